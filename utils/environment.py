"""Whether this Python has what a program needs, before anything that takes long is imported."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec


def require_modules(names: Sequence[str], advice: str) -> None:
    """End the program with one line and exit code 2 if a module is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}: {advice}", file=sys.stderr)
        raise SystemExit(2)


def require_working_directory() -> None:
    """End the program with one line and exit code 2 if the working directory was removed: libraries fail without."""
    try:
        os.getcwd()
    except OSError:
        print("error: the working directory does not exist any more: change to another one", file=sys.stderr)
        raise SystemExit(2) from None
