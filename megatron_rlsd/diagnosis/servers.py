"""Rollout servers that run already: do they answer, and are they what the trainer needs?"""

from __future__ import annotations

import asyncio

from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.engine import resolved_api_key

SECONDS = 10.0


def check_servers(config: Config) -> str:
    """Raises EngineError that names every server that does not answer."""
    settings = config.rollout.sglang
    if config.rollout.engine != "sglang":
        raise Skip("rollout.engine is not sglang")
    if not settings.urls:
        raise Skip("the trainer starts its own servers")
    key = resolved_api_key(settings.api_key)
    answers = asyncio.run(_ask_all(settings.urls, key))
    lost = [str(answer) for answer in answers if isinstance(answer, Exception)]
    if lost:
        raise EngineError("\n".join(lost))
    quantised = [str(answer) for answer in answers if "quantised" in str(answer)]
    if quantised:
        raise Doubt(f"weights will not match to the bit: {', '.join(quantised)}")
    return "; ".join(map(str, answers))


async def _ask_all(urls: list[str], key: str | None) -> list[str | BaseException]:
    return await asyncio.gather(*(_ask(url, key) for url in urls), return_exceptions=True)


async def _ask(url: str, key: str | None) -> str:
    client = SGLangClient(url, api_key=key, max_connections=1)
    try:
        await client.ready(timeout=SECONDS)
        facts = await client.facts(timeout=SECONDS)
        version = await client.weight_version(timeout=SECONDS)
    finally:
        await client.close()
    text = f"{url} on {facts.device}, TP{facts.tensor_parallel}, weights {version!r}"
    return f"{text}, quantised as {facts.quantization}" if facts.quantization else text
