"""Which attacks apply to a model and a recipe: one line for each, found without running them."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from attacks.base import ATTACKS, Attack
from core.errors import UsageError
from core.protocol import Kind, Recipe, Task
from models.validation import Validation

Verdict = Literal["works", "works in part", "refused"]


@dataclass(frozen=True)
class Applicability:
    """Whether an attack applies, and why not or what limits it."""

    attack: str
    threat: str
    verdict: Verdict
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.attack:<12} {self.verdict}{f': {self.reason}' if self.reason else ''}"


def applicability(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    kind: Kind,
    num_examples: int,
    validation: Validation,
    *,
    public: bool,
    granted: bool = False,
) -> list[Applicability]:
    """One entry for each attack, with its default hyperparameters.

    validation: of this model, by `models.validation.validate`. public: whether the attacker has public examples.
    granted: whether the attacker is given the labels.
    """
    entries = []
    for name, cls in ATTACKS.items():
        attack = cls()
        reason = refusal(attack, model, task, recipe, kind, num_examples, public)
        limits = [] if reason else list(_limits(attack, validation, granted))
        verdict: Verdict = "refused" if reason else "works in part" if limits else "works"
        entries.append(Applicability(name, cls.threat, verdict, reason or "; ".join(limits)))
    return entries


def refusal(
    attack: Attack, model: nn.Module, task: Task, recipe: Recipe, kind: Kind, num_examples: int, public: bool
) -> str | None:
    """Why an attack does not apply; None if it does."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # notes to the user are printed when the attack runs
            attack.check(model, task, recipe, kind, num_examples)
    except UsageError as error:
        return str(error).removeprefix(f"{attack.name} ")
    if "public" in attack.requirements() and not public:
        return "needs public examples"
    return None


def _limits(attack: Attack, validation: Validation, granted: bool) -> Iterator[str]:
    requires = attack.requirements()
    if "double_backward" in requires:
        yield from validation.limits("gradients")
        if not granted:
            yield from validation.limits("labels")
            yield from validation.limits("loss")
    elif requires & {"pixel_layer", "hidden_layer"}:
        yield from validation.limits("gradients", "loss")
    if attack.name == "dlg":
        yield from validation.limits("soft labels")
