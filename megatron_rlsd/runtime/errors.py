"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlsd.runtime.one_voice import is_first_to_say
from megatron_rlsd.runtime.terminal_text import visible

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A setting, a file, a model or a machine is not as a run needs it.

    The message names what is wrong, where, and what was expected. Programs and tools print it once,
    without a traceback, and end with exit code 2; any other exception is a fault of this package
    and keeps its traceback. A subclass exists only where a caller tells it apart from the others.
    """


WAYS_OUT = {
    errno.ENOSPC: "free some space, then start again to go on",
    errno.EDQUOT: "free some of the quota, then start again to go on",
    errno.EFBIG: "files may not grow so large here (ulimit -f)",
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this machine has no room for more open files",
    errno.EIO: "the disk, or the server behind it, failed",
    errno.ESTALE: "the server of this folder has lost it",
}
"""What a user can mend, whatever it was that could not be written or read -> how."""
OF_A_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What a user can mend where the system names a path."""


def mendable(error: BaseException) -> UserError | None:
    """The user's part in an error: a UserError itself, or one made of the system's answer in the
    error or in those that led to it; None for a fault of this package."""
    each, passed = error, [error]
    while not isinstance(each, UserError):
        number, path = getattr(each, "errno", None), getattr(each, "filename", None)
        if not isinstance(each, OSError):
            number = _in_others_words(str(each))
        if number in WAYS_OUT or (number in OF_A_PATH and path is not None):
            where = f"{path}: " if path is not None else ""
            way_out = f"; {WAYS_OUT[number]}" if number in WAYS_OUT else ""
            return UserError(f"{where}{os.strerror(number)}{way_out}")
        cause = each.__cause__ or each.__context__
        if cause is None or cause in passed:
            return None
        each = cause
        passed.append(cause)
    return each


def _in_others_words(text: str) -> int | None:
    """The system's answer in an error of a library that is not Python."""
    if found := re.search(r"\(os error (\d+)\)", text):  # Rust: safetensors
        return int(found[1])
    return next((number for number in WAYS_OUT if os.strerror(number) in text), None)  # C++: gloo


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """The system's answers inside name ``path``; to a write it answers without one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def tell(error: UserError) -> int:
    """Print the error as every program and tool does, once for all ranks; its exit code."""
    if is_first_to_say(str(error)):
        print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
