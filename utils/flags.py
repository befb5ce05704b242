"""Command-line flags from dataclasses, by argparse.

Every field becomes a flag: `batch_size: int` is `--batch-size`, and `--batch_size` is accepted as well. Types may be
int, float, str, Path, bool, Literal, any of them or None, and tuples of them, which take several values.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

Field = dataclasses.Field


class FlagError(Exception):
    """One line that says which flag or value cannot be read."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises FlagError instead of ending the process, and never guesses abbreviations."""

    def __init__(self, **options: Any) -> None:
        formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=28)  # noqa: E731
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise FlagError(message.removeprefix("argument "))

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Raises FlagError for an unknown flag, with the closest known one, and for a value of the wrong type."""
        found, unknown = self.parse_known_args([_hyphens(word) for word in words])
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            close = get_close_matches(name, known, n=1) if name.startswith("--") else []
            what = "unknown flag" if name.startswith("-") else "unexpected word"
            self.error(f"{what} {name}{f' (did you mean {close[0]}?)' if close else ''}; --help lists all flags")
        return found


def add_flags(
    parser: Any,
    cls: type,
    help_of: Callable[[type, Any], str],
    switches_only: bool = False,
    show: Callable[[Any], str] = str,
) -> None:
    """Add a flag for each field of a dataclass to a parser or argument group.

    help_of: (class, field) -> help text, to which the default is added. switches_only: booleans are switched on by
    --name alone; otherwise --no-name exists as well. show: a default -> its text in the help.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        text = f"{help_of(cls, field)} {_default(field.default, show)}".replace("%", "%%").strip()
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": field.name}
        parser.add_argument(flag, **options, **_action(hints[field.name], switches_only))


def as_flags(message: str) -> str:
    """Arguments in backticks as flags: "lower `batch_size`" -> "lower --batch-size"."""

    def flag(found: re.Match[str]) -> str:
        value = f" {found[2]}" if found[2] else ""
        return f"--{found[1].replace('_', '-')}{value}"

    return re.sub(r"`([a-z_]+)(?:=([^`]*))?`", flag, message)


def given(cls: type, found: argparse.Namespace) -> dict[str, Any]:
    """The values of `cls`'s fields that stand on the command line."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in vars(found).items() if name in names}


def _action(hint: Any, switches_only: bool) -> dict[str, Any]:
    if get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if hint is bool:
        return {"action": "store_true" if switches_only else argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"nargs": "+", **_action(get_args(hint)[0], switches_only)}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "metavar": "{" + ",".join(map(str, get_args(hint))) + "}"}
    assert hint in (int, float, str, Path), f"no flag for a field of type {hint}"
    return {"type": hint, "metavar": {int: "INT", float: "FLOAT", str: "NAME", Path: "PATH"}[hint]}


def _default(value: Any, show: Callable[[Any], str]) -> str:
    if value is None or value == ():
        return ""
    text = " ".join(map(show, value)) if isinstance(value, tuple) else show(value)
    return f"(default: {text})"


def _hyphens(word: str) -> str:
    """--batch_size=2 -> --batch-size=2."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
