"""Gradient matching: the observed update, and the simulated update of guessed examples.

An attack guesses examples and labels, simulates the update that a client with them would have sent, and moves them
until it equals the update that was observed.
"""

import copy
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from attacks.matching import distances
from attacks.matching.distances import TINY
from core.errors import UsageError
from core.protocol import Observation, Recipe
from defenses.base import Counter, parse
from models.meta import MetaModel
from models.winograd import has_bfloat16

UpdateModel = Literal["auto", "single_step", "unrolled"]
Precision = Literal["auto", "float32", "bfloat16"]

UPDATE_MODEL_HELP = (
    "model of how a weight delta arose: single_step (one gradient), unrolled (the client's local steps), "
    "auto (unrolled if there is more than one step)"
)


class GradientMatcher:
    """An observed update as a target, and the simulation of the update that guessed examples would have caused.

    update_model "single_step": a delta counts as one gradient. It is divided by the total weight with which local
    gradients enter it (lr * T without momentum), and the first-order share of weight decay is subtracted. "unrolled":
    the guess goes through the client's own local steps, and both deltas are divided by the same weight. "auto":
    unrolled if there is more than one step. A gradient is used as it is.
    """

    def __init__(
        self,
        observation: Observation,
        update_model: UpdateModel = "auto",
        batches: Sequence[Tensor] | None = None,
        *,
        fast_convs: bool = False,
        precision: Precision = "float32",
    ) -> None:
        """
        batches: the minibatches of an unrolled client; default: those of the recipe, without its shuffling.
        fast_convs: whether float32 convolutions use Winograd's algorithm where it pays.
        precision: what fast convolutions compute in; auto: bfloat16 where the hardware supports it.
        """
        update, recipe = observation.update, observation.recipe
        tensors = update.ordered(observation.model)
        self.task, self.recipe = observation.task, recipe
        self.num_examples, self.device, self.dtype = update.num_examples, update.device, tensors[0].dtype
        steps = recipe.steps(self.num_examples)
        self.is_gradient = update.kind == "gradient"
        self.unrolled = not self.is_gradient and (update_model == "unrolled" or (update_model == "auto" and steps > 1))
        self.mean_gradient = mean_gradient(observation, tensors)
        self.total_step_weight = recipe.total_step_weight(self.num_examples)
        largest = self.num_examples
        if self.unrolled:
            schedule = recipe.batches(self.num_examples) if batches is None else batches
            self.batches = [b.to(self.device) for b in schedule]
            largest = max(map(len, self.batches))
        fast = fast_convs and self.dtype == torch.float32
        domain = observation.task.domain
        self.checkpoint: bool | None = None  # local steps recomputed in the backward pass; None: where it saves memory
        self.meta = MetaModel(
            observation.model,
            recipe.model_mode,
            loss=recipe.loss,
            fast_convs=domain.to_model(tensors[0].new_zeros(largest, *domain.shape)) if fast else None,
            conv_dtype=torch.bfloat16 if fast and uses_bfloat16(precision, self.device) else None,
        )
        target = tuple(t / self.total_step_weight for t in tensors) if self.unrolled else self.mean_gradient
        self.target = self.meta.to_memory_format(target)

    @cached_property
    def counter(self) -> Counter:
        """What the attacker does about the defence that the recipe names."""
        return parse(self.recipe.defense).counter().start(self.meta.module, self.num_examples)

    def full_precision(self) -> "GradientMatcher":
        """The same matcher, whose fast convolutions compute in float32; itself if they do."""
        meta = self.meta.full_precision()
        if meta is self.meta:
            return self
        other = copy.copy(self)
        other.meta = meta
        return other

    def simulate(self, examples: Tensor, labels: Tensor, *unknowns: Tensor) -> tuple[Tensor, ...]:
        """The update, on the scale of `target`, of a client with these examples (N, *shape) and labels.

        Labels are (N,) int64 or, to be differentiated, probabilities (N, num_classes). `unknowns` are values of the
        defence's own variables (`Counter.variables`).
        """
        batches, count = (self.batches if self.unrolled else []), len(examples)
        if self.counter.batch is not None:
            examples, labels = self.counter.batch(examples, labels, self.task, *unknowns)
            copies = range(0, len(examples), count)  # a defence may append copies of the whole batch
            batches = [torch.cat([batch + start for start in copies]) for batch in batches]
        if self.counter.model is not None:
            self.counter.model(self.meta.module, *unknowns)
        inputs = self.task.domain.to_model(examples)
        if self.unrolled:
            graph = torch.is_grad_enabled()
            delta = self.meta.train(inputs, labels, batches, self.recipe, graph, self.checkpoint)
            return tuple(d / self.total_step_weight for d in self.counter.forward(delta, *unknowns))
        ours = self._gradient(inputs, labels)
        return self.defended(ours if self.is_gradient else self.adam_direction(ours), *unknowns)

    def _gradient(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The mean gradient or, against a defence of each example's gradient, the mean of the defended ones."""
        create_graph, per_example = torch.is_grad_enabled(), self.counter.per_example
        if per_example is None:
            return self.meta.gradient(inputs, labels, create_graph=create_graph)
        pairs = zip(inputs.split(1), labels.split(1), strict=True)
        grads = [per_example(self.meta.gradient(x, y, create_graph=create_graph)) for x, y in pairs]
        return tuple(torch.stack(own).mean(0) for own in zip(*grads, strict=True))

    def defended(self, update: tuple[Tensor, ...], *unknowns: Tensor) -> tuple[Tensor, ...]:
        """The deterministic part of the defence, applied to an update on the scale of `target`."""
        if not parse(self.recipe.defense).steps:
            return update
        scale = 1.0 if self.is_gradient else self.total_step_weight
        return tuple(t / scale for t in self.counter.forward(tuple(scale * t for t in update), *unknowns))

    def adam_direction(self, gradient: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The expected direction of a delta that is matched as one gradient.

        For SGD it is the gradient. Adam's first step is the sign of the gradient, whose derivative is zero. So for Adam
        it is g / (|g| + mean |g| of the layer), which has a derivative: 5 to 10 dB on single images.
        """
        if self.recipe.optimizer == "sgd":
            return gradient
        return tuple(g / (g.abs() + g.abs().mean() + TINY) for g in gradient)

    def squared_distance(self, examples: Tensor, labels: Tensor, *unknowns: Tensor) -> Tensor:
        """DLG's objective, the sum over layers of ||g^ - g*||^2.

        An Adam client's delta that is matched as one gradient has a direction but no size: its objective is the
        cosine distance, scaled to the same units.
        """
        if self.recipe.optimizer == "adam" and not self.unrolled and not self.is_gradient:
            return self.target_norm_sq * self.cosine_distance(examples, labels, *unknowns)
        if self.counter.misfit is not None:
            return self.target_norm_sq * self.counter.misfit(self.simulate(examples, labels, *unknowns), self.target)
        return distances.squared_distance(*self._weighted(self.simulate(examples, labels, *unknowns)))

    def cosine_distance(self, examples: Tensor, labels: Tensor, *unknowns: Tensor) -> Tensor:
        """Inverting Gradients' objective, 1 - <g^, g*> / (||g^|| ||g*||) over all layers as one vector."""
        if self.counter.misfit is not None:
            return self.counter.misfit(self.simulate(examples, labels, *unknowns), self.target)
        return distances.cosine_distance(*self._weighted(self.simulate(examples, labels, *unknowns)))

    def relative_squared_distance(self, examples: Tensor, labels: Tensor) -> Tensor:
        """`squared_distance` over ||g*||^2."""
        return self.squared_distance(examples, labels) / max(self.target_norm_sq, TINY)

    def _weighted(self, ours: tuple[Tensor, ...]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Both sides of a distance, with the entry weights that the defence calls for."""
        if self.counter.weights is None:
            return ours, self.target
        weights = self.counter.weights(self.target)
        return tuple(tuple(w * t for w, t in zip(weights, side, strict=True)) for side in (ours, self.target))  # type: ignore[return-value]

    @property
    def noise(self) -> float:
        """Standard deviation of the defence's noise on an entry of `target`; 0 if there is none or it is unknown."""
        return (self.counter.noise or 0.0) / (1.0 if self.is_gradient else self.total_step_weight)

    @cached_property
    def target_norm_sq(self) -> float:
        """||g*||^2, the squared distance of a guess that causes no update: what losses are relative to."""
        return sum(t.square().sum().item() for t in self.target)


def mean_gradient(observation: Observation, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors that the client has sent, or would have sent, as a mean gradient per example; Adam's has no size."""
    if observation.update.kind == "gradient":
        return tuple(tensors)
    recipe = observation.recipe
    weight = recipe.total_step_weight(observation.update.num_examples)
    decay = recipe.weight_decay if recipe.optimizer == "sgd" else 0.0
    parameters = observation.model.parameters()
    return tuple(t / weight - decay * w.detach() for t, w in zip(tensors, parameters, strict=True))


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def note_adam(recipe: Recipe, kind: str) -> None:
    """One line on standard error where the delta of an Adam client is about to be matched as one gradient."""
    if kind == "delta" and recipe.optimizer == "adam":
        print(
            "note: Adam hides the size of gradients: this attack matches the direction of the update", file=sys.stderr
        )


def check_update_model(update_model: UpdateModel, recipe: Recipe, kind: str, num_examples: int) -> None:
    """Refuse an `update_model` where there is no delta; print `note_adam`'s line where it applies."""
    if update_model != "auto" and kind == "gradient":
        raise UsageError("`update_model` describes how a weight delta arose: it does not apply to a gradient")
    if update_model == "single_step" or (update_model == "auto" and recipe.steps(num_examples) == 1):
        note_adam(recipe, kind)
