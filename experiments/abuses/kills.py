"""Real commands with two workers, killed at random moments, start-up and the training of a generator included."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from core.paths import ROOT
from experiments.abuses.harness import left_behind, without_clock

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
SMALL = ("--trials", "3", "--image-size", "16", "--jobs", "2", "--restarts", "1")
LATENT = ("--generator", "vae", "--generator-steps", "40", "--comparison-iterations", "0", "--latent-dim", "4")
COMMANDS = (
    ("main_grad.py", "dlg", "--model", "cnn", "--iterations", "60", "--failure-threshold", "1e-12", *SMALL),
    ("main_fed.py", "ig_single", "--model", "cnn", "--iterations", "60", "--clients", "3", *SMALL),
    ("main_grad.py", "ggl", "--model", "cnn", "--iterations", "40", *LATENT, *SMALL),
)
KILLS_OF_A_RUN = 5
SLOW = 10.0  # seconds to end in: at most one on a machine of its own, more where other programs run
GONE = 30.0  # seconds after which nothing may be left of a killed command: its server may still import torch


def kill(count: int, seed: int, scratch: Path) -> Iterator[tuple[str, str]]:
    """(what was done, what was wrong or ""), for each kill and each run that goes on afterwards."""
    rng = random.Random(seed)
    whole: dict[int, tuple[list[dict], float]] = {}
    done, number = 0, 0
    while done < count:
        which = number % len(COMMANDS)
        folder = scratch / f"{number:03d}"
        if which not in whole:
            started = time.monotonic()
            _start(which, scratch / f"whole-{which}").wait()
            whole[which] = (_rows(scratch / f"whole-{which}"), time.monotonic() - started)
        rows, seconds = whole[which]
        for _ in range(min(KILLS_OF_A_RUN, count - done)):
            name, moment = rng.choice(SIGNALS), rng.uniform(0, seconds)
            done += 1
            process = _start(which, folder)
            time.sleep(moment)
            process.send_signal(getattr(signal, name))
            started = time.monotonic()
            process.wait()
            took = time.monotonic() - started
            wrong = _judge(folder, name, process.returncode, took)
            yield f"{COMMANDS[which][1]}, {name} after {moment:.1f} s of {seconds:.1f} s, ended in {took:.2f} s", wrong
        code = _start(which, folder).wait()
        wrong = "" if code == 0 and _rows(folder) == rows else f"code {code}, other rows: {_error(folder)[-300:]}"
        yield f"{COMMANDS[which][1]} continued", wrong
        number += 1


def _start(which: int, folder: Path) -> "subprocess.Popen[bytes]":
    page, *words = COMMANDS[which]
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "CHECKPOINTS": str(folder / "checkpoints")}
    with (folder / "stderr").open("wb") as error:
        command = [sys.executable, str(ROOT / page), *words, "--out", str(folder / "out")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error)


def _judge(folder: Path, name: str, code: int, took: float) -> str:
    number = getattr(signal, name)
    if code not in (-number, 128 + number, 0):
        return f"exit code {code}: {_error(folder)[-300:]}"
    if "Traceback" in _error(folder):
        return f"a traceback: {_error(folder)[-300:]}"
    if took > SLOW and code != 0:
        return f"took {took:.1f} s to end"
    deadline = time.monotonic() + GONE
    while (left := _left(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return f"left behind: {', '.join(left)}" if left else ""


def _left(folder: Path) -> list[str]:
    """Temporary files and processes of a command that has ended."""
    left = left_behind(folder / "tmp")
    mark = f"TMPDIR={folder / 'tmp'}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes():
                left.append(f"process {path.name}")
        except OSError:
            continue
    return left


def _rows(folder: Path) -> list[dict]:
    (path,) = folder.glob("out/*/*/*/rows.jsonl")
    return without_clock(path.read_text())


def _error(folder: Path) -> str:
    return (folder / "stderr").read_text(errors="replace")
