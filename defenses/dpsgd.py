"""DP-SGD. Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, CCS 2016.   https://arxiv.org/abs/1607.00133

g <- (1/B) (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I))                 g_i: the gradient of example i

The unit of privacy is a record. With sampling=fixed an example enters E steps of a client's round, one in each epoch,
and no amplification by sampling is claimed. With sampling=poisson, as in the paper and in Opacus, it enters each
step with probability B / n, independently of others, and B is the expected size of a minibatch.
evaluation/guarantees.py has the epsilon of both.
"""

import torch
from torch import Tensor, nn

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
    sampling: str = hp("fixed", "minibatches of a local epoch: fixed (a shuffled partition) or poisson")

    def __post_init__(self) -> None:
        if self.sampling not in ("fixed", "poisson"):
            raise UsageError(f"`sampling` is fixed or poisson, not {self.sampling!r}")

    def on_architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        if any(getattr(m, "running_mean", None) is not None for m in model.modules()):
            raise UsageError(
                "`defense`: dpsgd clips the gradient of each example, and BatchNorm mixes examples: choose `norm=group`"
            )
        return model

    def on_schedule(self, schedule: list[Tensor], num_examples: int, rng: torch.Generator) -> list[Tensor]:
        size = len(schedule[0])  # only the last minibatch of an epoch may be shorter
        if self.sampling == "fixed" or size == num_examples:
            return schedule
        return [(torch.rand(num_examples, generator=rng) < size / num_examples).nonzero().flatten() for _ in schedule]

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        count = len(gradient.labels)
        if count == 0:  # a Poisson sample may be empty
            empty = [not p.requires_grad for p in gradient.model.parameters()]
            total: Tensors = tuple(torch.zeros_like(p) for p in gradient.model.parameters() if p.requires_grad)
        for index in range(count):
            grads = gradient.only(torch.tensor([index], device=gradient.inputs.device))()
            empty = [g is None for g in grads]
            own = clipped(tuple(g for g in grads if g is not None), self.bound)
            total = tuple(s + g for s, g in zip(total, own, strict=True)) if index else own
        size = count if self.sampling == "fixed" else gradient.recipe.batch_size
        noisy = iter(with_noise(total, self.sigma * self.bound, rng))
        return tuple(None if missing else next(noisy) / size for missing in empty)

    def counter(self) -> Counter:
        """The gradient of each guessed example is clipped. The noise on their mean depends on their number: None."""
        return Counter(per_example=lambda grads: clipped(grads, self.bound), noise=None if self.sigma else 0.0)
