"""The contract every attack signs, and the registry it signs into.

An attack is a frozen dataclass: its fields are the paper's hyperparameters, the flags of the command line and the
row in config.json, all at once. Adding one takes a file in this folder with a class under `@register("name")`, and
its shell files.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from federated.wire import Batch, Observation, Recipe, Reconstruction, Task, Update, UsageError
from utils.cli import settings

REGISTRY: dict[str, type["Attack"]] = {}

A = TypeVar("A", bound="type[Attack]")
R = TypeVar("R")


class Attack(ABC):
    """What a server does with an update it received."""

    name: ClassVar[str]  # of its command line and result folders; `register` sets it
    paper: ClassVar[str]
    threat: ClassVar[Literal["honest-but-curious", "malicious-parameters", "malicious-architecture"]]
    max_images: ClassVar[int | None] = None  # the most private images behind one update the method can handle
    instant: ClassVar[bool] = False  # answers in well under a second, so that no worker process pays
    reads_adam: ClassVar[bool] = False  # makes sense of the update of a client that trained with Adam
    names_labels: ClassVar[bool] = True  # False: says nothing of labels, not even those it is granted
    wants_model: ClassVar[str] = "lenet"  # a model it applies to, for whoever wants to see it run

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        """Refuse, with a UsageError of one line, what the attack does not apply to. Called before anything runs."""
        if self.max_images is not None and num_examples > self.max_images:
            raise UsageError(
                f"{type(self).__name__} rebuilds at most {self.max_images} image(s) from an update, not "
                f"{num_examples}: lower --batch-size (or --client-images), or choose an attack for batches"
            )
        if kind == "delta" and recipe.optimizer == "adam" and not self.reads_adam:
            raise UsageError(
                f"{type(self).__name__} divides gradients by one another, and Adam sends none: "
                "--client-optimizer sgd, or an attack that matches updates, such as ig_single"
            )

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        """The model as a malicious server would broadcast it; an honest one returns it as it is.

        Called before every broadcast, so it has to cope with a model it has already prepared. `recipe` is the training
        about to be ordered (None: one gradient, of a batch like any).
        """
        return model

    def prepare(self, task: Task, public: Batch, about: Mapping[str, Any]) -> None:
        """Make or find what serves all trials and takes long, such as a trained generator.

        Called once, by the main process, before anything is written. `about` says of what run, for what is kept.
        Raises UsageError for something that does not fit these public images.
        """
        return None

    def companion(self, kind: str) -> "Attack | None":
        """An attack on the same updates, of this kind, whose score stands beside this one's."""
        return None

    def floor(self, task: Task, public: Batch, truth: Batch) -> Tensor | None:
        """Images (N, C, H, W): what its search would end at, had it seen the true ones; for scoring only."""
        return None

    def ceiling(self, model: nn.Module, task: Task, images: Tensor) -> Tensor | None:
        """(N,) which of the true images (N, C, H, W) the method can tell apart at all, if it knows; for scoring only.

        The evaluator's side calls it, with the model as broadcast. An attack that answers has the number of its
        candidates and their control scored too: how many unrelated images they would pass for.
        """
        return None

    @abstractmethod
    def reconstruct(self, seen: Observation, rng: torch.Generator) -> Reconstruction:
        """Rebuild the private images. Same inputs, same answer; nothing is written on `seen`."""


def register(name: str) -> Callable[[A], A]:
    """Enter an attack under the name its command line and result folders carry."""

    def enter(cls: A) -> A:
        assert name not in REGISTRY, f"two attacks called {name}"
        assert cls.paper and cls.threat, f"{name} names no paper or no threat model"
        cls.name = name
        REGISTRY[name] = settings(cls)
        return REGISTRY[name]

    return enter


def discover() -> dict[str, type[Attack]]:
    """Import every module of this folder, and return the attacks they registered."""
    import attacks

    for module in pkgutil.iter_modules(attacks.__path__):
        importlib.import_module(f"attacks.{module.name}")
    return REGISTRY


def expect_update(update: Update, model: nn.Module) -> None:
    """The joint between wire and attack: an update has one tensor per parameter, of its shape."""
    shapes = [tuple(p.shape) for p in model.parameters()]
    received = [tuple(t.shape) for t in update.tensors]
    assert shapes == received, f"update {received} does not fit the model {shapes}"


class Progress:
    """Where an attack says how far it is, and whoever runs it listens. It carries nothing back."""

    def __init__(self) -> None:
        self.listener: Callable[[int, int, float], None] = lambda iteration, total, loss: None

    def __call__(self, iteration: int, total: int, loss: float) -> None:
        self.listener(iteration, total, loss)


progress = Progress()


class Checkpoint:
    """Where a long attack puts its state down now and then, and takes it up again after a kill.

    Whoever runs the attack keeps the states; with no keeper nothing is saved, and nothing is ever restored. An attack
    is a sequence of stretches, each from a random stream to a dataclass: those that have ended are remembered by what
    they returned, the one under way by what it last saved. States are tensors, numbers, strings, and lists, tuples
    and dictionaries of them.
    """

    def __init__(self) -> None:
        self.attend(None, lambda: False, lambda state: None)

    def attend(
        self, saved: Mapping[str, Any] | None, due: Callable[[], bool], keep: Callable[[dict[str, Any]], None]
    ) -> None:
        """For the attack about to start: the state it was last left in, whether it is time to save, and where to."""
        self._ended: list[tuple[dict[str, Any], Tensor]] = list(saved["ended"]) if saved else []
        self._open: tuple[dict[str, Any], Tensor] | None = saved["open"] if saved else None
        self._number, self.due, self._keep = 0, due, keep

    def stretch(self, kind: type[R], rng: torch.Generator, work: Callable[[], R]) -> R:
        """`work()`, a dataclass of type `kind`, or what it returned before the kill; `rng` moves on all the same."""
        self._number += 1
        if self._number <= len(self._ended):
            fields, stream = self._ended[self._number - 1]
            rng.set_state(stream.cpu())
            return kind(**fields)
        result = work()
        self._ended.append((dict(vars(result)), rng.get_state()))
        self._open = None
        return result

    def resume(self, rng: torch.Generator) -> dict[str, Any] | None:
        """What the stretch under way last saved before the kill, with `rng` as it was then; None from the start."""
        if self._open is None:
            return None
        (state, stream), self._open = self._open, None
        rng.set_state(stream.cpu())
        return state

    def save(self, rng: torch.Generator, state: dict[str, Any]) -> None:
        """A place to go on from. Call it when `due()`, between two steps of a stretch."""
        self._keep({"ended": self._ended, "open": (state, rng.get_state())})


checkpoint = Checkpoint()
