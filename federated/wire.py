"""What crosses the wire between a federated client and its server, and nothing else.

Every type here is public knowledge of an honest-but-curious server. True images and true labels have no
type in this file: an attack is handed an `Observation` and cannot name what it does not hold.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class UsageError(Exception):
    """One line for the person at the keyboard: what is wrong and what to do. Ends a command with exit code 2."""


class Batch(NamedTuple):
    """Images and their labels."""

    images: Tensor  # (N, C, H, W) in [0, 1]
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Task:
    """The learning problem, known to everyone who takes part.

    `mean` and `std` (one value per channel) are how the model wants its input: (pixel - mean) / std.
    """

    image_shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = self.image_shape[0]
        assert len(self.mean) == len(self.std) == channels, f"{channels} channels, mean {self.mean}, std {self.std}"
        assert all(s > 0 for s in self.std), f"std {self.std} must be positive"

    def to_model(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] (N, C, H, W) -> the model's input."""
        return (pixels - self._channelwise(self.mean, pixels)) / self._channelwise(self.std, pixels)

    def to_pixels(self, x: Tensor) -> Tensor:
        """The model's input (N, C, H, W) -> pixels, not clamped."""
        return x * self._channelwise(self.std, x) + self._channelwise(self.mean, x)

    @staticmethod
    def _channelwise(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


@dataclass(frozen=True)
class Recipe:
    """The local training the server orders from every client: SGD or Adam on minibatches. It never holds a label.

    `lr_schedule` is how the rate falls within a round's T steps, from `lr` on: not at all, along half a cosine, or to a
    tenth at 1/2 and again at 3/4 of them. Adam's other settings are torch's own; it has no use for `momentum`.
    `model_mode` says how BatchNorm and dropout behave while the client computes ("train" in real training,
    "eval" in most of the gradient-inversion literature). `defense` is what clients do to an update before they send it:
    (tensors, rng) -> tensors, and without an rng the part of it that draws nothing.
    """

    batch_size: int
    local_epochs: int = 1
    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    model_mode: Literal["eval", "train"] = "eval"
    defense: Callable[..., tuple[Tensor, ...]] | None = None

    def steps(self, num_examples: int) -> int:
        """T, the number of steps a client with `num_examples` images takes."""
        return self.local_epochs * math.ceil(num_examples / self.batch_size)

    def batches(self, num_examples: int, rng: torch.Generator | None = None) -> list[Tensor]:
        """The T minibatches as index tensors: shuffled anew each epoch by `rng`, or in order without one.

        A client shuffles with its own `rng`; a server, which does not know the order, simulates without.
        The last batch of an epoch is short when `batch_size` does not divide `num_examples`.
        """
        schedule: list[Tensor] = []
        for _ in range(self.local_epochs):
            order = torch.arange(num_examples) if rng is None else torch.randperm(num_examples, generator=rng)
            schedule += order.split(self.batch_size)
        return schedule

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each of T steps."""
        if self.lr_schedule == "cosine":
            return [self.lr * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
        if self.lr_schedule == "step":
            return [self.lr * 0.1 ** ((2 * t >= steps) + (4 * t >= 3 * steps)) for t in range(steps)]
        return [self.lr] * steps

    def gradient_weights(self, steps: int) -> list[float]:
        """The weight with which each of T gradients enters the update: gradient s moves lr_t momentum^(t-s) at step t.

        Adam moves a weight by about its rate, whatever the gradient's size: its rates stand in, and divided by their
        sum a delta is a mean direction, whose entries are about one at the most, and no gradient.
        """
        rates = self.rates(steps)
        if self.optimizer == "adam":
            return rates
        return [sum(rate * self.momentum**k for k, rate in enumerate(rates[s:])) for s in range(steps)]

    def gradient_mass(self, num_examples: int) -> float:
        """Sum of the weights with which the T gradients enter the update, so that delta / mass is a mean gradient.

        At a constant rate without momentum it is lr * T.
        """
        return sum(self.gradient_weights(self.steps(num_examples)))


@dataclass(frozen=True)
class Update:
    """The one message a client sends.

    kind "gradient": `tensors` is dL/dW of one batch. kind "delta": W_before - W_after of local training, which
    points the way a gradient does. Both in the order of `model.parameters()`. `buffers` are the running
    statistics a real client uploads with its weights; `num_examples` is the FedAvg weight.
    """

    kind: Literal["gradient", "delta"]
    tensors: tuple[Tensor, ...]
    num_examples: int
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """All an attack gets.

    `model` is a private copy of what was broadcast, `public` the auxiliary images every party may own, disjoint
    from all victims. `granted` holds oracle facts by name; it is empty unless `--grant` hands some over, and
    whatever stands in it is named in every row of the results.
    """

    task: Task
    recipe: Recipe
    model: nn.Module
    update: Update
    public: Batch
    granted: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reconstruction:
    """What an attack claims the private images were.

    `trace` is the attack's own objective over time, never a metric against the truth. `status` is "diverged" when
    no run of the optimiser stayed finite and made progress; such a reconstruction is scored all the same.
    `sources` are what a method found before it guessed their sign, scale and offset, one for each of the `images`; they
    are scored apart, as oracles.
    """

    images: Tensor  # (M, C, H, W) in [0, 1]
    labels: Tensor | None = None  # (M,) int64
    trace: tuple[float, ...] = ()
    iterations: int = 0
    restarts: int = 0
    status: Literal["ok", "diverged"] = "ok"
    sources: Tensor | None = None  # (M, C, H, W), in the units of the model's input
