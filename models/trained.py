"""What generators that have to be trained share: the order, the public images as they are shown, and the way up.

A new kind is a module with a `Prior` and a `Trainer`, and a line in models/priors.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federated.wire import Batch
from models.generators import Prior
from models.registry import Shape

LABEL = 16  # numbers that stand for a class
Normalize = Literal["half", "dataset"]


@dataclass(frozen=True)
class Order:
    """What to train; `kind` names a line of models/priors.py."""

    kind: str
    dim: int  # latents of an image
    steps: int  # of the generator's optimiser
    width: int  # channels before the last layer, four times as many at the first
    normalize: Normalize = "half"  # the last layer's units: tanh about mid-grey, or the mean and std of public images
    seed: int = 0
    batch: int = 64


class Trainer(ABC):
    """A generator under training. It draws from the `rng` it is given alone, so that it can stop between two steps."""

    prior: Prior

    @abstractmethod
    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Everything that training changes."""

    @abstractmethod
    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """Trains from step `start` to the last, and says after each step what it makes of it."""

    def finish(self) -> None:
        """What is left to do after the last step."""
        return None


@torch.no_grad()
def level(label: nn.Embedding, seen: Tensor) -> None:
    """Classes without an image among those `seen` (M,) get the mean of what stands for the others."""
    unseen = torch.bincount(seen, minlength=label.num_embeddings) == 0
    label.weight[unseen] = label.weight[~unseen].mean(0)


class Units(nn.Module):
    """Between pixels in [0, 1] and the units a generator's last layer speaks in."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, normalize: Normalize) -> None:
        super().__init__()
        self.last: nn.Module = nn.Tanh() if normalize == "half" else nn.Identity()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.5))

    def fit(self, public: Batch) -> None:
        """Nothing for "half"."""
        if isinstance(self.last, nn.Identity):
            self.mean.copy_(public.images.mean((0, 2, 3)).view(-1, 1, 1))
            self.std.copy_(public.images.std((0, 2, 3)).clamp(min=1e-3).view(-1, 1, 1))

    def scaled(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def pixels(self, made: Tensor) -> Tensor:
        return made * self.std + self.mean


def doublings(shape: Shape) -> int:
    """How often a map of at most four pixels is doubled until it covers the image."""
    return max(1, math.ceil(math.log2(max(shape[1:]) / 4)))


def widths(order: Order, shape: Shape) -> list[int]:
    """Channels from the image inwards: w, 2w, 4w, 4w, ..."""
    return [order.width * min(4, 2**k) for k in range(doublings(shape))]


class Upward(nn.Module):
    """(N, inputs) -> (N, C, H, W) by a linear layer and transposed convolutions, each twice as large."""

    def __init__(self, inputs: int, order: Order, shape: Shape, kernel: Literal[2, 4]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        wide = [*reversed(widths(order, shape)), channels]
        self.start = (wide[0], *(-(-side // 2 ** doublings(shape)) for side in shape[1:]))
        self.linear = nn.Linear(inputs, math.prod(self.start))
        layers: list[nn.Module] = [nn.BatchNorm2d(wide[0]), nn.ReLU()]
        for before, after in pairwise(wide):
            layers += [nn.ConvTranspose2d(before, after, kernel, 2, (kernel - 2) // 2)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2])  # nothing after the last

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(self.linear(z).view(-1, *self.start))[..., : self.height, : self.width]


def downward(order: Order, shape: Shape, slope: float) -> tuple[nn.Module, int]:
    """(N, C, H, W) -> (N, features) by convolutions, each half as large, and how many features that makes."""
    wide = [shape[0], *widths(order, shape)]
    layers: list[nn.Module] = []
    for before, after in pairwise(wide):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(slope)]
    net = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        return net, net(torch.zeros(1, *shape)).shape[1]


def augmented(public: Batch, count: int, rng: torch.Generator) -> Batch:
    """`count` public images, drawn with repetition and cropped to 3/4 of their side or more.

    Colour images are mirrored half of the time; of one channel, they may be digits.
    """
    chosen = torch.randint(len(public.labels), (count,), generator=rng).to(public.labels.device)
    side = 1 - 0.25 * torch.rand(count, 1, generator=rng)
    shift = (2 * torch.rand(count, 2, generator=rng) - 1) * (1 - side)
    mirror = 1 - 2 * torch.randint(2, (count, 1), generator=rng) if public.images.shape[1] == 3 else 1
    view = torch.zeros(count, 2, 3)
    view[:, 0, 0], view[:, 1, 1], view[:, :, 2] = (side * mirror)[:, 0], side[:, 0], shift
    images = public.images[chosen]
    places = F.affine_grid(view.to(images), list(images.shape), align_corners=False)
    return Batch(F.grid_sample(images, places, padding_mode="border", align_corners=False), public.labels[chosen])
