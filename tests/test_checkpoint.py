"""A run that is killed in the middle of a trial, again and again, ends with the rows of one that was left alone."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attacks.base import checkpoint
from tests.commands import in_process, lines, only_run, rows
from tests.conftest import ROOT
from utils.results import Store

SMALL = ["--image-size", "16", "--trials", "1", "--jobs", "1", "--model"]
# of a smaller batch no convolution would be; and a process whose threads have worked cannot fork
HALVED = ["--precision", "bfloat16", "--batch-size", "2", "--threads", "1"]
NEVER = ["--activation", "tanh", "--restarts", "2", "--stall", "1e-12", "--patience", "0"]  # stops for its budget only
LONG = {
    ("grad", "dlg"): (20, ["cnn", "--iterations", "600", *NEVER]),
    ("grad", "ig_single"): (3, ["convnet64", "--iterations", "30", "--restarts", "2", *HALVED]),
    ("fed", "sme"): (3, ["cnn", "--iterations", "60", "--restarts", "2", "--local-epochs", "2"]),
}


@pytest.mark.parametrize(("mode", "attack"), LONG)
def test_killed_in_the_middle_and_still_the_same_rows(mode: str, attack: str, tmp_path: Path) -> None:
    """Real kills of the real command, none of which may start a trial anew."""
    kills, flags = LONG[mode, attack]
    killer = [sys.executable, str(ROOT / "tests" / "killer.py"), str(kills), str(tmp_path)]
    page = str(ROOT / f"main_{mode}.py")
    done = subprocess.run([*killer, page, attack, *SMALL, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(kills) in done.stdout.split("\n"), done.stdout
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert rows(killed) == rows(whole)
    ours, theirs = lines(killed / "trials.jsonl")[0], lines(whole / "trials.jsonl")[0]
    assert {k: ours[k] for k in ("iterations", "loss", "status")} == {
        k: theirs[k] for k in ("iterations", "loss", "status")
    }
    assert not list(tmp_path.rglob("*.state"))


def test_a_torn_state_starts_the_trial_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["dlg", *SMALL, "cnn", *NEVER, "--iterations", "40", "--out"]
    monkeypatch.setattr("utils.results.SAVE_EVERY", 0.0)
    assert in_process("main_grad.py", [*flags, str(tmp_path / "whole")], monkeypatch) == 0
    whole = only_run(tmp_path / "whole")
    torn = tmp_path / "torn" / whole.relative_to(tmp_path / "whole") / "parts" / "00000.state"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"PK\x03\x04 cut short")
    assert in_process("main_grad.py", [*flags, str(tmp_path / "torn")], monkeypatch) == 0
    assert rows(only_run(tmp_path / "torn")) == rows(whole)


def test_stretches_that_have_ended_are_not_run_again(tmp_path: Path) -> None:
    """Two stretches, killed in the second: the stream of random numbers goes on as if nothing had been."""

    class Draw:
        def __init__(self, value: float) -> None:
            self.value = value

    def attack(stop: bool) -> list[float]:
        rng, drawn = torch.Generator().manual_seed(0), []
        for number in range(2):

            def work(number: int = number) -> Draw:
                state = checkpoint.resume(rng) or {"sum": 0.0, "step": 0}
                total = state["sum"]
                for step in range(state["step"], 5):
                    total += torch.rand((), generator=rng).item()
                    checkpoint.save(rng, {"sum": total, "step": step + 1})
                    if stop and number == 1 and step == 2:
                        raise InterruptedError
                return Draw(total)

            drawn.append(checkpoint.stretch(Draw, rng, work).value)
        return drawn

    saved = Store(tmp_path).under_way(0)
    saved.path.parent.mkdir()
    checkpoint.attend(None, lambda: True, lambda state: None)
    whole = attack(stop=False)
    checkpoint.attend(None, lambda: True, saved.save)
    with pytest.raises(InterruptedError):
        attack(stop=True)
    checkpoint.attend(saved.load(torch.device("cpu")), lambda: True, saved.save)
    assert attack(stop=False) == whole
    checkpoint.attend(None, lambda: False, lambda state: None)


def test_a_disk_that_fails_in_the_middle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(Store, "add_trial", full)
    code = in_process("main_grad.py", ["baseline", *SMALL, "cnn", "--out", str(tmp_path)], monkeypatch)
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2
    assert said.startswith("error: No space left on device (rows.jsonl)")


def test_code_that_is_edited_under_a_run_does_not_move_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = itertools.count()
    monkeypatch.setattr("utils.run.source_digest", lambda *args: f"edit {next(edits)}")
    monkeypatch.setattr("utils.results.SAVE_EVERY", 0.0)
    flags = ["ig_single", *SMALL, "cnn", "--iterations", "3", "--out", str(tmp_path)]
    assert in_process("main_grad.py", flags, monkeypatch) == 0
    assert (only_run(tmp_path) / "done").exists()
