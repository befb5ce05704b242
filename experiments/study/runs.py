"""The runs of the study: what is attacked, by what, and how it is measured.

Every cell is an ordinary run of main_grad.py or main_fed.py, with its folder and its command. `grid`: attacks x
observations x states of the network x networks x data sets. Every other table varies one setting of one attack.
`utility`: federations that train with and without Robbing the Fed's block.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from attacks.base import ATTACKS, Attack
from core.errors import UsageError
from evaluation.summary import is_recovered, unit_of
from runner import cli
from runner.experiment import Experiment
from runner.flags import Fed, Grad
from runner.run import execute
from runner.sources import federated_source, gradient_source
from utils.files import read_json_lines

SIDE = 16  # pixels: with 32, one update of an unrolled attack takes minutes
STEPS = (1, 5, 20)  # local steps of FedAvg
OBSERVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> mode, flags
    "one gradient": ("grad", ("--batch-size", "1")),
    "batch of 8": ("grad", ("--batch-size", "8")),
    "sum of 4 clients": ("grad", ("--aggregate", "4")),
    **{
        f"FedAvg, T = {steps}": ("fed", ("--client-images", "4", "--local-lr", "0.05", "--local-epochs", str(steps)))
        for steps in STEPS
    },
}
STATES: dict[str, tuple[str, ...]] = {"new": (), "trained": ("--pretrain-epochs", "5")}
NETWORKS = ("lenet", "cnn", "fc2")  # sigmoid; ReLU and convolutions; ReLU and a fully connected first layer
OWN_NETWORK = {"april": "vit_plain"}  # where the attack's example_model is not the one its scripts attack
OWN_DATA = {"discrete": "text", "tabular": "photostats"}  # of attacks that reconstruct no images

# name -> attack, mode, common flags, setting -> flags
SETTINGS: dict[str, tuple[str, str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "mode": (
        *("dlg", "grad", ("--model", "lenet", "--norm", "batch")),
        {mode: ("--model-mode", mode) for mode in ("eval", "train")},
    ),
    "dropout": (
        *("dlg", "grad", ("--model", "lenet", "--model-mode", "train")),
        {share: ("--dropout", share) for share in ("0", "0.1", "0.5")},
    ),
    "normalisation layers": (
        *("dlg", "grad", ("--model", "lenet")),
        {norm: ("--norm", norm) for norm in ("none", "batch", "group")},
    ),
    "input normalisation": (
        *("dlg", "grad", ("--model", "lenet")),
        {how: ("--normalize", how) for how in ("none", "dataset", "half")},
    ),
    "pretraining": (
        *("dlg", "grad", ("--model", "lenet")),
        {f"{epochs} epochs": ("--pretrain-epochs", str(epochs)) for epochs in (0, 1, 5, 20)},
    ),
    "activation": (
        *("dlg", "grad", ("--model", "lenet")),
        {name: ("--activation", name) for name in ("sigmoid", "tanh", "relu")},
    ),
    "public data": (
        *("ggl", "grad", ("--model", "cnn", "--comparison-iterations", "0")),
        {kind: ("--public", kind) for kind in ("same", "other", "noise")},
    ),
    "public data for labels": (
        *("ig_single", "grad", ("--model", "lenet", "--batch-size", "4")),
        {kind: ("--public", kind) for kind in ("same", "other", "noise", "none")},
    ),
    "beliefs": (
        *("sme", "fed", ("--model", "lenet", *OBSERVATIONS["FedAvg, T = 5"][1])),
        {
            "right": (),
            "rate / 10": ("--believe", "local-lr=0.005"),
            "rate x 10": ("--believe", "local-lr=0.5"),
            "1 epoch instead of 5": ("--believe", "local-epochs=1"),
            "5 images instead of 4": ("--believe", "client-images=5"),
        },
    ),
}
UTILITY = {"no block": ("baseline",), "block, ours": ("rtf",), "block, published": ("rtf", "--paper")}
TRAINING = (
    "--model",
    "lenet",
    "--clients",
    "4",
    "--client-images",
    "64",
    "--batch-size",
    "8",
    "--local-lr",
    "0.1",
    "--eval-every",
    "1",
)
LAST_ROUNDS = 5  # over which the accuracy of a federation is averaged

# --quick leaves these out: each is close to another one of the study, and they are slow
SLOW = ("dlf", "gias", "idlg", "ig_weight")
QUICK: dict[str, tuple[str, ...]] = {  # besides fewer iterations
    "fgla": ("--steps", "200"),
    "ggl": ("--comparison-iterations", "0"),
    "lti": ("--simulations", "400", "--epochs", "15", "--features", "1024", "--units", "256"),
    "suppress": ("--inner-iterations", "80"),
    "fishing": ("--inner-iterations", "80"),
}
QUICK_SKIPS = {"ggl": ("FedAvg, T = 5", "FedAvg, T = 20")}  # a minute for each of these cells
# attacks that differentiate through the local steps, each of which costs as much as the first
UNROLLED = ("dlf", "dlg", "ggl", "gias", "idlg", "ig_multi", "ig_weight")
# iterations of --quick, of --quick if unrolled, and of the full study if unrolled through the most steps
QUICK_ITERATIONS, QUICK_UNROLLED, FULL_UNROLLED = 80, 30, 100
ONLY = {"april": ("one gradient",)}  # elsewhere it is gradient matching, at minutes for an update of its transformer

SOURCES = {"grad": (Grad, gradient_source), "fed": (Fed, federated_source)}
SCORES = ("recovered", "identified", "rebuilt")  # shares of a unit's images


@dataclass(frozen=True)
class Cell:
    """One run. facts: what claims select it by. words: of its command line, without the mode."""

    mode: str
    facts: Mapping[str, str]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The size of a study. victims: attacked updates of a cell. seeds: networks of the utility table."""

    datasets: tuple[str, ...]
    attacks: tuple[str, ...]
    victims: int
    seeds: int
    rounds: int
    quick: bool
    common: tuple[str, ...]


