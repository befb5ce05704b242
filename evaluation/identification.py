"""Identification: is the victim nearer to a reconstruction than examples that nobody sent?

A candidate c for the place of victim i competes with the other victims of the update for its reconstructions r_j:

    T(c) = min_j { d(c, r_j) : d(c, r_j) <= d(x_k, r_j) for all victims k != i },   d = mean squared error

The rank of the victim is 1 + #{candidates c: T(c) <= T(x_i)}. If the reconstructions do not depend on the victim, then
victim and candidates are exchangeable, and rank 1 of N has a probability of at most 1 / N, for any number of
reconstructions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evaluation.candidates import Candidates
from evaluation.pairing import mse_matrix


def ranks(
    truth: Tensor,
    labels: Tensor,
    examples: Tensor,
    pairs: Sequence[int | None],
    candidates: Candidates,
    distances_of: Callable[[Tensor, Tensor], Tensor] = mse_matrix,
) -> list[dict[str, object]]:
    """For each true example {identified, rank, candidates_n, candidates_class}.

    Args:
        truth: (N, *shape).
        labels: (N,) int64, the true ones.
        examples: (M, *shape), valid reconstructions.
        pairs: the reconstruction of each true example; a missed one is not identified, and its rank is None.
        distances_of: the distances (N, M) of every pair of examples (N, *shape) and (M, *shape).
        candidates: candidates_n counts the victim and the others; candidates_class says whether all share its class.
    """
    found: list[dict[str, object]] = []
    own = distances_of(truth, examples)  # (N, M)
    distances: dict[int, tuple[Tensor, bool]] = {}
    for i, label in enumerate(labels.tolist()):
        if label not in distances:
            others, same = candidates.of(label)
            distances[label] = (distances_of(others, examples) if len(others) else own[:0], same)
        theirs, same = distances[label]
        if not len(theirs):
            found.append({"identified": None, "rank": None, "candidates_n": None, "candidates_class": None})
            continue
        rank = None
        if pairs[i] is not None:
            rivals = torch.cat([own[:i], own[i + 1 :]])
            limit = rivals.min(0).values if len(rivals) else torch.full_like(own[i], torch.inf)
            mine, best = (torch.where(d <= limit, d, torch.inf).min(-1).values for d in (own[i : i + 1], theirs))
            rank = 1 + int((best <= mine).sum())
        found.append({"identified": rank == 1, "rank": rank, "candidates_n": len(theirs) + 1, "candidates_class": same})
    return found
