"""The folder for files that processes of one run exchange, which does not outlive them.

The fork server imports this module before all others. It removes the folder when it ends, and it ends as soon as the
main process has ended, even if that was killed.
"""

import atexit
import contextlib
import os
import shutil
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path

VARIABLE = "FEDERATED_PRIVACY_ATTACK_SCRATCH"  # set in the environment of the server alone


def scratch_folder() -> Path:
    """The folder in which multiprocessing keeps its own files as well; removed when this process ends."""
    return Path(util.get_temp_dir())


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """A process that starts in the block removes the folder when it ends."""
    os.environ[VARIABLE] = str(scratch_folder())
    try:
        yield
    finally:
        del os.environ[VARIABLE]


if VARIABLE in os.environ:
    atexit.register(shutil.rmtree, os.environ.pop(VARIABLE), ignore_errors=True)
