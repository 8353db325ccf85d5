"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import sys

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A setting, a file, a model or a machine is not as a run needs it.

    The message names what is wrong, where, and what was expected. Programs and tools print it once,
    without a traceback, and end with exit code 2; any other exception is a fault of this package
    and keeps its traceback. A subclass exists only where a caller tells it apart from the others.
    """


def tell(error: UserError) -> int:
    """Print the error as every program and tool does; its exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
