"""Do trainer and servers, each in its own Python, load libraries that can work together?"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rlsd.config import Config, SGLangConfig
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.agreement import (
    Libraries,
    agreeing,
    ipc_doubt,
    ipc_problem,
    nccl_differs,
    nccl_problem,
    own_libraries,
    server_libraries,
)
from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON, on_cpu
from megatron_rlsd.runtime.errors import UserError


def check_agreement(config: Config | None = None) -> str:
    """What both load. ``config`` None: the project's own SGLang environment, any transport.

    Raises UserError where the configured transport cannot work, Doubt where that is not known.
    """
    if config is None:
        if not PROJECT_PYTHON.is_file():
            raise Skip("no SGLang environment beside the project")
        ours, theirs = own_libraries(), server_libraries(SGLangConfig())
        problems = [nccl_problem(ours, theirs), ipc_problem(ours, theirs), ipc_doubt(ours, theirs)]
        if any(problems):
            raise Doubt("\n".join(filter(None, problems)))
        return _both(ours, theirs)
    settings, transport = config.rollout.sglang, config.weight_sync.transport
    if config.rollout.engine != "sglang":
        raise Skip("rollout.engine is not sglang")
    if transport == "disk":
        raise Skip("weight_sync.transport=disk goes through files, whatever both load")
    if on_cpu(settings):
        raise Skip("servers on the CPU get their weights without CUDA and NCCL")
    ours = own_libraries()
    if settings.urls:
        raise Doubt(
            f"servers that run already do not say what they load; the trainer loads NCCL "
            f"{ours.nccl_text} and torch {ours.torch}. With transport=broadcast NCCL must be the "
            "same, with transport=ipc the trainer's torch must not be newer"
        )
    theirs = server_libraries(settings)
    problem = nccl_problem if transport == "broadcast" else ipc_problem
    if (reason := problem(ours, theirs)) is not None:
        raise UserError(reason)
    if transport == "ipc" and (doubt := ipc_doubt(ours, theirs)) is not None:
        raise Doubt(doubt)
    if transport == "broadcast" and nccl_differs(ours, theirs):
        raise Doubt(
            f"{_both(ours, theirs)}: servers that this program starts get the trainer's newer NCCL "
            "by LD_PRELOAD; any others would be refused"
        )
    return _both(ours, theirs)


def agreement_problems(config: Config, gpus_per_node: int) -> Iterator[str]:
    """What speaks against the servers that this configuration starts, on nodes with GPUs."""
    settings = config.rollout.sglang
    if gpus_per_node and settings.device == "auto":
        settings = settings.model_copy(update={"device": "cuda"})
    try:
        agreeing(settings, config.weight_sync.transport)
    except EngineError as error:
        yield str(error)


def _both(ours: Libraries, theirs: Libraries) -> str:
    return (
        f"NCCL {ours.nccl_text} here, {theirs.nccl_text} in {theirs.python}; "
        f"torch {ours.torch} and {theirs.torch}"
    )
