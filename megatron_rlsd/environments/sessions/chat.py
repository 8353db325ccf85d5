"""Requests and replies of ``/v1/chat/completions``, and what of OpenAI's interface is served."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_rlsd.types import SamplingParams

Message = dict[str, Any]

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}
)
"""Fields that say nothing about what is to be generated."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
}
"""Fields with the only values that change nothing. All others, such as ``seed``, are refused."""
READ = ("model", "messages", "tools", "max_tokens", "max_completion_tokens", "stream")
SAMPLING = ("temperature", "top_p", "top_k")
"""They are the run's: the log-probabilities are those of its settings."""
TEXT_OF = {"role", "content", "tool_calls", "tool_call_id", "name"}
ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Refused(Exception):
    """A request that is not served; the message says why, and what was expected."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ChatRequest:
    """A request whose form is right."""

    model: str
    messages: tuple[Message, ...]
    """As ``normal`` makes them."""
    tools: tuple[dict[str, Any], ...]
    max_tokens: int | None
    stream: bool
    include_usage: bool


def read(body: Any, params: SamplingParams) -> ChatRequest:
    """The request that ``body`` (JSON data) is; ``params``: what the run samples with.

    Raises Refused.
    """
    if not isinstance(body, dict):
        raise Refused(f"expected a JSON object, got {body!r:.80}")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("half of a surrogate pair, which has no tokens") from None
    except RecursionError:
        raise Refused("nested too deeply") from None
    given = {key: value for key, value in body.items() if value is not None}
    _check_fields(given, params)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages: expected a list of at least one message")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise Refused(f"stream_options: expected {{include_usage}}, got {options!r:.80}")
    tools = given.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(f"tools: expected a list of objects, got {tools!r:.80}")
    limits = [_count(given, key) for key in ("max_tokens", "max_completion_tokens")]
    return ChatRequest(
        model=str(given.get("model", "policy")),
        messages=tuple(normal(number, each) for number, each in enumerate(messages)),
        tools=tuple(tools),
        max_tokens=min((each for each in limits if each is not None), default=None),
        stream=bool(given.get("stream", False)),
        include_usage=bool(options.get("include_usage", False)),
    )


def _check_fields(given: Mapping[str, Any], params: SamplingParams) -> None:
    for key, value in given.items():
        if key in IGNORED or key in READ or key == "stream_options":
            continue
        if key in SAMPLING:
            if value != getattr(params, key):
                raise Refused(
                    f"{key}={value!r:.40}: the run samples with {getattr(params, key):g}; leave "
                    f"{key} out"
                )
        elif key not in NEUTRAL or value not in NEUTRAL[key]:
            raise Refused(f"{key}={value!r:.80} is not served here; leave {key} out")


def _count(given: Mapping[str, Any], key: str) -> int | None:
    value = given.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise Refused(f"{key}: expected a whole number from 1, got {value!r:.40}")
    return value


def normal(number: int, message: Any) -> Message:
    """The message with what counts: role, content as one text, and where it has them tool_calls,
    tool_call_id and name. Raises Refused for what no chat template is asked to show.

    number: among the request's messages.
    """
    where = f"messages.{number}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(f"{where}: expected an object with a role of {', '.join(ROLES)}")
    # Clients send back what they got with fields that hold nothing.
    told = {key: value for key, value in message.items() if value not in (None, [], {}, "")}
    if unknown := sorted(told.keys() - TEXT_OF):
        raise Refused(f"{where}.{unknown[0]} is not served here; leave it out")
    found = {**told, "content": _text(where, told.get("content", ""))}
    if "tool_calls" in found:
        if message["role"] != "assistant" or not isinstance(found["tool_calls"], list):
            raise Refused(f"{where}.tool_calls: expected a list, in the assistant's messages only")
        found["tool_calls"] = [_call(where, each) for each in found["tool_calls"]]
    return found


def _text(where: str, content: Any) -> str:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise Refused(f"{where}.content: only parts of type text, got {kind!r:.40}")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise Refused(f"{where}.content: expected text, got {content!r:.80}")
    return content


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}.tool_calls: expected objects with function.name and arguments")
    told = {"name": function["name"], "arguments": function.get("arguments", "")}
    return {"id": call.get("id"), "type": "function", "function": told}


def shown(message: Message) -> Message:
    """The message as chat templates expect it: the arguments of calls as objects."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        with suppress(ValueError, TypeError, RecursionError):  # stays the text that it is
            if isinstance(found := json.loads(function["arguments"]), dict):
                function["arguments"] = found
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def spoken(text: str, turn: int, tools: bool) -> Message:
    """The assistant's message for a turn of the model.

    With ``tools``, calls in the form of Qwen, ``<tool_call>{"name": ..., "arguments": {...}}
    </tool_call>``, or of Llama 3, a turn that is ``{"name": ..., "parameters": {...}}`` and nothing
    else, become ``tool_calls``. Where one of them is not such JSON the text stays as it is.
    """
    found = (_of_qwen(text) or _of_llama(text)) if tools else None
    if found is None:
        return {"role": "assistant", "content": text}
    told, content = found
    calls = [
        {
            "id": f"call_{turn}_{number}",
            "type": "function",
            "function": {
                "name": each["name"],
                "arguments": json.dumps(each["arguments"], ensure_ascii=False),
            },
        }
        for number, each in enumerate(told)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _of_qwen(text: str) -> tuple[list[dict[str, Any]], str] | None:
    """The calls, and the text around them."""
    calls = []
    for each in _CALL.findall(text):
        try:
            told = json.loads(each)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            return None
        calls.append({"name": told["name"], "arguments": told.get("arguments", {})})
    return (calls, _CALL.sub("", text).strip()) if calls else None


def _of_llama(text: str) -> tuple[list[dict[str, Any]], str] | None:
    """The same; several calls stand behind one another, with or without a semicolon."""
    calls, left = [], text.strip()
    while left:
        try:
            told, end = json.JSONDecoder().raw_decode(left)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or set(told) - {"type"} != {"name", "parameters"}:
            return None
        if not isinstance(told["name"], str) or not isinstance(told["parameters"], dict):
            return None
        calls.append({"name": told["name"], "arguments": told["parameters"]})
        left = left[end:].lstrip("; \n")
    return (calls, "") if calls else None


@dataclass(frozen=True)
class Reply:
    """A turn of the model, as it is told."""

    request: ChatRequest
    id: str
    message: Message
    cut: bool
    """Was the turn cut off by a limit?"""
    prompt_tokens: int
    completion_tokens: int

    def whole(self) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        # Clients expect null beside calls alone.
        said = self.message["content"]
        message = {**self.message, "content": said if said or not self._calls else None}
        choice: dict[str, Any] = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage}

    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream: the role, the text, the calls, the end; and where it was asked
        for, the usage."""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if self.message["content"]:
            deltas.append({"content": self.message["content"]})
        if self._calls:
            numbered = [{"index": number, **call} for number, call in enumerate(self._calls)]
            deltas.append({"tool_calls": numbered})
        head = self._head("chat.completion.chunk")
        choices: list[dict[str, Any]] = [
            {"index": 0, "delta": each, "finish_reason": None} for each in deltas
        ]
        choices.append({"index": 0, "delta": {}, "finish_reason": self._finish_reason})
        told = [{**head, "choices": [each]} for each in choices]
        if self.request.include_usage:
            told.append({**head, "choices": [], "usage": self._usage})
        return told

    @property
    def _calls(self) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = self.message.get("tool_calls", [])
        return calls

    @property
    def _finish_reason(self) -> str:
        if self.cut:
            return "length"
        return "tool_calls" if self._calls else "stop"

    @property
    def _usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        model = self.request.model
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": model}


def error(message: str, code: str | None = None) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return {"error": told}
