"""Results on disk: one folder per run, named by the hash of everything that can change a number.

Rows are appended as trials end, and a trial's line in trials.jsonl comes after all else it leaves behind, so that a
killed run goes on where it stopped; `done` is written last.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

SAVE_EVERY = 20.0  # seconds of a trial that a kill may cost


def digest(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits over a JSON-able mapping, whatever the order of its keys."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def source_digest(root: Path, rooms: tuple[str, ...]) -> str:
    """Hash over the code that computes numbers, so that results of older code are never taken for its own."""
    total = hashlib.sha256()
    files = sorted(p for room in rooms for p in (root / room).rglob("*.py")) + sorted(root.glob("main_*.py"))
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


class Store:
    """The folder of one run. Raises OSError where it cannot be made, BlockingIOError while another run writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.save_every = folder, SAVE_EVERY

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    @contextlib.contextmanager
    def writing(self, config: Mapping[str, Any], force: bool = False) -> Iterator[None]:
        """Hold the folder for this process; what a killed run left half-written is dropped first."""
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
        """Everything but the lock goes, `done` first."""
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
        """Everything a finished trial leaves; its record goes last."""
        part = self._part(record["trial"])
        save_file({"truth": truth.contiguous(), "reconstruction": rebuilt.contiguous()}, part.with_suffix(".tmp"))
        os.replace(part.with_suffix(".tmp"), part)
        _append(self.folder / "rows.jsonl", rows)
        _append(self.folder / "trials.jsonl", [record])
        self.under_way(record["trial"]).path.unlink(missing_ok=True)

    def under_way(self, trial: int) -> "Saved":
        """Where a trial that has not finished keeps its state."""
        return Saved(self._part(trial).with_suffix(".state"), self.save_every)

    def restart_log(self, name: str) -> None:
        """Forget the lines of a log that a resumed run writes again from the start."""
        (self.folder / name).unlink(missing_ok=True)

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        _append(self.folder / name, [line])

    def images(self) -> tuple[Tensor, Tensor]:
        """All truths and reconstructions (N, C, H, W), in the order of the rows."""
        if self._gathered.exists():
            both = load_file(self._gathered)
            return both["truth"], both["reconstruction"]
        parts = [load_file(self._part(t["trial"])) for t in self.trials()]
        return tuple(torch.cat([p[key] for p in parts]) for key in ("truth", "reconstruction"))  # type: ignore[return-value]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put rows in order, gather the images in one file, and declare the run done."""
        truth, rebuilt = self.images()
        _rewrite(self.folder / "rows.jsonl", self.rows())
        _rewrite(self.folder / "trials.jsonl", self.trials())
        save_file({"truth": truth, "reconstruction": rebuilt}, self.folder / "reconstructions.tmp")
        os.replace(self.folder / "reconstructions.tmp", self._gathered)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        write_json(self.folder / "summary.json", summary)
        (self.folder / "done").touch()

    @property
    def _gathered(self) -> Path:
        return self.folder / "reconstructions.safetensors"

    def _part(self, trial: int) -> Path:
        return self.folder / "parts" / f"{trial:05d}.safetensors"

    def _drop_unfinished(self) -> None:
        """Keep only what belongs to trials whose record was written whole."""
        trials = [t for t in self.trials() if self._gathered.exists() or self._part(t["trial"]).exists()]
        finished = {t["trial"] for t in trials}
        _rewrite(self.folder / "trials.jsonl", trials)
        _rewrite(self.folder / "rows.jsonl", [r for r in self.rows() if r["trial"] in finished])


class Saved:
    """The state of a trial under way, in a file: tensors, numbers, strings, and lists and dictionaries of them."""

    def __init__(self, path: Path, every: float) -> None:
        """`every`: seconds between two savings."""
        self.path, self.every = path, every
        self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.every

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved last; None if nothing was, or not whole."""
        try:
            return torch.load(self.path, map_location=device, weights_only=True)
        except Exception:  # whatever a damaged archive makes of itself: the trial starts anew
            return None

    def save(self, state: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        temporary = self.path.with_suffix(".half")
        torch.save(dict(state), temporary)
        os.replace(temporary, self.path)
        self.last = time.monotonic()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def _append(path: Path, lines: list[dict[str, Any]] | list[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def _rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut short by a kill is not one of them."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
