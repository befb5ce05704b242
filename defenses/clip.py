"""Norm clipping, the first half of DP-SGD. Abadi et al., CCS 2016. https://arxiv.org/abs/1607.00133"""

from collections.abc import Sequence

import torch
from torch import Tensor

from defenses.base import Defense, register


@register("clip")
class Clip(Defense):
    """The whole update is shortened to a norm of `strength` at the most: g min(1, C / |g|)."""

    paper = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    def __call__(self, tensors: Sequence[Tensor], rng: torch.Generator | None = None) -> tuple[Tensor, ...]:
        norm = torch.stack([t.square().sum() for t in tensors]).sum().sqrt()
        share = (self.strength / norm.clamp(min=1e-30)).clamp(max=1)
        return tuple(t * share for t in tensors)
