"""The layer's inputs from candidate columns: the set whose inputs agree best with the zeros of the columns."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.linear.column_space import ColumnSpace, unit
from attacks.linear.ica import View
from attacks.linear.layer import LinearProblem, match_class_gradients, scale_from_head
from attacks.linear.sparse_columns import Candidates, search_from_ica, unmix_beside

EXACT = 0.002  # largest sign mismatch of an exact solution; one wrong vector among a hundred causes more
NEARLY_EXACT = 0.1  # sign mismatch below which a single column may be wrong
SCALE_ROUNDS = 20  # in which scales and the head's d_i at these scales converge


class Solution(NamedTuple):
    """Inputs of a layer and their output gradients: columns @ inputs is the layer's gradient."""

    inputs: Tensor  # X (r, d)
    columns: Tensor  # D (H, r)


class Selection:
    """The best solution so far, and the sets of candidates that were tried.

    sign_mismatch: share of entries where W x_i + b is negative and d_i is not zero, or the other way round.
    """

    def __init__(self, space: ColumnSpace) -> None:
        self.space = space
        self.best: Solution | None = None
        self.sign_mismatch = 1.0
        self.tried: set[tuple[int, ...]] = set()

    def accept_if_better(self, solution: Solution) -> bool:
        """Whether the signs of a solution agree better than those of the best, which it then replaces."""
        layer, rows = self.space.layer, self.space.active_rows
        active = layer(solution.inputs.to(layer.weight.dtype)).T[rows] >= 0  # (h, r)
        mismatch = (active == self.space.is_zero(solution.columns[rows])).double().mean().item()
        better = self.best is None or mismatch < self.sign_mismatch
        if better:
            self.best, self.sign_mismatch = solution, mismatch
        return better

    def nearly_exact(self) -> Solution | None:
        """The best solution, if a single wrong column may explain all signs that disagree."""
        return self.best if 0 < self.sign_mismatch < NEARLY_EXACT else None


def select_best(candidates: Candidates, selection: Selection, resolve: Callable[[Tensor], Solution]) -> None:
    """Update `selection` with the sets of independent candidates that it has not tried yet.

    `resolve` makes a solution of columns (H, r) of unknown lengths. If the sparsest set is nearly exact, one of its
    vectors may be wrong: the sets that leave out one vector each are tried next, then `repair_column`.
    """
    space = candidates.space
    all_certain = len(candidates.certain()) == space.rank
    for excluded in [None, *candidates.independent()]:
        chosen = candidates.independent(excluded)
        key = tuple(candidates.ids[chosen].tolist())
        mismatch = selection.sign_mismatch
        if excluded is not None and (not mismatch or (mismatch >= NEARLY_EXACT and not all_certain)):
            break
        if not key or key in selection.tried or (len(key) < space.rank and selection.best is not None):
            continue
        selection.tried.add(key)
        selection.accept_if_better(resolve(space.columns(candidates.vectors[chosen])))
    while (best := selection.nearly_exact()) is not None and best.columns.shape[1] == space.rank:
        if not selection.accept_if_better(resolve(repair_column(space, best))):
            break


def repair_column(space: ColumnSpace, solution: Solution) -> Tensor:
    """Columns (H, r) of a solution, one of them without its share of another.

    If d_i - c d_j is in the place of d_i, then x_j + c x_i is in the place of x_j, and all other inputs are right.
    Among all i and j, and all c for which one more entry is zero, the one with the best signs of both is taken.
    """
    d = solution.columns[space.active_rows]
    z = space.layer(solution.inputs.to(space.layer.weight.dtype)).T[space.active_rows].to(d)  # (h, r)
    zero, nonzero = space.is_zero(d), ~space.is_zero(10 * d)
    mismatches = ((z < 0) != zero).double().mean(0)  # (r,)
    best, columns = 0.0, solution.columns
    for j in mismatches.argsort(descending=True)[:4].tolist():
        for i in (i for i in range(space.rank) if i != j):
            rows = nonzero[:, i] & nonzero[:, j]
            c = -d[rows, i] / d[rows, j]  # (k,)
            repaired = d[:, i, None] + c * d[:, j, None]  # (h, k)
            negative = (z[:, j, None] - c * z[:, i, None]) * (1 - c) < 0
            of_j = (negative != zero[:, j, None]).double().mean(0)
            of_i = (space.is_zero(repaired) != (z[:, i, None] < 0)).double().mean(0)
            gain = mismatches[i] + mismatches[j] - of_j - of_i
            if len(c) and gain.max() > best:
                best, columns = gain.max().item(), solution.columns.clone()
                columns[space.active_rows, i] = space.refine(unit(repaired[:, gain.argmax()][None]))[0]
    return columns


def resolve_scales(problem: LinearProblem, space: ColumnSpace, columns: Tensor) -> Solution:
    """The solution whose columns are `columns` (H, r) up to their lengths.

    The bias gradient gives the lengths s, D s = dL/db; without one, the head's d_i of the inputs does.
    """
    x = space.inputs(columns)
    if problem.bias_gradient is not None:
        length = torch.linalg.lstsq(columns, problem.bias_gradient[:, None]).solution.squeeze(1)
        return Solution(x / length[:, None], columns * length)
    scale, _ = scale_from_head(problem, x)
    for _ in range(SCALE_ROUNDS):
        x, columns = x * scale[:, None], columns / scale
        scale, _ = match_class_gradients(columns.T, problem.output_gradients(x) / problem.n)
    return Solution(x, columns)


def assign_labels(problem: LinearProblem, inputs: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (r,) of inputs (r, d), and the cosine similarity of their deltas (r, h) with each class's d_i (r, C)."""
    class_gradients = problem.output_gradients(inputs)
    labels = match_class_gradients(deltas, class_gradients)[1]
    return labels, F.cosine_similarity(class_gradients, deltas[:, None], dim=2)


def solve_by_zeros(problem: LinearProblem, view: View, rng: torch.Generator) -> tuple[Selection, list[Tensor]]:
    """The best solution by ICA on `view` and the zeros of ReLU, and sources (r, d) if only some d_i are certain."""
    space = ColumnSpace.of(problem.layer, problem.gradient, problem.n, problem.public.flatten(1))
    candidates, selection = Candidates(space), Selection(space)
    certain = search_from_ica(candidates, view, rng)
    select_best(candidates, selection, partial(resolve_scales, problem, space))
    partial_solution = 0 < len(certain) < space.rank
    return selection, [unmix_beside(candidates, certain, view, rng)] if partial_solution else []
