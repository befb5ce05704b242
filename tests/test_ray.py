"""Ray as the backend: the rows of one process, though a worker is killed on the way. Only where Ray is installed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import in_process, lines, only_run, rows
from tests.conftest import ROOT

FLAGS = ["dlg", "--image-size", "16", "--trials", "4", "--activation", "tanh", "--restarts", "1", "--iterations", "400"]
WHOLE_BUDGET = ["--failure-threshold", "1e-12", "--patience", "0", "--jobs", "2"]


def workers_of(session: int) -> list[int]:
    """Ray's workers, below a process that leads a session, that are at a trial."""
    listed = subprocess.run(["ps", "-eo", "pid,sess,args"], capture_output=True, text=True, check=True).stdout
    found = (line.split(None, 2) for line in listed.splitlines()[1:])
    return [int(pid) for pid, leader, name in found if int(leader) == session and name.startswith("ray::_work_on_ray")]


def test_same_rows_though_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, str(ROOT / "main_grad.py"), *FLAGS, *WHOLE_BUDGET, "--out"]
    subprocess.run([*command, str(tmp_path / "local")], check=True, capture_output=True, timeout=300)
    isolated = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]  # no network but loopback
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        isolated = []
    run = subprocess.Popen(
        [*isolated, *command, str(tmp_path / "ray"), "--backend", "ray"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "ray").rglob("parts/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        while not (at_work := workers_of(run.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(at_work[0], signal.SIGKILL)
        _, error = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 0, error
    assert rows(only_run(tmp_path / "ray")) == rows(only_run(tmp_path / "local"))
    assert [t["status"] for t in lines(only_run(tmp_path / "ray") / "trials.jsonl")] == [
        t["status"] for t in lines(only_run(tmp_path / "local") / "trials.jsonl")
    ]


def test_without_ray_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runner.executors.find_spec", lambda name: None)
    assert in_process("main_grad.py", [*FLAGS, "--backend", "ray", "--out", str(tmp_path)], monkeypatch) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "pip install 'ray" in error
    assert not list(tmp_path.iterdir())
