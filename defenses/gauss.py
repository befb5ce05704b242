"""Gaussian noise on every entry of an update, the second half of DP-SGD. Abadi et al., CCS 2016.

g <- g + N(0, sigma^2)                  entry by entry                         https://arxiv.org/abs/1607.00133
"""

import torch

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register


@register("gauss")
class Gauss(Defense):
    """Add independent Gaussian noise of standard deviation `sigma`."""

    citation = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    sigma: float = hp(0.01, "standard deviation of the noise on an entry", gt=0)

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        return with_noise(tensors, self.sigma, rng)

    def counter(self) -> Counter:
        """The noise is unknown; its standard deviation is not."""
        return Counter(noise=self.sigma)


def with_noise(tensors: Tensors, std: float, rng: torch.Generator) -> Tensors:
    """The tensors plus independent Gaussian noise of standard deviation `std`."""
    return tuple(t + std * torch.randn(t.shape, generator=rng).to(t) for t in tensors)
