"""Gaussian noise on every entry of an update, the second half of DP-SGD. Abadi et al., CCS 2016."""

from collections.abc import Sequence

import torch
from torch import Tensor

from defenses.base import Defense, register


@register("gauss")
class Gauss(Defense):
    """g + N(0, strength^2), entry by entry."""

    paper = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    @property
    def noise(self) -> float:
        return self.strength

    def __call__(self, tensors: Sequence[Tensor], rng: torch.Generator | None = None) -> tuple[Tensor, ...]:
        if rng is None:
            return tuple(tensors)
        return tuple(t + self.strength * torch.randn(t.shape, generator=rng).to(t) for t in tensors)
