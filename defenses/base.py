"""Defences: what clients and server do so that an update gives away less.

A defence is one file of this folder with a frozen dataclass whose fields are its parameters. It acts through hooks,
each at the place where a real client or server acts. It is public knowledge, as the training recipe is: `counter` says
what an attacker who knows the defence and its parameters does differently.
"""

import math
import re
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from core.errors import UsageError
from core.hyperparameters import hyperparameters
from core.protocol import LOSSES, Batch, Recipe, Task, Update
from core.registry import Registry

Tensors = tuple[Tensor, ...]  # one per parameter, in the order of model.parameters()
Gradient = tuple[Tensor | None, ...]  # likewise; None for a frozen or unused parameter
D = TypeVar("D", bound="type[Defense]")


class Step(Protocol):
    """One local step, as a defence of gradients sees it. Calling it computes the gradient of the mean loss."""

    @property
    def model(self) -> nn.Module:
        """The client's own copy."""

    @property
    def inputs(self) -> Tensor:
        """Model inputs (N, *shape)."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 or (N, num_classes) probabilities."""

    @property
    def recipe(self) -> Recipe:
        """The training that the server ordered."""

    def __call__(self) -> Gradient: ...

    def only(self, chosen: Tensor) -> "Step":
        """The same step on the examples at these indices."""

    def loss(self) -> Tensor:
        """The mean loss, with its graph."""


@dataclass(frozen=True)
class PlainStep:
    """The step of a client without a defence. The loss of each call is appended to `losses`, if given."""

    model: nn.Module
    inputs: Tensor  # (N, *shape)
    labels: Tensor  # (N,) int64 or (N, num_classes)
    recipe: Recipe
    losses: list[float] | None = None

    def loss(self) -> Tensor:
        return LOSSES[self.recipe.loss](self.model(self.inputs), self.labels)

    def __call__(self) -> Gradient:
        """None for a frozen or unused parameter."""
        loss = self.loss()
        if self.losses is not None:
            self.losses.append(loss.item())
        parameters = list(self.model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        grads = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
        return tuple(next(grads) if p.requires_grad else None for p in parameters)

    def only(self, chosen: Tensor) -> "PlainStep":
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen])


@dataclass
class Memory:
    """What a client remembers from one round to the next.

    rounds, steps: the number of rounds that it has finished, and of its local steps in all rounds. kept: what a
    defence stores, by its position among those of the recipe.
    """

    rounds: int = 0
    steps: int = 0
    kept: dict[int, Tensors] = field(default_factory=dict)


@dataclass(frozen=True)
class Variable:
    """A variable that is optimised together with the examples.

    init: its start value, any shape, or a function (model, number of examples) -> start value. step: its learning rate.
    project: maps its value to the nearest valid one.
    """

    init: Tensor | Callable[[nn.Module, int], Tensor]
    step: float
    project: Callable[[Tensor], Tensor] = lambda value: value

    def start(self, model: nn.Module, num_examples: int) -> "Variable":
        """The same variable with a tensor as its start value."""
        return self if isinstance(self.init, Tensor) else replace(self, init=self.init(model, num_examples))


@dataclass(frozen=True)
class Counter:
    """What an attacker who knows a defence does differently.

    forward: the deterministic, differentiable part of the defence; the attacker applies it to the simulated update.
    weights: per entry of an update, how much it counts in the distance between two updates. noise: the standard
    deviation of the noise on an entry, None if unknown. variables: unknowns of the defence, which are optimised with
    the examples and passed behind the other arguments of `forward`, `batch` and `model`. batch: (examples, labels,
    task) -> the examples and labels that the client computes on. model: sets the unknowns of a randomised model in the
    attacker's own copy of it. per_example: what is done to the gradient of each example before the mean. misfit:
    (simulated, observed) -> how unlikely the observed update is, in place of the attack's distance.
    """

    forward: Callable[..., Tensors] = lambda tensors, *variables: tuple(tensors)
    weights: Callable[[Tensors], Tensors] | None = None
    noise: float | None = 0.0
    variables: tuple[Variable, ...] = ()
    batch: Callable[..., tuple[Tensor, Tensor]] | None = None
    model: Callable[..., None] | None = None
    per_example: Callable[[Tensors], Tensors] | None = None
    misfit: Callable[[Tensors, Tensors], Tensor] | None = None

    def start(self, model: nn.Module, num_examples: int) -> "Counter":
        """The same counter, whose variables have tensors as start values."""
        return replace(self, variables=tuple(v.start(model, num_examples) for v in self.variables))


