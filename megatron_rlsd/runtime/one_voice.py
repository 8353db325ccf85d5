"""Ranks that have the same to say say it once.

Under torchrun and ``rlsd --nproc`` the launcher's store is there from the first moment on. Under
srun, before the ranks have found each other, there is none: rank 0 speaks, and any other rank only
once rank 0 has had the time to end the run.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

LAUNCHED = "RLSD_LAUNCHED"
"""Environment variable of ranks whose configuration ``rlsd --nproc`` has read already."""
CONNECT_SECONDS = 3.0
HEAD_START_SECONDS = 5.0
"""Without a store: what rank 0 gets before another rank says the same."""


def rank() -> int:
    """This process's place among the ranks of the run; 0 outside a launcher."""
    return int(os.environ.get("RANK", "0"))


def notice(text: str) -> None:
    """Tell something that no one has to mend, once for all ranks."""
    if rank() == 0 and LAUNCHED not in os.environ:
        print(f"note: {text}", file=sys.stderr, flush=True)


def is_first_to_say(text: str) -> bool:
    """May this rank print ``text``? False where another rank has done so."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if (store := _store()) is None:
        time.sleep(HEAD_START_SECONDS if rank() else 0.0)
        return True
    key = hashlib.sha256(text.encode()).hexdigest()
    try:
        return int(store.add(f"said/{key}", 1)) == 1
    except Exception:  # the store has ended with whoever held it
        return True


def is_first_here(text: str) -> bool:
    """As ``is_first_to_say`` where ``rlsd --nproc`` shows all ranks in one terminal; elsewhere
    each rank may have a log of its own, and True lets it say so there."""
    return LAUNCHED not in os.environ or is_first_to_say(text)


def after_rank_zero(patience: float) -> None:
    """On ranks other than 0: wait until rank 0 has found the run possible; it ends it otherwise.

    patience: seconds to wait at most. Without a store there is no wait.
    """
    if rank() and (store := _store()) is not None:
        # If it does not come, the ranks meet again where they form their group, which is bounded.
        with suppress(Exception):
            store.wait(["possible"], timedelta(seconds=patience))


def rank_zero_agrees() -> None:
    """On rank 0: let the others go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (store := _store()) is not None:
        with suppress(Exception):
            store.set("possible", "1")


def _store() -> Store | None:
    """The launcher's, or rank 0's once it has one."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not _has_group():
        return None
    import torch.distributed as dist  # slow to import, and one process does without

    with suppress(Exception):
        store = dist.TCPStore(
            address,
            int(port),
            is_master=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"rlsd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return None


def _has_group() -> bool:
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_initialized()
