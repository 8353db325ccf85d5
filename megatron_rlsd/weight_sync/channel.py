"""A process group of the trainer and servers, in which the trainer's end never waits alone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, BackendConfig

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import Server, ServerFacts, ServerFault, SGLangClient
from megatron_rlsd.rollout.sglang.agreement import nccl_refusal, own_libraries
from megatron_rlsd.rollout.sglang.ownership import address_towards, is_loopback
from megatron_rlsd.weight_sync.flat import FlatBucket

Result = TypeVar("Result")
POLL_SECONDS = 0.001
CLOSE_SECONDS = 5.0


class BroadcastGroup(Protocol):
    """What torch's process groups do that its type stubs leave out."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work: ...


class Channel:
    """The trainer's end of a process group with one server or several."""

    def __init__(
        self,
        servers: tuple[Server, ...],
        name: str,
        group: BroadcastGroup,
        backend: str,
        device: torch.device,
        seconds: float,
    ) -> None:
        self._clients = {server: server.client for server in servers}
        self._name, self._group = name, group
        self._backend, self._device, self._seconds = backend, device, seconds
        self._work: dist.Work | None = None

    @classmethod
    async def open(
        cls, servers: tuple[Server, ...], device: torch.device, seconds: float
    ) -> Channel:
        """Meet in a new group. ServerFault if that takes longer than ``seconds``; EngineError for
        servers that cannot be in one."""
        facts = await asyncio.gather(*(s.client.facts(timeout=seconds) for s in servers))
        devices = {fact.device for fact in facts}
        if len(devices) > 1:
            raise EngineError(
                f"{_names(servers)} run on {' and '.join(sorted(devices))}, and share no process "
                "group; set weight_sync.broadcast_group=server"
            )
        on_gpu = device.type == "cuda" and devices == {"cuda"}
        first, size = [], 1
        for server, fact in zip(servers, facts, strict=True):
            _check_member(server, fact, on_gpu=on_gpu)
            first.append(size)
            size += fact.tensor_parallel
        backend = "nccl" if on_gpu else "gloo"
        addresses = [address_towards(server.url) for server in servers]
        # Servers on other machines cannot reach this one by its loopback address.
        address = next((a for a in addresses if not is_loopback(a)), addresses[0])
        name = f"weights-{uuid.uuid4().hex[:12]}"
        limit = timedelta(seconds=seconds)
        store = dist.TCPStore(address, 0, None, True, limit, wait_for_workers=False)
        joining = [
            server.client.join_group(
                name,
                address,
                store.port,
                first_rank=rank,
                size=size,
                backend=backend,
                timeout=seconds,
            )
            for server, rank in zip(servers, first, strict=True)
        ]
        group = await _with_servers(
            dict(zip(servers, joining, strict=True)),
            in_thread(lambda: new_group(backend, store, name, size, address, limit)),
            "joining a process group",
            seconds,
        )
        return cls(servers, name, group, backend, device, seconds)

    @property
    def is_current(self) -> bool:
        """Are its servers still the ones that it was opened with? One of our own that was started
        again has another client."""
        return all(server.client is client for server, client in self._clients.items())

    @property
    def busy(self) -> bool:
        """Is a broadcast under way? Then the group must not be freed: that would wait for it."""
        return self._work is not None and not self._work.is_completed()

    async def send(self, bucket: FlatBucket) -> None:
        """ServerFault if the server does not take the bucket, or a process is gone; EngineError if
        NCCL refuses the group, whose ends load different releases of it."""
        entries = bucket.entries
        receiving = {
            server: client.receive_bucket(
                self._name,
                [entry.name for entry in entries],
                [str(entry.dtype).removeprefix("torch.") for entry in entries],
                [list(entry.shape) for entry in entries],
                timeout=self._seconds,
            )
            for server, client in self._clients.items()
        }
        what = f"a broadcast of {bucket.nbytes} bytes"
        sending = asyncio.create_task(self._broadcast(bucket))
        try:
            await _with_servers(receiving, sending, what, self._seconds)
        except EngineError as error:
            if (refusal := nccl_refusal(error, _names(self._clients))) is None:
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
        """Have the servers leave too, those that are still the ones that it was opened with."""

        async def leave(client: SGLangClient) -> None:
            with contextlib.suppress(EngineError):
                await client.leave_group(self._name, timeout=CLOSE_SECONDS)

        clients = self._clients.items()
        await asyncio.gather(
            *(leave(client) for server, client in clients if server.client is client)
        )


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


def _names(servers: Iterable[Server]) -> str:
    return ", ".join(map(str, servers))


def _check_member(server: Server, facts: ServerFacts, *, on_gpu: bool) -> None:
    if facts.pipeline_parallel != 1:
        raise EngineError(
            f"{server} has pipeline parallel {facts.pipeline_parallel}, but the ranks of one "
            "process group can only be a server's tensor-parallel ranks"
        )
    if on_gpu and not server.is_own:
        # A server of ours was asked before it started; of another SGLang tells its own release.
        print(
            f"{server} does not say which NCCL it loads; the trainer loads "
            f"{own_libraries().nccl_text}, and no other release can take its weights",
            flush=True,
        )


async def _with_servers(
    requests: Mapping[Server, Coroutine[Any, Any, None]],
    ours: asyncio.Future[Result],
    what: str,
    seconds: float,
) -> Result:
    """The result of our part of a collective whose other parts HTTP requests have asked for.

    The first failure ends it: a server that refuses or dies never takes part, and the others would
    wait for it. ServerFault that says ``what`` after ``seconds``, or if our part fails.
    """
    tasks: dict[asyncio.Future[None], Server] = {
        asyncio.ensure_future(request): server for server, request in requests.items()
    }
    what = f"{_names(requests)}: {what}"
    parts: set[asyncio.Future[Any]] = {*tasks, ours}
    try:
        done, waiting = await asyncio.wait(
            parts, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in tasks.keys() & done:
            task.result()
        if ours in done and (error := ours.exception()) is not None:
            raise ServerFault(f"{what}: {error}") from error
        if waiting:
            late = [str(tasks[p]) if p in tasks else "the trainer's end" for p in waiting]
            raise ServerFault(f"{what}: {', '.join(sorted(late))} not done within {seconds:g} s")
        return ours.result()
    finally:
        for part in parts:
            part.cancel()
