"""Is a checkpoint what was written, and safe to read? Asked on all ranks before it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_rlsd.checkpoint.checksums import damages
from megatron_rlsd.checkpoint.manifest import Manifest
from megatron_rlsd.conversion.restricted import DamagedError, check_safe_to_load
from megatron_rlsd.parallel.exchange import from_rank_zero


def verify(folder: Path, manifest: Manifest, control: dist.ProcessGroup) -> str | None:
    """Compare the files that have a checksum as a whole; collective.

    The same on all ranks: what is damaged, None if nothing is; or UserError for a checkpoint that
    refers to code (``check_safe_to_load``). The files of tensors are compared as they are read
    (``storage.load_into``).
    """

    def look() -> str | None:
        if found := damages(folder, manifest.checksums):
            return f"{folder} is damaged: {described(found)}"
        try:
            check_safe_to_load(folder)
        except DamagedError as error:
            return str(error)
        return None

    return from_rank_zero(look, control)


def described(found: dict[str, str]) -> str:
    """Damages in a few words: the first ones, and how many there are."""
    lines = [f"{name} {damage}" for name, damage in sorted(found.items())[:3]]
    more = f", and {len(found) - 3} more files" if len(found) > 3 else ""
    return "; ".join(lines) + more
