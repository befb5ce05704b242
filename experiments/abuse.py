"""Abuses the commands in a thousand ways and counts how they end: in results, in one line, or in something worse."""

import gc
import itertools
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from core.errors import UsageError
from core.hyperparameters import hp, hyperparameters
from experiments.abuses import doors, flags, fuzz, inputs, kills, runs
from experiments.abuses.harness import Case, run_all
from report.tables import table
from runner.cli import run_script
from runner.experiment import commit

GROUPS = {
    "a": "flags and sweeps",
    "b": "data folders",
    "c": "weights, CIFAR batches",
    "d": "folders of results",
    "e": "trained generators",
    "f": "federated training",
    "g": "report",
    "h": "environment",
    "i": "audits, captures",
    "j": "texts, tables, sums, own networks",
}


@hyperparameters
class Flags:
    group: tuple[str, ...] = hp(
        tuple(GROUPS), "groups of abuses: " + ", ".join(f"{k} ({v})" for k, v in GROUPS.items())
    )
    fuzz: int = hp(0, "number of randomly damaged folders of results, instead of the groups", ge=0)
    kills: int = hp(0, "number of kills of real commands with two workers, instead of the groups", ge=0)
    seed: int = hp(0, "random seed of the damage and of the kills", ge=0)
    jobs: int = hp(2, "commands at the same time", ge=1)
    verbose: bool = hp(False, "one line for each abuse, with its time and its last line")
    part: str = hp("1/1", "K/N: every N-th abuse from the K-th on, for N machines or for little time at once")
    only: str = hp("", "part of the names of the abuses that are tried; default: all are")


def main(flags: Flags) -> None:
    if unknown := set(flags.group) - set(GROUPS):
        raise UsageError(f"`group`: unknown {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    first, _, step = flags.part.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise UsageError(f"`part` takes K/N with K from 1 to N, not {flags.part!r}")
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: a collection in a fork would copy it
    started = time.monotonic()
    tried, hard, soft = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="abuse-") as scratch:
        if flags.kills:
            _kill(flags, Path(scratch))
            return
        cases = itertools.islice(_cases(flags, Path(scratch)), int(first) - 1, None, int(step))
        for outcome in run_all(cases, Path(scratch), flags.jobs):
            group = outcome.case.group
            tried[group] += 1
            hard[group] += bool(outcome.hard)
            soft[group] += bool(outcome.soft)
            if flags.verbose:
                print(f"{outcome.seconds:.1f} s, {outcome.code}: {outcome.case.name!r}: {outcome.text}", flush=True)
            if outcome.hard or outcome.soft:
                kind = "HARD" if outcome.hard else "soft"
                print(f"{kind} {group} {outcome.case.name!r}: {outcome.hard or outcome.soft}", flush=True)
    rows = [[f"{g} {GROUPS[g]}", str(tried[g]), str(hard[g]), str(soft[g])] for g in GROUPS if tried[g]]
    rows.append(["all", *(str(counter.total()) for counter in (tried, hard, soft))])
    print(table(["group", "tried", "hard", "soft"], rows))
    processor = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{time.monotonic() - started:.0f} s, {processor:.0f} s of processor time, commit {commit()}")
    if hard.total():
        raise SystemExit(1)


def _kill(flags: Flags, scratch: Path) -> None:
    wrong = 0
    for what, error in kills.kill(flags.kills, flags.seed, scratch):
        wrong += bool(error)
        if error or flags.verbose:
            print(f"{what}: {error or 'as it should'}", flush=True)
    print(f"{flags.kills} kills, {wrong} wrong, commit {commit()}")
    if wrong:
        raise SystemExit(1)


def _cases(flags_: Flags, scratch: Path) -> Iterator[Case]:
    runs.warm(scratch / "warm")
    groups: dict[str, Callable[[], Iterator[Case]]] = {
        "a": flags.flags,
        "b": inputs.images,
        "c": inputs.weights,
        "d": lambda: _both(runs.Prepared(scratch / "d"), runs.folders, doors.unwritable),
        "e": lambda: inputs.generators(scratch / "own"),
        "f": flags.federated,
        "g": lambda: _both(runs.Prepared(scratch / "g"), runs.reports, doors.pages),
        "h": lambda: runs.environments(runs.Prepared(scratch / "h")),
        "i": doors.audits,
        "j": doors.others,
    }
    if flags_.fuzz:
        yield from fuzz.cases(runs.Prepared(scratch / "fuzz"), flags_.fuzz, flags_.seed)
        return
    for name in flags_.group:
        yield from (case for case in groups[name]() if flags_.only in case.name)


def _both(prepared: runs.Prepared, *groups: Callable[[runs.Prepared], Iterator[Case]]) -> Iterator[Case]:
    for group in groups:
        yield from group(prepared)


if __name__ == "__main__":
    run_script(Flags, main, __doc__)
