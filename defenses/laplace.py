"""Laplace noise on every entry of an update. Dwork, McSherry, Nissim, Smith, TCC 2006.

g <- g + Lap(b),   p(e) = exp(-|e| / b) / 2b,   standard deviation b sqrt(2)          https://doi.org/10.1007/11681878_14
"""

import math

import torch

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register


@register("laplace")
class Laplace(Defense):
    """Add independent Laplace noise of scale `scale`."""

    citation = "Dwork, McSherry, Nissim, Smith: Calibrating Noise to Sensitivity. TCC 2006"

    scale: float = hp(0.01, "scale b of the noise on an entry; its standard deviation is 1.41 b", gt=0)

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        return tuple(t + self.scale * _laplace(t.shape, rng).to(t) for t in tensors)

    def counter(self) -> Counter:
        """The noise is unknown; its standard deviation is not."""
        return Counter(noise=math.sqrt(2) * self.scale)


def _laplace(shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
    """Standard Laplace noise: the difference of two exponential variables."""
    first, second = (torch.empty(shape).exponential_(generator=rng) for _ in range(2))
    return first - second
