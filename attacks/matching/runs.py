"""Runs of one descent from several starts, and the reconstruction from the best of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attacks.optim.tracker import current_tracker
from core.protocol import Reconstruction


@dataclass(frozen=True)
class Run:
    """One descent, at the lowest objective it found."""

    examples: Tensor  # (M, *shape), valid in the domain; more than N if the attack optimises copies of the batch
    labels: Tensor  # (M,) int64
    loss: float  # of the attack's own objective, comparable between runs
    trace: tuple[float, ...]
    iterations: int
    failed: bool


def run_restarts(
    count: int, rng: torch.Generator, work: Callable[[int], Run], *, until_success: bool = False
) -> list[Run]:
    """`work(0)`, ..., `work(count - 1)`, each a segment of the current tracker.

    until_success: whether the first run that does not fail is the last one.
    """
    runs: list[Run] = []
    for number in range(count):
        runs.append(current_tracker().run_segment(Run, rng, partial(work, number)))
        if until_success and not runs[-1].failed:
            break
    return runs


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the lowest objective."""
    return min(runs, key=lambda run: run.loss)


def to_reconstruction(runs: Sequence[Run], examples: Tensor | None = None) -> Reconstruction:
    """The best run as a reconstruction; `examples` (N, *shape) replace its own if given.

    Iterations are those of all runs together. Status is "diverged" if the best run failed.
    """
    best = best_of(runs)
    examples = best.examples if examples is None else examples
    return Reconstruction(
        examples=examples,
        labels=best.labels[: len(examples)],
        trace=best.trace,
        iterations=sum(run.iterations for run in runs),
        restarts=len(runs) - 1,
        status="diverged" if best.failed else "ok",
    )
