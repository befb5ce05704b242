"""The parts that trained generators share: their configuration, training images, encoder and decoder.

A new kind of generator is a file of this folder with a `Generator` and, under `@register(...)`, its `Trainer`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.protocol import Batch
from core.registry import Registry
from models.generators.base import Generator
from models.zoo.registry import Shape

LABEL_DIM = 16  # entries of a class's embedding
OutputNormalization = Literal["half", "dataset"]
T = TypeVar("T", bound="type[Trainer]")


@dataclass(frozen=True)
class GeneratorConfig:
    """Which generator to train, and how.

    kind: a name in `KINDS`. latent_dim: number of latents of an image. steps: steps of the generator's optimiser.
    width: channels before the last layer; inner layers have up to four times as many. output_normalization: units of
    the last layer, "half" (tanh about mid-grey) or "dataset" (mean and std of the public images). seed: of the initial
    weights and of all draws. batch_size: images of a training step.
    """

    kind: str
    latent_dim: int
    steps: int
    width: int
    output_normalization: OutputNormalization = "half"
    seed: int = 0
    batch_size: int = 64


class Trainer(ABC):
    """The training of one generator. It draws from the given `rng` only, so it can be resumed between two steps.

    Constructed as `trainer(config, public, classes)`, it builds `generator` with weights from torch's global stream.
    """

    generator_class: ClassVar[type[Generator]]  # constructed as generator_class(config, image_shape, classes)
    generator: Generator

    @abstractmethod
    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Everything that training changes, by name: what a checkpoint holds."""

    @abstractmethod
    def steps(self, start: int, rng: torch.Generator) -> Iterator[float]:
        """Train from step `start` to the last one; yields the loss after each step."""

    def finish(self) -> None:
        """Called once after the last step."""
        return None


class Kind(NamedTuple):
    """A kind of generator that has to be trained, with its default number of steps and width."""

    trainer: type[Trainer]
    steps: int
    width: int


KINDS: Registry[Kind] = Registry("generator", package="models.generators")


def register(name: str, *, steps: int, width: int) -> Callable[[T], T]:
    """Enter a trainer's kind of generator under `name`, with its default number of steps and width."""

    def enter(trainer: T) -> T:
        KINDS.add(name, Kind(trainer, steps, width))
        return trainer

    return enter


@torch.no_grad()
def fill_unseen_embeddings(embedding: nn.Embedding, labels: Tensor) -> None:
    """Give each class that is not among `labels` (M,) the mean embedding of the classes that are."""
    unseen = torch.bincount(labels, minlength=embedding.num_embeddings) == 0  # (classes,)
    embedding.weight[unseen] = embedding.weight[~unseen].mean(0)


class PixelScaler(nn.Module):
    """Converts between pixels in [0, 1] and the units of a generator's last layer: (pixel - mean) / std per channel."""

    mean: Tensor  # (C, 1, 1)
    std: Tensor  # (C, 1, 1)

    def __init__(self, channels: int, output_normalization: OutputNormalization) -> None:
        super().__init__()
        self.activation: nn.Module = nn.Tanh() if output_normalization == "half" else nn.Identity()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.5))

    def fit(self, public: Batch) -> None:
        """Set mean and std to those of the public images, for "dataset" only."""
        if isinstance(self.activation, nn.Identity):
            self.mean.copy_(public.examples.mean((0, 2, 3)).view(-1, 1, 1))
            self.std.copy_(public.examples.std((0, 2, 3)).clamp(min=1e-3).view(-1, 1, 1))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) -> the last layer's units."""
        return (pixels - self.mean) / self.std

    def to_pixels(self, outputs: Tensor) -> Tensor:
        """The inverse of `normalize`; the result may lie outside [0, 1]."""
        return outputs * self.std + self.mean


def num_upsamplings(shape: Shape) -> int:
    """How often a map with sides of at most 4 has to be doubled to cover an image of `shape` (C, H, W)."""
    return max(1, math.ceil(math.log2(max(shape[1:]) / 4)))


def channel_widths(config: GeneratorConfig, shape: Shape) -> list[int]:
    """Channels of the layers from the image inwards: w, 2w, 4w, 4w, ..."""
    return [config.width * min(4, 2**k) for k in range(num_upsamplings(shape))]


class UpsamplingDecoder(nn.Module):
    """(N, inputs) -> (N, C, H, W): a linear layer, then transposed convolutions that double height and width."""

    def __init__(self, inputs: int, config: GeneratorConfig, shape: Shape, kernel_size: Literal[2, 4]) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        widths = [*reversed(channel_widths(config, shape)), channels]
        self.start = (widths[0], *(-(-side // 2 ** num_upsamplings(shape)) for side in shape[1:]))
        self.linear = nn.Linear(inputs, math.prod(self.start))
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, kernel_size, 2, (kernel_size - 2) // 2)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2])  # no norm and no ReLU after the last convolution

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(self.linear(z).view(-1, *self.start))[..., : self.height, : self.width]


def conv_encoder(config: GeneratorConfig, shape: Shape, negative_slope: float) -> tuple[nn.Module, int]:
    """Convolutions that halve height and width, (N, C, H, W) -> (N, features), and the number of features."""
    widths = [shape[0], *channel_widths(config, shape)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(negative_slope)]
    net = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        return net, net(torch.zeros(1, *shape)).shape[1]


def augmented_batch(public: Batch, count: int, rng: torch.Generator) -> Batch:
    """`count` public images drawn with replacement, each a random crop of at least 3/4 of the side, resized.

    Images of three channels are mirrored with probability 1/2; images of one channel, which may be digits, are not.
    """
    chosen = torch.randint(len(public.labels), (count,), generator=rng).to(public.labels.device)
    side = 1 - 0.25 * torch.rand(count, 1, generator=rng)  # (N, 1), as a share of the image
    shift = (2 * torch.rand(count, 2, generator=rng) - 1) * (1 - side)  # (N, 2)
    mirror = 1 - 2 * torch.randint(2, (count, 1), generator=rng) if public.examples.shape[1] == 3 else 1
    view = torch.zeros(count, 2, 3)
    view[:, 0, 0], view[:, 1, 1], view[:, :, 2] = (side * mirror)[:, 0], side[:, 0], shift
    images = public.examples[chosen]
    grid = F.affine_grid(view.to(images), list(images.shape), align_corners=False)  # (N, H, W, 2)
    return Batch(F.grid_sample(images, grid, padding_mode="border", align_corners=False), public.labels[chosen])
