"""The interface of every attack, and the registry of attacks.

An attack is a frozen dataclass whose fields are the paper's hyperparameters; they are its constructor's arguments, its
command-line flags and a part of config.json. A new attack is a file of this folder with a class under
`@register("name")`, and a shell file for each mode.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from core.domain import Kind as DomainKind
from core.errors import UsageError
from core.hyperparameters import hyperparameters
from core.protocol import Batch, Kind, Observation, Recipe, Reconstruction, Task, Update, by_name, image_task
from core.registry import Registry
from models.inspection import require

Fact = Literal["num_examples", "recipe", "defense", "public"]
Threat = Literal["honest-but-curious", "malicious-parameters", "malicious-architecture"]
MatchingDistance = Callable[[Tensor, Tensor], Tensor]  # examples (N, *shape), labels (N,) -> ()
A = TypeVar("A", bound="type[Attack]")

ATTACKS: Registry[type["Attack"]] = Registry("attack", package="attacks")


class Attack(ABC):
    """What a server does with an update it received.

    threat: what the server is assumed to do. requires: names of `models.inspection.REQUIREMENTS`, and "public" for
    public examples. uses: what the attack reads of an observation besides task, model and update; what is missing there
    changes no result. paper: field name -> (the authors' value, its source), where it differs from our default.
    """

    name: ClassVar[str]  # set by `register`
    citation: ClassVar[str]
    link: ClassVar[str] = ""
    threat: ClassVar[Threat]
    requires: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Fact]] = frozenset({"num_examples", "recipe", "defense"})
    infers_labels: ClassVar[bool] = False  # from the update; of several examples with the help of public ones
    paper: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    supports_adam: ClassVar[bool] = False  # applies to updates of clients that train with Adam
    returns_labels: ClassVar[bool] = True  # False: reconstructions carry no labels, not even granted ones
    kinds: ClassVar[frozenset[DomainKind]] = frozenset({"continuous", "tabular"})  # of examples that it reconstructs
    accumulates: ClassVar[bool] = False  # reads `Observation.earlier`
    trains: ClassVar[bool] = False  # a network of its own, for minutes, before the first reconstruction
    isolates: ClassVar[bool] = False  # seeks the examples of the first client of a sum alone
    singles_out: ClassVar[bool] = False  # seeks the one example that evaluation/bounds.py finds behind the update
    example_model: ClassVar[str] = "lenet"  # a model of the zoo it applies to

    def needs_workers(self) -> bool:
        """Whether a reconstruction takes long enough that worker processes pay off."""
        return True

    def requirements(self) -> frozenset[str]:
        """What this instance requires: `requires`, unless hyperparameters change it."""
        return self.requires

    def knowledge(self, num_examples: int, labels_granted: bool = False) -> frozenset[Fact]:
        """What the attack reads of an update of `num_examples` examples: `uses` and, where it needs them, "public"."""
        infers = self.infers_labels and num_examples > 1 and not labels_granted
        return self.uses | ({"public"} if infers or "public" in self.requirements() else set())

    def check(self, model: nn.Module, task: Task, recipe: Recipe, kind: str, num_examples: int) -> None:
        """Raise UsageError if the attack does not apply. Called before anything runs."""
        if kind == "delta" and recipe.optimizer == "adam" and not self.supports_adam:
            raise UsageError(
                f"{self.name} divides gradients by one another, and an Adam client sends none: choose "
                "`client_optimizer=sgd`, or an attack that matches updates, such as ig_single"
            )
        if task.domain.kind not in self.kinds:
            fitting = ", ".join(name for name, cls in ATTACKS.items() if task.domain.kind in cls.kinds)
            raise UsageError(f"{self.name} does not reconstruct {task.domain.noun[1]}; choose one of {fitting}")
        require(model, task, self.requirements(), self.name)

    def implant(self, model: nn.Module, task: Task, public: Batch, recipe: Recipe | None = None) -> nn.Module:
        """The model as a malicious server broadcasts it; an honest server returns it unchanged.

        Called before every broadcast, so it must accept a model it has already prepared. `recipe` is the training
        about to be ordered (None: one gradient).
        """
        return model

    def personalize(self, model: nn.Module, client: int) -> nn.Module:
        """The model that client number `client` of a sum receives, from what `implant` returned; 0 is the victim.

        An honest server sends everybody the same.
        """
        return model

    def query(
        self, model: nn.Module, ask: Callable[[nn.Module], Update], task: Task, recipe: Recipe
    ) -> tuple[nn.Module, Update]:
        """The model and the update to attack. `ask(model)` is the clients' update for a model, from the same examples.

        `model` is what `implant` returned. An honest server asks once. Both may be made of several answers.
        """
        return model, ask(model)

    def prepare(self, task: Task, public: Batch, metadata: Mapping[str, Any]) -> None:
        """Make or find what all trials share and what takes long, such as a trained generator.

        Called once, by the main process, before anything is written. `metadata` (data set, commit) is stored with
        whatever this builds. Raises UsageError for something that does not fit these public examples.
        """
        return

    def comparison_attack(self, kind: str) -> "Attack | None":
        """Another attack, run on the same updates, whose score is reported beside this one's."""
        return None

    def matching_objective(self, observation: Observation) -> MatchingDistance | None:
        """How well examples explain the update, for the attack's own distance; None if it matches no update.

        The value is 0 where examples (N, *shape) and labels (N,) cause exactly this update, and about 1 where they
        explain nothing of it. Regularisers are left out. None also for a defence with unknowns of its own.
        """
        return None

    @abstractmethod
    def reconstruct(self, observation: Observation, rng: torch.Generator) -> Reconstruction:
        """Rebuild the private examples. Equal inputs give equal results; `observation` is not changed."""

    @final
    def __call__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor] | Iterable[Tensor],
        *,
        input_shape: tuple[int, int, int] | None = None,
        task: Task | None = None,
        num_examples: int | None = None,
        labels: Tensor | None = None,
        public: Batch | tuple[Tensor, Tensor] | None = None,
        recipe: Recipe | None = None,
        kind: Kind = "gradient",
        seed: int = 0,
    ) -> Reconstruction:
        """Attack one update of `model`: `IGSingle(iterations=300)(model, gradients, input_shape=(3, 32, 32))`.

        Args:
            model: the network as it was broadcast. It is not changed.
            gradients: dL/dW by parameter name, or in the order of `model.parameters()`. With kind "delta" the change
                of the weights, before minus after.
            input_shape: (C, H, W) of images with pixels in [0, 1] that the model takes as they are.
            task: instead of `input_shape`, the whole task: domain (normalisation, other kinds of data) and classes.
            num_examples: how many examples are behind the update; default: as many as `labels`, else 1.
            labels: (N,) int64, if the attacker knows them. Otherwise they are inferred.
            public: auxiliary (examples, labels) that do not contain the private ones.
            recipe: the client's training; default: one step on all examples in eval mode.
            kind: "gradient" or "delta".
            seed: of the attack's random numbers.

        Returns:
            A `Reconstruction`: `images` (N, C, H, W) in [0, 1], `labels` (N,), `trace`, `status`.

        Raises:
            UsageError: the attack does not apply; the message names the argument.
        """
        task = task or _infer_task(model, input_shape)
        named = gradients if isinstance(gradients, Mapping) else by_name(model, _counted(model, gradients))
        count = num_examples or (1 if labels is None else len(labels))
        if labels is not None and len(labels) != count:
            raise UsageError(f"`labels` holds {len(labels)} labels for `num_examples={count}`")
        update = Update(kind, {name: t.detach() for name, t in named.items()}, count)
        update.ordered(model)
        recipe = recipe or Recipe(batch_size=count)
        if public is None and "public" in self.requirements():
            raise UsageError(f"{self.name} needs public examples of the same kind: pass `public=(examples, labels)`")
        self.check(model, task, recipe, kind, count)
        granted = {} if labels is None else {"labels": labels.to(update.device)}
        public = None if public is None else Batch(*public)
        observation = Observation(task, recipe, model, update, public, granted)
        return self.reconstruct(observation, torch.Generator().manual_seed(seed))


