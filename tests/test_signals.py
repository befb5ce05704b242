"""Signals end a program tidily within a second, and a program that does not react as well."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attacks import ATTACKS
from core.protocol import Observation, Recipe, Update, image_task
from models import build
from runner.executors import TrialRunner
from runner.store import Store
from tests.conftest import ROOT
from utils.terminal import printable

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from utils.signals import Stopped, stopped_by_signals
print("ready", flush=True)
with stopped_by_signals():
    try:
        time.sleep(20)
    except Stopped as stop:
        print("tidy", flush=True)
        {rest}
        raise SystemExit(128 + stop.number)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("rest", ["pass", "time.sleep(20)"])
def test_a_signal_ends_a_program_within_a_second(name: str, rest: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), rest=rest)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=10)  # far less than 20 s, however loaded the machine
    assert process.returncode == 128 + getattr(signal, name)
    assert out == "tidy\n"


def test_an_attack_is_not_called_on_an_update_that_is_not_finite(tmp_path: Path) -> None:
    model = build("cnn", (3, 8, 8), 2, rng=torch.Generator())
    tensors = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    observation = Observation(image_task((3, 8, 8), 2), Recipe(1), model, Update("gradient", tensors, 1))
    runner = TrialRunner(ATTACKS["cpa"](), None, 0, Store(tmp_path), 1)
    result = runner.reconstruct(observation, 0, lambda *progress: None)
    assert result.reconstruction.status == "diverged"
    assert result.reconstruction.examples.shape == (0, 3, 8, 8)
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_a_sign_is_shown_another() -> None:
    code = "from utils.terminal import prepare_streams; prepare_streams(); print('1 ± 2 ☃')"
    variables = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.stdout == "1 +- 2 \\u2603\n", done.stderr
    assert printable("a\nb\x1b[31m \udcff é") == "a b\\x1b[31m \\udcff é"
