"""Adam. Kingma, Ba, ICLR 2015. https://arxiv.org/abs/1412.6980

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    x -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

torch.optim's step for step, without the compiler it imports with the first optimiser of a process: two seconds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.meta import BETAS, EPS


class Adam:
    """Moves variables in place, each by a rate of its own."""

    def __init__(self, variables: Sequence[Tensor]) -> None:
        self.variables = list(variables)
        self.moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in self.variables]
        self.steps = 0

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        """A variable without a slope, which the objective never has, stays where it is."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for x, g, lr, (m, v) in zip(self.variables, slopes, rates, self.moments, strict=True):
            if g is None:
                continue
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            x.addcdiv_(m, (v.sqrt() / second**0.5).add_(EPS), value=-lr / first)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "moments": [(m.clone(), v.clone()) for m, v in self.moments]}

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.moments = state["steps"], [tuple(pair) for pair in state["moments"]]
