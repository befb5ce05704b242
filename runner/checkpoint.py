"""The saved state of a trial that has not finished."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.states import load_state, save_state


class TrialCheckpoint:
    """The state of an unfinished trial in a file."""

    def __init__(self, path: Path, owner: str, every: float) -> None:
        """`owner`: names the trial, so that no other trial continues from its state. `every`: seconds between saves."""
        self.path, self.owner, self.every = path, owner, every
        self.last = time.monotonic()

    def should_save(self) -> bool:
        return time.monotonic() - self.last >= self.every

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last; None if there is nothing, or if it is damaged: the trial then starts anew."""
        return load_state(self.path, self.owner, device)

    def save(self, state: Mapping[str, Any]) -> None:
        save_state(self.path, self.owner, state)
        self.last = time.monotonic()
