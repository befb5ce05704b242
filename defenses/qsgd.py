"""QSGD: stochastic quantisation. Alistarh, Grubic, Li, Tomioka, Vojnovic, NeurIPS 2017.

Q(g_j) = m sign(g_j) l / s,   l = floor(s |g_j| / m) + Bernoulli(rest),   E Q(g) = g     https://arxiv.org/abs/1610.02132
"""

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register


@register("qsgd")
class QSGD(Defense):
    """Round every entry at random to one of a few levels, so that its mean is unchanged."""

    citation = "Alistarh et al.: QSGD. NeurIPS 2017"

    levels: int = hp(15, "number s of levels above zero: 15 with a sign take 5 bits", ge=1)
    norm: str = hp("max", "size m of a tensor: max (as in the authors' experiments) or l2 (as in their theorem)")

    def __post_init__(self) -> None:
        if self.norm not in ("max", "l2"):
            raise UsageError(f"`norm` is max or l2, not {self.norm!r}")

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        sent = []
        for t in tensors:
            size = (t.abs().max() if self.norm == "max" else t.norm()).clamp(min=1e-30)
            up = torch.rand(t.shape, generator=rng, dtype=t.dtype).to(t)  # rounds up where the rest exceeds it
            sent.append(size * t.sign() * torch.floor(self.levels * t.abs() / size + up) / self.levels)
        return tuple(sent)

    def counter(self) -> Counter:
        """The distance of directions, since the mean of Q(g) is g, plus the square of what lies outside the cells."""
        return Counter(misfit=self.misfit)

    def misfit(self, ours: Tensors, theirs: Tensors) -> Tensor:
        """1 - cos(ours, theirs), plus the square, relative to `theirs`, of differences of more than one level."""
        excess, product, square, norm = (theirs[0].new_zeros(()) for _ in range(4))
        for o, t in zip(ours, theirs, strict=True):
            sizes = t.abs()
            cell = sizes.max() / self.levels if self.norm == "max" else sizes[sizes > 0].amin() if sizes.any() else 0.0
            excess = excess + ((o - t).abs() - cell).relu().square().sum()
            product, square, norm = product + (o * t).sum(), square + o.square().sum(), norm + t.square().sum()
        return 1 - product / (square * norm).sqrt().clamp(min=1e-30) + excess / norm.clamp(min=1e-30)
