"""Fully connected networks."""

import math

from torch import nn

from models.zoo.layers import activation_layer, with_head
from models.zoo.registry import Shape, model


@model("mlp", smallest=1, takes="vectors")
def mlp(
    image_shape: Shape, num_classes: int, *, activation: str = "relu", dropout: float = 0.0, width: int = 256
) -> nn.Module:
    """Two hidden layers of `width` units each. A baseline without a paper; its default width is that of `fc2`."""
    body = [
        nn.Flatten(),
        *(nn.Linear(math.prod(image_shape), width), activation_layer(activation)),
        *(nn.Linear(width, width), activation_layer(activation)),
    ]
    return with_head(body, width, num_classes, dropout)


@model("fc2", smallest=1, takes="vectors")
def fc2(image_shape: Shape, num_classes: int, *, width: int = 256) -> nn.Module:
    """FC2 of the Cocktail Party Attack, d -> 256 -> classes. Kariyappa et al., ICML 2023. https://arxiv.org/abs/2209.05578

    As in the authors' src/models.py.
    """
    body = [nn.Flatten(), nn.Linear(math.prod(image_shape), width), activation_layer("relu")]
    return with_head(body, width, num_classes)
