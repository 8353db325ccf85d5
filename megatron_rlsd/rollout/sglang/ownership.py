"""Whose weights a server holds: said by the server's own label, and asked at the owner's door.

A server keeps one text for us, the label of its weights. It names the run that gave them, and where
the run's trainer can be asked whether it lives: ``rlsd-RUN@HOST,ADDRESS,PORT/VERSION``. So equal
version numbers of two runs are two labels, a server that a living run uses is refused by name, and
one whose trainer was killed, at whatever moment, is taken over at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import ServerFault

CLAIM = "claimed"
"""In place of a version: the server is a run's, and holds what it held before."""
RING_SECONDS = 5.0
MOST_BYTES = 4096
SETTLE_SECONDS = 0.3
"""Between a claim and looking whether it stands: longer than another run, which found the server
free at the same time, needs to write its own."""


class ServerInUse(ServerFault):
    """A living run, which the message names, has given the server its weights."""


@dataclass(frozen=True)
class ServerOwner:
    """A run's trainer, as a server's label names it."""

    run: str
    """12 hexadecimal digits, new with each start of a trainer."""
    host: str
    address: str
    """The trainer's address on the way to this server."""
    port: int

    def label(self, version: str) -> str:
        return f"rlsd-{self.run}@{self.host},{self.address},{self.port}/{version}"

    def owns(self, label: str) -> bool:
        return label.startswith(f"rlsd-{self.run}@")

    @classmethod
    def of(cls, label: str) -> ServerOwner | None:
        """None: no run of ours has given the server its weights."""
        found = re.fullmatch(r"rlsd-([0-9a-f]{12})@([^,/]+),([^,/]+),(\d{1,5})/.*", label)
        return None if found is None else cls(found[1], found[2], found[3], int(found[4]))

    async def living(self) -> str | None:
        """What the owner says of itself; None: it does not live.

        An owner whose port takes connections and says nothing (one that was stopped, say) lives.
        """
        address = self.address
        if is_loopback(address) and self.host != socket.gethostname():
            # The way from another machine; from its own to its server it was the loopback.
            address = self.host
        writer = None
        try:
            async with asyncio.timeout(RING_SECONDS):
                reader, writer = await asyncio.open_connection(address, self.port, limit=MOST_BYTES)
                told = json.loads(await reader.readline())
            return _name(told) if told["run"] == self.run else None
        except TimeoutError:
            return f"a run on {self.host}, which does not answer" if writer else None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        finally:
            if writer is not None:
                writer.close()


class Doorbell:
    """Answers other runs that ask whether this one lives. ``open`` first, ``close`` at the end."""

    def __init__(self, run_dir: str, urls: list[str]) -> None:
        """urls: the servers that run already; none: only processes of this machine can ask."""
        self._run = uuid.uuid4().hex[:12]
        self._everywhere = bool(urls)
        self._host, self._port = socket.gethostname(), 0
        told = {"run": self._run, "run_dir": run_dir[-500:], "host": self._host}
        self._told = json.dumps(told | {"pid": os.getpid()}).encode() + b"\n"
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        host = None if self._everywhere else "127.0.0.1"
        # One port for every address, IPv6 ones too where the machine has them.
        for _ in range(10):
            with socket.socket() as probe:
                probe.bind(("", 0))
                self._port = probe.getsockname()[1]
            with contextlib.suppress(OSError):
                self._listener = await asyncio.start_server(self._answer, host, self._port)
                return
        raise EngineError(f"found no free port on {self._host} to tell other runs that this lives")

    def towards(self, url: str) -> ServerOwner:
        """This run, in labels of the server at ``url``."""
        return ServerOwner(self._run, self._host, address_towards(url), self._port)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(self._told)
            await writer.drain()
        writer.close()


def address_towards(url: str) -> str:
    """This machine's address on the way to a server. ServerFault if there is no way."""
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)
        family, kind, _, _, target = found[0]
        with socket.socket(family, kind) as probe:
            # With a datagram socket this sends nothing.
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ServerFault(f"{url}: {error}") from error


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _name(told: dict[str, object]) -> str:
    return f"the run in {told['run_dir']} ({told['host']}, process {told['pid']})"
