"""A server process of our own: its command line, its log, its end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.config.secrets import is_secret
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.launch import hidden_flags
from megatron_rlsd.runtime.guard import END, END_NOW, guarded
from megatron_rlsd.runtime.lifecycle import unheard_by_children

HERE = Path(__file__).parent
PROJECT_PYTHON = Path(__file__).parents[3] / ".venv-sglang" / "bin" / "python"
STOP_SECONDS = 10.0
GRACE_SECONDS = 5.0
"""In which a server may end in order."""
LOG_LINES = 15
FREE_PORTS = range(20000, 32000)
"""Below the range that outgoing connections take their ports from."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""With MASTER_* and TORCHELASTIC_*: what torchrun tells the trainer, and no server."""
TRAINER_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
"""What suits training alone: torch_memory_saver ends a server whose allocator is told
expandable_segments, and SGLang chooses its own number of connections."""


class ServerProcess:
    """Starts on construction; ``log`` gets its output, in addition to what is there already.

    Only the user may read the log: what servers print is not ours to judge.
    """

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", opener=_for_the_user_alone) as output:
            print(time.strftime("==== %F %T"), " ".join(command), file=output, flush=True)
            self._start = output.tell()
            # The trainer needs its servers to the end of the step at which a warning stops it.
            with unheard_by_children(signal.SIGUSR1):
                self._guard = subprocess.Popen(
                    guarded(command, grace_seconds=GRACE_SECONDS, apart=False),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    start_new_session=True,
                )

    @property
    def group(self) -> int:
        """Process group of the guard, the server and its workers."""
        return self._guard.pid

    @property
    def running(self) -> bool:
        return self._guard.poll() is None

    def listens_on(self, port: int) -> bool:
        """Does the server, or a process that came of it, take connections on ``port``?"""
        with contextlib.suppress(psutil.Error):
            return any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == port
                for process in psutil.Process(self._guard.pid).children(recursive=True)
                for each in process.net_connections("tcp")
            )
        return False

    def kill(self) -> None:
        """End the server and all that came of it by force."""
        if self.running:
            self._guard.send_signal(END_NOW)
            # It may have been stopped with its group.
            self._guard.send_signal(signal.SIGCONT)
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self._guard.wait()

    def stop(self) -> None:
        """Let the server end in order, within seconds; then end it and all that came of it."""
        self.ask_to_stop()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def ask_to_stop(self) -> None:
        if self.running:
            self._guard.send_signal(END)

    def last_lines(self) -> str:
        """The end of the log since this start, indented."""
        with self.log.open("rb") as output:
            output.seek(self._start)
            lines = output.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-LOG_LINES:]) or "    (empty)"


def server_command(
    config: SGLangConfig,
    *,
    model: str,
    dtype: str,
    index: int,
    port: int,
    label: str,
) -> list[str]:
    """Command line of server ``index`` on ``port``; ``config.args`` overrides any default.

    Secrets do not stand on it: see ``hidden_environment``.

    label: what the server calls its weights until it is given others; it tells this very server
    from any other that may answer on its port.

    Raises EngineError if SGLang's environment is missing.
    """
    python = server_python(config)
    flags: dict[str, Any] = {
        "model_path": model,
        "dtype": dtype,
        "host": config.host,
        "port": port,
        "tp_size": config.tensor_parallel,
        # Token ids in, token ids out: the trainer's tokenizer need not be one that SGLang reads.
        "skip_tokenizer_init": True,
        # Or every request would make a line of the log.
        "log_level_http": "warning",
    }
    if on_cpu(config):
        launcher = [str(HERE / "cpu" / "launch.py")]
        flags |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "max_total_tokens": 16384,
            "mem_fraction_static": 0.1,
            "max_running_requests": 64,
            # An idle scheduler would keep a whole core from the trainer.
            "sleep_on_idle": True,
        }
    else:
        launcher = [str(HERE / "launch" / "launch.py")]
        flags["base_gpu_id"] = config.first_gpu + index * config.tensor_parallel
    flags |= {name: value for name, value in _args(config).items() if not is_secret(name)}
    flags["weight_version"] = label
    return [str(python), *launcher, *_as_arguments(flags)]


def server_python(config: SGLangConfig) -> Path:
    """Python of SGLang's environment; EngineError if it is missing."""
    python = Path(config.python) if config.python else PROJECT_PYTHON
    if not python.is_file():
        raise EngineError(
            f"no SGLang environment: {python} does not exist; run `make sglang-cpu`, or set "
            "rollout.sglang.python or rollout.sglang.urls"
        )
    # It may be a link; resolved, it would lose its environment.
    return python.absolute()


def server_environment(config: SGLangConfig) -> dict[str, str]:
    """The trainer's variables without those of its own, with ``config.env`` on top."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in (*LAUNCHER_VARIABLES, *TRAINER_VARIABLES)
        and not name.startswith(("MASTER_", "TORCHELASTIC_"))
    }
    if on_cpu(config):
        # More threads than cores cost a factor of ten.
        env.setdefault("OMP_NUM_THREADS", "1")
    return env | {"HF_HUB_OFFLINE": "1"} | config.env


def hidden_environment(config: SGLangConfig, api_key: str | None) -> dict[str, str]:
    """What a server is told in its environment: its key, and flags of ``config.args`` like it.

    Every user of a machine can read the command lines on it, and SGLang's log has its arguments.
    """
    flags = {"api_key": api_key} | {
        name: value for name, value in _args(config).items() if is_secret(name)
    }
    given = {name: str(value) for name, value in flags.items() if value is not None}
    return {hidden_flags.VARIABLE: json.dumps(given)} if given else {}


def giving_memory_back(config: SGLangConfig) -> SGLangConfig:
    """The same servers, able to free their memory and take it again.

    On a CPU they answer to both and free nothing: SGLang's memory saver is for GPUs.
    """
    if on_cpu(config):
        return config
    args = {"enable_memory_saver": True, **config.args}
    # Their trainer loads its model meanwhile, on one GPU sooner than on another.
    env = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false", **config.env}
    return config.model_copy(update={"args": args, "env": env})


def on_cpu(config: SGLangConfig) -> bool:
    if config.device != "auto":
        return config.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def free_port(host: str, count: int = 1) -> int:
    """The first of ``count`` neighbouring ports that are free just now."""
    reason: OSError | None = None
    for first in random.SystemRandom().sample(FREE_PORTS, 200):
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind((host, port))
            except OSError as error:
                reason = error
                continue
        return first
    raise EngineError(f"found no {count} free ports on {host} in {FREE_PORTS}: {reason}")


def _args(config: SGLangConfig) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in config.args.items()}


def _for_the_user_alone(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    # It may be there already.
    os.fchmod(descriptor, 0o600)
    return descriptor


def _as_arguments(flags: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for key, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append("--" + key.replace("_", "-"))
        if isinstance(value, dict):
            arguments.append(json.dumps(value))
        elif isinstance(value, list):
            arguments += map(str, value)
        elif value is not True:
            arguments.append(str(value))
    return arguments
