"""Where worker processes come from: a server that has imported the project, and forks them in no time.

A page calls `start_ahead` before it imports torch, so that server and page import at the same time. The server itself
computes nothing: a process whose OpenMP threads have worked cannot fork. Windows has no fork; its workers are spawned.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

from utils.cli import ROOT

# of a command that wants no workers
ALONE = re.compile(r"(^|\s)(-h|--help|--(jobs|trials)[ =]1|--backend[ =]ray)(\s|$)")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_ahead() -> None:
    """The server, for a command line that may want workers."""
    if len(sys.argv) > 1 and not ALONE.search(" ".join(sys.argv[1:])) and cores() > 1:
        context()


def context() -> BaseContext:
    """What to make workers and their queues from; starts the server if there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forkserver.set_forkserver_preload(["utils.run"])
    with _at_home(), _deaf():
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def _at_home() -> Iterator[None]:
    """What is imported from where a process stands must be ours, wherever the user stands."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A child inherits that Ctrl-C means nothing: it is for the main process to end its workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
