"""Results on disk: one folder per run, named by a hash of everything that can change a number.

Rows are appended as trials end. A trial's line in trials.jsonl is written after everything else that belongs to it, so
that a killed run continues where it stopped; `done` is written last.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.files import write_atomically, write_json

SAVE_EVERY = 20.0  # seconds between two checkpoints of a trial: the work that a kill loses


def source_digest(root: Path, folders: Sequence[str]) -> str:
    """A hash of the code that computes numbers: results of other code are never taken for its own."""
    total = hashlib.sha256()
    files = sorted(p for folder in folders for p in (root / folder).rglob("*.py")) + sorted(root.glob("main_*.py"))
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


class Store:
    """The folder of one run. Raises OSError if it cannot be made, BlockingIOError while another run writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.save_every = folder, SAVE_EVERY

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    @contextlib.contextmanager
    def writing(self, config: Mapping[str, Any], force: bool = False) -> Iterator[None]:
        """Hold the folder for this process; unfinished trials of a killed run are dropped first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"another run is writing {self.folder}") from None
        try:
            if force:
                self._clear()
            (self.folder / "parts").mkdir(exist_ok=True)
            write_json(self.folder / "config.json", config)
            self._drop_unfinished()
            yield
        finally:
            lock.release()

    def _clear(self) -> None:
        """Remove everything but the lock, `done` first."""
        (self.folder / "done").unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    def trials(self) -> list[dict[str, Any]]:
        """Records of the finished trials, in order."""
        return sorted(_read_lines(self.folder / "trials.jsonl"), key=lambda t: t["trial"])

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the finished trials, in order."""
        return sorted(_read_lines(self.folder / "rows.jsonl"), key=lambda r: (r["trial"], r["image"]))

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def add_trial(self, rows: list[dict[str, Any]], record: dict[str, Any], truth: Tensor, rebuilt: Tensor) -> None:
        """Write a finished trial; its record goes last."""
        tensors = {"truth": truth.contiguous(), "reconstruction": rebuilt.contiguous()}
        write_atomically(self._part(record["trial"]), lambda path: save_file(tensors, path))
        _append(self.folder / "rows.jsonl", rows)
        _append(self.folder / "trials.jsonl", [record])
        self.trial_checkpoint(record["trial"]).path.unlink(missing_ok=True)

    def trial_checkpoint(self, trial: int) -> "TrialCheckpoint":
        """Where a trial that has not finished saves its state."""
        return TrialCheckpoint(self._part(trial).with_suffix(".state"), self.save_every)

    def restart_log(self, name: str) -> None:
        """Remove a log that a resumed run writes again from the start."""
        (self.folder / name).unlink(missing_ok=True)

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        _append(self.folder / name, [dict(line)])

    def images(self) -> tuple[Tensor, Tensor]:
        """All true examples and reconstructions (N, *shape), in the order of the rows."""
        if self._gathered.exists():
            both = load_file(self._gathered)
            return both["truth"], both["reconstruction"]
        parts = [load_file(self._part(t["trial"])) for t in self.trials()]
        truth, rebuilt = (torch.cat([p[key] for p in parts]) for key in ("truth", "reconstruction"))
        return truth, rebuilt

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put rows in order, gather the tensors in one file, and declare the run done."""
        truth, rebuilt = self.images()
        _rewrite(self.folder / "rows.jsonl", self.rows())
        _rewrite(self.folder / "trials.jsonl", self.trials())
        write_atomically(self._gathered, lambda path: save_file({"truth": truth, "reconstruction": rebuilt}, path))
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        write_json(self.folder / "summary.json", summary)
        (self.folder / "done").touch()

    @property
    def _gathered(self) -> Path:
        return self.folder / "reconstructions.safetensors"

    def _part(self, trial: int) -> Path:
        return self.folder / "parts" / f"{trial:05d}.safetensors"

    def _drop_unfinished(self) -> None:
        """Keep only what belongs to trials whose record was written."""
        trials = [t for t in self.trials() if self._gathered.exists() or self._part(t["trial"]).exists()]
        finished = {t["trial"] for t in trials}
        _rewrite(self.folder / "trials.jsonl", trials)
        _rewrite(self.folder / "rows.jsonl", [r for r in self.rows() if r["trial"] in finished])


class TrialCheckpoint:
    """The state of an unfinished trial in a file: tensors, numbers, strings, and lists and dictionaries of them."""

    def __init__(self, path: Path, every: float) -> None:
        """`every`: seconds between two saves."""
        self.path, self.every = path, every
        self.last = time.monotonic()

    def should_save(self) -> bool:
        return time.monotonic() - self.last >= self.every

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last; None if there is nothing, or if it is damaged: the trial then starts anew."""
        try:
            return torch.load(self.path, map_location=device, weights_only=True)
        except Exception:  # torch raises many types for a missing or damaged archive
            return None

    def save(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.path, lambda path: torch.save(dict(state), path))
        self.last = time.monotonic()


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _rewrite(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
