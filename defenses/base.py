"""Defences: what clients and server do so that an update gives away less.

A defence is one file of this folder with a frozen dataclass whose fields are its parameters. It acts through hooks,
each at the place where a real client or server acts. It is public knowledge, as the training recipe is: `counter` says
what an attacker who knows the defence and its parameters does differently.
"""

import math
import re
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from core.errors import UsageError
from core.hyperparameters import hyperparameters
from core.protocol import Batch, Update
from core.registry import Registry

Tensors = tuple[Tensor, ...]  # one per parameter, in the order of model.parameters()
Gradient = tuple[Tensor | None, ...]  # likewise; None for a frozen or unused parameter
D = TypeVar("D", bound="type[Defense]")


@dataclass(frozen=True)
class Variable:
    """A variable that is optimised together with the examples.

    init: its start value, any shape. step: its learning rate. project: maps its value to the nearest valid one.
    """

    init: Tensor
    step: float
    project: Callable[[Tensor], Tensor] = lambda value: value


@dataclass(frozen=True)
class Counter:
    """What an attacker who knows a defence does differently.

    forward: the deterministic, differentiable part of the defence; the attacker applies it to the simulated update.
    weights: per entry of an update, how much it counts in the distance between two updates. noise: the standard
    deviation of the noise on an entry, None if unknown. variables: unknowns of the defence, which are optimised with
    the examples and passed to `forward` behind the tensors.
    """

    forward: Callable[..., Tensors] = lambda tensors, *variables: tuple(tensors)
    weights: Callable[[Tensors], Tensors] | None = None
    noise: float | None = 0.0
    variables: tuple[Variable, ...] = ()


class Defense(ABC):
    """A defence that does nothing: override the hooks where yours acts."""

    name: ClassVar[str]  # set by `register`
    citation: ClassVar[str]

    def on_model(self, model: nn.Module) -> nn.Module:
        """The model a client trains, from the one it received (its own copy)."""
        return model

    def on_batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The examples and labels a client computes on, from its own."""
        return batch

    def on_gradient(self, gradient: Callable[[], Gradient], rng: torch.Generator) -> Gradient:
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

    def on_model(self, model: nn.Module) -> nn.Module:
        for step in self.steps:
            model = step.on_model(model)
        return model

    def on_batch(self, batch: Batch, rng: torch.Generator) -> Batch:
        for step in self.steps:
            batch = step.on_batch(batch, rng)
        return batch

    def on_gradient(self, gradient: Callable[[], Gradient], rng: torch.Generator) -> Gradient:
        for step in self.steps:
            gradient = _applied(step, gradient, rng)
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
        """The steps' forward functions in order.

        Noise before a step without noise is left out (0): clipped noise, for example, is not Gaussian noise of known
        size. Weights apply if one step alone has them.
        """
        counters = [step.counter() for step in self.steps]
        noise: float | None = 0.0
        for own in counters:
            if own.noise is None or noise is None:
                noise = None
            else:
                noise = math.hypot(noise, own.noise) if own.noise else 0.0
        weights = [own.weights for own in counters if own.weights is not None]
        assert len(weights) <= 1, "two defences that both weight entries cannot be countered together"
        counts = [len(own.variables) for own in counters]

        def forward(tensors: Tensors, *variables: Tensor) -> Tensors:
            rest = list(variables)
            for own, count in zip(counters, counts, strict=True):
                tensors = own.forward(tensors, *rest[:count])
                rest = rest[count:]
            return tuple(tensors)

        variables = tuple(v for own in counters for v in own.variables)
        return Counter(forward, weights[0] if weights else None, noise, variables)


def _applied(step: Defense, gradient: Callable[[], Gradient], rng: torch.Generator) -> Callable[[], Gradient]:
    return lambda: step.on_gradient(gradient, rng)


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
        values = ", ".join(f"{field.name}={getattr(step, field.name)!r}" for field in fields(step))  # type: ignore[arg-type]
        steps.append(f"{step.name}({values})")
    return "+".join(steps) or "none"


def _parse_step(text: str) -> Defense:
    called = re.fullmatch(r"\s*(\w*)\s*(?:\((.*)\)|=(.*))?\s*", text)
    if called is None:
        raise UsageError(f"`defense`: cannot read {text!r}; write name(parameter=value), as in clip(bound=1.0)")
    name, inside, short = called.groups()
    cls = DEFENSES.find(name)
    declared = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    usage = f"{name}({', '.join(f'{key}={field.default}' for key, field in declared.items())})"
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
        return type(like)(text)  # type: ignore[call-arg]
    except (ValueError, KeyError):
        raise UsageError(f"`defense`: {name} cannot take {text!r}; write {usage}") from None
