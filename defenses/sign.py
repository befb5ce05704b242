"""signSGD: one bit for every entry. Bernstein, Wang, Azizzadenesheli, Anandkumar, ICML 2018.

g <- a sign(g)                                                                  https://arxiv.org/abs/1802.04434

a is a constant, or the tensor's mean |g| (Karimireddy et al., ICML 2019, https://arxiv.org/abs/1901.09847), with which
FedAvg's average has the size of a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.hyperparameters import hp
from defenses.base import Counter, Defense, Tensors, register

SHARPNESS = 4.0  # of the logistic likelihood, per mean |g| of a tensor


@register("sign")
class Sign(Defense):
    """Send the signs of an update, all of one size in a tensor."""

    citation = "Bernstein et al.: signSGD. ICML 2018"

    size: float = hp(0.0, "size a of every entry; 0: the mean size of the tensor's entries", ge=0)

    def on_update(self, tensors: Tensors, rng: torch.Generator | None = None) -> Tensors:
        return tuple(t.sign() * (self.size or t.abs().mean()) for t in tensors)

    def counter(self) -> Counter:
        """Logistic loss of the guess's entries, each tensor's relative to their mean size."""
        return Counter(misfit=self.misfit)

    def misfit(self, ours: Tensors, theirs: Tensors) -> Tensor:
        """The mean over entries of log(1 + exp(-b sign_j g_j / mean |g|)); entries that are exactly 0 stay 0."""
        total, count = theirs[0].new_zeros(()), 0
        for o, t in zip(ours, theirs, strict=True):
            relative = o / o.abs().mean().clamp(min=1e-30)
            sign = t.sign()
            loss = torch.where(sign == 0, relative.square(), F.softplus(-SHARPNESS * sign * relative))
            total, count = total + loss.sum(), count + t.numel()
        return total / count
