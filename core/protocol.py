"""What a federated server and its clients exchange: every type an attack sees, and nothing else.

An honest-but-curious server knows all that stands in an `Observation`. True examples and labels travel beside it, in
a `Batch` that is never handed to an attack.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.domain import Domain, ImageDomain
from core.errors import UsageError
from core.references import is_reference, resolve
from core.registry import Registry


class Losses(Registry[Any]):
    """Losses by name or by reference. A loss maps logits (N, C) and labels to the mean over examples, a scalar.

    Labels are (N,) int64, or probabilities (N, C) where an attack optimises them.
    """

    def __getitem__(self, name: str) -> Any:
        return resolve(name, "loss") if is_reference(name) else super().__getitem__(name)

    def find(self, name: str) -> Any:
        return self[name] if is_reference(name) else super().find(name)


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels (N,) as one-hot rows (N, C); probabilities as they are."""
    return labels if labels.is_floating_point() else F.one_hot(labels, logits.shape[1]).to(logits)


LOSSES = Losses("loss")
LOSSES.add("cross_entropy", F.cross_entropy)
LOSSES.add("label_smoothing", lambda logits, y: F.cross_entropy(logits, y, label_smoothing=0.1))
LOSSES.add("nll", lambda logits, y: -(_probabilities(logits, y) * logits).sum(1).mean())
LOSSES.add("bce", lambda logits, y: F.binary_cross_entropy_with_logits(logits, _probabilities(logits, y)))
LOSSES.add("mse", lambda logits, y: F.mse_loss(logits, _probabilities(logits, y)))


