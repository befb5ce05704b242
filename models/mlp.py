"""Fully connected networks."""

import math

from torch import nn

from models.layers import activation_layer, with_head
from models.registry import Shape, model


@model("mlp", smallest=1)
def mlp(
    image_shape: Shape, num_classes: int, *, activation: str = "relu", dropout: float = 0.0, width: int = 256
) -> nn.Module:
    """Two hidden layers of `width` units; a default of ours, the width that of `fc2`."""
    body = [
        nn.Flatten(),
        *(nn.Linear(math.prod(image_shape), width), activation_layer(activation)),
        *(nn.Linear(width, width), activation_layer(activation)),
    ]
    return with_head(body, width, num_classes, dropout)


@model("fc2", smallest=1)
def fc2(image_shape: Shape, num_classes: int, *, width: int = 256) -> nn.Module:
    """The Cocktail Party Attack's FC2: d -> 256 -> classes. Kariyappa et al., ICML 2023, authors' src/models.py.

    https://arxiv.org/abs/2209.05578
    """
    body = [nn.Flatten(), nn.Linear(math.prod(image_shape), width), activation_layer("relu")]
    return with_head(body, width, num_classes)
