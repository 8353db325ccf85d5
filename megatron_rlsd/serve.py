"""The SGLang servers of one node, for a trainer that runs elsewhere.

    python -m megatron_rlsd.serve CONFIG.yaml [key=value ...]

Starts ``rollout.sglang.num_servers`` servers that bind ``rollout.sglang.host`` and, once all of
them serve, writes their URLs, one a line, to run_dir/servers/NODE/urls. A server that dies is
started again on its port, ``rollout.sglang.max_restarts`` times in all; the trainer gives it the
current weights before it asks it anything. SIGTERM, SIGINT or SIGHUP ends the servers, unless this
program was started with that signal ignored.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what may be missing is imported
    from megatron_rlsd.runtime.missing import tell_missing

    tell_missing()

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rlsd.config import Config, SGLangConfig, config_parser, load_config
from megatron_rlsd.data.tokenizers import warn_of_other_ids_in
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.routes import recording
from megatron_rlsd.rollout.sglang import SGLangEngine, agreeing
from megatron_rlsd.rollout.sglang.process import free_port, on_cpu
from megatron_rlsd.rollout.sglang.server import State
from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError, mendable, tell
from megatron_rlsd.runtime.ownership import Claim

POLL_SECONDS = 0.5
WILDCARDS = ("0.0.0.0", "::")


class Stopped(Exception):
    """A signal asked this program to end."""


def serve(config: Config) -> None:
    """Keep this node's servers up until a signal comes (Stopped) or one is given up (EngineError).

    Raises UserError for settings under which there is nothing to serve, and where another process
    serves from the same folder of this node.
    """
    settings = settings_to_serve(config)
    # The trainer's tokenizer may be elsewhere; this one answers whoever asks in words.
    warn_of_other_ids_in(Path(config.model.hf_path))
    folder = Path(config.run_dir) / "servers" / node_name()
    with Claim(folder):
        urls = folder / "urls"
        urls.unlink(missing_ok=True)
        engine = SGLangEngine(
            settings,
            hf_path=config.model.hf_path,
            dtype=config.model.dtype,
            # Bounds on requests, and this program sends none.
            vocab_size=0,
            max_positions=None,
            run_dir=folder,
            # Whoever trains with them does.
            claims=False,
        )
        try:
            engine.wait_until_ready()
            write_whole(urls, "".join(f"{url}\n" for url in announced_urls(settings)))
            print(f"serving; the URLs are in {urls}", flush=True)
            while True:
                for server in engine.fleet.servers:
                    if server.state is State.GIVEN_UP:
                        raise EngineError(f"{server} is given up: {server.reason}")
                time.sleep(POLL_SECONDS)
        finally:
            urls.unlink(missing_ok=True)
            engine.close()


def settings_to_serve(config: Config) -> SGLangConfig:
    """rollout.sglang as this node's servers need it.

    Raises UserError if they cannot be started, EngineError if the trainer, which is taken to run
    in this program's Python, could not bring them weights.
    """
    settings = config.rollout.sglang
    if config.algorithm.routing_replay == "rollout":
        settings = recording(settings)
    if config.rollout.engine != "sglang":
        raise UserError(f"rollout.engine={config.rollout.engine}: only sglang has servers")
    if settings.urls:
        raise UserError(
            f"rollout.sglang.urls={settings.urls}: these servers run already; the trainer is given "
            "urls, and whoever starts the servers is not"
        )
    if not (Path(config.model.hf_path) / "config.json").is_file():
        raise UserError(f"model.hf_path={config.model.hf_path}: no config.json there")
    _check_gpus(settings)
    changes = {
        # A restarted server must be found where it was.
        "port": settings.port or free_port(settings.host, settings.num_servers),
        # The trainer pauses servers while weights change: from here that would look like a hang.
        "health_interval_seconds": math.inf,
    }
    return agreeing(settings.model_copy(update=changes), config.weight_sync.transport)


def announced_urls(settings: SGLangConfig) -> list[str]:
    """Where other nodes find the servers."""
    assert settings.port is not None
    host = socket.gethostname() if settings.host in WILDCARDS else settings.host
    shown = f"[{host}]" if ":" in host else host
    return [f"http://{shown}:{settings.port + index}" for index in range(settings.num_servers)]


def node_name() -> str:
    """Slurm's name of this node, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _check_gpus(settings: SGLangConfig) -> None:
    if on_cpu(settings):
        return
    import torch

    needed = settings.first_gpu + settings.num_servers * settings.tensor_parallel
    if needed > (found := torch.cuda.device_count()):
        raise UserError(
            f"rollout.sglang.first_gpu={settings.first_gpu} + num_servers={settings.num_servers} x "
            f"tensor_parallel={settings.tensor_parallel} = {needed} GPUs, but this node has {found}"
        )


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise Stopped, once; a signal that is ignored already stays so."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    heeded = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    arguments = config_parser(__doc__).parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        with stopped_by_signals():
            serve(config)
    except Stopped as stop:
        print(f"{stop}: the servers have ended", flush=True)
    except (UserError, OSError) as error:
        if told := mendable(error):
            return tell(told)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
