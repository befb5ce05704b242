"""Files that are written whole or not at all, and digests."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DIGEST_LENGTH = 12  # hexadecimal digits


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` writes: a reader sees the old file or the new one, never a part of it.

    `write` is given a temporary path beside `path`, with ".tmp" behind its name; a writer that chooses the format by
    the suffix must be told the format. The content is on the disk before the name changes, and the new name is on the
    disk before this returns. Whatever `write` raises is raised, and `path` is then unchanged. OSError is raised if
    `path` is a device, a pipe or a socket. Two processes must not write the same path at the same time.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # it would be replaced like a file
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # of `write` is the error to raise
            temporary.unlink()
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically. Raises OSError, whatever made the bytes: on a full disk torch raises other types."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; what JSON does not know, such as a path, is written as a string."""
    write_bytes(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk: a file that was fsynced is found after a loss of power."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(content: Any) -> str:
    """12 hexadecimal digits that depend on every value in `content` but not on the order of a mapping's keys.

    `content` is what JSON can hold; anything else in it counts as its string.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def require_regular(path: Path) -> None:
    """Raise OSError for what is not a regular file: a pipe never ends, and some devices do not either."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a file's content; None if there is no regular file, such as a pipe or a device."""
    if not path.is_file():
        return None
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def seal(folder: Path, names: Sequence[str], seal_name: str) -> None:
    """Write the digests of those files of `folder` that exist, in the file `seal_name` of the folder."""
    found = {name: file_digest(folder / name) for name in names}
    write_json(folder / seal_name, {name: value for name, value in found.items() if value is not None})


def is_sealed(folder: Path, seal_name: str) -> bool:
    """Whether every file that was sealed is unchanged; False without a readable seal."""
    sealed = read_json(folder / seal_name)
    try:
        return bool(sealed) and all(file_digest(folder / name) == value for name, value in sealed.items())
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no regular file, or if another thing stands in it."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file; lines that hold no whole object are left out."""
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
