"""Abuses the commands in a thousand ways and counts how they end: in results, in one line, or in something worse."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from experiments.abuses import flags, fuzz, inputs, runs
from experiments.abuses.harness import Case, run_all
from report.tables import table
from runner.cli import run_script

GROUPS = {
    "a": "flags and sweeps",
    "b": "data folders",
    "c": "weights, CIFAR batches",
    "d": "folders of results",
    "e": "trained generators",
    "f": "federated training",
    "g": "report",
    "h": "environment",
}


@hyperparameters
class Flags:
    group: tuple[str, ...] = hp(
        tuple(GROUPS), "groups of abuses: " + ", ".join(f"{k} ({v})" for k, v in GROUPS.items())
    )
    fuzz: int = hp(0, "number of randomly damaged folders of results, instead of the groups", ge=0)
    seed: int = hp(0, "random seed of the damage", ge=0)
    jobs: int = hp(2, "commands at the same time", ge=1)
    only: str = hp("", "part of the names of the abuses that are tried; default: all are")


def main(flags: Flags) -> None:
    if unknown := set(flags.group) - set(GROUPS):
        raise UsageError(f"`group`: unknown {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    started = time.monotonic()
    tried, hard, soft = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="abuse-") as scratch:
        for outcome in run_all(_cases(flags, Path(scratch)), Path(scratch), flags.jobs):
            group = outcome.case.group
            tried[group] += 1
            hard[group] += bool(outcome.hard)
            soft[group] += bool(outcome.soft)
            if outcome.hard or outcome.soft:
                kind = "HARD" if outcome.hard else "soft"
                print(f"{kind} {group} {outcome.case.name!r}: {outcome.hard or outcome.soft}", flush=True)
    rows = [[f"{g} {GROUPS[g]}", str(tried[g]), str(hard[g]), str(soft[g])] for g in GROUPS if tried[g]]
    rows.append(["all", *(str(counter.total()) for counter in (tried, hard, soft))])
    print(table(["group", "tried", "hard", "soft"], rows))
    print(f"{time.monotonic() - started:.0f} s")
    if hard.total():
        raise SystemExit(1)


def _cases(flags_: Flags, scratch: Path) -> Iterator[Case]:
    prepared = runs.Prepared(scratch / "prepared")
    vae = ("ggl", *inputs.BASE[1:], "--iterations", "3", "--restarts", "1", "--comparison-iterations", "0")
    vae += ("--latent-dim", "4", "--generator", "vae", "--generator-steps", "2")
    runs.run_here("grad", vae, scratch / "first", {"CHECKPOINTS": str(scratch / "own")})
    if flags_.fuzz:
        yield from fuzz.cases(prepared, flags_.fuzz, flags_.seed)
        return
    groups = {
        "a": flags.flags(),
        "b": inputs.images(),
        "c": inputs.weights(),
        "d": runs.folders(prepared),
        "e": inputs.generators(),
        "f": flags.federated(),
        "g": runs.reports(prepared),
        "h": runs.environments(prepared),
    }
    for name in flags_.group:
        yield from (case for case in groups[name] if flags_.only in case.name)


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
