"""Top-k sparsification. Aji, Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017.

g_j <- g_j if |g_j| is among the k largest, else 0                              https://arxiv.org/abs/1704.05021

"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register


@register("topk")
class TopK(Defense):
    """Send only the largest entries of an update."""

    citation = "Aji, Heafield: Sparse Communication for Distributed Gradient Descent. EMNLP 2017"

    share: float = hp(0.1, "share of the entries that is sent", gt=0, le=1)
    scope: str = hp("layer", "range over which entries are compared: layer (each tensor) or global (all together)")

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise UsageError(f"`scope` is layer or global, not {self.scope!r}")

    def on_update(self, tensors: Tensors, rng: torch.Generator | None = None) -> Tensors:
        if self.scope == "layer":
            return tuple(t * _largest(t.flatten(), self.share).view_as(t) for t in tensors)
        chosen = _largest(torch.cat([t.flatten() for t in tensors]), self.share)
        parts = chosen.split([t.numel() for t in tensors])
        return tuple(t * part.view_as(t) for t, part in zip(tensors, parts, strict=True))

    def counter(self) -> Counter:
        """Squared distance on the entries sent; others cost only what exceeds the smallest entry sent."""
        return Counter(misfit=self.misfit)

    def misfit(self, ours: Tensors, theirs: Tensors) -> Tensor:
        """Relative to the squared norm of `theirs`: 0 where sent entries agree and no other one would have been."""
        smallest = [t[t != 0].abs().amin() if (t != 0).any() else t.new_zeros(()) for t in theirs]
        if self.scope == "global":
            smallest = [torch.stack([s for s in smallest if s > 0] or smallest).amin()] * len(theirs)
        errors = [
            torch.where(t != 0, o - t, (o.abs() - s).relu()) for o, t, s in zip(ours, theirs, smallest, strict=True)
        ]
        return sum_of_squares(errors) / sum_of_squares(theirs)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def _largest(entries: Tensor, share: float) -> Tensor:
    """(P,) 0 or 1: which entries (P,) are the ceil(share * P) largest in size."""
    k = min(math.ceil(share * len(entries)), len(entries))
    return torch.zeros_like(entries).scatter_(0, entries.abs().topk(k).indices, 1)
