"""Worker processes: when they are started, from any working directory, and what happens when one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import workers
from tests.commands import lines, only_run
from tests.conftest import ROOT

FLAGS = ["--image-size", "16", "--trials", "3", "--jobs", "2", "--tolerance", "0", "--failure-threshold", "1e-12"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("dlg", True),
        ("dlg --jobs 2", True),
        ("dlg --trials 10 --jobs=12", True),
        ("dlg --iterations 1", True),
        ("", False),
        ("--help", False),
        ("dlg -h", False),
        ("dlg --jobs 1", False),
        ("dlg --trials=1 --seed 3", False),
        ("dlg --backend ray --jobs 2", False),
    ],
)
def test_commands_that_may_need_workers_preload_them(flags: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[None] = []
    monkeypatch.setattr(workers, "context", lambda: called.append(None))
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["main_grad.py", *flags.split()])
    workers.preload_workers()
    assert bool(called) == wanted


# a fork server whose imports take long, and a main process that ends meanwhile
SLOW_SERVER = """
import os, sys
sys.path.insert(0, {root!r})
from multiprocessing import forkserver
from runner import workers
from runner.scratch import scratch_folder
workers.forkserver.set_forkserver_preload = lambda names: (
    type(forkserver._forkserver).set_forkserver_preload(forkserver._forkserver, ["runner.scratch", "sleeper"])
)
workers.context()
print(scratch_folder(), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel reports the end of a parent")
def test_a_server_that_still_imports_ends_with_the_main_process(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)\n")
    variables = _without_path() | {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SLOW_SERVER.format(root=str(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=30)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30  # half of what the server would sleep
    while Path(done.stdout.strip()).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(done.stdout.strip()).exists()


def test_a_signal_while_the_server_starts_comes_afterwards() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with workers._signals_blocked():
            signal.raise_signal(signal.SIGTERM)  # to this thread, whatever others the process has
            time.sleep(0.01)
            assert not came
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_of_the_users_hides_nothing_from_workers(tmp_path: Path) -> None:
    """Modules with names of ours and of the standard library in the working directory."""
    for name in ("random", "tempfile", "torch", "utils", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    command = [sys.executable, str(ROOT / "main_grad.py"), "dlg", *FLAGS, "--iterations", "3", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=_without_path(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "not this one" not in done.stderr + done.stdout
    assert len(list(tmp_path.glob("out/grad/dlg/*/done"))) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers by /proc")
def test_a_dead_worker_is_one_line_and_the_same_command_continues(tmp_path: Path) -> None:
    long = ["--iterations", "1500", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "main_grad.py"), "dlg", *FLAGS, *long]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_without_path())
    deadline = time.monotonic() + 60
    while len(found := _grandchildren(run.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(found[0], signal.SIGKILL)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 1
    assert [line for line in error.splitlines() if line.startswith("error")] == [
        "error: a worker process died (out of memory?); the same command continues the run, --jobs 1 needs less"
    ]
    assert "Traceback" not in error
    done = subprocess.run(command, capture_output=True, text=True, env=_without_path())
    assert done.returncode == 0, done.stderr
    assert sorted(trial["trial"] for trial in lines(only_run(tmp_path) / "trials.jsonl")) == [0, 1, 2]


def _without_path() -> dict[str, str]:
    """The environment of a user without a PYTHONPATH to this project."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def _grandchildren(pid: int) -> list[int]:
    """Workers are children of the fork server, which is a child of the main process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [child for child, parent in parents.items() if parents.get(parent) == pid]
