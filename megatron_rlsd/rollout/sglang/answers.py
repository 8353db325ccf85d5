"""What servers answer over HTTP: bounded, read strictly, and the ways in which it can be bad."""

from __future__ import annotations

import json
import reprlib
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_rlsd.config.secrets import masked, without
from megatron_rlsd.rollout.engine import EngineError

Answer = TypeVar("Answer", bound="Strict")


class ServerFault(EngineError):
    """A server did not answer, or not as it should; another one may serve the request."""


class Redirected(ServerFault):
    """Something between here and the server, or in its place, points elsewhere."""


class RequestRefused(EngineError):
    """The server is well and refuses this request, so every other server would too."""


class Strict(BaseModel):
    """No number for a text and no text for a number; what a server says beyond it is left alone."""

    model_config = ConfigDict(strict=True, frozen=True, populate_by_name=True)


def read_strictly(kind: type[Answer], content: bytes, where: str) -> Answer:
    """The JSON in ``content``; ServerFault that says what ``where`` should have sent instead."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the answer"
        raise ServerFault(
            f"{where}: {place}: {first['msg']}, got {reprlib.repr(masked(first['input']))}"
        ) from None


async def received(response: httpx2.Response, where: str, max_bytes: int) -> bytes:
    """The body; ServerFault as soon as it is longer than an answer to this request can be."""
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise ServerFault(f"{where}: the answer is encoded as {encoding!r:.40}, unasked")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > max_bytes:
            raise ServerFault(f"{where}: an answer of more than {max_bytes} bytes, read no further")
    return bytes(content)


def raise_for_status(
    response: httpx2.Response, content: bytes, where: str, secret: str | None = None
) -> None:
    """Nothing for a status of 2xx; ServerFault or RequestRefused for any other.

    secret: the key that was sent, which an answer may repeat and no message does.
    """
    status = response.status_code
    if 200 <= status < 300:
        return
    if status in (408, 429) or status >= 500:
        raise ServerFault(f"{where}: HTTP {status}: {_message(content, secret)}")
    if status >= 400:
        hint = "; is the configured api_key the server's?" if status in (401, 403) else ""
        raise RequestRefused(f"{where}: HTTP {status}: {_message(content, secret)}{hint}")
    target = without(secret, response.headers.get("Location", ""))
    raise Redirected(
        f"{where}: HTTP {status} to {target!r:.200}, which is not followed; name the server's own "
        "URL"
    )


def shown(content: bytes, secret: str | None = None) -> str:
    """The beginning of an answer, for a message, without ``secret``."""
    return repr(without(secret, content.decode(errors="replace"))[:200])


def _message(content: bytes, secret: str | None) -> str:
    """What a refusal says, as one line."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = content.decode(errors="replace")
    error = told.get("error", told) if isinstance(told, dict) else told
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(without(secret, str(error)).split())[:500] or "(no message)"
