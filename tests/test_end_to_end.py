"""The real scripts, as a user runs them: results on disk, resuming after a kill, workers, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import TINY, lines, only_run, rows, shell
from tests.conftest import ROOT

ROW = {"trial", "image", "match", "psnr", "ssim", "lpips", "mse", "label_true", "label_pred", "label_ok"} | {
    "baseline_psnr",
    "class_baseline_psnr",
    "seconds",
    "oracle",
}


@pytest.mark.parametrize("mode", ["grad", "fed"])
def test_a_script_from_nothing_to_done_and_once_more(mode: str, tmp_path: Path) -> None:
    flags = ("--trials", "2", *TINY, "--out", str(tmp_path))
    first = shell(f"{mode}/dlg.sh", *flags)
    assert first.returncode == 0, first.stderr
    run = only_run(tmp_path)
    assert run.parent == tmp_path / mode / "dlg"
    assert {p.name for p in run.iterdir()} >= {"config.json", "rows.jsonl", "trials.jsonl", "summary.json", "done"}
    for row in lines(run / "rows.jsonl"):
        assert set(row) >= ROW
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == 2
    assert summary["lpips"] is None
    assert summary["oracle"] == []
    images = load_file(run / "reconstructions.safetensors")
    assert images["truth"].shape == images["reconstruction"].shape == (2, 3, 16, 16)
    assert 0 <= images["reconstruction"].min() <= images["reconstruction"].max() <= 1
    assert (run / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "PSNR" in first.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["hyperparameters"]["iterations"] == 20
    assert config["threat"] == "honest-but-curious"
    if mode == "fed":
        assert [line["round"] for line in lines(run / "rounds.jsonl")] == [0, 1]
    before = (run / "done").stat().st_mtime_ns
    second = shell(f"{mode}/dlg.sh", *flags)
    assert second.returncode == 0
    assert "already done" in second.stdout
    assert (run / "done").stat().st_mtime_ns == before


def test_one_worker_and_two_give_equal_rows_and_so_does_a_killed_run(tmp_path: Path) -> None:
    """The same three trials three ways: here, in two workers, and killed in the middle and started again."""
    mode, flags = "fed", ["--trials", "3", "--iterations", "40", "--restarts", "1", "--image-size", "16"]
    flags += ["--local-epochs", "2", "--clients", "4", "--clients-per-round", "3"]
    here, workers, killed = (tmp_path / name for name in ("here", "workers", "killed"))
    for out, jobs in ((here, "1"), (workers, "2")):
        done = shell(f"{mode}/dlg.sh", *flags, "--jobs", jobs, "--out", str(out))
        assert done.returncode == 0, done.stderr
    expected = rows(only_run(here))
    assert len(expected) == 3
    assert rows(only_run(workers)) == expected

    command = [sys.executable, str(ROOT / f"main_{mode}.py"), "dlg", *flags, "--jobs", "1", "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _finished_trials(killed):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survivors = _finished_trials(killed)
    assert 1 <= len(survivors) < 3
    (run,) = (killed / mode / "dlg").iterdir()
    assert not (run / "done").exists()
    with (run / "rows.jsonl").open("a") as file:
        file.write('{"trial": 2, "image": 0, "psn')  # what a kill in the middle of a line leaves
    resumed = shell(f"{mode}/dlg.sh", *flags, "--jobs", "1", "--out", str(killed))
    assert resumed.returncode == 0, resumed.stderr
    assert rows(run) == expected
    kept = [line for line in lines(run / "trials.jsonl") if line["trial"] in {s["trial"] for s in survivors}]
    assert kept == survivors, "a finished trial was run again"
    assert lines(run / "rounds.jsonl") == lines(only_run(here) / "rounds.jsonl")


def _finished_trials(out: Path) -> list[dict[str, object]]:
    found = list(out.glob("*/*/*/trials.jsonl"))
    if not found:
        return []
    whole = found[0].read_text().splitlines(keepends=True)
    return [json.loads(line) for line in whole if line.endswith("\n")]


def test_ctrl_c_ends_at_once_with_its_workers(tmp_path: Path) -> None:
    flags = ["--trials", "4", "--iterations", "20000", "--tolerance", "0", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main_grad.py"), "dlg", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("*/*/*/config.json")):
        time.sleep(0.1)
    time.sleep(4)  # the workers are up or on their way
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command continues the run" in error
    assert "Traceback" not in error
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive_in_session(process.pid):
        time.sleep(0.2)
    assert not _alive_in_session(process.pid), "workers outlived the run"


def _alive_in_session(session: int) -> list[int]:
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(int(stat.parent.name))
    return alive


def test_a_sweep_ends_with_one_table(tmp_path: Path) -> None:
    flags = ("--trials", "1", *TINY, "--out", str(tmp_path), "--sweep", "local-lr=0.01,0.1", "local-epochs=1,2")
    done = shell("fed/dlg.sh", *flags)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "fed" / "dlg").glob("sweep-*")
    table = (folder / "table.md").read_text().splitlines()
    assert [c.strip() for c in table[0].split("|")[1:4]] == ["local-lr", "local-epochs", "images"]
    assert [tuple(c.strip() for c in line.split("|")[1:3]) for line in table[2:]] == [
        ("0.01", "1"),
        ("0.01", "2"),
        ("0.1", "1"),
        ("0.1", "2"),
    ]
    assert len((folder / "table.csv").read_text().splitlines()) == 5
    assert (folder / "plot.png").exists()
    runs = [str(p.parent) for p in sorted((tmp_path / "fed" / "dlg").glob("*/done"))]
    report = subprocess.run(
        [sys.executable, "-m", "report", *runs], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "local-epochs" in report.stdout.splitlines()[0]
    assert len(report.stdout.strip().splitlines()) == 6


@pytest.mark.parametrize(("mode", "attack"), [("fed", "idlg"), ("grad", "baseline"), ("fed", "baseline")])
def test_the_other_scripts_run(mode: str, attack: str, tmp_path: Path) -> None:
    tiny = TINY if attack != "baseline" else ("--image-size", "16")
    extra = ("--rounds", "1", "--clients", "2", "--eval-every", "1", "--client-images", "20") if mode == "fed" else ()
    done = shell(f"{mode}/{attack}.sh", "--trials", "1", *tiny, *extra, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["attack"] == attack
    if attack == "idlg":
        assert summary["label_accuracy"] == 1
    else:
        assert summary["psnr"]["mean"] == pytest.approx(summary["baseline_psnr"])
    if mode == "fed":
        assert 0 <= summary["accuracy"] <= 1
