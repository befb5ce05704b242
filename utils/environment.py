"""Whether this Python has what a program needs, before anything that takes long is imported."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def require_modules(names: Sequence[str], advice: str) -> None:
    """End the program with one line and exit code 2 if a module is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}: {advice}", file=sys.stderr)
        raise SystemExit(2)
