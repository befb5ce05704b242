"""Results on disk: one folder per run, named by a hash of everything that can change a number.

Nothing on the disk is trusted: a kill, a full disk or a loss of power may have left any part of a file. A trial's
record holds a checksum over the record, its rows and its tensors; a trial whose checksum does not fit is done again.
`done` is written last and holds the digests of all other files; a run is finished while they fit.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runner.checkpoint import TrialCheckpoint
from utils.files import is_sealed, read_json, read_json_lines, seal, sync_folder, write_bytes, write_json

SAVE_EVERY = 20.0  # seconds between two checkpoints of a trial: the work that a kill loses
ROWS, TRIALS, GATHERED, SUMMARY = "rows.jsonl", "trials.jsonl", "reconstructions.safetensors", "summary.json"
SEALED = ("config.json", ROWS, TRIALS, GATHERED, SUMMARY, "rounds.jsonl", "grid.png", "accuracy.png")
SEAL = "done"

Tensors = dict[str, Tensor]  # "truth" and "reconstruction", each (N, *shape)
Record = dict[str, Any]


class WholeTrial(NamedTuple):
    """What is on the disk of a finished trial."""

    record: Record
    rows: list[Record]
    gathered: Tensors | None  # its tensors, if they are not in a file of their own


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
        """Whether the run is finished and all its files are as it left them."""
        return is_sealed(self.folder, SEAL)

    @contextlib.contextmanager
    def writing(self, config: Mapping[str, Any], count: int, force: bool = False) -> Iterator[None]:
        """Hold the folder for this process, with the whole ones of trials 0 to `count` - 1 and nothing else in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"another run is writing {self.folder}") from None
        try:
            if force:
                _remove(self._parts)
            self._keep({} if force else self._whole_trials(count))
            write_json(self.folder / "config.json", config)
            yield
        finally:
            lock.release()

    def trials(self) -> list[Record]:
        """Records of the finished trials, in order."""
        return sorted(read_json_lines(self.folder / TRIALS), key=lambda t: t["trial"])

    def rows(self) -> list[Record]:
        """Rows of the finished trials, in order."""
        return sorted(read_json_lines(self.folder / ROWS), key=lambda r: (r["trial"], r["image"]))

    def summary(self) -> dict[str, Any]:
        return read_json(self.folder / SUMMARY)

    def add_trial(self, rows: list[Record], record: Record, truth: Tensor, rebuilt: Tensor) -> None:
        """Write a finished trial; its record goes last."""
        tensors = {"truth": truth.contiguous(), "reconstruction": rebuilt.contiguous()}
        write_bytes(self._part(record["trial"]), save(tensors))
        _append(self.folder / ROWS, rows)
        _append(self.folder / TRIALS, [{**record, "checksum": _checksum(record, rows, tensors)}])
        sync_folder(self.folder)
        self.trial_checkpoint(record["trial"]).path.unlink(missing_ok=True)

    def trial_checkpoint(self, trial: int) -> TrialCheckpoint:
        """Where a trial that has not finished saves its state."""
        return TrialCheckpoint(self._part(trial).with_suffix(".state"), f"{self.folder.name}/{trial}", self.save_every)

    def restart_log(self, name: str) -> None:
        """Remove a log that a resumed run writes again from the start."""
        (self.folder / name).unlink(missing_ok=True)

    def log(self, name: str, line: Mapping[str, Any]) -> None:
        _append(self.folder / name, [line])

    def images(self) -> tuple[Tensor, Tensor]:
        """All true examples and reconstructions (N, *shape), in the order of the rows."""
        parts = [_load(self._part(t["trial"])) for t in self.trials()]
        if any(part is None for part in parts):
            raise OSError(errno.ENOENT, "A finished trial was removed or damaged, or cannot be read", str(self._parts))
        truth, rebuilt = (torch.cat([p[key] for p in parts if p]) for key in ("truth", "reconstruction"))
        return truth, rebuilt

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put rows in order, gather the tensors in one file, and declare the run done."""
        rows, trials = self.rows(), self.trials()
        truth, rebuilt = self.images()
        counts = [[t["trial"], sum(r["trial"] == t["trial"] for r in rows)] for t in trials]
        content = save({"truth": truth, "reconstruction": rebuilt}, {"images": json.dumps(counts)})
        write_bytes(self.folder / GATHERED, content)
        write_bytes(self.folder / ROWS, _json_lines(rows))
        write_bytes(self.folder / TRIALS, _json_lines(trials))
        write_json(self.folder / SUMMARY, summary)
        shutil.rmtree(self._parts)
        seal(self.folder, SEALED, SEAL)

    @property
    def _parts(self) -> Path:
        return self.folder / "parts"

    def _part(self, trial: int) -> Path:
        return self._parts / f"{trial:05d}.safetensors"

    def _whole_trials(self, count: int) -> dict[int, WholeTrial]:
        """The trials whose checksum fits, by number."""
        rows: dict[int, dict[int, Record]] = {}
        for row in read_json_lines(self.folder / ROWS):
            if type(row.get("trial")) is type(row.get("image")) is int:
                rows.setdefault(row["trial"], {}).setdefault(row["image"], row)
        gathered = _load_gathered(self.folder / GATHERED)
        whole = {}
        for record in read_json_lines(self.folder / TRIALS):
            trial, check = record.get("trial"), record.get("checksum")
            if type(trial) is not int or not 0 <= trial < count or trial in whole:
                continue
            own = [row for _, row in sorted(rows.get(trial, {}).items())]
            part, slice_ = _load(self._part(trial)), gathered.get(trial)
            if part is not None and check == _checksum(record, own, part):
                whole[trial] = WholeTrial(record, own, None)
            elif slice_ is not None and check == _checksum(record, own, slice_):
                whole[trial] = WholeTrial(record, own, slice_)
        return whole

    def _keep(self, whole: Mapping[int, WholeTrial]) -> None:
        """Write these trials anew and remove all other results, first of all `done`."""
        _remove(self.folder / SEAL)
        if self._parts.is_symlink() or not self._parts.is_dir():
            _remove(self._parts)
            self._parts.mkdir()
        for number, trial in whole.items():
            if trial.gathered is not None:
                write_bytes(self._part(number), save(trial.gathered))
        expected = {self._part(number) for number in whole}
        for path in self._parts.iterdir():
            state = path.suffix == ".state" and path.is_file() and path.with_suffix(".safetensors") not in expected
            if path not in expected and not state:
                _remove(path)
        for name in {*SEALED, *(f"{name}.tmp" for name in (*SEALED, SEAL))}:
            if name not in (ROWS, TRIALS) or not (self.folder / name).is_file():
                _remove(self.folder / name)
        write_bytes(self.folder / ROWS, _json_lines([row for trial in whole.values() for row in trial.rows]))
        write_bytes(self.folder / TRIALS, _json_lines([trial.record for trial in whole.values()]))


def _checksum(record: Mapping[str, Any], rows: Sequence[Record], tensors: Tensors) -> str | None:
    """16 hexadecimal digits over a record without its checksum, its rows and its tensors; None if they have none."""
    content = [{k: v for k, v in record.items() if k != "checksum"}, *rows]
    try:
        hasher = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    except RecursionError:
        return None
    for name in ("truth", "reconstruction"):
        tensor = tensors[name].contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def _load(path: Path) -> Tensors | None:
    """The tensors of a file; None if it is damaged or missing."""
    return _open(path)[0]


def _load_gathered(path: Path) -> dict[int, Tensors]:
    """The tensors of each trial of a finished run; empty if the file does not say which belong to which trial."""
    tensors, metadata = _open(path)
    try:
        counts = [(int(trial), int(n)) for trial, n in json.loads(metadata["images"])]
        parts = {name: both.split([n for _, n in counts]) for name, both in (tensors or {}).items()}
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError):
        return {}
    return {trial: {name: split[i] for name, split in parts.items()} for i, (trial, _) in enumerate(counts) if parts}


def _open(path: Path) -> tuple[Tensors | None, Mapping[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    if not path.is_file():
        return None, {}
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ("truth", "reconstruction")}, file.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError):
        return None, {}


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("ab") as file:
        file.write(_json_lines(lines))
        file.flush()
        os.fsync(file.fileno())


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
