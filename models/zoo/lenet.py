"""The two LeNets of the gradient-inversion literature."""

import math

from torch import nn

from models.zoo.layers import activation_layer, norm_layer, with_head
from models.zoo.registry import Shape, model


# below 5 the last maps have one pixel, so BatchNorm has nothing to average over for a single image
@model("lenet", smallest=5)
def lenet(
    image_shape: Shape,
    num_classes: int,
    *,
    activation: str = "sigmoid",
    norm: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    """DLG's LeNet. Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019. https://arxiv.org/abs/1906.08935

    Three 5x5 convolutions of 12 channels with sigmoids, then the head. Every weight and bias is drawn from U(-0.5, 0.5)
    as in the authors' models/vision.py; with smaller ones the gradients of the sigmoids vanish. The paper has neither
    norm nor dropout; both are off by default.
    """
    channels, height, width = image_shape
    body: list[nn.Module] = []
    for inputs, stride in ((channels, 2), (12, 2), (12, 1)):
        body += [nn.Conv2d(inputs, 12, 5, stride, padding=2), norm_layer(norm, 12), activation_layer(activation)]
    features = 12 * math.ceil(height / 4) * math.ceil(width / 4)  # 768 at 32x32
    net = with_head([*body, nn.Flatten()], features, num_classes, dropout)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.uniform_(layer.weight, -0.5, 0.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return net


@model("lenet5", smallest=12)
def lenet5(image_shape: Shape, num_classes: int, *, activation: str = "tanh") -> nn.Module:
    """LeNet-5. LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition, 1998.

    Widths 6, 16, 120, 84 and tanh are those of the paper. Its trainable subsampling is an average pool here, its 32x32
    canvas around a 28x28 digit is the padding of the first convolution, and its RBF output is a linear head.
    """
    channels, height, width = image_shape
    features = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)  # 400 at 28x28
    body = [
        *(nn.Conv2d(channels, 6, 5, padding=2), activation_layer(activation), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation_layer(activation), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(features, 120), activation_layer(activation)),
        *(nn.Linear(120, 84), activation_layer(activation)),
    ]
    return with_head(body, 84, num_classes)
