"""Weights within one machine: servers read the trainer's memory.

On GPUs a CUDA IPC handle of each bucket travels over HTTP and the server copies from the trainer's
GPU, its own or one that it reaches; without GPUs, the name of a shared-memory file. SGLang's tensor
endpoint reads both; see payload.py. For colocated runs, where trainer and servers share GPUs and
nccl refuses to connect them.

A server that comes back between two publications is given the buckets in main memory (see
FlatWeights), which are shared memory here, GPU or not.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from urllib.parse import urlsplit

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import Server, ServerFacts, SGLangClient, SGLangEngine
from megatron_rlsd.weight_sync.flat import Allocate, FlatBucket
from megatron_rlsd.weight_sync.payload import (
    payload,
    remove_stale_names,
    shared_buffer,
    start_janitor,
)
from megatron_rlsd.weight_sync.streamed import StreamedTransport
from megatron_rlsd.weight_sync.transport import SyncSettings


class IpcTransport(StreamedTransport):
    """See the module."""

    def __init__(self, engine: SGLangEngine | None, settings: SyncSettings) -> None:
        super().__init__(engine, settings)
        self._janitor: subprocess.Popen[bytes] | None = None
        if engine is not None:
            remove_stale_names()
            self._janitor = start_janitor()
        self._facts: dict[Server, tuple[SGLangClient, ServerFacts]] = {}

    def _allocator(self) -> Allocate:
        return shared_buffer

    def close(self) -> None:
        super().close()
        if self._janitor is not None:
            # Nothing is being read any more.
            self._janitor.kill()
            self._janitor.wait()
            self._janitor = None

    async def _open(self, servers: tuple[Server, ...], *, anew: bool) -> None:
        (server,) = servers
        known = self._facts.get(server)
        if known is None or anew or known[0] is not server.client:
            if not is_here(server.url):
                raise EngineError(
                    f"{server} is not on this machine, so it cannot read the trainer's memory: "
                    "weight_sync.transport must be broadcast or disk"
                )
            facts = await server.client.facts(timeout=self._seconds)
            self._facts[server] = server.client, facts

    async def _send(self, servers: tuple[Server, ...], bucket: FlatBucket) -> None:
        (server,) = servers
        facts = self._facts[server][1]
        on_gpu = facts.device == "cuda" and bucket.device_flat is not None
        with contextlib.ExitStack() as stack:
            payloads = [
                stack.enter_context(payload(bucket, on_gpu=on_gpu))
                for _ in range(facts.tensor_parallel)
            ]
            await server.client.take_bucket(payloads, timeout=self._seconds)


def is_here(url: str) -> bool:
    """Is the server's address one of this machine's?"""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, 0, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
