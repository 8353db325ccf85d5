"""A process group of the trainer and one server, in which the trainer's end never waits alone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, BackendConfig

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import Server, ServerFault, SGLangClient
from megatron_rlsd.rollout.sglang.agreement import nccl_refusal, own_libraries
from megatron_rlsd.rollout.sglang.ownership import address_towards
from megatron_rlsd.weight_sync.flat import FlatBucket

Result = TypeVar("Result")
POLL_SECONDS = 0.001
CLOSE_SECONDS = 5.0


class BroadcastGroup(Protocol):
    """What torch's process groups do that its type stubs leave out."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work: ...


class Channel:
    """The trainer's end of a process group with one server."""

    def __init__(
        self,
        server: Server,
        name: str,
        group: BroadcastGroup,
        backend: str,
        device: torch.device,
        seconds: float,
    ) -> None:
        self._server, self._name, self._group = str(server), name, group
        self._backend, self._device, self._seconds = backend, device, seconds
        self._work: dist.Work | None = None
        self.client: SGLangClient = server.client

    @classmethod
    async def open(cls, server: Server, device: torch.device, seconds: float) -> Channel:
        """Meet in a new group. ServerFault if that takes longer than ``seconds``."""
        facts = await server.client.facts(timeout=seconds)
        if facts.pipeline_parallel != 1:
            raise EngineError(
                f"{server} has pipeline parallel {facts.pipeline_parallel}, but the ranks of one "
                "process group can only be a server's tensor-parallel ranks"
            )
        on_gpu = device.type == facts.device == "cuda"
        if on_gpu and not server.is_own:
            # A server of ours was asked before it started; of another SGLang tells its own release.
            print(
                f"{server} does not say which NCCL it loads; the trainer loads "
                f"{own_libraries().nccl_text}, and no other release can take its weights",
                flush=True,
            )
        backend, size = ("nccl" if on_gpu else "gloo"), 1 + facts.tensor_parallel
        address = address_towards(server.url)
        name = f"weights-{uuid.uuid4().hex[:12]}"
        limit = timedelta(seconds=seconds)
        store = dist.TCPStore(address, 0, None, True, limit, wait_for_workers=False)
        joining = asyncio.create_task(
            server.client.join_group(
                name, address, store.port, size=size, backend=backend, timeout=seconds
            )
        )
        group = await _both(
            joining,
            in_thread(lambda: new_group(backend, store, name, size, address, limit)),
            f"{server}: joining a process group",
            seconds,
        )
        return cls(server, name, group, backend, device, seconds)

    @property
    def busy(self) -> bool:
        """Is a broadcast under way? Then the group must not be freed: that would wait for it."""
        return self._work is not None and not self._work.is_completed()

    async def send(self, bucket: FlatBucket) -> None:
        """ServerFault if the server does not take the bucket, or a process is gone; EngineError if
        NCCL refuses the group, whose ends load different releases of it."""
        entries = bucket.entries
        receiving = asyncio.create_task(
            self.client.receive_bucket(
                self._name,
                [entry.name for entry in entries],
                [str(entry.dtype).removeprefix("torch.") for entry in entries],
                [list(entry.shape) for entry in entries],
                timeout=self._seconds,
            )
        )
        what = f"{self._server}: a broadcast of {bucket.nbytes} bytes"
        sending = asyncio.create_task(self._broadcast(bucket))
        try:
            await _both(receiving, sending, what, self._seconds)
        except EngineError as error:
            if (refusal := nccl_refusal(error, self._server)) is None:
                raise
            # Not the server's fault: started again, it would load the same library.
            raise EngineError(refusal) from error

    async def _broadcast(self, bucket: FlatBucket) -> None:
        if self._backend == "gloo":
            self._work = self._group.broadcast([bucket.flat], _from_rank_zero())
        else:
            self._work = await in_thread(lambda: self._broadcast_on_gpu(bucket))
        while not self._work.is_completed():
            await asyncio.sleep(POLL_SECONDS)
        # Complete: this only raises what went wrong.
        self._work.wait()

    def _broadcast_on_gpu(self, bucket: FlatBucket) -> dist.Work:
        # In a thread: the first one waits until the server has joined.
        with torch.cuda.device(self._device):
            flat = bucket.device_flat
            if flat is None:
                flat = bucket.flat.to(self._device)
            return self._group.broadcast([flat], _from_rank_zero())

    async def leave(self) -> None:
        """Have the server leave too."""
        with contextlib.suppress(EngineError):
            await self.client.leave_group(self._name, timeout=CLOSE_SECONDS)


def new_group(
    backend: str, store: dist.Store, name: str, size: int, address: str, limit: timedelta
) -> BroadcastGroup:
    """Rank 0's end; waits for the others with gloo, and with nccl in the first collective.

    The store's prefixes are those that torch and SGLang's init_weights_update_group put before the
    keys of their ends. The group is not part of torch's global registry.
    """
    kind = next(iter(BackendConfig(Backend(backend)).get_device_backend_map()))
    for prefix in (name, f"{name}/", f"{kind}/"):
        store = dist.PrefixStore(prefix, store)
    if backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        # Where the server finds us, whatever interface the trainer's own groups use.
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = limit
        met: BroadcastGroup = gloo(store, 0, size, options)
        return met
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = limit
    unmet: BroadcastGroup = nccl(store, 0, size, options)
    return unmet


def in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run blocking ``work`` in a thread that nothing has to wait for, not even the program's
    end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):
            # The loop is closed if the run ended meanwhile.
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="weight_sync", daemon=True).start()
    return future


def _from_rank_zero() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


async def _both(
    request: asyncio.Task[None], ours: asyncio.Future[Result], what: str, seconds: float
) -> Result:
    """The result of our half of a collective whose other half an HTTP request has asked for.

    The first failure ends it: a server that refuses or dies never takes part, and our half alone
    would wait for it. ServerFault that says ``what`` after ``seconds``, or if our half fails.
    """
    try:
        halves: set[asyncio.Future[Any]] = {request, ours}
        done, waiting = await asyncio.wait(
            halves, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        if request in done:
            request.result()
        if ours in done and (error := ours.exception()) is not None:
            raise ServerFault(f"{what}: {error}") from error
        if waiting:
            late = "the server" if request in waiting else "the trainer's end"
            raise ServerFault(f"{what}: {late} was not done within {seconds:g} s")
        return ours.result()
    finally:
        for task in (request, ours):
            task.cancel()
