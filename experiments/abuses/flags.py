"""Groups a and f: values of flags that no run can be made of, and some that are merely odd."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from attacks.base import ATTACKS
from experiments.abuses.harness import Case
from runner.flags import Common, Fed, Grad

SMALL = ("--trials", "2", "--image-size", "16", "--jobs", "1", "--out", "@/out")
INTEGERS = ("0", "-1", "1e3", "", "99999999999999999999")
FLOATS = ("nan", "inf", "-1", "1e300", "1e-320", "x")
# counts of things that are done one after the other: a huge one is an answer that takes long
LONG = {"iterations", "restarts", "trials", "rounds", "pretrain_epochs", "seed", "jobs", "evaluations", "patience"}
FEW = {"restarts": "1", "weight_iterations": "2", "comparison_iterations": "0"}  # of attacks without small values


def flags() -> Iterator[Case]:
    """Group a: every flag of the gradient mode, and every hyperparameter of every attack."""
    for field, values in _hostile(Grad):
        for value in values:
            yield _case("a", "grad", "baseline", field, value)
    for name, attack in ATTACKS.items():
        for field, values in _hostile(attack):
            for value in values[:: 1 if name in ("dlg", "rtf") else 3]:
                yield _case("a", "grad", name, field, value)
    sweeps = ("help=true,false", "paper=true,false", "h=1", "seed=", "=1", "seed", "seed=0,0,x", "out=a,b", "seed=0,")
    sweeps += ("sweep=1", "attack=", "attack=dlg,", "trials=1,-1", "lr=1,nan", "dataset=photos,photoz", "--seed=0,1")
    for sweep in sweeps:
        yield Case("a", f"sweep {sweep}", ("baseline", *SMALL, "--sweep", sweep))
    words = ((), ("",), ("--",), ("-h",), ("--help",), ("dlg", "-x"), ("dlg", "a", "b"), ("dlg", "--"), ("../dlg",))
    words += (("dlg\x1b[31m",), ("dlg", "--dataset", "\x1b[31mred"), ("base",), ("dlg", "--trial", "3"), ("é",))
    words += (("dlg", "--defense", "clip"), ("dlg", "--defense", "clip(bound=nan)"), ("dlg", "--defense", "x=1"))
    words += (("dlg", "--defense", "gauss=1e300"), ("dlg", "--defense", "clip(bound=1e-320)"), ("__init__",))
    words += (("dlg", "--defense", "clip(" * 500), ("dlg", "--believe", "local-lr=inf"), ("dlg", "--believe", "x"))
    words += (
        ("dlg", "--believe", "local-epochs=1000000000000"),
        ("dlg", "--believe", "batch-size=99999999999999999999"),
    )
    for line in words:
        yield Case("a", f"words {line!r}"[:60], (*line, *SMALL) if line[1:] else line)


def federated() -> Iterator[Case]:
    """Group f: every flag of the federated mode, and training that diverges under every attack."""
    shared = {field.name for field in dataclasses.fields(Common)}
    for field, values in _hostile(Fed):
        if field not in shared:
            for value in values:
                yield _case("f", "fed", "baseline", field, value)
    for name, attack in ATTACKS.items():
        model = ("--model", attack.example_model)
        tiny = (*_few(attack), *model, "--client-images", "4", "--batch-size", "2", "--local-epochs", "2", *SMALL)
        tiny += ("--clients", "2")
        diverging = [("1e6",), ("1e20",), ("1e30",), ("1e-30",), ("10", "--weight-decay", "1e30")]
        for rate in diverging:
            yield Case("f", f"{name} at rate {' '.join(rate)}", (name, *tiny, "--local-lr", *rate), "fed", codes=(0, 2))
    for rate, decay in (("1", "1e200"), ("1", "1e308"), ("1e-30", "1e-5"), ("1e20", "1e10"), ("1e-20", "1e20")):
        words = ("baseline", *SMALL, "--local-lr", rate, "--lr-decay", decay, "--rounds", "4")
        yield Case("f", f"rate {rate} decay {decay}", words, "fed")
    for extra in (
        ("--local-epochs", "1000000000000000000"),
        ("--local-epochs", "1000000000", "--client-images", "2", "--batch-size", "1"),
        ("--momentum", "0.999999999", "--local-lr", "1e30"),
        ("--client-optimizer", "adam", "--local-lr", "1e30"),
        ("--client-optimizer", "adam", "--weight-decay", "1e30"),
        ("--partition", "dirichlet", "--beta", "1e-300"),
        ("--partition", "dirichlet", "--beta", "1e30"),
        ("--partition", "classes", "--classes-per-client", "1000000000000"),
        ("--clients", "1000000000000000000"),
        ("--clients-per-round", "11"),
        ("--defense", "gauss=1e30"),
        ("--defense", "clip=1e-30+gauss=1e30"),
    ):
        yield Case("f", " ".join(extra), ("baseline", *SMALL, *extra), "fed")


def _hostile(cls: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint: Any = hints[field.name]
        options = [option for option in get_args(hint) if option is not type(None)]
        if get_origin(hint) is tuple:
            yield field.name, ("nan", "x", "")
        elif int in (hint, *options):
            values = INTEGERS[:-1] if field.name in LONG else INTEGERS
            # 0 is right there: a worker for each core, and a training of minutes
            yield field.name, values[1:] if field.name in ("jobs", "generator_steps") else values
        elif float in (hint, *options):
            yield field.name, FLOATS
        elif hint is bool:
            yield field.name, ("true", "=true") if field.name not in ("force", "paper") else ("=true",)
        else:
            yield field.name, ("nope", "", "/dev/null", "\x1b[31mred", "a" * 5000)


def _few(attack: type) -> tuple[str, ...]:
    """Small values of an attack's hyperparameters: those of its contract tests, and FEW."""
    fields = dataclasses.fields(attack)  # type: ignore[arg-type]
    values = {f.name: f.metadata["smoke"] for f in fields if f.metadata["smoke"] is not None}
    values |= {f.name: FEW[f.name] for f in fields if f.name in FEW}
    if getattr(attack, "generator", None) == "class_pca":
        values.pop("generator_steps", None)
    return tuple(w for k, v in values.items() for w in (f"--{k.replace('_', '-')}", str(v)))


def _case(group: str, page: str, name: str, field: str, value: str) -> Case:
    flag = f"--{field.replace('_', '-')}"
    words = [f"{flag}{value}"] if value.startswith("=") else [flag, value]
    small = [w for i, w in enumerate(SMALL) if flag not in (w, SMALL[i - 1])] if flag != "--out" else SMALL[:-2]
    attack = ATTACKS[name]
    few = _few(attack)
    given = [w for i, w in enumerate(few) if flag not in (w, few[i - 1])]
    model = [] if flag == "--model" else ["--model", attack.example_model]
    return Case(group, f"{name} {flag} {value[:20]!r}", (name, *small, *given, *model, *words), page)
