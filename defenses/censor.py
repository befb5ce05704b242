"""CENSOR: send a random direction that is orthogonal to the gradient. Zhang et al., NDSS 2025.

g_l <- ||g_l|| o / ||o||,   o = r - <r, g_l> g_l / ||g_l||^2,   r ~ N(0, I)           in every layer l

Of `trials` such draws the client sends the one with the lowest loss after a step of 1e-4. To first order no step along
an orthogonal direction changes the loss: the update trains little.   https://arxiv.org/abs/2501.15718

version=code is the authors' program: it divides by ||g_l|| and not by its square, with ||r|| = 1. Its o has the cosine
c (1 - ||g_l||) / ||o|| with g_l, where c is that of r, and is orthogonal only where ||g_l|| = 1. It acts in epochs 0
to 9 alone, which is rounds=10 here.
"""

import torch
from torch import Tensor

from core.errors import UsageError
from core.hyperparameters import hp
from defenses.base import Counter, Defense, Gradient, Memory, Pipeline, Step, Tensors, register
from models.inspection import eval_mode

STEP = 1e-4  # learning rate of the step whose loss is compared; the authors' code
TINY = 1e-30


@register("censor")
class Censor(Defense):
    """Send a random direction in place of each layer's gradient, of the same norm."""

    citation = "Zhang et al.: CENSOR. NDSS 2025"

    trials: int = hp(20, "number of random directions, of which the one with the lowest loss is sent", ge=1)
    version: str = hp("paper", "projection: paper (orthogonal) or code (the authors' program, not orthogonal)")
    rounds: int = hp(0, "number of a client's first rounds that are defended; 0: all", ge=0)

    def __post_init__(self) -> None:
        if self.version not in ("paper", "code"):
            raise UsageError(f"`version` is paper or code, not {self.version!r}")

    def for_client(self, memory: Memory, position: int = 0) -> Defense:
        return Pipeline() if self.rounds and memory.rounds >= self.rounds else self

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        grads = gradient()
        pairs = [(p, g) for p, g in zip(gradient.model.parameters(), grads, strict=True) if g is not None]
        original = [p.detach().clone() for p, _ in pairs]
        best, lowest = [g for _, g in pairs], torch.inf
        with torch.no_grad(), eval_mode(gradient.model):
            for _ in range(self.trials):
                drawn = [self.direction(g, rng) for _, g in pairs]
                for (parameter, _), before, own in zip(pairs, original, drawn, strict=True):
                    parameter.copy_(before - STEP * own)
                loss = gradient.loss().item()
                if loss < lowest:
                    best, lowest = drawn, loss
            for (parameter, _), before in zip(pairs, original, strict=True):
                parameter.copy_(before)
        sent = iter(best)
        return tuple(None if g is None else next(sent) for g in grads)

    def direction(self, grad: Tensor, rng: torch.Generator) -> Tensor:
        """A random direction (*shape) of the norm of `grad` (*shape)."""
        r = torch.randn(grad.shape, generator=rng, dtype=grad.dtype).to(grad)
        norm = grad.norm().clamp(min=TINY)
        if self.version == "code":
            o = r / r.norm()
            o = o - (o * grad).sum() / norm * grad
        else:
            o = r - (r * grad).sum() / norm * (grad / norm)
            o = o - (o * grad).sum() / norm * (grad / norm)  # again: rounding errors of the first time
        return norm * o / o.norm().clamp(min=TINY)

    def counter(self) -> Counter:
        """The norm of every layer's gradient is sent as it is and, as published, the gradient is orthogonal to it."""
        return Counter(misfit=self.misfit)

    def misfit(self, ours: Tensors, theirs: Tensors) -> Tensor:
        """Mean over layers of (||ours|| / ||theirs|| - 1)^2 and, as published, of d cos^2, about 1 by chance."""
        total = theirs[0].new_zeros(())
        for o, t in zip(ours, theirs, strict=True):
            size, norm = o.norm().clamp(min=TINY), t.norm().clamp(min=TINY)
            total = total + (size / norm - 1).square()
            if self.version == "paper" and t.numel() > 1:
                total = total + t.numel() * ((o * t).sum() / (size * norm)).square()
        return total / len(theirs)
