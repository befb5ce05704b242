"""The saved state of a trial that has not finished."""

import hashlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.files import write_bytes


class TrialCheckpoint:
    """The state of an unfinished trial in a file: tensors, numbers, strings, and lists and dictionaries of them."""

    def __init__(self, path: Path, owner: str, every: float) -> None:
        """`owner`: names the trial, so that no other trial continues from its state. `every`: seconds between saves."""
        self.path, self.owner, self.every = path, owner, every
        self.last = time.monotonic()

    def should_save(self) -> bool:
        return time.monotonic() - self.last >= self.every

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last; None if there is nothing, or if it is damaged: the trial then starts anew."""
        try:
            content = self.path.read_bytes() if self.path.is_file() else b""
        except OSError:
            return None
        check, payload = content[:32], content[32:]
        if check != self._check(payload):
            return None
        return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_bytes(self.path, self._check(buffer.getvalue()) + buffer.getvalue())
        self.last = time.monotonic()

    def _check(self, payload: bytes) -> bytes:
        return hashlib.sha256(self.owner.encode() + b"\0" + payload).digest()
