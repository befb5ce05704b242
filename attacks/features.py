"""Networks cut at a fully connected layer: the embeddings it is fed, what follows from them, and images that have them.

Feature inversion as in the Cocktail Party Attack, Kariyappa et al., ICML 2023:  min_x 1 - cos(z(x), z*) + a TV(x)
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import progress
from attacks.common import TINY, total_variation
from federated.wire import Task


def hidden_layer(model: nn.Module) -> nn.Linear | None:
    """The first fully connected layer, if it is not the head."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[0] if len(linear) > 1 else None


class Embedding(nn.Module):
    """Model inputs (N, C, H, W) -> what `layer` of `model` is fed (N, d)."""

    def __init__(self, model: nn.Module, layer: nn.Linear) -> None:
        super().__init__()
        self.model, self.layer = copy.deepcopy((model, layer))
        self.model.eval()
        self.layer.register_forward_pre_hook(lambda module, args: self.fed.append(args[0]))
        self.fed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.fed.clear()
        self.model(x)
        return self.fed.pop()


class Tail(nn.Module):
    """What follows from embeddings: (N, d) -> logits. `layer` is this copy's own."""

    def __init__(self, model: nn.Module, layer: nn.Linear, task: Task) -> None:
        super().__init__()
        self.model, self.layer, self.shape = *copy.deepcopy((model, layer)), task.image_shape
        self.model.eval()

    def forward(self, z: Tensor) -> Tensor:
        fed = self.layer.register_forward_pre_hook(lambda module, args: (z,))
        logits = self.model(z.new_zeros(len(z), *self.shape))
        fed.remove()
        return logits


def invert_features(
    embedding: Embedding, target: Tensor, task: Task, iterations: int, lr: float, tv: float, rng: torch.Generator
) -> tuple[Tensor, tuple[float, ...]]:
    """Images (N, C, H, W) in [0, 1] whose embeddings point where `target` (N, d) does, and the objective's course.

    Adam on the sign of the slope, each image on its own; `tv` is total variation's share of the matching slope.
    """
    noise = 0.01 * torch.randn(len(target), *task.image_shape, generator=rng).to(target)
    low, high = (task.to_model(torch.full_like(noise, edge)) for edge in (0.0, 1.0))
    x = task.to_model(0.5 + noise).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    trace = []
    for iteration in range(iterations):
        distance = (1 - F.cosine_similarity(embedding(x), target, dim=1)).sum()
        (slope,) = torch.autograd.grad(distance, x)
        (prior,) = torch.autograd.grad(total_variation(x), x)
        ours, its = (g.abs().mean((1, 2, 3), keepdim=True) for g in (slope, prior))
        x.grad = (slope + tv * ours / its.clamp(min=TINY) * prior).sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(low, high)
        trace.append(distance.item() / len(target))
        progress(iteration, iterations, trace[-1])
    return task.to_pixels(x.detach()).clamp(0, 1), tuple(trace)