class Defense(ABC):
    """A defence that does nothing: override the hooks where yours acts."""

    name: ClassVar[str]  # set by `register`
    citation: ClassVar[str]

    def on_architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        """The model that the whole federation trains. Called once, before the first broadcast.

        Raises UsageError for a model that the defence does not apply to.
        """
        return model

    def for_client(self, memory: Memory, position: int = 0) -> "Defense":
        """The defence of one client in one round: another one where it depends on what the client remembers."""
        return self

    def on_schedule(self, schedule: list[Tensor], num_examples: int, rng: torch.Generator) -> list[Tensor]:
        """The minibatches of a round, as indices of a client's examples, from those that the recipe orders."""
        return schedule

    def on_model(self, model: nn.Module) -> nn.Module:
        """The model a client trains, from the one it received (its own copy)."""
        return model

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        """The examples and labels a client computes one step on, from its own.

        Labels may be probabilities (N, num_classes) if examples are mixed.
        """
        return batch

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        """The gradient of one local step; `gradient()` computes the plain one."""
        return gradient()

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        """The tensors a client sends, from those of its update."""
        return tensors

    def on_aggregate(self, updates: Sequence[Update]) -> Sequence[Update]:
        """The updates a server sees, from those of a round's clients."""
        return updates

    def counter(self) -> Counter:
        """What an attacker who knows this defence does differently."""
        return Counter()


@dataclass(frozen=True)
class Pipeline(Defense):
    """Defences applied one after the other, in the order given."""

    steps: tuple[Defense, ...] = ()

    def on_architecture(self, model: nn.Module, rng: torch.Generator) -> nn.Module:
        for step in self.steps:
            model = step.on_architecture(model, rng)
        return model

    def for_client(self, memory: Memory, position: int = 0) -> "Pipeline":
        return Pipeline(tuple(step.for_client(memory, k) for k, step in enumerate(self.steps)))

    def on_schedule(self, schedule: list[Tensor], num_examples: int, rng: torch.Generator) -> list[Tensor]:
        for step in self.steps:
            schedule = step.on_schedule(schedule, num_examples, rng)
        return schedule

    def on_model(self, model: nn.Module) -> nn.Module:
        for step in self.steps:
            model = step.on_model(model)
        return model

    def on_batch(self, batch: Batch, task: Task, rng: torch.Generator) -> Batch:
        for step in self.steps:
            batch = step.on_batch(batch, task, rng)
        return batch

    def on_gradient(self, gradient: Step, rng: torch.Generator) -> Gradient:
        for step in self.steps:
            if type(step).on_gradient is not Defense.on_gradient:
                gradient = _DefendedStep(step, gradient, rng)
        return gradient()

    def on_update(self, tensors: Tensors, rng: torch.Generator) -> Tensors:
        for step in self.steps:
            tensors = step.on_update(tensors, rng)
        return tuple(tensors)

    def on_aggregate(self, updates: Sequence[Update]) -> Sequence[Update]:
        for step in self.steps:
            updates = step.on_aggregate(updates)
        return updates

    def counter(self) -> Counter:
        """The steps' functions in order.

        Noise before a step without noise is left out (0): clipped noise, for example, is not Gaussian noise of known
        size. Weights apply if one step alone has them, and a misfit only if its step is the last to change the update.
        """
        counters = [step.counter() for step in self.steps]
        noise: float | None = 0.0
        for own in counters:
            if own.noise is None or noise is None:
                noise = None
            else:
                noise = math.hypot(noise, own.noise) if own.noise else 0.0
        variables = tuple(v for own in counters for v in own.variables)
        ends = list(accumulate(len(own.variables) for own in counters))
        parts = [(own, slice(end - len(own.variables), end)) for own, end in zip(counters, ends, strict=True)]

        def forward(tensors: Tensors, *values: Tensor) -> Tensors:
            for own, mine in parts:
                tensors = own.forward(tensors, *values[mine])
            return tuple(tensors)

        def batch(examples: Tensor, labels: Tensor, task: Task, *values: Tensor) -> tuple[Tensor, Tensor]:
            for own, mine in parts:
                if own.batch is not None:
                    examples, labels = own.batch(examples, labels, task, *values[mine])
            return examples, labels

        def model(module: nn.Module, *values: Tensor) -> None:
            for own, mine in parts:
                if own.model is not None:
                    own.model(module, *values[mine])

        # gradients are defended before updates, whatever the order given
        early = [s for s in self.steps if type(s).on_update is Defense.on_update and s.counter().misfit is not None]
        late = [s for s in self.steps if type(s).on_update is not Defense.on_update]
        misfits = [step.counter().misfit for step in (*early, *late)]
        return Counter(
            forward,
            _only([own.weights for own in counters], "weight entries"),
            noise,
            variables,
            batch if any(own.batch for own in counters) else None,
            model if any(own.model for own in counters) else None,
            _only([own.per_example for own in counters], "change the gradient of each example"),
            misfits[-1] if misfits else None,
        )


