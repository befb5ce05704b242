"""Files that are written whole or not at all, and short digests."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIGEST_LENGTH = 12  # hexadecimal digits


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` writes: a reader sees the old file or the new one, never a part of it.

    `write` is given a temporary path beside `path`, with ".tmp" behind its name; a writer that chooses the format by
    the suffix must be told the format. The content is on the disk before the name changes. Whatever `write` raises is
    raised, and `path` is then unchanged. Two processes must not write the same path at the same time.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; what JSON does not know, such as a path, is written as a string."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def digest(content: Any) -> str:
    """12 hexadecimal digits that depend on every value in `content` but not on the order of a mapping's keys.

    `content` is what JSON can hold; anything else in it counts as its string.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]
