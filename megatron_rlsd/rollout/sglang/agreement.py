"""What trainer and servers, each in a Python of its own, must have alike: NCCL, and torch for IPC.

NCCL refuses a communicator whose ranks load different releases of it, patch number included, and
torch makes the communicator with the first broadcast: the first publication of a run, minutes after
its start. So both are asked before anything large starts.

LD_PRELOAD gives a server another libnccl than its torch was built with. That is sound for a newer
library of the same major version and CUDA: NCCL only adds functions, and reads its callers'
structures by the version that they carry. It is not sound for an older one, which lacks functions
that torch calls. So of two releases the newer one is for both: our servers are started with the
trainer's where that is the newer, and otherwise the trainer has to be started with theirs, which no
program can do for itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_rlsd.config import Config, SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.loaded_libraries import loaded_libraries
from megatron_rlsd.rollout.sglang.process import HERE, on_cpu, server_environment, server_python
from megatron_rlsd.runtime.warn import warn

ASK_SECONDS = 300.0
"""importing torch from a network file system takes its time."""
NCCL_SWITCHES = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
"""SGLang sets both to 0 where its environment has none; NCCL's own default is on."""
IPC_HANDLES = (2, 13)
"""The torch release whose CUDA IPC handles older ones refuse as those "of a future version"."""


@dataclass(frozen=True)
class Libraries:
    """What one Python's torch loads."""

    python: str
    torch: str
    cuda: str | None
    nccl: tuple[int, ...] | None
    nccl_file: str | None

    @classmethod
    def of(cls, python: str, told: Mapping[str, Any]) -> Libraries:
        nccl = told["nccl"]
        numbers = None if nccl is None else tuple(map(int, nccl))
        return cls(python, told["torch"], told["cuda"], numbers, told["nccl_file"])

    @property
    def nccl_text(self) -> str:
        return "none" if self.nccl is None else ".".join(map(str, self.nccl))

    @property
    def torch_release(self) -> tuple[int, ...]:
        """Major and minor."""
        return tuple(int(number) for number in re.findall(r"\d+", self.torch)[:2])

    @property
    def cuda_major(self) -> str:
        return (self.cuda or "").split(".")[0]


@cache
def own_libraries() -> Libraries:
    """The libraries of this very process."""
    return Libraries.of(sys.executable, loaded_libraries())


def server_libraries(config: SGLangConfig) -> Libraries:
    """The libraries of servers that ``config`` starts: their Python, in their environment, says.

    Raises EngineError if that Python is missing or has no torch that can be imported.
    """
    return _asked(str(server_python(config)), tuple(sorted(server_environment(config).items())))


