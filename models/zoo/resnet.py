"""Residual networks whose first layer is made for small images: 3x3, stride 1, no max pool.

He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016. https://arxiv.org/abs/1512.03385
Shortcuts that change shape are 1x1 convolutions (option B of the paper, as in Inverting Gradients). Layers have
torchvision's names, so that state dicts of its variants for CIFAR can be loaded.
"""

from collections import OrderedDict

from torch import Tensor, nn

from models.zoo.layers import activation_layer, norm_layer
from models.zoo.registry import Shape, model


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        bias = norm == "none"  # a norm layer has its own shift
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.bn1 = norm_layer(norm, outputs)
        self.act1 = activation_layer(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.bn2 = norm_layer(norm, outputs)
        self.act2 = activation_layer(activation)
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=bias), norm_layer(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(residual + self.downsample(x))


def resnet(
    image_shape: Shape, num_classes: int, width: int, blocks: tuple[int, ...], activation: str, norm: str
) -> nn.Module:
    """A network of `len(blocks)` stages; each after the first halves height and width and doubles the channels."""
    channels = image_shape[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, width, 3, padding=1, bias=norm == "none"),
        bn1=norm_layer(norm, width),
        act1=activation_layer(activation),
    )
    channels = width
    for stage, depth in enumerate(blocks):
        stack = []
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            stack.append(Block(channels, width << stage, stride, activation, norm))
            channels = width << stage
        layers[f"layer{stage + 1}"] = nn.Sequential(*stack)
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, num_classes)}
    net = nn.Sequential(layers)
    # without a norm this initialisation doubles the variance in every block; PyTorch's smaller default is kept
    if norm != "none":
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


# `smallest` is the product of the strides plus one: the last maps then have 2x2 pixels, which BatchNorm averages over


@model("resnet20", smallest=5)
def resnet20(image_shape: Shape, num_classes: int, *, activation: str = "relu", norm: str = "batch") -> nn.Module:
    """The paper's CIFAR network (section 4.2) with n = 3: widths 16, 32, 64."""
    return resnet(image_shape, num_classes, 16, (3, 3, 3), activation, norm)


@model("resnet18", smallest=9)
def resnet18(image_shape: Shape, num_classes: int, *, activation: str = "relu", norm: str = "batch") -> nn.Module:
    """The paper's 18-layer ImageNet network (table 1) with the first layer for small images."""
    return resnet(image_shape, num_classes, 64, (2, 2, 2, 2), activation, norm)


@model("resnet34", smallest=9)
def resnet34(image_shape: Shape, num_classes: int, *, activation: str = "relu", norm: str = "batch") -> nn.Module:
    """The paper's 34-layer ImageNet network (table 1) with the first layer for small images."""
    return resnet(image_shape, num_classes, 64, (3, 4, 6, 3), activation, norm)
