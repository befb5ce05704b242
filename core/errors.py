"""The one exception that is meant for the user."""


class UsageError(Exception):
    """One line for the caller: what is wrong and what to do about it.

    Messages name arguments in backticks, as in "lower `batch_size`". The command line prints these as flags
    (`--batch-size`) and exits with code 2; a notebook shows the message as it is.
    """
