"""What clients do to an update before they send it, so that it gives away less.

A defence is a module of this folder with one frozen dataclass, registered by name. It is public knowledge, as the
training recipe it rides on: a server that attacks knows what was done, though not the noise that was drawn.
"""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from federated.wire import UsageError

REGISTRY: dict[str, type["Defense"]] = {}

D = TypeVar("D", bound="type[Defense]")


class Defense(ABC):
    """One step between a client's update and the wire, with one number to set."""

    name: ClassVar[str]
    paper: ClassVar[str]
    noise: float = 0.0  # deviation of what it draws onto an entry

    def __init__(self, strength: float) -> None:
        """Raises UsageError if `strength` is not a positive number."""
        if not (math.isfinite(strength) and strength > 0):
            raise UsageError(f"--defense {self.name} takes a positive number, not {strength:g}")
        self.strength = strength

    @abstractmethod
    def __call__(self, tensors: Sequence[Tensor], rng: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The update's tensors as they are sent, differentiable. `rng` draws noise; without one there is none, which is
        what a server can repeat on updates of its own."""


@dataclass(frozen=True)
class Chain:
    """Defences one after the other."""

    steps: tuple[Defense, ...]

    @property
    def noise(self) -> float:
        """Deviation of what has been drawn onto an entry; 0 where a later step has made something else of it."""
        drawn = 0.0
        for step in self.steps:
            drawn = math.hypot(drawn, step.noise) if step.noise else 0.0
        return drawn

    def __call__(self, tensors: Sequence[Tensor], rng: torch.Generator | None = None) -> tuple[Tensor, ...]:
        for step in self.steps:
            tensors = step(tensors, rng)
        return tuple(tensors)


def register(name: str) -> Callable[[D], D]:
    """Enter a defence in the registry."""

    def enter(cls: D) -> D:
        assert name not in REGISTRY, f"two defences named {name}"
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return enter


def discover() -> dict[str, type[Defense]]:
    """Import every module of this folder; the registry is complete afterwards."""
    import defenses

    for module in pkgutil.iter_modules(defenses.__path__):
        importlib.import_module(f"defenses.{module.name}")
    return REGISTRY


def parse(text: str) -> Chain | None:
    """ "clip=1.0+gauss=0.01" -> both, in that order; "none" -> None. Raises UsageError for anything else."""
    known = discover()
    if text == "none":
        return None
    steps = []
    for part in text.split("+"):
        name, _, strength = part.partition("=")
        if name not in known:
            raise UsageError(
                f"unknown defence {name!r}: --defense takes none or {', '.join(sorted(known))}, as in clip=1.0"
            )
        try:
            steps.append(known[name](float(strength)))
        except ValueError:
            raise UsageError(f"--defense {name} takes a number, as in {name}=0.1, not {part!r}") from None
    return Chain(tuple(steps))