@LOSSES.register("next_token")
def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of token p + 1 under the logits (N, vocabulary, L) of position p, for all p but the last."""
    return F.cross_entropy(logits[..., :-1], ids[:, 1:])


Kind = Literal["gradient", "delta"]
MAX_STEPS = 1_000_000  # local steps of a client in a round


class Batch(NamedTuple):
    """Examples and their labels."""

    examples: Tensor  # (N, *shape) in the domain's units: images have pixels in [0, 1], sentences are int64 ids
    labels: Tensor  # (N,) int64

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.examples.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """The learning problem, known to everyone who takes part."""

    domain: Domain
    num_classes: int


def image_task(
    shape: tuple[int, int, int],
    num_classes: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Task:
    """A task on images (C, H, W) with pixels in [0, 1]; without `mean` and `std` the model takes them as they are."""
    channels = shape[0]
    return Task(ImageDomain(shape, mean or (0.0,) * channels, std or (1.0,) * channels), num_classes)


@dataclass(frozen=True)
class Recipe:
    """The local training that the server orders from every client. It holds data only, and never a label.

    lr_schedule: how the rate changes within a round's T steps: constant, half a cosine, or x 0.1 at 1/2 and again at
    3/4 of them. Adam's other settings are torch's own. model_mode: how BatchNorm and dropout behave while the client
    computes ("train" in real training, "eval" in most of the gradient-inversion literature). loss: a name in `LOSSES`.
    defense: what clients do to protect an update, as `defenses.parse` reads it: "clip(bound=1.0)+gauss(sigma=0.01)".
    """

    batch_size: int
    local_epochs: int = 1
    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    model_mode: Literal["eval", "train"] = "eval"
    loss: str = "cross_entropy"
    defense: str = "none"

    def targets(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What the loss compares the model's outputs with: the labels or, of a language model, its own inputs."""
        return inputs if self.loss == "next_token" else labels

    def steps(self, num_examples: int) -> int:
        """T, the number of steps a client with `num_examples` examples takes. Raises UsageError beyond a million."""
        steps = self.local_epochs * -(-num_examples // self.batch_size)
        if steps > MAX_STEPS:
            raise UsageError(f"{steps} local steps in a round are more than {MAX_STEPS}: lower `local_epochs`")
        return steps

    def batches(self, num_examples: int, rng: torch.Generator | None = None) -> list[Tensor]:
        """The T minibatches as index tensors, shuffled in each epoch by `rng`, or in order without one.

        A client shuffles with its own `rng`; a server, which does not know the order, simulates without. The last
        batch of an epoch is short when `batch_size` does not divide `num_examples`.
        """
        schedule: list[Tensor] = []
        for _ in range(self.local_epochs):
            order = torch.arange(num_examples) if rng is None else torch.randperm(num_examples, generator=rng)
            schedule += order.split(self.batch_size)
        return schedule

    def learning_rates(self, steps: int) -> list[float]:
        """The learning rate of each of T steps."""
        if self.lr_schedule == "cosine":
            return [self.lr * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
        if self.lr_schedule == "step":
            return [self.lr * 0.1 ** ((2 * t >= steps) + (4 * t >= 3 * steps)) for t in range(steps)]
        return [self.lr] * steps

    def step_weights(self, steps: int) -> list[float]:
        """The weight of each of the T gradients in the update: gradient s moves lr_t momentum^(t-s) at step t.

        Adam moves a weight by about its learning rate, whatever the size of the gradient, so the weight of each
        gradient is its learning rate. A delta divided by the sum of weights is then a mean direction with entries of
        about one at most, not a gradient.
        """
        rates = self.learning_rates(steps)
        if self.optimizer == "adam":
            return rates
        return [sum(rate * self.momentum**k for k, rate in enumerate(rates[s:])) for s in range(steps)]

    def total_step_weight(self, num_examples: int) -> float:
        """The sum of `step_weights`: delta / sum is a mean gradient. Without momentum and schedule it is lr * T."""
        return sum(self.step_weights(self.steps(num_examples)))


@dataclass(frozen=True)
class Update:
    """The one message a client sends.

    kind "gradient": `tensors` is dL/dW of one batch. kind "delta": W_before - W_after of local training, which points
    the way a gradient does. Both by parameter name. `buffers` are the running statistics that a real client uploads
    with its weights; `num_examples` is the FedAvg weight.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    num_examples: int
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def ordered(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The tensors in the order of `model.parameters()`.

        Raises UsageError if a parameter has no tensor, if a tensor has another shape than its parameter, or if a
        tensor belongs to no parameter.
        """
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, shape in expected.items():
            if name not in self.tensors:
                raise UsageError(f"the update does not fit the model: it has no tensor {name}")
            if tuple(self.tensors[name].shape) != shape:
                received = tuple(self.tensors[name].shape)
                raise UsageError(f"the update does not fit the model: {name} has shape {received}, not {shape}")
        unknown = sorted(set(self.tensors) - set(expected))
        if unknown:
            raise UsageError(f"the update does not fit the model: the model has no parameter {unknown[0]}")
        return tuple(self.tensors[name] for name in expected)


def by_name(model: nn.Module, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors in the order of `model.parameters()` -> the same by parameter name."""
    return dict(zip((name for name, _ in model.named_parameters()), tensors, strict=True))


@dataclass(frozen=True)
class Observation:
    """All that an attack is given.

    model: a private copy of what was broadcast. public: auxiliary examples that any party may own, disjoint from all
    victims, or None. aggregate: the number of clients whose weighted mean `update` is. granted: oracle facts by name,
    empty unless `--grant` hands some over; whatever stands in it is named in every row of the results. earlier: what
    the server saw of the same client, with the same examples, in earlier rounds, if it accumulates evidence.
    """

    task: Task
    recipe: Recipe
    model: nn.Module
    update: Update
    public: Batch | None = None
    granted: Mapping[str, Tensor] = field(default_factory=dict)
    aggregate: int = 1
    earlier: tuple["Observation", ...] = ()


@dataclass(frozen=True)
class Reconstruction:
    """The examples and labels that an attack returns.

    trace: the attack's own objective over its iterations, never a metric against the truth. status: "diverged" if no
    run of the optimiser stayed finite and made progress; such a reconstruction is scored all the same. sources: unmixed
    examples before sign, scale and offset are resolved, in the units of the model's input; they are scored separately,
    by an oracle metric. certainty: the probability that each cell of a table is right, by the attack itself.
    """

    examples: Tensor  # (M, *shape), valid in the domain
    labels: Tensor | None = None  # (M,) int64
    trace: tuple[float, ...] = ()
    iterations: int = 0
    restarts: int = 0
    status: Literal["ok", "diverged"] = "ok"
    sources: Tensor | None = None  # (M, *shape)
    certainty: Tensor | None = None  # (M, columns), in [0, 1]

    @property
    def images(self) -> Tensor:
        """The examples of an image task: (M, C, H, W) with pixels in [0, 1]."""
        return self.examples
