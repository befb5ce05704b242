"""The input of a first layer with bias. Phong, Aono, Hayashi, Wang, Moriai, IEEE TIFS 2018.

https://eprint.iacr.org/2017/715      x = (dL/dW_k) / (dL/db_k)      for every neuron k that x alone has activated

With one example this holds for every neuron. In a batch, an ordinary ReLU layer reveals the examples that are alone on
some neuron, to a server that changes nothing.
"""

import torch

from attacks.base import Attack, register
from attacks.linear.layer import invert_rows, require_pixel_layer
from core.protocol import Observation, Reconstruction


@register("analytic")
class Analytic(Attack):
    """Weight gradient over bias gradient of a fully connected first layer."""

    citation = "Phong et al.: Privacy-Preserving Deep Learning via Additively Homomorphic Encryption. TIFS 2018"
    link = "https://eprint.iacr.org/2017/715"
    threat = "honest-but-curious"
    uses = frozenset({"num_examples", "recipe", "defense"})
    requires = frozenset({"pixel_layer", "pixel_layer_bias"})
    example_model = "fc2"

    def needs_workers(self) -> bool:
        return False

    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        return invert_rows(observation, require_pixel_layer(observation.model, observation.task, self.name))
