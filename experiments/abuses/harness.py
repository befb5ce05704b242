"""Runs one command after the other as a user would, each in a fork of a process that has imported everything.

A fork starts in milliseconds, so a thousand commands take minutes. It has a folder of its own, which is its working
directory and holds its temporary folder, limits on memory and time, and files in place of its standard streams.
"""

import contextlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from core.paths import ROOT

SECONDS = 40.0  # of processor time, after which a command counts as hanging: other programs may slow the clock
IDLE = 20.0  # seconds without any processor time, after which it counts as hanging as well
MEMORY = 8 << 30  # bytes that a command may ask for beyond what it starts with
PROGRESS = re.compile(r"\[00:|^\w+: (\d+ of \d+ records recovered|not scored), \d+ s$")  # of runs and of audits
PAGES = {"grad": "main_grad.py", "fed": "main_fed.py", "audit": "main_audit.py"}  # scripts
MODULES = {"report": "report", "inspect": "evaluation.inspect", "detect": "defenses.detect"}


@dataclass(frozen=True)
class Case:
    """One command, and what stands in its folder before it runs. "@" in a word is the folder."""

    group: str
    name: str
    words: tuple[str, ...]
    page: str = "grad"
    prepare: Callable[[Path], object] = lambda folder: None
    codes: tuple[int, ...] = (0, 2)  # exit codes that are right
    rows: str | None = None  # rows.jsonl of an undisturbed run, which a command that ends with 0 must have made
    resumes: bool = False  # the folder of results was there before, and may stay after an error
    environment: Mapping[str, str] = field(default_factory=dict)
    inside: Callable[[], object] = lambda: None  # called in the process before the command


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `hard` and `soft` say what was wrong, if anything was."""

    case: Case
    code: int | None  # None: it did not end
    hard: str
    soft: str
    text: str
    seconds: float  # of processor time


def run_all(cases: Iterable[Case], scratch: Path, processes: int = 2) -> Iterator[Outcome]:
    """The outcomes of all cases, as they end."""
    waiting = iter(cases)
    running: dict[int, tuple[Case, Path, Clock]] = {}
    number, more = 0, True
    while more or running:
        while more and len(running) < processes:
            case = next(waiting, None)
            if case is None:
                more = False
                break
            number += 1
            folder = scratch / f"{number:05d}"
            running[start(case, folder)] = (case, folder, Clock())
        for process, (case, folder, clock) in list(running.items()):
            ended, status, usage = os.wait4(process, os.WNOHANG)
            if not ended and not clock.hangs(process):
                continue
            code = os.waitstatus_to_exitcode(status) if ended else None
            if not ended:
                os.kill(process, signal.SIGKILL)
                _, _, usage = os.wait4(process, 0)
            del running[process]
            yield judge(case, folder, code, usage.ru_utime + usage.ru_stime)
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.005)


class Clock:
    """Decides whether a process hangs: by its own processor time, whatever else the machine does."""

    def __init__(self) -> None:
        self.used, self.since = 0.0, time.monotonic()

    def hangs(self, process: int) -> bool:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if used > self.used:
            self.used, self.since = used, time.monotonic()
        return used > SECONDS or time.monotonic() - self.since > IDLE


def start(case: Case, folder: Path) -> int:
    """The number of a process that runs the case in `folder`, which is made."""
    (folder / "tmp").mkdir(parents=True)
    case.prepare(folder)
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        _enter(folder, case.environment)
        case.inside()
        run(case.page, [word.replace("@", str(folder)) for word in case.words])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(code)


def _enter(folder: Path, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, stream)
        os.close(descriptor)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        setattr(sys, name, os.fdopen(stream, "w", encoding=encoding, errors="strict", closefd=False))
    os.environ.update({"TMPDIR": str(folder / "tmp"), "CHECKPOINTS": str(folder / "checkpoints"), **environment})
    import tempfile

    tempfile.tempdir = None
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared by forks, and a case that dies may hold it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def run(page: str, words: list[str]) -> None:
    """The command in this process."""
    if page in MODULES:
        sys.modules.pop(MODULES[page] if page != "report" else "", None)  # imported for another command
        sys.argv = [MODULES[page], *words]
        runpy.run_module(MODULES[page], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [PAGES[page], *words]
        runpy.run_path(str(ROOT / PAGES[page]), run_name="__main__")


def judge(case: Case, folder: Path, code: int | None, seconds: float) -> Outcome:
    """Whether a command ended as it should: in results, or in one line, code 2, and nothing written."""
    error = _text(folder / "stderr")
    lines = [line for line in error.replace("\r", "\n").split("\n") if line.strip() and not PROGRESS.search(line)]
    out = folder / "out"
    hard, soft = "", ""
    if code is None:
        hard = "does not end"
    elif "Traceback" in error:
        hard = "traceback: " + lines[-1][:200]
    elif code not in case.codes:
        hard = f"exit code {code}"
    elif not Path("/dev/full").is_char_device():
        hard = "a file stands in place of the device /dev/full"
    elif list(folder.rglob("executed")):
        hard = "a command of a stranger was run"
    elif code == 2 and not case.resumes and case.page in PAGES and _wrote(out, case.page):
        hard = "half-written results"
    elif wrong := _wrong_results(case, folder, code):
        hard = wrong
    elif code == 2 and 120 in case.codes and not lines:
        pass  # a run whose streams are lost can say nothing
    elif code == 2 and case.words and (len(lines) != 1 or not lines[0].startswith("error: ")):
        soft = f"{len(lines)} lines: {' / '.join(lines)[:200]}"
    elif code == 2 and lines and not lines[0].isprintable():
        soft = "control characters in the error"
    elif code == 0 and any("Warning" in line for line in lines):
        soft = f"a warning: {next(line for line in lines if 'Warning' in line)[:200]}"
    elif code == 0 and (files := left_behind(folder / "tmp")):
        soft = f"temporary files: {files}"
    return Outcome(case, code, hard, soft, (lines or [""])[-1], seconds)


def left_behind(temporary: Path) -> list[str]:
    """The names of temporary files but for torch's own folder, in which it keeps what it has compiled."""
    return [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]


def _wrote(out: Path, page: str) -> bool:
    """Whether there are results: a file of an audit, or the first file of a run."""
    return any(path.is_file() for path in out.rglob("*" if page == "audit" else "config.json"))


def _wrong_results(case: Case, folder: Path, code: int) -> str:
    """What is wrong with the results of a command that ended well, if anything is."""
    if code == 0 and case.rows is not None:
        return _wrong_rows(folder / "out", case.rows)
    if case.page != "audit" or code == 2 or {"-h", "--help"} & {*case.words}:
        return ""
    found = list(folder.rglob("audit.json"))
    try:
        contents = [json.loads(path.read_text()) for path in found if path.with_name("audit.md").exists()]
    except ValueError:
        return "audit.json is no JSON"
    return "" if len(contents) == len(found) == 1 else f"{len(contents)} audits"


def _wrong_rows(out: Path, expected: str) -> str:
    found = [_text(path) for path in out.glob("*/*/*/rows.jsonl")]
    if len(found) != 1:
        return f"{len(found)} runs"
    if not next(out.glob("*/*/*/rows.jsonl")).with_name("done").exists():
        return "not done"
    return "" if without_clock(found[0]) == without_clock(expected) else "other rows"


def without_clock(text: str) -> list[dict]:
    """The rows of rows.jsonl without what a clock says."""
    try:
        rows = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return []
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""
