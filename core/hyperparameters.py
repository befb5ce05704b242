"""Hyperparameters: dataclass fields with a help text, limits, and the value the authors published."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from core.errors import UsageError

T = TypeVar("T")

LARGEST = 1e30  # of a number on the command line: products of a few such numbers must fit in a float32

_COMPARISONS = {
    "ge": (lambda value, bound: value >= bound, "at least"),
    "le": (lambda value, bound: value <= bound, "at most"),
    "gt": (lambda value, bound: value > bound, "above"),
    "lt": (lambda value, bound: value < bound, "below"),
}


def hp(
    default: Any,
    help: str,
    *,
    source: str = "",
    smoke: Any = None,
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
) -> Any:
    """A hyperparameter: its default, a noun phrase that explains it, and its limits.

    `source` says where the default comes from. `smoke` is a small value with which the contract tests show that the
    attack runs. Values outside `ge`, `le`, `gt` and `lt` (as in pydantic) raise UsageError. The authors' own value,
    where it differs, stands in the class attribute `paper` of the class that uses it.
    """
    limits = {name: bound for name, bound in (("ge", ge), ("le", le), ("gt", gt), ("lt", lt)) if bound is not None}
    metadata = {"help": help, "source": source, "smoke": smoke, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def hyperparameters(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that checks the limits of its fields when it is constructed."""
    inherited = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        check_limits(self)
        if inherited is not None:
            inherited(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def check_limits(instance: Any) -> None:
    """Raise UsageError for the first field of a dataclass instance whose value lies outside its limits.

    Without any, a float still has to be finite and at most 1e30 in size: beyond that, float32 overflows.
    """
    for field in dataclasses.fields(instance):
        value, limits = getattr(instance, field.name), field.metadata.get("limits", {})
        for number in value if isinstance(value, tuple) else (value,):
            check_number(field.name, number)
        if value is None or not limits:
            continue
        for name, bound in limits.items():
            holds, words = _COMPARISONS[name]
            if not holds(value, bound):
                raise UsageError(f"`{field.name}` must be {words} {bound:g}, not {value:g}")


def check_number(name: str, value: Any) -> None:
    """Raise UsageError for a float that is not finite or beyond 1e30, and for an integer of more than 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"`{name}` must be a finite number, not {value:g}")
    if isinstance(value, float) and abs(value) > LARGEST:
        raise UsageError(f"`{name}` must be at most {LARGEST:g} in size, not {value:g}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UsageError(f"`{name}` must be below 2^63, not {value}")


def published(cls: type) -> Mapping[str, tuple[Any, str]]:
    """Field name -> (the authors' value, its source), over the `paper` attributes of the class and its bases."""
    found: dict[str, tuple[Any, str]] = {}
    for base in reversed(cls.__mro__):
        values = vars(base).get("paper")
        found |= values if isinstance(values, Mapping) else {}  # a field may be called "paper" as well
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: entry for name, entry in found.items() if name in names}


def paper_values(cls: type[T]) -> T:
    """An instance with every published value in place of the default."""
    return cls(**{name: value for name, (value, _) in published(cls).items()})


def help_of(cls: type, field: "dataclasses.Field[Any]") -> str:
    """The help text of a field, with the source of the default and the published value."""
    text = field.metadata["help"]
    if field.metadata["source"]:
        text += f" [{field.metadata['source']}]"
    if field.name in published(cls):
        value, source = published(cls)[field.name]
        text += f" [--paper: {value}{', ' + source if source else ''}]"
    return text
