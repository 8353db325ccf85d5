"""An agent with two tools, written with the openai package (docs/bring_your_own.md).

It asks the model, runs the tools that the model calls, and tells it their results, until the model
calls none. Once the results are many it begins again with the question and a list of them, as
agents with long histories do; the trainer makes a training row of its own of that.
"""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI

from megatron_rlsd.types import Problem


def _tool(name: str, description: str) -> dict[str, Any]:
    numbers = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    parameters = {"type": "object", "properties": numbers, "required": ["a", "b"]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [_tool("add", "Adds two whole numbers."), _tool("multiply", "Multiplies two of them.")]


async def solve(
    base_url: str,
    session_key: str,
    problem: Problem,
    stream: bool = False,
    rounds: int = 4,
    most_results: int = 6,
) -> None:
    """Play one episode.

    rounds: questions to the model, at most. most_results: shown as they came; with more of them the
    conversation is begun anew.
    """
    # An answer may take as long as a training step does; the trainer bounds it.
    client = AsyncOpenAI(base_url=base_url, api_key=session_key, timeout=3600)
    messages: list[Any] = list(problem.messages)
    results: list[str] = []
    said: dict[str, Any] = {}
    for _ in range(rounds):
        said = await _ask(client, messages, stream)
        messages.append(said)
        for call in said.get("tool_calls", []):
            result = run(call["function"]["name"], call["function"]["arguments"])
            results.append(f"{call['function']['name']} {call['function']['arguments']}: {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not said.get("tool_calls"):
            break
        if len(results) > most_results:
            *earlier, question = problem.messages
            told = "\n".join([question["content"], "", "Results so far:", *results[-most_results:]])
            messages, results = [*earlier, {"role": "user", "content": told}], []
    right = problem.answer in (said.get("content") or "")
    path = f"/sessions/{session_key}/reward"
    await client.post(path, body={"reward": float(right)}, cast_to=object)
    await client.close()


def run(name: str, arguments: str) -> str:
    """What a tool answers; a call that cannot be carried out is told so."""
    try:
        told = json.loads(arguments)
        a, b = int(told["a"]), int(told["b"])
        return str({"add": a + b, "multiply": a * b}[name])
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {type(error).__name__}: {error}"


async def _ask(client: AsyncOpenAI, messages: list[Any], stream: bool) -> dict[str, Any]:
    """The assistant's message; of a stream, put together from its pieces."""
    asked: dict[str, Any] = {"model": "policy", "messages": messages, "tools": TOOLS}
    if not stream:
        reply = await client.chat.completions.create(**asked)
        return reply.choices[0].message.model_dump(exclude_none=True)
    content, calls = "", list[dict[str, Any]]()
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for piece in delta.tool_calls or []:
            if piece.index == len(calls):
                function = {"name": "", "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["name"] += piece.function.name or ""
            calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return {**message, "tool_calls": calls} if calls else message
