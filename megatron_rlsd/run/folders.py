"""The folders that a run writes to, as its own for as long as it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_rlsd.config import Config
from megatron_rlsd.parallel.exchange import from_rank_zero
from megatron_rlsd.runtime.lifecycle import keep_room_for_status, write_status
from megatron_rlsd.runtime.ownership import Claim


@contextmanager
def owned_folders(config: Config, control: dist.ProcessGroup) -> Iterator[None]:
    """Rank 0 claims them; UserError on all ranks where another run has one, or one is of no use."""
    with ExitStack() as stack:

        def claim() -> None:
            for folder in _folders(config):
                stack.enter_context(Claim(folder))
            write_status(config.run_dir, None)  # that of an earlier run
            keep_room_for_status(config.run_dir)

        from_rank_zero(claim, control)
        yield


def _folders(config: Config) -> list[Path]:
    run_dir, weights = Path(config.run_dir), config.weight_folder
    outside = weights is not None and not weights.is_relative_to(run_dir)
    return [run_dir, weights] if weights is not None and outside else [run_dir]
