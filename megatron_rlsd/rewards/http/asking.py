"""Requests to a judge's servers: bounded in time, size and number, and tried again."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from megatron_rlsd.config import HttpRewardConfig
from megatron_rlsd.config.secrets import without
from megatron_rlsd.rewards.http.forms import Form
from megatron_rlsd.rewards.http.replies import MalformedReply, Verdict, read_json, shown
from megatron_rlsd.rewards.http.templates import encoded
from megatron_rlsd.types import RewardInput

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0
"""Shorter than servers' own, which close a connection just as it is used again."""
MAX_REPLY_BYTES = 1 << 22
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
ILL_SECONDS = 10.0
"""For which an address that failed is asked only if no other is left."""
TOO_MUCH = (400, 413, 422)
"""What may be said of one response among those of a request."""


class _Failed(Exception):
    """A request that brought no reply to read; its reason."""

    def __init__(
        self, reason: str, *, again: bool = True, timed_out: bool = False, pause: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.again, self.timed_out = again, timed_out
        self.pause = pause if again else 0.0
        self.parts = False
        """May it be asked in parts?"""


@dataclass(eq=False)
class _Address:
    url: str
    shown: str
    in_flight: int = 0
    ill_until: float = 0.0


class Judge:
    """One function ``http`` and its servers. It belongs to the event loop that it is made in."""

    def __init__(self, config: HttpRewardConfig, form: Form, key: str | None) -> None:
        self.config, self._form, self._key = config, form, key
        self._addresses = [_address(url, form.path) for url in config.urls]
        self._turns = asyncio.Semaphore(config.max_in_flight)
        self._random = random.Random()  # the run's own generators are not touched
        self._http = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=config.max_in_flight,
                max_keepalive_connections=config.max_in_flight,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
            trust_env=config.trust_env,
            follow_redirects=False,
        )

    @property
    def batch_size(self) -> int:
        return self._form.batch_size

    async def close(self) -> None:
        await self._http.aclose()

    async def verdicts(self, samples: list[RewardInput], until: float) -> list[Verdict]:
        """What is said of each of these responses of one request; raises nothing.

        until: time of the loop's clock at which there is no verdict any more.
        """
        last = ""
        try:
            content = encoded(self._form.ask(samples))
        except Exception as error:  # whatever a template raises
            if len(samples) > 1:
                return await self._in_parts(samples, until)
            return [Verdict(None, f"the request cannot be made: {type(error).__name__}: {error}")]
        try:
            async with asyncio.timeout_at(until), self._turns:
                tried = 0
                while True:
                    try:
                        return await self._once(content, len(samples))
                    except _Failed as failed:
                        last = str(failed)
                        if failed.parts and len(samples) > 1:
                            break
                        # Whoever says when to come again is well; the deadline bounds it.
                        tried += not failed.pause
                        if not failed.again or tried > self.config.max_retries:
                            tries = f" ({tried} tries)" if tried > 1 else ""
                            verdict = Verdict(None, f"{last}{tries}"[:500], failed.timed_out)
                            return [verdict] * len(samples)
                        await asyncio.sleep(self._pause(tried, failed.pause))
        except TimeoutError:
            reason = f"no verdict within {self.config.deadline_seconds:g} s"
            reason += f"; the last try: {last}" if last else ", in which it had no turn"
            return [Verdict(None, reason[:500], timed_out=True)] * len(samples)
        return await self._in_parts(samples, until)

    async def _in_parts(self, samples: list[RewardInput], until: float) -> list[Verdict]:
        """One that cannot be judged is not to cost the others of its request their verdicts."""
        half = len(samples) // 2
        parts = (samples[:half], samples[half:])
        found = await asyncio.gather(*(self.verdicts(part, until) for part in parts))
        return [verdict for part in found for verdict in part]

    def _pause(self, tried: int, asked: float) -> float:
        own = (
            FIRST_PAUSE_SECONDS * 2 ** min(max(tried - 1, 0), 10) * self._random.uniform(0.75, 1.25)
        )
        return min(max(own, asked), LONGEST_PAUSE_SECONDS)

    async def _once(self, content: bytes, asked: int) -> list[Verdict]:
        now = time.monotonic()
        address = min(self._addresses, key=lambda each: (each.ill_until > now, each.in_flight))
        # The next of those that are as busy.
        self._addresses.remove(address)
        self._addresses.append(address)
        address.in_flight += 1
        try:
            reply = await self._reply(address, content)
            try:
                return self._form.read(read_json(reply), asked)
            except MalformedReply as error:
                raise _Failed(f"{address.shown}: {without(self._key, str(error))}") from None
        except _Failed as failed:
            if failed.again:
                address.ill_until = time.monotonic() + ILL_SECONDS
            raise
        finally:
            address.in_flight -= 1

    async def _reply(self, address: _Address, content: bytes) -> bytes:
        limit = self.config.timeout_seconds
        try:
            async with (
                asyncio.timeout(limit),
                self._http.stream("POST", address.url, content=content) as response,
            ):
                reply = await _received(response)
        except TimeoutError:
            reason = f"{address.shown}: no answer within {limit:g} s"
            raise _Failed(reason, timed_out=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = without(self._key, str(error)) or type(error).__name__
            raise _Failed(f"{address.shown}: {reason}") from None
        except _Failed as failed:
            raise _Failed(f"{address.shown}: {failed}", again=failed.again) from None
        self._check_status(address, response, reply)
        return reply

    def _check_status(self, address: _Address, response: httpx2.Response, reply: bytes) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        said = f"{address.shown}: HTTP {status}"
        if 300 <= status < 400:
            target = without(self._key, response.headers.get("Location", ""))
            reason = f"{said} to {target!r:.200}, which is not followed; give the judge's own url"
            raise _Failed(reason, again=False)
        said += f": {without(self._key, shown(reply))}" if reply else ""
        if status in (401, 403):
            said += "; is api_key the judge's?"
        failed = _Failed(said, again=status in (408, 425, 429) or status >= 500)
        failed.parts = status in TOO_MUCH
        failed.pause = _seconds(response.headers.get("Retry-After", ""))
        raise failed


def _address(url: str, path: str) -> _Address:
    parts = urlsplit(url)
    whole = parts._replace(path=parts.path.rstrip("/") + path if path else parts.path, fragment="")
    return _Address(whole.geturl(), whole._replace(query="").geturl())


async def _received(response: httpx2.Response) -> bytes:
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise _Failed(f"the reply is encoded as {encoding!r:.40}, unasked")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            reason = f"a reply of more than {MAX_REPLY_BYTES} bytes, read no further"
            raise _Failed(reason, again=False)
    return bytes(content)


def _seconds(text: Any) -> float:
    """What Retry-After asks for; of a date, and of anything else, nothing."""
    return float(text) if text.isascii() and text.isdigit() else 0.0
