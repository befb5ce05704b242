"""What the networks are put together from: activations, norms, and the body-dropout-head shape most of them have."""

import math
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from core.registry import Registry

ACTIVATIONS: Registry[Callable[[], nn.Module]] = Registry("activation")
for _name, _activation in {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}.items():
    ACTIVATIONS.add(_name, _activation)

# Two groups per layer: Hsieh et al., The Non-IID Data Quagmire of Decentralized ML, ICML 2020; as in
# Reddi et al., Adaptive Federated Optimization, ICLR 2021, and in the federated baselines that follow them.
NORMS: Registry[Callable[[int], nn.Module]] = Registry("norm")
for _name, _norm in {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(2, channels), channels),
}.items():
    NORMS.add(_name, _norm)


def activation_layer(name: str) -> nn.Module:
    return ACTIVATIONS.find(name)()


def norm_layer(name: str, channels: int) -> nn.Module:
    return NORMS.find(name)(channels)


def with_head(body: list[nn.Module], features: int, num_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """body -> (N, features) -> dropout -> head -> (N, num_classes)."""
    return nn.Sequential(
        OrderedDict(
            body=nn.Sequential(*body),
            dropout=nn.Dropout(dropout),
            head=nn.Linear(features, num_classes),
        )
    )