@cache
def _asked(python: str, env: tuple[tuple[str, str], ...]) -> Libraries:
    command = [python, str(HERE / "loaded_libraries.py")]
    try:
        answer = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
        return Libraries.of(python, json.loads(answer.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[-1]
    except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    raise EngineError(f"{python} cannot say which torch and NCCL it loads: {reason}")


def agreeing(config: SGLangConfig, transport: str) -> SGLangConfig:
    """The same servers, started so that weights can come to them by ``transport``.

    Raises EngineError where that cannot be, and says what to do.
    """
    if config.urls or on_cpu(config):
        return config
    if transport == "disk":
        return config
    ours, theirs = own_libraries(), server_libraries(config)
    problem = nccl_problem if transport == "broadcast" else ipc_problem
    if (reason := problem(ours, theirs)) is not None:
        raise EngineError(reason)
    if transport == "ipc":
        if (doubt := ipc_doubt(ours, theirs)) is not None:
            warn(doubt)
        return config
    if not nccl_differs(ours, theirs):
        return config
    assert ours.nccl_file is not None
    print(
        f"servers are started with LD_PRELOAD={ours.nccl_file}: NCCL {ours.nccl_text} of the "
        f"trainer in place of the older {theirs.nccl_text} of {theirs.python}",
        flush=True,
    )
    preload = {"LD_PRELOAD": _before(ours.nccl_file, server_environment(config).get("LD_PRELOAD"))}
    return config.model_copy(update={"env": {**config.env, **preload}})


def nccl_differs(ours: Libraries, theirs: Libraries) -> bool:
    """Neither has to be there: without it, weights go over gloo."""
    return None not in (ours.nccl, theirs.nccl) and ours.nccl != theirs.nccl


def nccl_problem(ours: Libraries, theirs: Libraries) -> str | None:
    """Why these two cannot be in one NCCL communicator, whatever servers are started with."""
    if not nccl_differs(ours, theirs):
        return None
    assert ours.nccl is not None
    assert theirs.nccl is not None
    found = (
        f"weight_sync.transport=broadcast: NCCL refuses a group of different releases, and the "
        f"trainer ({ours.python}) loads {ours.nccl_text}, the servers ({theirs.python}) "
        f"{theirs.nccl_text}. "
    )
    if ours.nccl[0] != theirs.nccl[0] or ours.cuda_major != theirs.cuda_major:
        return found + (
            f"Neither serves both: they were built for CUDA {ours.cuda} and {theirs.cuda}. Install "
            "environments for one CUDA, or take weight_sync.transport=disk"
        )
    if ours.nccl > theirs.nccl:
        if ours.nccl_file is not None:
            return None
        return found + (
            f"The trainer's lies within its torch, so servers cannot be given it: install NCCL "
            f"{ours.nccl_text} for {theirs.python} (pip install nvidia-nccl-cu{theirs.cuda_major}=="
            f"{ours.nccl_text}), or take weight_sync.transport=disk"
        )
    preload = f"start the trainer with LD_PRELOAD={theirs.nccl_file}, " if theirs.nccl_file else ""
    return found + (
        f"Install the newer one for the trainer (pip install nvidia-nccl-cu{theirs.cuda_major}=="
        f"{theirs.nccl_text} into {ours.python}), {preload}or take weight_sync.transport=disk"
    )


def ipc_problem(ours: Libraries, theirs: Libraries) -> str | None:
    """Why servers cannot open the CUDA IPC handles that the trainer's torch makes."""
    if None in (ours.cuda, theirs.cuda) or not theirs.torch_release < IPC_HANDLES <= (
        ours.torch_release
    ):
        return None
    return (
        f"weight_sync.transport=ipc: torch {theirs.torch} of the servers ({theirs.python}) refuses "
        f"the CUDA IPC handles of the trainer's newer torch {ours.torch} ({ours.python}): the "
        "trainer's must not be newer than the servers'. Install torch "
        f">= {'.'.join(map(str, IPC_HANDLES))} for the servers, or take weight_sync.transport=disk"
    )


def ipc_doubt(ours: Libraries, theirs: Libraries) -> str | None:
    """What has not been tried of IPC between these two, though nothing is known against it."""
    if None in (ours.cuda, theirs.cuda) or ours.torch_release <= theirs.torch_release:
        return None
    return (
        f"the trainer's torch {ours.torch} ({ours.python}) is newer than the servers' "
        f"{theirs.torch} ({theirs.python}): torch promises only the reverse for CUDA IPC handles"
    )


def set_nccl_switches(config: Config) -> None:
    """Have the trainer's NCCL switches as SGLang has its own, unless they are set already.

    Before the first communicator, which reads them once for the whole process. Ranks that differ
    in them have failed in point-to-point transfers (NeMo RL, issue 564).
    """
    if config.rollout.engine == "sglang" and config.weight_sync.transport == "broadcast":
        for name in NCCL_SWITCHES:
            os.environ.setdefault(name, "0")


def nccl_refusal(error: object, server: object) -> str | None:
    """What it means if an error holds NCCL's refusal of different releases; None: it holds none.

    In a group of the trainer, as rank 0, and ``server``.
    """
    pattern = r"Mismatched NCCL version detected : rank (\d+) version (\d+) rank \d+ version (\d+)"
    if (found := re.search(pattern, str(error))) is None:
        return None
    rank, one, other = map(int, found.groups())
    ours, theirs = (one, other) if rank == 0 else (other, one)
    return (
        f"{server} loads NCCL {_release(theirs)} and the trainer ({sys.executable}) "
        f"{_release(ours)}, and NCCL refuses a group of different releases. Give both the newer "
        "one (docs/rollout.md, one NCCL for both), or take weight_sync.transport=disk"
    )


def _release(code: int) -> str:
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _before(file: str, others: str | None) -> str:
    return file if not others else f"{file}:{others}"
