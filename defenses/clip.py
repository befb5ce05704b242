"""Norm clipping, the first half of DP-SGD. Abadi et al., CCS 2016. https://arxiv.org/abs/1607.00133

g <- g min(1, bound / ||g||)            over all layers as one vector
"""

import torch

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register


@register("clip")
class Clip(Defense):
    """Scale the whole update down to a norm of at most `bound`."""

    citation = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    bound: float = hp(1.0, "largest l2 norm of an update", gt=0)

    def on_update(self, tensors: Tensors, rng: torch.Generator | None = None) -> Tensors:
        return clipped(tensors, self.bound)

    def counter(self) -> Counter:
        """Clipping is deterministic: the attacker clips the update of its guess as well."""
        return Counter(forward=self.on_update)


def clipped(tensors: Tensors, bound: float) -> Tensors:
    """The tensors, scaled to a norm of at most `bound` over all of them."""
    norm = torch.stack([t.square().sum() for t in tensors]).sum().sqrt()
    scale = (bound / norm.clamp(min=1e-30)).clamp(max=1)
    return tuple(t * scale for t in tensors)
