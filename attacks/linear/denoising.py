"""Less noise in a layer's gradient, because its rank is at most the number of examples. Gavish, Donoho 2017.

https://arxiv.org/abs/1405.7511     G + s Z  ->  U diag(f(y)) V^T,    f(y) = sqrt((y^2 - h - d)^2 - 4 h d) / y  or 0

for noise of standard deviation s on an h x d gradient G of n examples, and singular values y in units of s. Values up
to sqrt(h) + sqrt(d) are those of pure noise and become 0; f is the shrinkage with the least squared error. About
n (h + d) of the h d dimensions of the noise are left. The bias gradient is one more column, the input 1 of an example.
"""

import torch
from torch import Tensor

from attacks.linear.column_space import economy_svd
from core.protocol import Observation
from defenses.base import parse


def noise_on_mean_gradient(observation: Observation) -> float:
    """Standard deviation of the defence's noise on an entry of the mean gradient; 0 if none is known."""
    recipe, update = observation.recipe, observation.update
    noise = parse(recipe.defense).counter().noise or 0.0
    return noise if update.kind == "gradient" else noise / recipe.total_step_weight(update.num_examples)


def denoised(weight: Tensor, bias: Tensor | None, noise: float, n: int) -> tuple[Tensor, Tensor | None]:
    """dL/dW (h, d) and dL/db (h,) of n examples with less of their noise; noise: its standard deviation."""
    if not noise:
        return weight, bias
    both = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    left, sizes, right = economy_svd(both)
    h, d = both.shape
    y = (sizes[:n] / noise).clamp(min=h**0.5 + d**0.5)
    shrunk = noise * ((y**2 - h - d) ** 2 - 4 * h * d).clamp(min=0).sqrt() / y
    clean = (left[:, :n] * shrunk) @ right[:n]
    return (clean, None) if bias is None else (clean[:, :-1], clean[:, -1])