F = TypeVar("F")


def _only(functions: Sequence[F | None], what: str) -> F | None:
    """The one function among `functions`, or None. Raises UsageError for two."""
    found = [function for function in functions if function is not None]
    if len(found) > 1:
        raise UsageError(f"two defences that both {what} cannot be countered together: choose `believe=defense=none`")
    return found[0] if found else None


@dataclass(frozen=True)
class _DefendedStep:
    """A local step as the next defence of gradients sees it."""

    defense: Defense
    inner: Step
    rng: torch.Generator

    def __call__(self) -> Gradient:
        return self.defense.on_gradient(self.inner, self.rng)

    def only(self, chosen: Tensor) -> "_DefendedStep":
        return replace(self, inner=self.inner.only(chosen))

    def loss(self) -> Tensor:
        return self.inner.loss()

    @property
    def model(self) -> nn.Module:
        return self.inner.model

    @property
    def inputs(self) -> Tensor:
        return self.inner.inputs

    @property
    def labels(self) -> Tensor:
        return self.inner.labels

    @property
    def recipe(self) -> Recipe:
        return self.inner.recipe


DEFENSES: Registry[type[Defense]] = Registry("defence", package="defenses")


def register(name: str) -> Callable[[D], D]:
    """Enter a defence under the name it has in `--defense` and in a recipe."""

    def enter(cls: D) -> D:
        cls.name = name
        DEFENSES.add(name, hyperparameters(cls))
        return cls

    return enter


@lru_cache(maxsize=256)
def parse(text: str) -> Pipeline:
    """Read a defence such as "clip(bound=1.0)+gauss(sigma=0.01)"; "none" is a pipeline without steps.

    The shorter "clip=1.0+gauss=0.01" sets the first parameter of each. Raises UsageError for anything else.
    """
    if text == "none":
        return Pipeline()
    return Pipeline(tuple(_parse_step(part) for part in re.split(r"\+(?![^()]*\))(?=\s*[A-Za-z_])", text)))


def canonical(text: str) -> str:
    """The one spelling of a defence, with every parameter by name: what config.json and recipes hold."""
    steps = []
    for step in parse(text).steps:
        values = ", ".join(f"{own.name}={getattr(step, own.name)!r}" for own in fields(step))  # type: ignore[arg-type]
        steps.append(f"{step.name}({values})")
    return "+".join(steps) or "none"


def _parse_step(text: str) -> Defense:
    called = re.fullmatch(r"\s*(\w*)\s*(?:\((.*)\)|=(.*))?\s*", text)
    if called is None:
        raise UsageError(f"`defense`: cannot read {text!r}; write name(parameter=value), as in clip(bound=1.0)")
    name, inside, short = called.groups()
    cls = DEFENSES.find(name)
    declared = {own.name: own for own in fields(cls)}  # type: ignore[arg-type]
    usage = f"{name}({', '.join(f'{key}={own.default}' for key, own in declared.items())})"
    given: dict[str, str] = {}
    if short is not None:
        given[next(iter(declared))] = short
    for part in filter(str.strip, (inside or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in declared:
            raise UsageError(f"`defense`: {name} has no parameter {key!r}; write {usage}")
        given[key] = value
    if short is None and inside is None:
        raise UsageError(f"`defense`: {name} needs its parameters; write {usage}")
    values = {key: _convert(name, usage, value, declared[key].default) for key, value in given.items()}
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"`defense`: {name}: {str(error).replace('`', '')}") from None


def _convert(name: str, usage: str, text: str, like: object) -> object:
    """`text` as a value of the type of the parameter's default."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, str):
            return text.strip("'\"")
        return type(like)(text)  # type: ignore[call-arg]
    except (ValueError, KeyError):
        raise UsageError(f"`defense`: {name} cannot take {text!r}; write {usage}") from None