def register(name: str) -> Callable[[A], A]:
    """Enter an attack under the name of its command line and result folders."""

    def enter(cls: A) -> A:
        assert cls.citation and cls.threat, f"{name} names no citation or no threat model"
        cls.name = name
        decorated = hyperparameters(cls)
        ATTACKS.add(name, decorated)
        return decorated

    return enter


def _infer_task(model: nn.Module, input_shape: tuple[int, int, int] | None) -> Task:
    """An image task with the number of classes that the model has outputs for."""
    if input_shape is None:
        raise UsageError("pass `input_shape=(C, H, W)`, or a `task`")
    parameter = next(model.parameters())
    training = model.training
    with torch.no_grad():
        try:
            outputs = model.eval()(parameter.new_zeros(1, *input_shape))
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"`input_shape={input_shape}` does not fit the model: {reason}") from None
        finally:
            model.train(training)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise UsageError("the model must return logits of shape (N, num_classes)")
    return image_task(input_shape, outputs.shape[1])


def _counted(model: nn.Module, gradients: Iterable[Tensor]) -> list[Tensor]:
    """`gradients` as a list, if there is one for each parameter."""
    found, expected = list(gradients), len(list(model.parameters()))
    if len(found) != expected:
        raise UsageError(f"`gradients` holds {len(found)} tensors, and the model has {expected} parameters")
    if missing := [i for i, g in enumerate(found) if g is None]:
        raise UsageError(f"`gradients` has None at position {missing[0]}: pass zeros for parameters without a gradient")
    return found
