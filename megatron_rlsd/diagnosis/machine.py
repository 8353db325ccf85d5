"""The device itself, and room for what a run writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args

import torch

from megatron_rlsd.config import Config, Fusion
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.memory import rank_parameters
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.machine import device

GIB = 2**30
SIZE = 512
MOST_USED_SHARE = 0.1
"""The share of a GPU's memory that others may hold before a run starts."""


def check_device() -> str:
    """A product on every device of this machine, held against float64; and free memory."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"cuda:{number}" for number in range(count)] or ["cpu"]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    expected = a.double() @ b.double()
    for name in names:
        error = float((a.to(name) @ b.to(name)).cpu().sub(expected).abs().max())
        # TF32 products of 512 terms are off by some hundredths.
        if not error < 0.5:
            raise UserError(f"{name} multiplies wrongly: off by {error:.3g} from float64")
    if device().type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"CPU with {os.cpu_count()} cores and {memory / GIB:.0f} GiB"
    taken = []
    for name in names:
        free, total = torch.cuda.mem_get_info(name)
        if free < (1 - MOST_USED_SHARE) * total:
            taken.append(f"{name} has {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if taken:
        raise Doubt(f"memory of GPUs is in use: {', '.join(taken)}")
    return f"{count} x {torch.cuda.get_device_name(0)}"


def check_fast_kernels(config: Config | None = None) -> str:
    """What a run takes on this device where ``auto`` leaves the choice; Doubt if it is slow."""
    # Imported late: other checks do without the kernels' modules.
    from megatron_rlsd.actor.slow_paths import slow_paths

    if device().type != "cuda":
        raise Skip("there is no GPU to choose for")
    if found := slow_paths(config, device()):
        raise Doubt("\n".join(found))
    off = config.model.disabled_fusions if config else []
    kept = ", ".join(name for name in get_args(Fusion) if name not in off)
    fused = f"fused: {kept or 'nothing'}"
    return f"the head runs on Triton, the layers are Transformer Engine's; {fused}"


def check_processes(config: Config, processes: int | None) -> str:
    """A GPU for each process of this machine, and layers that this device can have.

    processes: of the trainer on this machine; None: not known.
    """
    precision = config.model.precision
    if precision.layers == "transformer_engine" or precision.fp8 != "none":
        # Imported late: it pulls in Megatron.
        from megatron_rlsd.actor.precision import layer_kind

        layer_kind(precision, device())
    if device().type != "cuda":
        return "on the CPU any number of processes goes"
    if processes and processes > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"{processes} processes on this machine need a GPU each, but torch finds {gpus} GPUs; "
            f"start {gpus} processes, or look at CUDA_VISIBLE_DEVICES"
        )
    return f"{torch.cuda.device_count()} GPUs"


def check_space(config: Config, model: ModelDims | None) -> str:
    """run_dir can be written, and holds the checkpoints and the export that the run will keep."""
    run_dir = Path(config.run_dir).absolute()
    parent = run_dir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"run_dir={config.run_dir}: {parent} is not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir}: {parent} cannot be written: {error}") from error
    free = shutil.disk_usage(parent).free
    if model is None:
        return f"{free / GIB:.1f} GiB free"
    needed = wanted_bytes(config, model)
    text = f"{free / GIB:.1f} GiB free, about {needed / GIB:.1f} GiB wanted"
    if needed > free:
        raise UserError(
            f"run_dir={config.run_dir}: {text} for checkpoints (checkpoint.keep="
            f"{config.checkpoint.keep}) and the final export"
        )
    return text


def wanted_bytes(config: Config, model: ModelDims) -> int:
    """The size of the checkpoints kept, one more while it is written, and the final export."""
    count = rank_parameters(model, type(config.parallel)(), 0).total
    item = 2 if config.model.dtype == "bfloat16" else 4
    state = count * (item + (12 if item == 2 else 8))
    if config.teacher.mode != "live":
        state += count * (4 if config.teacher.mode == "ema" else item)
    settings = config.checkpoint
    kept = (settings.keep or 2) + 1 if settings.interval else 1
    exports = 1
    if settings.hf_export_interval:
        exports += config.train.steps // settings.hf_export_interval
    if config.rollout.engine == "sglang" and config.weight_sync.transport == "disk":
        exports += 2
    return kept * state + exports * count * item
