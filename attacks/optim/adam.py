"""Adam. Kingma, Ba, ICLR 2015. https://arxiv.org/abs/1412.6980

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    x -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

The same steps as torch.optim.Adam, whose first use in a process imports a compiler and takes two seconds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attacks.optim.loop import Closure
from models.meta import BETAS, EPS


class Adam:
    """Moves variables in place, each by its own learning rate."""

    def __init__(self, variables: Sequence[Tensor]) -> None:
        self.variables = list(variables)
        self.grads: Sequence[Tensor | None] = ()
        self.reset()

    def reset(self) -> None:
        self.moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in self.variables]
        self.steps = 0

    def evaluate(self, closure: Closure, at_most: int = 1) -> tuple[float, int]:
        loss, self.grads = closure()
        return loss, 1

    def update(self, rates: Sequence[float]) -> None:
        self.step(self.grads, rates)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        """One step along `grads`; a variable whose gradient is None stays where it is."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for x, g, lr, (m, v) in zip(self.variables, grads, rates, self.moments, strict=True):
            if g is None:
                continue
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            x.addcdiv_(m, (v.sqrt() / second**0.5).add_(EPS), value=-lr / first)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "moments": [(m.clone(), v.clone()) for m, v in self.moments]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.steps, self.moments = saved["steps"], [tuple(pair) for pair in saved["moments"]]
