"""Finished runs as the page needs them: read from their folders, not trusted, and computed no further than counting."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.verdict import outcome
from utils.files import is_sealed, read_json, read_json_lines

Record = Mapping[str, Any]

# settings that make no other experiment: the page does not draw a score over them
NOT_VARIED = frozenset({"seed", "trials", "threads", "thresholds", "victims"})
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")


@dataclass(frozen=True, eq=False)  # a run is equal to itself alone
class Run:
    """One finished run: the objects in its files.

    number: position on the page, from 1. rounds: empty outside of the federated mode.
    """

    folder: Path
    number: int
    config: Record
    summary: Record
    rows: Sequence[Record]
    trials: Sequence[Record]
    rounds: Sequence[Record]

    @property
    def name(self) -> str:
        """attack/hash: unique among the runs of a results folder, and short."""
        return f"{self.attack}/{self.folder.name}"

    @property
    def attack(self) -> str:
        return str(self.summary["attack"])

    @property
    def mode(self) -> str:
        return str(self.summary.get("mode", "-"))

    @property
    def dataset(self) -> str:
        return str(self.summary.get("dataset", "-"))

    @property
    def model(self) -> str:
        return str(self.summary.get("model", "-"))

    @property
    def defense(self) -> str:
        return str(self.config["flags"].get("defense", "none"))

    @property
    def verdict(self) -> str:
        """What the run showed, in the words of docs/metrics.md; "not scored" if there is nothing to compare with."""
        return str(self.summary.get("verdict") or outcome(self.summary) or "not scored")

    @property
    def is_audit(self) -> bool:
        return bool(self.config.get("audit"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen for the run, by name as it is typed, without the place and pace of computing."""
        flags, own = self.config["flags"], self.config["hyperparameters"]
        chosen = {"attack": self.attack, "mode": self.mode, **flags, **own}
        found = {name.replace("_", "-"): _plain(value) for name, value in chosen.items() if name not in NOT_VARIED}
        steps = self.local_steps
        return found if steps is None else {**found, "local steps": steps}

    @property
    def local_steps(self) -> int | None:
        """Steps of a client in a round; None for a gradient, and where clients have different numbers of images."""
        flags = self.config["flags"]
        images, epochs = flags.get("client_images"), flags.get("local_epochs")
        if self.mode != "fed" or not images or not epochs:
            return None
        return int(epochs) * math.ceil(images / (flags.get("batch_size") or images))

    @property
    def leakage(self) -> tuple[float, ...]:
        """Sorts runs by how much they leak: verdict, recovered share, gain over the null, PSNR."""
        s = self.summary
        gain, psnr = s.get("over_null") or s.get("over_class_mean"), s.get("psnr")
        order = ("leaks", "too few updates to tell", "no leak found by this attack")
        rank = order.index(self.verdict) if self.verdict in order else len(order)
        below = -math.inf
        scores = (s.get("success_rate") or 0.0, gain["mean"] if gain else below, psnr["mean"] if psnr else below)
        return (-float(rank), *map(float, scores))


def load_runs(paths: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in these folders, and the folders that hold an unfinished or damaged one.

    A folder that is no run itself stands for all runs below it.
    """
    runs: list[Run] = []
    left_out = []
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        run = _load(folder, len(runs) + 1)
        if run is None:
            left_out.append(folder)
        else:
            runs.append(run)
    return runs, left_out


def strengths(defense: str) -> list[tuple[str, float]]:
    """(name with a gap, number) for each number of a defence: gauss(sigma=0.1) -> [("gauss(sigma=…)", 0.1)]."""
    return [
        (f"{defense[: found.start()]}…{defense[found.end() :]}", float(found[0])) for found in NUMBER.finditer(defense)
    ]


def differing(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[str]:
    """The settings, among `names` or all, that all these runs have and whose values differ."""
    shared = [name for name in runs[0].settings if all(name in run.settings for run in runs)] if runs else []
    chosen = shared if names is None else [name for name in shared if name in names]
    return [name for name in chosen if len({str(run.settings[name]) for run in runs}) > 1]


def _load(folder: Path, number: int) -> Run | None:
    seal = folder / "done"
    if not seal.is_file() or (seal.stat().st_size and not is_sealed(folder, "done")):  # earlier versions left it empty
        return None
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    psnr = summary.get("psnr")
    whole = (
        isinstance(config.get("flags"), dict)
        and isinstance(config.get("hyperparameters"), dict)
        and isinstance(summary.get("attack"), str)
        and isinstance(summary.get("images"), int)
        and (psnr is None or (isinstance(psnr, dict) and {"mean", "std", "median"} <= psnr.keys()))
    )
    if not whole:
        return None
    rows, trials = read_json_lines(folder / "rows.jsonl"), read_json_lines(folder / "trials.jsonl")
    return Run(folder, number, config, summary, rows, trials, read_json_lines(folder / "rounds.jsonl"))


def _folders(path: Path) -> list[Path]:
    if (path / "config.json").exists() or not path.is_dir():
        return [path]
    return sorted(config.parent for config in path.rglob("config.json"))


def _plain(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
