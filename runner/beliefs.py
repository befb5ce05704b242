"""What the attacker believes about the client's training, where it differs from the truth (`--believe`)."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from core.errors import UsageError
from core.hyperparameters import check_number
from core.protocol import Recipe, Update
from defenses.base import canonical

# flag name -> field of Recipe
FIELDS = {
    "batch_size": "batch_size",
    "local_epochs": "local_epochs",
    "local_lr": "lr",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "client_optimizer": "optimizer",
    "lr_schedule": "lr_schedule",
    "model_mode": "model_mode",
    "defense": "defense",
}
NUM_EXAMPLES = "client_images"  # how many examples are behind an update


@dataclasses.dataclass(frozen=True)
class Beliefs:
    """Fields of the recipe, and the number of examples, that the attacker believes to be other than they are."""

    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_examples: int | None = None

    def about(self, recipe: Recipe) -> Recipe:
        """The recipe as the attacker believes it to be."""
        return dataclasses.replace(recipe, **self.recipe)

    def of(self, update: Update) -> Update:
        """The update with the number of examples that the attacker believes to be behind it."""
        return update if self.num_examples is None else dataclasses.replace(update, num_examples=self.num_examples)


def parse(words: Sequence[str]) -> Beliefs:
    """("local-lr=0.02", "defense=none") -> beliefs. Raises UsageError for an unknown field or an impossible value."""
    hints = typing.get_type_hints(Recipe)
    recipe: dict[str, Any] = {}
    num_examples = None
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals or name not in (*FIELDS, NUM_EXAMPLES):
            known = ", ".join((*FIELDS, NUM_EXAMPLES)).replace("_", "-")
            raise UsageError(f"`believe` takes FLAG=VALUE with one of {known}, not {word!r}")
        if name == NUM_EXAMPLES:
            num_examples = _convert(name, text, int)
        else:
            recipe[FIELDS[name]] = _convert(name, text, hints[FIELDS[name]])
    if "defense" in recipe:
        recipe["defense"] = canonical(recipe["defense"])
    return Beliefs(recipe, num_examples)


def _convert(name: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise UsageError(f"`believe`: {name} is one of {', '.join(get_args(hint))}, not {text!r}")
        return text
    try:
        value = hint(text)
    except ValueError:
        raise UsageError(f"`believe`: {name} cannot be {text!r}") from None
    if isinstance(value, int | float) and not (value > 0 or (value == 0 and name in ("momentum", "weight_decay"))):
        raise UsageError(f"`believe`: {name} must be positive, not {text}")
    check_number("believe", value)
    return value
