"""Is a checkpoint what was written, and safe to read? Asked on all ranks before it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch.distributed as dist

from megatron_rlsd.checkpoint.checksums import damages
from megatron_rlsd.checkpoint.manifest import Manifest
from megatron_rlsd.conversion.restricted import DamagedError, check_safe_to_load
from megatron_rlsd.parallel.exchange import from_rank_zero, gather_bytes

_OWN_FILE = re.compile(r"_(\d+)(?:_\d+\.distcp|\.safetensors)$")


def verify(folder: Path, manifest: Manifest, control: dist.ProcessGroup) -> str | None:
    """Compare every file with its checksum, each rank a share of them; collective.

    The same on all ranks: what is damaged, None if nothing is; or UserError for a checkpoint that
    refers to code (``check_safe_to_load``). Of one of release 0.1, which has no checksums, only the
    latter is asked.
    """
    found = _damages_found_together(folder, manifest, control) if manifest.checksums else {}
    if found:
        return f"{folder} is damaged: {described(found)}"

    def read_restricted() -> str | None:
        try:
            check_safe_to_load(folder)
        except DamagedError as error:
            return str(error)
        return None

    return from_rank_zero(read_restricted, control)


def described(found: dict[str, str]) -> str:
    """Damages in a few words: the first ones, and how many there are."""
    lines = [f"{name} {damage}" for name, damage in list(found.items())[:3]]
    more = f", and {len(found) - 3} more files" if len(found) > 3 else ""
    return "; ".join(lines) + more


def shares(manifest: Manifest, world: int) -> dict[str, int]:
    """File -> the rank that looks at it.

    In the layout that wrote the checkpoint it is the rank whose own file it is: that one will load
    it, from memory then. In another layout the bytes are shared out evenly.
    """
    if manifest.layout.get("world_size") == world:
        owners = {name: _OWN_FILE.search(name) for name in manifest.files}
        return {name: int(found[1]) % world if found else 0 for name, found in owners.items()}
    loads, chosen = [0] * world, {}
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += manifest.files[name]
        chosen[name] = rank
    return chosen


def _damages_found_together(
    folder: Path, manifest: Manifest, control: dist.ProcessGroup
) -> dict[str, str]:
    """The same on every rank, in the order of the names."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [name for name, owner in shares(manifest, world).items() if owner == rank]
    gathered = gather_bytes(json.dumps(damages(folder, manifest.checksums, mine)).encode(), control)

    def merged() -> dict[str, str]:
        found = {name: what for each in gathered or [] for name, what in json.loads(each).items()}
        return dict(sorted(found.items()))

    return from_rank_zero(merged, control)
