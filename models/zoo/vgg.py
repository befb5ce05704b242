"""VGG-16, the convolutional network that the Cocktail Party Attack was evaluated on."""

from collections import OrderedDict

from torch import nn

from models.zoo.layers import activation_layer, norm_layer
from models.zoo.registry import Shape, model

CONFIGURATION_D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@model("vgg16", smallest=32)
def vgg16(
    image_shape: Shape,
    num_classes: int,
    *,
    activation: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    """VGG-16. Simonyan, Zisserman, ICLR 2015, table 1, column D. https://arxiv.org/abs/1409.1556

    Layer names and initialisation are torchvision's, so that its ImageNet weights can be loaded at 3x224x224 and 1000
    classes (those of its vgg16_bn with norm "batch"). `classifier.0` has 512 inputs at 32x32, and 25088 at 224x224 and
    above. Dropout, 0.5 in the paper, is off by default as in the Cocktail Party authors' src/vgg16.py.
    """
    channels, height, width = image_shape
    features: list[nn.Module] = []
    for widths in CONFIGURATION_D:
        for outputs in widths:
            features.append(nn.Conv2d(channels, outputs, 3, padding=1))
            # without a norm no layer takes its place, so that the numbers of the layers are torchvision's
            features += [norm_layer(norm, outputs)] if norm != "none" else []
            features.append(activation_layer(activation))
            channels = outputs
        features.append(nn.MaxPool2d(2))
    grid = (min(height // 32, 7), min(width // 32, 7))
    net = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(grid),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                *(nn.Linear(512 * grid[0] * grid[1], 4096), activation_layer(activation), nn.Dropout(dropout)),
                *(nn.Linear(4096, 4096), activation_layer(activation), nn.Dropout(dropout)),
                nn.Linear(4096, num_classes),
            ),
        )
    )
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
    return net
