"""The system's bound on files and connections that this process may have open."""

from __future__ import annotations

import os
import resource

from megatron_rlsd.runtime.errors import UserError

SPARE = 256
"""For what else is opened: checkpoints, pipes of workers, torch's own connections."""


def allow_open_files(wanted: int, what: str) -> None:
    """Raise the soft limit (``ulimit -Sn``) so far that ``wanted`` more can be open.

    Raises UserError with the numbers where the hard limit is lower; ``what`` says who wants them.
    """
    needed = wanted + len(os.listdir("/proc/self/fd")) + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _at_least(soft, needed):
        return
    if not _at_least(hard, needed):
        raise UserError(
            f"{what} may need {wanted} connections and so about {needed} open files, but this "
            f"process may have {hard} (ulimit -Hn): raise that, or lower the setting"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _at_least(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