def attack_names(quick: bool) -> tuple[str, ...]:
    return tuple(name for name in ATTACKS if not (quick and name in SLOW))


def cells(plan: Plan) -> list[Cell]:
    """All runs, those that take longest first."""
    found = [*_grid(plan), *_sensitivity(plan), *_utility(plan)]
    return sorted(found, key=lambda cell: _cost(cell.facts), reverse=True)


def _cost(facts: Mapping[str, str]) -> int:
    steps = next((n for n in STEPS if facts["observation"] == f"FedAvg, T = {n}"), 1)
    return steps * (10 if facts["attack"] in UNROLLED else 1)


def _grid(plan: Plan) -> Iterator[Cell]:
    for name in plan.attacks:
        cls = ATTACKS[name]
        images = "continuous" in cls.kinds
        sets = plan.datasets if images else (OWN_DATA["discrete" if "discrete" in cls.kinds else "tabular"],)
        networks = _networks(cls)
        for dataset in sets:
            for state, training in STATES.items():
                # trained networks: the first one alone; --quick: new ones as well, and one gradient of trained ones
                chosen = networks[:1] if plan.quick or state == "trained" else networks
                for observation, (mode, flags) in OBSERVATIONS.items():
                    if plan.quick and state == "trained" and observation != "one gradient":
                        continue
                    if observation not in ONLY.get(name, OBSERVATIONS):
                        continue
                    if plan.quick and observation in QUICK_SKIPS.get(name, ()):
                        continue
                    for network in chosen:
                        words = (name, "--dataset", dataset, "--model", network, *flags, *training)
                        words += _victims(plan, mode) + _effort(plan, cls, observation)
                        words += ("--image-size", str(SIDE)) if images else ()
                        facts = _facts("grid", name, network, dataset, observation, state)
                        yield Cell(mode, facts, words + plan.common)


def _networks(cls: type[Attack]) -> tuple[str, ...]:
    """Those of NETWORKS to which an attack may apply, the one it was made for first; else that one alone."""
    own = OWN_NETWORK.get(cls.name, cls.example_model)
    if own not in NETWORKS:
        return (own,)
    pixel = "pixel_layer" in cls.requires  # its input is the image itself
    return (own,) if pixel else (own, *(network for network in NETWORKS if network != own))


def _sensitivity(plan: Plan) -> Iterator[Cell]:
    for table, (name, mode, flags, settings) in SETTINGS.items():
        if name not in plan.attacks:
            continue
        for dataset in plan.datasets:
            for setting, own in settings.items():
                words = (name, "--dataset", dataset, "--image-size", str(SIDE), *flags, *own)
                observation = "FedAvg, T = 5" if mode == "fed" else "gradient"
                words += _victims(plan, mode) + _effort(plan, ATTACKS[name], observation, flags)
                network = flags[flags.index("--model") + 1]
                facts = _facts(table, name, network, dataset, observation, "new", setting)
                yield Cell(mode, facts, words + plan.common)


def _utility(plan: Plan) -> Iterator[Cell]:
    if "rtf" not in plan.attacks:
        return
    for dataset in plan.datasets:
        for setting, words in UTILITY.items():
            for seed in range(plan.seeds):
                federation = (*TRAINING, "--rounds", str(plan.rounds), "--trials", "1")
                own = ("--dataset", dataset, "--image-size", str(SIDE), "--seed", str(seed))
                facts = _facts("utility", words[0], "lenet", dataset, "training", "new", setting)
                yield Cell("fed", facts, (*words, *own, *federation, *plan.common))


