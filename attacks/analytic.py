"""The image in a biased first layer. Phong, Aono, Hayashi, Wang, Moriai, IEEE TIFS 2018. https://eprint.iacr.org/2017/715

    x = (dL/dW_k) / (dL/db_k)            for every neuron k that one image alone has reached

Of a single image every neuron says so. Of a batch, an ordinary ReLU layer tells the images that are alone on a neuron,
to a server that changed nothing.
"""

import torch
from torch import Tensor, nn

from attacks.base import Attack, register
from attacks.linear import alone_on_a_neuron, divide_rows, require_pixel_layer
from federated.wire import Observation, Recipe, Reconstruction, Task


@register("analytic")
class Analytic(Attack):
    """Weight gradient over bias gradient of a fully connected first layer: what it leaks without any malice."""

    paper = "Phong et al.: Privacy-Preserving Deep Learning via Additively Homomorphic Encryption. TIFS 2018"
    threat = "honest-but-curious"
    instant = True
    wants_model = "fc2"

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        super().check(model, task, recipe, kind, num_examples)
        require_pixel_layer("analytic", model, task, bias=True)

    def ceiling(self, model: nn.Module, task: Task, images: Tensor) -> Tensor:
        return alone_on_a_neuron(require_pixel_layer("analytic", model, task), task.to_model(images))

    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        return divide_rows(seen, require_pixel_layer("analytic", seen.model, seen.task, bias=True))
