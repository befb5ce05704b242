"""Objects of the user's own code by reference: "package.module:name" or "path/to/file.py:name"."""

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import UsageError
from core.paths import ROOT


def is_reference(text: str) -> bool:
    """Whether `text` names an object of the user's code, and not an entry of a registry."""
    return ":" in text


def resolve(reference: str, argument: str) -> Any:
    """The object that `reference` names. Its module is imported, which runs the user's code.

    The folder of a file goes to the end of `sys.path`, so that the file imports its neighbours and worker processes
    find it. Raises UsageError in the name of `argument` if there is no such object or if the import fails.
    """
    place, _, name = reference.rpartition(":")
    given = f"`{argument}={reference}`"
    if not place or not name.isidentifier():
        raise UsageError(f"{given}: write package.module:name or path/to/file.py:name")
    try:
        module = _import_file(Path(place), given) if place.endswith(".py") else _import_module(place)
    except UsageError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UsageError(f"{given} cannot be imported: {describe(error)}") from None
    if not hasattr(module, name):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"{given}: {place} has no {name}; it has {', '.join(sorted(names)[:20]) or 'no functions'}")
    return getattr(module, name)


def absolute(reference: str) -> str:
    """The reference with the absolute path of its file; a reference to a module is unchanged."""
    place, _, name = reference.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else reference


def source_file(reference: str) -> Path | None:
    """The file that a reference names; None for a reference to a module."""
    place, _, _ = reference.rpartition(":")
    return Path(place).expanduser() if place.endswith(".py") else None


def describe(error: BaseException) -> str:
    """The type and message of an error in the user's code on one line, with the file and line of it that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_own(f.filename)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        message = " ".join(str(error).split())[:200]
    except Exception:  # a user's exception may raise anything when it is printed
        message = ""
    return f"{type(error).__name__}{f': {message}' if message else ''}{where}"


def _is_own(file: str) -> bool:
    """Whether a file is the user's, and neither a library's nor of the rooms that call the user's code."""
    rooms = (ROOT / "core", ROOT / "models")
    return "site-packages" not in file and "importlib" not in file and not any(map(Path(file).is_relative_to, rooms))


def _import_module(name: str) -> ModuleType:
    _append_to_path(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path, given: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"{given}: there is no file {path}")
    if not path.stem.isidentifier():
        raise UsageError(f"{given}: {path.name} is no name of a Python module; rename the file")
    _append_to_path(path.parent)
    module = importlib.import_module(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != path:
        raise UsageError(f"{given}: another module is called {path.stem}; rename the file")
    return module


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
