"""A run that is killed several times in the middle of a trial ends with the rows of an uninterrupted one."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from runner.store import Store
from tests.commands import in_process, lines, only_run, rows
from tests.conftest import ROOT

SMALL = ["--image-size", "16", "--trials", "1", "--jobs", "1"]
# a smaller batch would have no fast convolution; and a process whose threads have worked cannot fork
BFLOAT16 = ["--grant", "labels", "--precision", "bfloat16", "--batch-size", "2", "--threads", "1"]
FEATURES = ["--feature-iterations", "12"]
WHOLE_BUDGET = ["--activation", "tanh", "--restarts", "2", "--failure-threshold", "1e-12", "--patience", "0"]
SMALL_GENERATOR = [
    "--latent-dim",
    "8",
    "--generator-steps",
    "5",
    "--weight-iterations",
    "40",
    "--comparison-iterations",
    "0",
]
CMA = [
    "--optimizer",
    "cma",
    "--latent-dim",
    "8",
    "--evaluations",
    "80",
    "--comparison-iterations",
    "0",
    "--restarts",
    "2",
]
LONG = {  # name -> mode, kills, attack and flags
    "dlg": ("grad", 6, ["dlg", "--model", "cnn", "--iterations", "160", *WHOLE_BUDGET]),
    "ig_single": (
        "grad",
        3,
        ["ig_single", "--model", "convnet64", "--iterations", "8", "--restarts", "2", *FEATURES, *BFLOAT16],
    ),
    "sme": ("fed", 3, ["sme", "--model", "cnn", "--iterations", "60", "--restarts", "2", "--local-epochs", "2"]),
    "ggl by CMA-ES": ("grad", 3, ["ggl", "--model", "cnn", *CMA]),
    "gias": (
        "grad",
        2,
        ["gias", "--model", "cnn", "--iterations", "20", *SMALL_GENERATOR],
    ),
    "cpa --paper": ("grad", 2, ["cpa", "--model", "fc2", "--batch-size", "4", "--paper", "--iterations", "300"]),
    "feature inversion": ("grad", 3, ["rtf", "--model", "cnn", "--batch-size", "4", "--position", "features"]),
}


@pytest.mark.parametrize("name", LONG)
def test_killed_in_the_middle_and_still_the_same_rows(name: str, tmp_path: Path) -> None:
    """Real kills of the real command."""
    mode, kills, flags = LONG[name]
    killer = [sys.executable, str(ROOT / "tests" / "killer.py"), str(kills), str(tmp_path)]
    page = str(ROOT / f"main_{mode}.py")
    done = subprocess.run([*killer, page, *flags, *SMALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(kills) in done.stdout.split("\n"), done.stdout
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert rows(killed) == rows(whole)
    ours, theirs = lines(killed / "trials.jsonl")[0], lines(whole / "trials.jsonl")[0]
    assert {k: ours[k] for k in ("iterations", "loss", "status", "trace")} == {
        k: theirs[k] for k in ("iterations", "loss", "status", "trace")
    }
    assert not list(tmp_path.rglob("*.state"))


def test_a_torn_state_starts_the_trial_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["dlg", *SMALL, "--model", "cnn", *WHOLE_BUDGET, "--iterations", "40", "--out"]
    monkeypatch.setattr("runner.store.SAVE_EVERY", 0.0)
    assert in_process("main_grad.py", [*flags, str(tmp_path / "whole")], monkeypatch) == 0
    whole = only_run(tmp_path / "whole")
    torn = tmp_path / "torn" / whole.relative_to(tmp_path / "whole") / "parts" / "00000.state"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"PK\x03\x04 cut short")
    assert in_process("main_grad.py", [*flags, str(tmp_path / "torn")], monkeypatch) == 0
    assert rows(only_run(tmp_path / "torn")) == rows(whole)


def test_a_disk_that_fails_in_the_middle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(Store, "add_trial", full)
    code = in_process("main_grad.py", ["baseline", *SMALL, "--model", "cnn", "--out", str(tmp_path)], monkeypatch)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2
    assert error.startswith("error: No space left on device (rows.jsonl)")


def test_code_that_is_edited_under_a_run_does_not_move_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = itertools.count()
    monkeypatch.setattr("runner.experiment.source_digest", lambda *args: f"edit {next(edits)}")
    monkeypatch.setattr("runner.store.SAVE_EVERY", 0.0)
    flags = ["ig_single", *SMALL, "--model", "cnn", "--iterations", "3", "--out", str(tmp_path)]
    assert in_process("main_grad.py", flags, monkeypatch) == 0
    assert (only_run(tmp_path) / "done").exists()
