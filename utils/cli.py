"""Flags: dataclasses in, one line of error out.

`hp` gives a field its default, its sentence of help and, where the authors chose otherwise, the paper's value with
its source. `settings` makes a class of such fields a frozen dataclass that tyro turns into flags.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

ROOT = Path(__file__).resolve().parent.parent
_SAME = object()

T = TypeVar("T")


def hp(
    ours: Any,
    doc: str,
    *,
    paper: Any = _SAME,
    source: str = "",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A hyperparameter: our default, what it means, and the authors' value under `--paper` where it differs.

    `source` says where the authors' value stands. A value under `least`, over `most`, not above `above` or not below
    `below` is refused on the command line.
    """
    help_text = doc
    if paper is not _SAME:
        help_text += f" [--paper: {paper}{', ' + source if source else ''}]"
    elif source:
        help_text += f" [{source}]"
    limits = {"least": least, "most": most, "above": above, "below": below}
    return dataclasses.field(
        default=ours, metadata={"help": help_text, "paper": ours if paper is _SAME else paper, "limits": limits}
    )


def settings(cls: type[T]) -> type[T]:
    """Frozen, keyword-only dataclass whose `hp` sentences are the help of its flags."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if "help" in f.metadata:
            cls.__annotations__[f.name] = Annotated[hints[f.name], tyro.conf.arg(help=f.metadata["help"])]
            f.type = cls.__annotations__[f.name]
    return cls


def paper_values(cls: type[T]) -> T:
    """An instance of a `settings` class with every field at the authors' official value."""
    return cls(**{f.name: f.metadata.get("paper", f.default) for f in dataclasses.fields(cls)})


@settings
class Common:
    """Flags of both modes."""

    dataset: str = hp("photos", "photos (embedded), mnist, cifar10, cifar100, tiny_imagenet, imagenet or folder")
    base_datadir: Path = hp(ROOT / "datasets", "where data sets lie; for folder, the <class>/<image> tree itself")
    image_size: int | None = hp(None, "side in pixels; default: the data set's own")
    normalize: Literal["none", "dataset", "half"] = hp(
        "none", "what the model is fed: pixels in [0, 1], the data set's mean and std, or mean 0.5 and std 0.5"
    )
    model: str = hp("lenet", "lenet, lenet5, cnn, convnet64, resnet20, resnet18, resnet34, vgg16, mlp or fc2")
    activation: str | None = hp(None, "relu, sigmoid, tanh, ...; default: the model's own")
    norm: Literal["none", "batch", "group"] | None = hp(None, "normalisation layers; default: the model's own")
    dropout: float | None = hp(None, "dropout probability; default: the model's own", least=0, below=1)
    width: int | None = hp(None, "units of a hidden layer (mlp, fc2); default: the model's own", least=1)
    model_mode: Literal["eval", "train"] = hp("eval", "mode in which clients compute: BatchNorm statistics, dropout")
    weights: Path | None = hp(None, "start from these weights: safetensors, or a torch state dict")
    defense: str = hp("none", "what clients do to an update before it leaves: clip=NORM, gauss=SIGMA, or A=X+B=Y")
    pretrain_epochs: int = hp(0, "first train the model on public data for so many epochs", least=0)
    trials: int = hp(10, "attacked updates", least=1)
    seed: int = hp(0, "of victims and model; the attack's own stream is (seed, trial)", least=0)
    device: str = hp("auto", "auto, cpu, cuda or cuda:N")
    jobs: int = hp(0, "trials attacked at once; 0: as many as cores (one on a GPU)", least=0)
    backend: Literal["local", "ray"] = hp("local", "who runs them: worker processes, or Ray (a cluster if RAY_ADDRESS)")
    threads: int = hp(0, "CPU threads of each trial; 0: one, or all for one trial of a large net", least=0, below=1025)
    out: Path = hp(ROOT / "results", "where results go")
    grant: Literal["none", "labels"] = hp("none", "hand the attack an oracle fact; every row then says so")
    paper: bool = hp(False, "the authors' official hyperparameters instead of ours")
    force: bool = hp(False, "run again even if this very run is finished")
    sweep: tuple[str, ...] = hp((), "FLAG=V1,V2,... [FLAG=...]: one run for each combination, then one table")


