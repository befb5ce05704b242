"""Trap weights. Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, EuroS&P 2023.

https://arxiv.org/abs/2112.02918      w_k = half of its entries -|N(0, s)|, the other half +s' |the same|, s' < 1

Negative weights slightly outweigh the positive, so that a ReLU neuron passes few images, and an image alone on a neuron
is dW_k / db_k. A bias at the public (1 - 1/K) quantile of w_k x, for K images behind an update, does it on purpose.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.linear import alone_on_a_neuron, divide_rows, has_relu, require_pixel_layer
from federated.wire import Batch, Observation, Recipe, Reconstruction, Task, UsageError
from utils.cli import hp


@register("trap")
class Trap(Attack):
    """Trap weights: the first layer's parameters set so that one image in a batch passes each neuron."""

    paper = "Boenisch et al.: When the Curious Abandon Honesty. EuroS&P 2023"
    threat = "malicious-parameters"
    instant = True
    wants_model = "fc2"

    rows: Literal["white", "trap"] = hp("white", "weights: N(0, s), or the paper's", paper="trap")
    bias: Literal["quantile", "zero"] = hp("quantile", "one public image in --target passes a neuron", paper="zero")
    scale: float = hp(0.95, "s', of the positive half of --rows trap", above=0, source="section 6")
    target: int = hp(32, "images behind an update, K, that a quantile bias counts on", least=2)
    spread: float = hp(1.0, "s times the square root of the pixels", above=0)

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        require_pixel_layer("trap", model, task, bias=True)
        if not has_relu(model):
            raise UsageError("trap needs neurons that stay silent, and this model has no ReLU: --activation relu")

    @torch.no_grad()
    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        layer = require_pixel_layer("trap", model, task, bias=True)
        rng = torch.Generator().manual_seed(0)  # the same trap in every round
        outputs, pixels = layer.weight.shape
        weight = torch.randn(outputs, pixels, generator=rng) * self.spread / pixels**0.5
        if self.rows == "trap":
            for row in weight:
                order, half = torch.randperm(pixels, generator=rng), pixels // 2
                row[order[:half]] = -row[order[:half]].abs()
                row[order[half : 2 * half]] = -self.scale * row[order[:half]]
        layer.weight.copy_(weight)
        layer.bias.zero_()
        if self.bias == "quantile":
            passed = task.to_model(public.images).flatten(1) @ layer.weight.T  # (n, h)
            layer.bias.copy_(-passed.quantile(1 - 1 / self.target, dim=0))
        return model

    def ceiling(self, model: nn.Module, task: Task, images: Tensor) -> Tensor:
        return alone_on_a_neuron(require_pixel_layer("trap", model, task), task.to_model(images))

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        return divide_rows(seen, require_pixel_layer("trap", seen.model, seen.task, bias=True))
