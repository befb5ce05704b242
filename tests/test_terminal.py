"""What a person sees: one line for mistakes, a table within 80 columns, names of files, and bars that move."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attacks import ATTACKS
from core.errors import UsageError
from core.protocol import image_task
from runner import progress
from runner.executors import detached
from tests.commands import in_process, lines, only_run
from tests.conftest import ROOT
from tests.test_bad_input import folder_of_images


def test_a_run_on_a_folder_names_its_files_and_says_how_they_were_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folder_of_images(tmp_path / "images", size=20)
    flags = ["baseline", "--dataset", "folder", "--base-datadir", str(images), "--trials", "2", "--image-size", "16"]
    assert in_process("main_grad.py", [*flags, "--out", str(tmp_path / "out")], monkeypatch) == 0
    files = [row["file"] for row in lines(only_run(tmp_path / "out") / "rows.jsonl")]
    assert all((images / file).is_file() for file in files)
    assert len(set(files)) == 2
    out = capsys.readouterr().out
    assert re.search(r"16 files.*private.*public.*test", " ".join(out.split()))
    assert "20x20" in out


def test_the_output_of_a_run_fits_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["analytic", "--model", "fc2", "--trials", "2", "--batch-size", "2", "--image-size", "16"]
    monkeypatch.chdir(tmp_path)
    assert in_process("main_grad.py", [*flags, "--out", "out"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "recovered (PSNR >= 20 dB)" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("note: ")) <= 80


@pytest.mark.parametrize("answer", [None, 3, torch.rand(1, 3, 8, 8)])
def test_an_attack_that_returns_something_else_is_one_line(answer: object) -> None:
    with pytest.raises(UsageError, match="dlg returned"):
        detached(ATTACKS["dlg"](), answer, image_task((3, 8, 8), 2))


def test_a_bar_moves_within_a_unit_shows_the_time_left_and_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.Bar(4) as bar:
        for step in range(40):
            bar.bar.start_t -= 1  # a second has passed
            bar.bar.last_print_t -= 1
            bar.update(
                "trial 0", step / 40, "fed/ig_single: 0/4 trials, round 1/10, client 7/20", "PSNR 31.2 dB, trial 0"
            )
        bar.finish("trial 0", "fed/ig_single: 1/4 trials", "PSNR 31.2 dB")
    shown = terminal.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, shown)) <= 80
    assert any("0/4 trials, round 1/10, client 7/20" in line and "<" in line and "?" not in line for line in shown)


def test_without_torch_one_line_says_which_command_to_run(tmp_path: Path) -> None:
    page = ROOT / "main_grad.py"
    command = [sys.executable, "-S", str(page), "dlg"]  # -S: without site-packages
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sh experiments/grad/dlg.sh" in done.stderr