@settings
class Grad(Common):
    """Flags of the pure-gradient mode."""

    batch_size: int = hp(1, "images behind the one gradient on the wire", least=1)


@settings
class Fed(Common):
    """Flags of the federated mode."""

    client_images: int | None = hp(1, "images each client holds; 0: the whole split is shared out", least=0)
    batch_size: int | None = hp(None, "a client's minibatch; default: all its images at once", least=1)
    local_epochs: int = hp(1, "passes over its images a client makes in a round", least=1)
    local_lr: float = hp(0.01, "learning rate of the clients", above=0)
    lr_decay: float = hp(1.0, "factor on the learning rate from one round to the next", above=0)
    lr_schedule: Literal["constant", "cosine", "step"] = hp(
        "constant", "of that rate within a round: constant, half a cosine, or x 0.1 at 1/2 and 3/4 of the local steps"
    )
    client_optimizer: Literal["sgd", "adam"] = hp("sgd", "what clients train with")
    momentum: float = hp(0.0, "of the clients' SGD", least=0, below=1)
    weight_decay: float = hp(0.0, "of the clients' SGD or Adam", least=0)
    clients: int = hp(10, "clients in the federation", least=1)
    clients_per_round: int | None = hp(None, "clients that take part in a round; default: all", least=1)
    rounds: int | None = hp(None, "rounds of FedAvg; default: one for each trial", least=1)
    partition: Literal["iid", "dirichlet", "classes"] = hp("iid", "how private images are dealt to clients")
    beta: float | None = hp(None, "concentration of --partition dirichlet; default 0.5", above=0)
    classes_per_client: int | None = hp(None, "of --partition classes; default 2", least=1)


@dataclasses.dataclass(frozen=True)
class Command:
    """One run, fully specified: an attack with its hyperparameters, and the settings of the mode."""

    attack_name: str
    attack: Any
    run: Any
    swept: tuple[tuple[str, str], ...] = ()


def parse(argv: list[str], run_cls: type, attacks: dict[str, type], program: str) -> list[Command]:
    """Command line -> the runs it asks for: one, or one for each point of a sweep, all checked before the first starts.

    A mistake prints one line on standard error and exits with code 2.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(run_cls, attacks, program))
        raise SystemExit(0 if argv else 2)
    name, *flags = argv
    name = name.replace("-", "_")
    if name not in attacks:
        fail(f"unknown attack {argv[0]!r}{_suggest(name, attacks)}; there are {', '.join(sorted(attacks))}")
    first = _parse_one(name, flags, run_cls, attacks[name], program)
    if sum(word == "--sweep" or word.startswith("--sweep=") for word in flags) != bool(first.run.sweep):
        fail("--sweep is given once, followed by FLAG=V1,V2,... [FLAG=...]")
    points = _sweep_points(first.run.sweep)
    if points == [()]:
        return [first]
    flags = _without_sweep(flags)
    return [
        dataclasses.replace(
            _parse_one(name, flags + [_as_flag(k, v) for k, v in point], run_cls, attacks[name], program),
            swept=point,
        )
        for point in points
    ]


def fail(message: str) -> None:
    """One line on standard error, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _parse_one(name: str, flags: list[str], run_cls: type, attack_cls: type, program: str) -> Command:
    clash = {f.name for f in dataclasses.fields(run_cls)} & {f.name for f in dataclasses.fields(attack_cls)}
    assert not clash, f"{name} has fields named like flags of the run: {clash}"
    command = dataclasses.make_dataclass(
        name,
        [
            ("attack", tyro.conf.OmitArgPrefixes[attack_cls]),  # type: ignore[valid-type]
            ("run", tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[run_cls]]),  # type: ignore[valid-type]
        ],
    )
    values = paper_values(attack_cls) if "--paper" in flags else attack_cls()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            parsed = tyro.cli(
                command,
                args=flags,
                default=command(attack=values, run=run_cls()),
                prog=f"{program} {name}",
                description=attack_cls.__doc__,
            )
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue(), end="")
            raise
        fail(_one_line(err.getvalue()))
    for part in (parsed.attack, parsed.run):
        check_limits(part)
    return Command(name, parsed.attack, parsed.run)


