"""Top-k sparsification. Aji, Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017.

g_j <- g_j if |g_j| is among the k largest, else 0                              https://arxiv.org/abs/1704.05021

With a residual, what a client does not send is added to its next update, so that the sum of all that it sent, plus the
last residual, is the sum of its updates. An attacker who sees every round receives small entries later.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Memory, Tensors, register


@register("topk")
class TopK(Defense):
    """Send only the largest entries of an update."""

    citation = "Aji, Heafield: Sparse Communication for Distributed Gradient Descent. EMNLP 2017"

    share: float = hp(0.1, "share of the entries that is sent", gt=0, le=1)
    scope: str = hp("layer", "range over which entries are compared: layer (each tensor) or global (all together)")
    residual: bool = hp(False, "addition of what was not sent to the client's next update: true or false")

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise UsageError(f"`scope` is layer or global, not {self.scope!r}")

    def for_client(self, memory: Memory, position: int = 0) -> Defense:
        return _WithResidual(self, memory, position) if self.residual else self

    def on_update(self, tensors: Tensors, rng: torch.Generator | None = None) -> Tensors:
        if self.scope == "layer":
            return tuple(t * _largest(t.flatten(), self.share).view_as(t) for t in tensors)
        chosen = _largest(torch.cat([t.flatten() for t in tensors]), self.share)
        parts = chosen.split([t.numel() for t in tensors])
        return tuple(t * part.view_as(t) for t, part in zip(tensors, parts, strict=True))

    def counter(self) -> Counter:
        """Squared distance on the entries sent; others cost only what exceeds the smallest entry sent.

        The residual of earlier rounds, which is in a later update, is not modelled.
        """
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


class _WithResidual(Defense):
    """Top-k at a client that keeps what it did not send."""

    def __init__(self, defense: TopK, memory: Memory, position: int) -> None:
        self.defense, self.memory, self.position = defense, memory, position

    def on_update(self, tensors: Tensors, rng: torch.Generator | None = None) -> Tensors:
        before = self.memory.kept.get(self.position)
        total = tensors if before is None else tuple(t + r for t, r in zip(tensors, before, strict=True))
        sent = self.defense.on_update(total)
        self.memory.kept[self.position] = tuple(t - s for t, s in zip(total, sent, strict=True))
        return sent


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def _largest(entries: Tensor, share: float) -> Tensor:
    """(P,) 0 or 1: which entries (P,) are the ceil(share * P) largest in size."""
    k = min(math.ceil(share * len(entries)), len(entries))
    return torch.zeros_like(entries).scatter_(0, entries.abs().topk(k).indices, 1)
