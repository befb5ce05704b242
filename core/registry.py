"""Registries: classes and functions by name, filled by decorators and by importing the modules of a package."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from core.errors import UsageError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name. With `package`, its direct modules are imported at the first look-up.

    A module that cannot be imported does not hide the others: its error is stored in `broken` under the module's name
    and is raised when an entry of that name is looked up.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind, self.package = kind, package
        self.broken: dict[str, str] = {}
        self._entries: dict[str, T] = {}
        self._discovered = package is None

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters what it decorates under `name`."""

        def enter(entry: T) -> T:
            self.add(name, entry)
            return entry

        return enter

    def add(self, name: str, entry: T) -> None:
        assert name not in self._entries, f"two entries named {name!r} for one kind: {self.kind}"
        self._entries[name] = entry

    def find(self, name: str) -> T:
        """The entry called `name`. Raises UsageError with the closest names if there is none."""
        self._discover()
        if name in self._entries:
            return self._entries[name]
        if name in self.broken:
            raise UsageError(f"{self.package}/{name}.py cannot be imported: {self.broken[name]}")
        raise UsageError(unknown(self.kind, name, self))

    def __getitem__(self, name: str) -> T:
        self._discover()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        assert self.package is not None
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            if module.ispkg:
                continue
            try:
                importlib.import_module(f"{self.package}.{module.name}")
            except Exception as error:  # a contributor's file may raise anything while it is imported
                self.broken[module.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """The line that says `name` is not one of `names`, and which are close."""
    names = sorted(names)
    close = get_close_matches(name, names)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"unknown {kind} {name!r}{hint}; choose from {', '.join(names)}"
