"""What the tools that run as `python -m package.module` share."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from utils.flags import FlagError, as_flags
from utils.memory import is_out_of_memory
from utils.terminal import prepare_streams, printable


@contextlib.contextmanager
def one_line_errors(mistake: type[Exception]) -> Iterator[None]:
    """End the program with one line and exit code 2 for a mistake of the user, and where the system gives no more.

    mistake: the exception whose message is meant for the user, besides FlagError.
    """
    prepare_streams()
    try:
        yield
    except (mistake, FlagError) as error:
        _fail(as_flags(str(error)))
    except OSError as error:
        _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail("there is not enough memory for this model and its inputs")


def _fail(message: str) -> NoReturn:
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2) from None
