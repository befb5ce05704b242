"""Worker processes: a fork server that has imported the project, and forks workers quickly.

A script calls `preload_workers` before it imports torch, so that server and script import at the same time. The server
itself computes nothing: a process whose OpenMP threads have worked cannot fork. Windows has no fork and spawns workers.
"""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

from core.paths import ROOT
from runner.scratch import handed_over
from utils.signals import STOPPING

# command lines that need no workers
NO_WORKERS = re.compile(r"(^|\s)(-h|--help|--(jobs|trials)[ =]1|--backend[ =]ray)(\s|$)")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preload_workers() -> None:
    """Start the fork server if the command line may need workers."""
    if len(sys.argv) > 1 and not NO_WORKERS.search(" ".join(sys.argv[1:])) and cores() > 1:
        context()


def context() -> BaseContext:
    """The context that makes workers and their queues; starts the fork server if there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forkserver.set_forkserver_preload(["runner.scratch", "runner.run"])
    with _in_project_root(), _signals_blocked(), handed_over():
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def start_worker() -> None:
    """What every worker does first: it ignores Ctrl-C, and ends when the process that started it ends."""
    gc.freeze()  # pages shared with the server stay shared until a collection writes to them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def end(pool: ProcessPoolExecutor, finished: bool) -> None:
    """End the workers of a pool; unless the run has `finished`, perhaps while one starts, without waiting for them."""
    if not finished:
        for worker in multiprocessing.active_children():
            worker.kill()
    pool.shutdown(wait=finished, cancel_futures=True)


@contextlib.contextmanager
def _in_project_root() -> Iterator[None]:
    """The server imports from its working directory: it must find this project wherever the user stands."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Receive signals after the block only. The fork server inherits that they are blocked, and so do workers.

    They end with the main process. multiprocessing's resource tracker must start first, because it unblocks signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
