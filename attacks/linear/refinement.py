"""From unmixed sources to the layer's inputs: by the zeros that ReLU leaves in d_i, or by consistency.

Inputs are consistent if the output gradients d(x, y) that the model computes for them satisfy

    dL/dW = (1/n) sum_i d_i x_i^T
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.linear.column_space import economy_svd
from attacks.linear.ica import View
from attacks.linear.layer import LinearProblem, match_class_gradients, scale_from_head
from attacks.linear.selection import EXACT, assign_labels, solve_by_zeros
from attacks.optim.tracker import current_tracker

LABEL_ROUNDS = 3  # first rounds, in which labels may change
REWEIGHTINGS = 5
MAX_UNEXPLAINED = 0.4  # share of the gradient beyond which a round counts as failed


class Refined(NamedTuple):
    """Inputs of a layer with sign, scale and label."""

    inputs: Tensor  # (r, d)
    labels: Tensor  # (r,)
    unexplained: float  # share of the gradient; 1 if every round failed


def refine_by_consistency(problem: LinearProblem, sources: Tensor, rounds: int) -> Refined:
    """The most consistent of `rounds` refinements of unmixed sources (r, d).

    Sources take sign, scale and label from the head. Then follow rounds of d = d(x, y) and
    x = argmin |dL/dW - (1/n) d^T x|. A neuron whose activation is guessed wrong spoils its row only, so rows are
    weighted down by their residual. If every round fails, sources are only scaled.
    """
    gradient, n = problem.gradient, problem.n
    scale, labels = scale_from_head(problem, sources)
    if problem.nonnegative:  # says more about the sign than the head does
        sign = (sources.relu().norm(dim=1) - (-sources).relu().norm(dim=1)).sign()
        scale = scale.abs() * sign
    x = scale[:, None] * sources
    best, least, previous = Refined(x, labels, 1.0), MAX_UNEXPLAINED, math.inf
    size = gradient.norm(dim=1).median()
    left, sizes, right = economy_svd(gradient)
    rows, right = (left * sizes)[:, :n], right[:n]  # (h, n), with the lengths and distances of the gradient's rows
    for number in range(rounds):
        class_gradients = problem.output_gradients(x) / n
        if number < LABEL_ROUNDS:
            labels = match_class_gradients(problem.deltas(x), class_gradients)[1]
        d = class_gradients[torch.arange(len(x)), labels].T  # (h, r)
        weights = torch.ones_like(d[:, :1])
        for _ in range(REWEIGHTINGS):
            rotated = torch.linalg.lstsq(weights * d, weights * rows).solution  # (r, n)
            residual = (rows - d @ rotated).norm(dim=1, keepdim=True)
            weights = (residual + 1e-3 * residual.median() + 1e-30).rsqrt()
        x = rotated @ right
        unexplained = (residual.median() / size).item()
        current_tracker().progress(number + 1, rounds, unexplained)
        if unexplained < least:
            best, least = Refined(x, labels, unexplained), unexplained
        # rounds that lead to the exact inputs converge fast, and all others can be stopped early
        if not 1e-5 < unexplained < (0.97 * previous if number >= LABEL_ROUNDS else math.inf):
            break
        previous = unexplained
    return best


class Recovered(NamedTuple):
    """Inputs of a layer, and how they were found."""

    inputs: Tensor  # (r, d)
    labels: Tensor  # (r,)
    sources: Tensor  # (r, d), known up to sign and scale
    trace: tuple[float, ...]  # of the search that ended at `sources`


def recover_inputs(
    problem: LinearProblem,
    unmix: Callable[[], tuple[Tensor, tuple[float, ...]]],
    view: View | None,
    rounds: int,
    rng: torch.Generator,
) -> Recovered:
    """The layer's inputs with sign, scale and label.

    With a `view` for ICA they are first searched for by the zeros of ReLU. If these do not determine them, the
    sources that `unmix()` returns with its trace are refined by up to `rounds` of consistency.
    """
    starts: list[Tensor] = []
    if view is not None:
        selection, starts = solve_by_zeros(problem, view, rng)
        if (best := selection.best) is not None and selection.sign_mismatch <= EXACT:
            labels, _ = assign_labels(problem, best.inputs, best.columns.T)
            return Recovered(best.inputs, labels, best.inputs, (selection.sign_mismatch,))
    unmixed, trace = unmix()
    starts = [*starts, unmixed]
    # if no start explains the gradient, as after local steps, min returns the first one
    ends = [refine_by_consistency(problem, start, rounds) for start in starts]
    sources, end = min(zip(starts, ends, strict=True), key=lambda run: run[1].unexplained)
    return Recovered(end.inputs, end.labels, sources, trace)
