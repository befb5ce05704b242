"""The state of a computation in a file: whole and its own, or as good as missing."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.files import write_bytes


def save_state(path: Path, owner: str, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, and lists and dictionaries of them, atomically.

    owner: what the state belongs to. Raises OSError if it cannot be written.
    """
    torch.save(dict(state), buffer := io.BytesIO())
    payload = buffer.getvalue()
    write_bytes(path, _digest(owner, payload) + payload)


def load_state(path: Path, owner: str, device: torch.device | str) -> dict[str, Any] | None:
    """What `save_state` wrote; None if there is no such file, if it is damaged, or if another `owner` wrote it."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return None
    found, payload = content[:32], content[32:]
    if found != _digest(owner, payload):
        return None
    return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)


def _digest(owner: str, payload: bytes) -> bytes:
    return hashlib.sha256(owner.encode() + b"\0" + payload).digest()
