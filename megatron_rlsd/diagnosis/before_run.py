"""What a program asks before its ranks meet, so that a mistake costs seconds and one message."""

from __future__ import annotations

import os

from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis.doctor import Doctor
from megatron_rlsd.runtime import one_voice


def refuse(config: Config, processes: int | None = None) -> None:
    """Raise UserError if ``rlsd doctor`` finds that this configuration cannot run here.

    processes: ranks that are about to be started, all on this machine. None: this process is one of
    those that a launcher's variables tell of; whatever started it may have asked already.
    Looks at the model's folder, tokenizer and template, layout and devices, run_dir, data,
    environment and rewards; starts no process of the run.
    """
    if one_voice.LAUNCHED in os.environ:
        return
    world = processes or int(os.environ.get("WORLD_SIZE", "1"))
    local = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    Doctor(world_size=world, local_processes=local).refuse(config)
