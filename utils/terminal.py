"""What a program writes to a terminal: text that every terminal can show, and nothing that a library adds to it."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator

SPELLED = {"±": "+-", "×": "x", "≥": ">=", "≤": "<=", "–": "-", "—": "-", "…": "..."}  # where there is no such sign


def prepare_streams() -> None:
    """Let standard output and error write any text: a sign that their encoding lacks is spelled out, or escaped."""
    codecs.register_error("spelled", _spelled)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the program started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError, ValueError):  # another kind of stream, or a closed one
            getattr(sys, name).reconfigure(errors="spelled")


def printable(text: str) -> str:
    """`text` on one line, with control characters, such as those of escape sequences in a file's name, escaped."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what the process writes to standard error, C libraries included."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(SPELLED.get(c, c) for c in text)
    return plain.encode("ascii", "backslashreplace").decode(), error.end
