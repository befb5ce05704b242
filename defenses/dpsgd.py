"""DP-SGD. Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, CCS 2016.   https://arxiv.org/abs/1607.00133

g <- (1/B) (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I))                 g_i: the gradient of example i

The unit of privacy is a record: an example enters E steps of a client's round, one in each epoch. Minibatches have a
fixed size, and no amplification by sampling is claimed. evaluation/guarantees.py has the epsilon.
"""

import torch
from torch import nn

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Gradient, Step, Tensors, register
from defenses.clip import clipped
from defenses.gauss import with_noise


@register("dpsgd")
class DPSGD(Defense):
    """Clip the gradient of every example and add noise to their sum."""

    citation = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    bound: float = hp(1.0, "largest l2 norm C of the gradient of an example", gt=0)
    sigma: float = hp(1.0, "noise multiplier: standard deviation of the noise on the sum, in units of C", ge=0)

    def on_architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        if any(getattr(m, "running_mean", None) is not None for m in model.modules()):
            raise UsageError(
                "`defense`: dpsgd clips the gradient of each example, and BatchNorm mixes examples: choose `norm=group`"
            )
        return model

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        count = len(gradient.labels)
        total: Tensors = ()
        for index in range(count):
            grads = gradient.only(torch.tensor([index], device=gradient.inputs.device))()
            frozen = [g is None for g in grads]
            own = clipped(tuple(g for g in grads if g is not None), self.bound)
            total = tuple(s + g for s, g in zip(total, own, strict=True)) if total else own
        noisy = iter(with_noise(total, self.sigma * self.bound, rng))
        return tuple(None if empty else next(noisy) / count for empty in frozen)

    def counter(self) -> Counter:
        """The gradient of each guessed example is clipped. The noise on their mean depends on their number: None."""
        return Counter(per_example=lambda grads: clipped(grads, self.bound), noise=None if self.sigma else 0.0)
