"""Trap weights. Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot, EuroS&P 2023.

https://arxiv.org/abs/2112.02918      w_k = half of its entries -|N(0, s^2)|, the other half +s' |the same|, s' < 1

Negative weights slightly outweigh positive ones, so that few examples activate a ReLU neuron, and one that is alone on
a neuron is dW_k / db_k. Our own addition is a bias at the (1 - 1/K) quantile of w_k x over public examples: of K
private examples, one is expected to activate each neuron. With --neurons 3, neurons come in groups with equal
weights, whose gradients certify that a reconstruction is one example alone (linear/certificate.py).
"""

from typing import Literal

import torch
from torch import nn

from attacks.base import Attack, register
from attacks.linear.layer import invert_rows, output_gradients, public_inputs, require_pixel_layer
from core.hyperparameters import hp
from core.protocol import Batch, Observation, Recipe, Reconstruction, Task
from models.implants.calibration import resolution


@register("trap")
class Trap(Attack):
    """Trap weights: a first layer whose neurons are each activated by one example of a batch."""

    citation = "Boenisch et al.: When the Curious Abandon Honesty. EuroS&P 2023"
    link = "https://arxiv.org/abs/2112.02918"
    threat = "malicious-parameters"
    uses = frozenset({"num_examples", "recipe", "defense"})
    requires = frozenset({"public", "pixel_layer", "pixel_layer_bias", "relu"})
    paper = {"weight_init": ("trap", "section 6"), "bias": ("zero", "section 6")}
    example_model = "fc2"

    weight_init: Literal["white", "trap"] = hp(
        "white", "weights of the first layer, white: N(0, s^2), trap: the paper's trap weights"
    )
    bias: Literal["quantile", "zero"] = hp(
        "quantile", "bias of the first layer: at the public (1 - 1/K) quantile of its outputs, or zero"
    )
    positive_scale: float = hp(
        0.95, "s', size of positive trap weights relative to negative ones", gt=0, source="section 6"
    )
    expected_batch_size: int = hp(32, "number K of examples of an update that the quantile bias assumes", ge=2)
    neurons: int = hp(
        1,
        "neurons with equal weights; from 2 on, their gradients certify that a reconstruction is one example alone, "
        "and fewer examples are alone",
        ge=1,
        le=16,
    )
    weight_scale: float = hp(1.0, "standard deviation s of the weights, times the square root of the input size", gt=0)

    def needs_workers(self) -> bool:
        return False

    def requirements(self) -> frozenset[str]:
        return self.requires if self.bias == "quantile" or self.neurons > 1 else self.requires - {"public"}

    @torch.no_grad()
    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        layer = require_pixel_layer(model, task, self.name)
        rng = torch.Generator().manual_seed(0)  # the same trap in every round
        outputs, size = layer.weight.shape
        weight = torch.randn(outputs, size, generator=rng) * self.weight_scale / size**0.5
        if self.weight_init == "trap":
            for row in weight:
                order, half = torch.randperm(size, generator=rng), size // 2
                row[order[:half]] = -row[order[:half]].abs()
                row[order[half : 2 * half]] = -self.positive_scale * row[order[:half]]
        weight[: outputs // self.neurons * self.neurons] = weight[: outputs // self.neurons].repeat(self.neurons, 1)
        layer.weight.copy_(weight)
        layer.bias.zero_()
        if self.bias == "quantile":
            outputs_without_bias = task.domain.to_model(public.examples).flatten(1) @ layer.weight.T  # (n, h)
            layer.bias.copy_(-outputs_without_bias.quantile(1 - 1 / self.expected_batch_size, dim=0))
        return model

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        layer = require_pixel_layer(observation.model, observation.task, self.name)
        least = self._resolution(observation, layer, rng) if self.neurons > 1 else 0.0
        return invert_rows(observation, layer, self.neurons, least)

    def _resolution(self, observation: Observation, layer: nn.Linear, rng: torch.Generator) -> float:
        """The s_2 / s_1 that pairs of public examples on one group of neurons have at least."""
        inputs = public_inputs(observation)
        labels = torch.randint(observation.task.num_classes, (len(inputs),), generator=rng).to(inputs.device)
        grads = output_gradients(observation.model, layer, inputs)[torch.arange(len(inputs)), labels]  # (m, h)
        groups = grads[:, : grads.shape[1] // self.neurons * self.neurons].unflatten(1, (self.neurons, -1))
        found = []
        for group in groups.unbind(2):  # (m, R)
            active = group.abs().sum(1) > 0
            if active.sum() > 1:
                found.append(resolution(inputs[active], group[active]))
        return min(found, default=0.0)
