"""The folder for files that processes of one run exchange, which does not outlive them.

The fork server imports this module before all others. It removes the folder when it ends, and it ends with the main
process, even if that was killed: where the kernel reports the end of a parent (Linux), in the middle of its imports as
well, and elsewhere after them.
"""

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path
from types import FrameType

SCRATCH = "FEDERATED_PRIVACY_ATTACK_SCRATCH"  # the folder; set in the environment of the server alone
PARENT = "FEDERATED_PRIVACY_ATTACK_PARENT"  # the number of the main process; likewise
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def scratch_folder() -> Path:
    """The folder in which multiprocessing keeps its own files as well; removed when this process ends."""
    return Path(util.get_temp_dir())


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """A process that starts in the block ends with this one, and then removes the folder."""
    own = {SCRATCH: str(scratch_folder())}
    if threading.current_thread() is threading.main_thread():  # the kernel reports the end of a thread
        own[PARENT] = str(os.getpid())
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def _end_with(parent: int, folder: str) -> None:
    """Let the end of the process `parent` end this one, whatever it does at that moment."""
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own and os.getppid() != parent:  # not a worker, and not a signal of somebody else
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

    signal.signal(signal.SIGUSR1, end)
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGUSR1))
    end(signal.SIGUSR1, None)  # it may have ended before


if SCRATCH in os.environ:
    _folder = os.environ.pop(SCRATCH)
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    if PARENT in os.environ:
        _parent = int(os.environ.pop(PARENT))
        if sys.platform == "linux":
            _end_with(_parent, _folder)
