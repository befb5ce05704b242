"""Ctrl-C while a program starts: a module of its own, because it must be imported before anything that takes time."""

import signal


def die_of_sigint() -> None:
    """Let Ctrl-C end the process at once, without a traceback: for the imports before a program does anything."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
