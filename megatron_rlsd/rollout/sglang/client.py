"""One SGLang server over HTTP: generation, and what weight updates ask of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import httpx2
from pydantic import Field

from megatron_rlsd.config.secrets import without
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import (
    Answer,
    Redirected,
    RequestRefused,
    ServerFault,
    Strict,
    raise_for_status,
    read_strictly,
    received,
    shown,
)
from megatron_rlsd.rollout.sglang.ownership import ServerOwner

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0
"""Shorter than the server's 5 s: a connection that it closes just as it is used again would look
like a server that died."""
CONTROL_BYTES = 1 << 24
"""The most bytes of any answer but those to /generate. The longest has a checksum of about 100
bytes for each parameter."""


class ServerFacts(Strict):
    """What a server says of itself (/server_info)."""

    tensor_parallel: int = Field(alias="tp_size")
    pipeline_parallel: int = Field(alias="pp_size")
    device: str
    """cpu, cuda, ..."""
    quantization: str | None
    no_prefix_cache: bool = Field(alias="disable_radix_cache")
    """Does it compute the same first tokens anew for each request?"""
    max_prompt: int = Field(alias="max_req_input_len")
    """Tokens of a prompt that it refuses: 6 below its context, or below what its cache holds."""
    cache_tokens: int = Field(alias="max_total_num_tokens")
    """Tokens of all requests together that its cache holds."""
    page_size: int = 1
    """Tokens that its cache gives out together."""

    @property
    def max_tokens(self) -> int:
        """The most tokens of one request, prompt and response, that it answers in full."""
        return min(self.max_prompt, self.cache_tokens - 2 * self.page_size - 1)


class _Label(Strict):
    weight_version: str


class _Model(Strict):
    model_path: str


class _RankChecksums(Strict):
    checksums: dict[str, str]


class _Checksums(Strict):
    ranks: list[_RankChecksums]


class SGLangClient:
    """Speaks to the server at ``url``. Every call is bounded and belongs to one event loop.

    All calls raise ServerFault where the server cannot be reached in time, breaks off or answers
    with a server error, and RequestRefused where it refuses; both name the server and the call.
    """

    def __init__(self, url: str, *, api_key: str | None, max_connections: int) -> None:
        self.url, self._api_key = url, api_key
        self.owner: ServerOwner | None = None
        """Whose weights it is given; None: whoever calls gives it none."""
        self._http = httpx2.AsyncClient(
            base_url=url,
            # Uncompressed, so that what arrives is what is counted.
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            # Calls bound themselves as a whole: a response may be silent for long and still come.
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=max_connections,
                max_keepalive_connections=max_connections,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
            # Proxy variables are for the world outside; servers are inside.
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, body: dict[str, Any], *, timeout: float, max_bytes: int) -> bytes:
        """POST /generate; the answer, unread (see replies.py). ServerFault beyond ``max_bytes``."""
        return await self._request("POST", "/generate", body, timeout, max_bytes)

    async def abort(self, rid: str, *, timeout: float = 5.0) -> None:
        """Stop a request whose answer is no longer wanted, if it still runs.

        SGLang aborts every request whose id *begins* with ``rid``.
        """
        await self.call("POST", "/abort_request", {"rid": rid}, timeout=timeout)

    async def ready(self, *, timeout: float) -> None:
        """ServerFault until the model is loaded and the server takes requests.

        RequestRefused for a router, naming the servers behind it, and for a redirection.
        """
        try:
            await self.call("GET", "/ready", timeout=timeout)
        except Redirected as redirected:
            raise RequestRefused(str(redirected)) from None
        except RequestRefused:
            if servers := await self._servers_behind(timeout):
                raise RequestRefused(
                    f"{self.url} is a router, which hands on no weight updates and hides which "
                    f"server answered; name its servers in rollout.sglang.urls: "
                    f"[{', '.join(servers)}]. Requests are balanced over them here"
                ) from None
            raise

    async def health(self, *, timeout: float) -> None:
        """ServerFault unless the scheduler has answered something, or a probe of one token."""
        await self.call("GET", "/health", timeout=timeout)

    async def weight_version(self, *, timeout: float) -> str:
        """The label that the last weight update gave."""
        return (await self._told(_Label, "GET", "/model_info", None, timeout)).weight_version

    async def model_path(self, *, timeout: float) -> str:
        """The folder or name of the model that it was started with."""
        return (await self._told(_Model, "GET", "/model_info", None, timeout)).model_path

    def label(self, version: int) -> str:
        """What the server calls version ``version`` of its owner's weights."""
        return str(version) if self.owner is None else self.owner.label(str(version))

    async def pause(self, mode: Literal["abort", "retract", "in_place"], *, timeout: float) -> None:
        """Stop generating until ``resume``; ``abort`` ends running requests with what they have."""
        await self.call("POST", "/pause_generation", {"mode": mode}, timeout=timeout)

    async def resume(self, *, timeout: float) -> None:
        await self.call("POST", "/continue_generation", {}, timeout=timeout)

    async def release_memory(self, tags: list[str], *, timeout: float) -> None:
        """Give back the memory of ``weights`` and ``kv_cache``, whose contents are lost.

        Only while it is paused or idle: with requests under way SGLang's scheduler ends.
        """
        body = {"tags": tags}
        await self.call("POST", "/release_memory_occupation", body, timeout=timeout)

    async def resume_memory(self, tags: list[str], *, timeout: float) -> None:
        """Only tags that were released: SGLang's scheduler ends on any other."""
        await self.call("POST", "/resume_memory_occupation", {"tags": tags}, timeout=timeout)

    async def facts(self, *, timeout: float) -> ServerFacts:
        """What it was started with; ServerFault where it does not say."""
        return await self._told(ServerFacts, "GET", "/server_info", None, timeout)

    async def update_weights_from_disk(self, folder: str, *, timeout: float) -> None:
        """Load a Hugging Face folder; the server keeps its old weights if it refuses."""
        body = {"model_path": folder, "flush_cache": False}
        await self.call("POST", "/update_weights_from_disk", body, timeout=timeout)

    async def begin_update(self, *, timeout: float) -> None:
        """Open what the tensor and distributed updates must happen in, anew if it was open."""
        try:
            await self.call("POST", "/begin_weight_update", {}, timeout=timeout)
        except RequestRefused:
            # Left open by an update that broke off.
            await self.end_update(timeout=timeout)
            await self.call("POST", "/begin_weight_update", {}, timeout=timeout)

    async def end_update(self, *, timeout: float) -> None:
        await self.call("POST", "/end_weight_update", {}, timeout=timeout)

    async def join_group(
        self,
        name: str,
        address: str,
        port: int,
        *,
        first_rank: int,
        size: int,
        backend: str,
        timeout: float,
    ) -> None:
        """Have its tensor-parallel ranks join a process group as the ranks from ``first_rank`` on.

        It answers when the group is complete (gloo) or at once (nccl, which joins when it is used).
        """
        body = {
            "group_name": name,
            "master_address": address,
            "master_port": port,
            "rank_offset": first_rank,
            "world_size": size,
            "backend": backend,
        }
        await self.call("POST", "/init_weights_update_group", body, timeout=timeout)

    async def leave_group(self, name: str, *, timeout: float) -> None:
        body = {"group_name": name}
        await self.call("POST", "/destroy_weights_update_group", body, timeout=timeout)

    async def receive_bucket(
        self,
        group: str,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        *,
        timeout: float,
    ) -> None:
        """Take part in one broadcast of rank 0: the tensors' bytes, one after the other."""
        body = {
            "group_name": group,
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        try:
            await self.call("POST", "/update_weights_from_distributed", body, timeout=timeout)
        except RequestRefused as refusal:
            if "Failed to receive weights" in str(refusal):
                # The weights are not at fault: their way is.
                raise ServerFault(str(refusal)) from refusal
            raise

    async def take_bucket(self, payloads: list[str], *, timeout: float) -> None:
        """Load tensors that it finds by ``payloads``, one for each tensor-parallel rank."""
        body = {
            "serialized_named_tensors": payloads,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self.call("POST", "/update_weights_from_tensor", body, timeout=timeout)

    async def set_weight_version(self, version: int, *, timeout: float, flush: bool = True) -> None:
        """Name the weights that it has now, and forget what it cached of others."""
        if flush:
            await self.call("POST", "/flush_cache", timeout=timeout)
        await self.set_label(self.label(version), timeout=timeout)

    async def set_label(self, label: str, *, timeout: float) -> None:
        """Answers that begin before and end after it say which tokens are of which label."""
        body = {"new_version": label, "abort_all_requests": False}
        await self.call("POST", "/update_weight_version", body, timeout=timeout)

    async def checksums(self, *, timeout: float) -> list[dict[str, str]]:
        """Per tensor-parallel rank: SGLang's own (fused) parameter names -> hash of the bits."""
        body = {"action": "checksum"}
        told = await self._told(_Checksums, "POST", "/weights_checker", body, timeout)
        return [rank.checksums for rank in told.ranks]

    async def _servers_behind(self, timeout: float) -> list[str]:
        """The URLs that a router (sglang-router) lists; none: it is not a router."""
        try:
            found = await self.call("GET", "/workers", timeout=timeout)
            return [str(worker["url"]) for worker in found["workers"]]
        except (EngineError, KeyError, TypeError):
            return []

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float
    ) -> Any:
        """One HTTP request within ``timeout`` seconds; the JSON of the answer, None if empty.

        ServerFault for an answer that says, whatever its status, that it did not succeed.
        """
        content = await self._request(method, path, body, timeout, CONTROL_BYTES)
        if not content:
            return None
        try:
            told = json.loads(content)
        except (ValueError, RecursionError) as error:
            if path in ("/ready", "/health", "/flush_cache"):
                return None
            raise ServerFault(
                f"{self.url}{path}: expected JSON, got {shown(content, self._api_key)}"
            ) from error
        if isinstance(told, dict) and told.get("success", True) is not True:
            raise ServerFault(f"{self.url}{path}: no success: {shown(content, self._api_key)}")
        return told

    async def _told(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
    ) -> Answer:
        content = await self._request(method, path, body, timeout, CONTROL_BYTES)
        return read_strictly(kind, content, f"{self.url}{path}")

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float, max_bytes: int
    ) -> bytes:
        where = f"{self.url}{path}"
        try:
            async with (
                asyncio.timeout(timeout),
                self._http.stream(method, path, json=body) as response,
            ):
                content = await received(response, where, max_bytes)
        except TimeoutError:
            raise ServerFault(f"{where}: no answer within {timeout:g} s") from None
        except httpx2.HTTPError as error:
            reason = without(self._api_key, str(error)) or type(error).__name__
            raise ServerFault(f"{where}: {reason}") from error
        except RuntimeError as error:
            if not self._http.is_closed:
                raise
            raise ServerFault(f"{where}: the server was stopped") from error
        raise_for_status(response, content, where, self._api_key)
        return content