def check_limits(part: Any) -> None:
    """Every number within the limits its `hp` states."""
    for f in dataclasses.fields(part):
        value, limits = getattr(part, f.name), f.metadata.get("limits", {})
        if value is None or not limits:
            continue
        flag = "--" + f.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag} must be a finite number, not {value:g}")
        for name, broken, words in (
            ("least", lambda v, bound: not v >= bound, "at least"),
            ("most", lambda v, bound: not v <= bound, "at most"),
            ("above", lambda v, bound: not v > bound, "above"),
            ("below", lambda v, bound: not v < bound, "below"),
        ):
            if limits[name] is not None and broken(value, limits[name]):
                fail(f"{flag} must be {words} {limits[name]:g}, not {value:g}")


def _one_line(box: str) -> str:
    """tyro's framed message -> its sentence (and the closest flag, if tyro names one)."""
    blocks = [" ".join(re.sub(r"[─╭╮╰╯│]", " ", b).split()) for b in re.split(r"\n[ │├]*[-─]{5,}[ │┤]*\n", box)]
    message = blocks[1] if len(blocks) > 1 else blocks[0]
    closest = re.search(r"Perhaps you meant:\s*(--[\w-]+)", " ".join(blocks))
    return message + (f" (did you mean {closest[1]}?)" if closest else "") + "; --help lists all flags"


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _sweep_points(sweep: tuple[str, ...]) -> list[tuple[tuple[str, str], ...]]:
    """("lr=1,2", "seed=0,1") -> every combination as (flag, value) pairs, in order; [()] when nothing is swept."""
    points: list[tuple[tuple[str, str], ...]] = [()]
    for axis in sweep:
        flag, equals, values = axis.partition("=")
        flag = flag.lstrip("-").replace("_", "-")
        if not equals or not flag or not all(values.split(",")):
            fail(f"--sweep takes FLAG=V1,V2,..., not {axis!r}")
        if flag in ("sweep", "out", "jobs", "force"):
            fail(f"--sweep cannot take {flag}: it changes no number")
        if flag in (key for key, _ in points[0]):
            fail(f"--sweep names {flag} twice: give all its values at once")
        points = [(*point, (flag, value)) for point in points for value in values.split(",")]
    return points


def _as_flag(flag: str, value: str) -> str:
    """A point's flag: switches are swept by true and false."""
    if value.lower() in ("true", "false"):
        return f"--{flag}" if value.lower() == "true" else f"--no-{flag}"
    return f"--{flag}={value}"


def _without_sweep(flags: list[str]) -> list[str]:
    """The flags without --sweep and the FLAG=... words that follow it."""
    kept, inside = [], False
    for word in flags:
        inside = word == "--sweep" or (inside and not word.startswith("-"))
        if not inside and not word.startswith("--sweep="):
            kept.append(word)
    return kept


def _overview(run_cls: type, attacks: dict[str, type], program: str) -> str:
    width = max(map(len, attacks))
    lines = [
        f"usage: {program} ATTACK [flags]",
        "",
        f"{run_cls.__doc__.splitlines()[0].replace('Flags of', 'Attacks in')}",
        *(f"  {name:<{width}}  {cls.paper}" for name, cls in sorted(attacks.items())),
        "",
        f"`{program} ATTACK --help` also lists the attack's own hyperparameters. Flags of every attack:",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(tyro.conf.FlagCreatePairsOff[run_cls], args=["--help"], prog=program)  # type: ignore[valid-type]
    _, options, flags = out.getvalue().partition(" options")
    return "\n".join(lines) + "\n\n" + options + flags
