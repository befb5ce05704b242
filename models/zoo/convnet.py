"""Plain convolutional networks, from FedAvg and from Inverting Gradients."""

from torch import nn

from models.zoo.layers import activation_layer, norm_layer, with_head
from models.zoo.registry import Shape, model


@model("cnn", smallest=4)
def cnn(
    image_shape: Shape,
    num_classes: int,
    *,
    activation: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    """FedAvg's CNN. McMahan et al., AISTATS 2017, section 3. https://arxiv.org/abs/1602.05629

    Two 5x5 convolutions (32 and 64 channels, padded, each with a 2x2 max pool), 512 units, the head: the paper's
    1,663,370 parameters at 1x28x28 and 10 classes. The paper has neither norm nor dropout; both are off by default.
    """
    channels, height, width = image_shape
    body: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64)):
        body += [nn.Conv2d(inputs, outputs, 5, padding=2), norm_layer(norm, outputs)]
        body += [activation_layer(activation), nn.MaxPool2d(2)]
    features = 64 * (height // 4) * (width // 4)  # 3136 at 28x28
    body += [nn.Flatten(), nn.Linear(features, 512), activation_layer(activation)]
    return with_head(body, 512, num_classes, dropout)


@model("convnet64", smallest=9)
def convnet64(
    image_shape: Shape,
    num_classes: int,
    *,
    activation: str = "relu",
    norm: str = "batch",
) -> nn.Module:
    """Inverting Gradients' ConvNet64. Geiping et al., NeurIPS 2020. https://arxiv.org/abs/2003.14053

    Eight 3x3 convolutions with BatchNorm and ReLU, a 3x3 max pool after the sixth and the eighth, the head. The
    authors' inversefed/nn/models.py lists nine, but two have the key "conv6", so only one of these two is built.
    """
    channels, height, width = image_shape
    body: list[nn.Module] = []
    for block, outputs in enumerate((64, 128, 128, 256, 256, 256, 256, 256)):
        body += [nn.Conv2d(channels, outputs, 3, padding=1), norm_layer(norm, outputs), activation_layer(activation)]
        body += [nn.MaxPool2d(3)] if block in (5, 7) else []
        channels = outputs
    features = 256 * (height // 9) * (width // 9)  # 2304 at 32x32
    return with_head([*body, nn.Flatten()], features, num_classes)