def _facts(
    table: str, attack: str, network: str, dataset: str, observation: str, state: str, setting: str = ""
) -> dict[str, str]:
    return {
        "table": table,
        "attack": attack,
        "network": network,
        "dataset": dataset,
        "observation": observation,
        "state": state,
        "setting": setting,
    }


def _victims(plan: Plan, mode: str) -> tuple[str, ...]:
    federation = ("--clients", str(plan.victims), "--rounds", "1") if mode == "fed" else ()
    return ("--trials", str(plan.victims), *federation)


def _effort(plan: Plan, cls: type[Attack], observation: str, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Fewer iterations and one run, for attacks that have these flags."""
    unrolled = cls.name in UNROLLED and observation.startswith("FedAvg")
    if plan.quick:
        most = QUICK_UNROLLED if unrolled else QUICK_ITERATIONS
    elif unrolled and observation == f"FedAvg, T = {STEPS[-1]}":
        most = FULL_UNROLLED
    else:
        return ()
    limits = {"iterations": most, "feature_iterations": most, "weight_iterations": most, "restarts": 1}
    fields = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    words = [
        word
        for name, limit in limits.items()
        if name in fields and fields[name] > limit
        for word in (f"--{name.replace('_', '-')}", str(limit))
    ]
    own = QUICK.get(cls.name, ()) if plan.quick else ()
    return (*words, *(() if own and own[0] in given else own))


def measure(cell: Cell) -> dict[str, Any]:
    """The facts of a cell, its command, its summary and the scores of its units; or `refused` and the reason."""
    flags_cls, source = SOURCES[cell.mode]
    try:
        (command,) = cli.parse(list(cell.words), flags_cls, ATTACKS, "study")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            experiment = Experiment(cell.mode, command, source)
            folder = experiment.folder
            summary = execute(experiment)
    except UsageError as error:
        return {**cell.facts, "refused": str(error)}
    found = {"command": cli.command_line(cell.mode, command), "folder": str(folder), "summary": summary}
    if cell.facts["table"] == "utility":
        rounds = [line["accuracy"] for line in read_json_lines(folder / "rounds.jsonl")]
        score = {"n": 1, "accuracy": statistics.fmean(rounds[-LAST_ROUNDS:])}
        return {**cell.facts, **found, "units": {f"seed {command.flags.seed}": score}}
    return {**cell.facts, **found, "units": units_of(read_json_lines(folder / "rows.jsonl"))}


def units_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each independent unit: n images, how many count for each of SCORES, and the sums of PSNR and gain.

    A rebuilt image is recovered (20 dB) and identified: nearer to its own reconstruction than every image of its class
    that nobody sent. Examples without a PSNR have no such scores.
    """
    units: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows):
        unit = units.setdefault(str(unit_of(row, number)), {"n": 0})
        unit["n"] += 1
        scores: dict[str, float] = {}
        if row.get("psnr") is not None:
            recovered = is_recovered(row)
            scores = {"recovered": recovered, "psnr": row["psnr"]}
            if row.get("null_psnr") is not None:
                scores["gain"] = row["psnr"] - row["null_psnr"]
            if row.get("identified") is not None:
                scores |= {"identified": bool(row["identified"]), "rebuilt": recovered and bool(row["identified"])}
        for name, value in scores.items():
            unit[name] = unit.get(name, 0) + value
    return units


def run_all(found: Sequence[Cell], jobs: int) -> list[dict[str, Any]]:
    """All measurements, in the order of the cells; `jobs` runs at the same time, in this process if it is one."""
    if jobs == 1:
        return _counted(map(measure, found), len(found))
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    finished = False
    try:
        measured = _counted(pool.map(measure, found), len(found))
        finished = True
    finally:
        if not finished:  # what has been done is on the disk
            for worker in multiprocessing.active_children():
                worker.kill()
        pool.shutdown(wait=finished, cancel_futures=True)
    return measured


def _counted(results: Iterable[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    measured = []
    for result in results:
        measured.append(result)
        print(f"\r{len(measured)}/{total} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return measured


def common_flags(base_datadir: Path, out: Path, backend: str) -> tuple[str, ...]:
    """Flags of every run."""
    jobs = ("--backend", backend) if backend == "ray" else ("--jobs", "1")
    words = ("--victims", "reporting", "--threads", "1", "--base-datadir", str(base_datadir), "--out", str(out))
    return words + jobs
