"""Checks of the network that end within a time limit."""

import threading
import urllib.request
from http.client import HTTPException


def is_reachable(url: str, patience: float) -> bool:
    """Whether the server of `url` answers a HEAD request with success within `patience` seconds."""
    try:
        check_reachable(url, patience)
    except (OSError, HTTPException):
        return False
    return True


def check_reachable(url: str, patience: float) -> None:
    """Raise OSError or HTTPException, with the reason, unless `url` answers within `patience` seconds.

    The request runs in a daemon thread of its own, because no socket timeout bounds the look-up of a name.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience).close()
            outcome.append(None)
        except (OSError, HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    failure = outcome[0] if outcome else TimeoutError(f"no answer in {patience:g} s")
    if failure is not None:
        raise failure
