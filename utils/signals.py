"""How a program ends when it is asked to: at once while it starts, and within a second, tidily, while it works."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

PATIENCE = 0.8  # seconds in which a program may tidy up
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's own end, which takes a second where large libraries are loaded."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block for SIGINT, SIGTERM and SIGHUP; a signal that was ignored before stays ignored.

    A process that has not ended within PATIENCE, in a long call of a C library say, is ended by a thread. Does nothing
    outside of the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _raise_stopped) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_process, args=(reader, numbers), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _end_process(reader: int, numbers: list[signal.Signals]) -> None:
    """Read signal numbers until the other end is closed; end the process a while after one of `numbers`."""
    while received := os.read(reader, 1):
        if received[0] in numbers:
            time.sleep(PATIENCE)
            os._exit(128 + received[0])
    os.close(reader)
