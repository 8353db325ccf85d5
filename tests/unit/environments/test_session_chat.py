"""The wire's forms of agents' requests and replies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rlsd.environments.sessions import chat
from megatron_rlsd.types import SamplingParams

PARAMS = SamplingParams(64, temperature=0.5)
QUESTION = [{"role": "user", "content": "Say."}]


def read(**fields: Any) -> chat.ChatRequest:
    return chat.read({"messages": QUESTION, **fields}, PARAMS)


def test_fields_that_change_nothing_are_taken():
    found = read(
        model="mine",
        temperature=0.5,
        top_p=1.0,
        n=1,
        user="me",
        seed=None,
        tool_choice="auto",
        max_tokens=9,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (found.model, found.max_tokens, found.stream, found.include_usage) == (
        "mine",
        7,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 1.0}, "the run samples with 0.5"),
        ({"seed": 1}, "seed=1 is not served here"),
        ({"n": 2}, "n=2 is not served here"),
        ({"stop": ["x"]}, "stop="),
        ({"tool_choice": "required"}, "tool_choice="),
        ({"max_tokens": 0}, "max_tokens: expected a whole number from 1"),
        ({"max_tokens": True}, "max_tokens: expected a whole number from 1"),
        ({"messages": []}, "messages: expected a list of at least one"),
        ({"messages": ["x"]}, "messages.0: expected an object with a role"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0: expected an object"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: expected text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages.0.mood"),
        ({"tools": {"name": "x"}}, "tools: expected a list"),
        ({"tools": [{"name": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(fields: dict[str, Any], said: str):
    with pytest.raises(chat.Refused) as refused:
        read(**fields)
    assert said in str(refused.value)


def test_a_message_that_comes_back_is_the_one_that_was_sent():
    text = 'Look.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    spoken = chat.spoken(text, 2, tools=True)
    (call,) = spoken["tool_calls"]
    assert spoken["content"] == "Look."
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    back = {**spoken, "refusal": None, "annotations": [], "audio": None}
    assert chat.normal(1, json.loads(json.dumps(back))) == chat.normal(1, spoken)
    parts = [{"type": "text", "text": "Lo"}, {"type": "text", "text": "ok."}]
    assert chat.normal(1, {**back, "content": parts}) == chat.normal(1, spoken)
    assert chat.normal(1, {"role": "assistant", "content": None})["content"] == ""


def test_llamas_form_of_calls():
    text = '{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}'
    told = chat.spoken(text, 1, tools=True)
    assert [each["function"] for each in told["tool_calls"]] == [
        {"name": "a", "arguments": '{"x": 1}'},
        {"name": "b", "arguments": "{}"},
    ]
    assert told["content"] == ""
    assert chat.shown(told)["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert chat.spoken(text, 1, tools=False)["content"] == text


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "a"}</tool_call><tool_call>[]</tool_call>',
        '<tool_call>{"name": "a"',
        '{"name": "a", "parameters": []}',
        '{"name": "a"}',
        'I say {"name": "a", "parameters": {}}',
        '{"name": "a", "parameters": {}} and more',
    ],
)
def test_a_call_that_is_none_stays_text(text: str):
    assert chat.spoken(text, 1, tools=True) == {"role": "assistant", "content": text}
    whole = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert chat.spoken(whole, 1, tools=False)["content"] == whole


def test_a_stream_says_what_a_whole_reply_says():
    request = read(stream=True, stream_options={"include_usage": True}, tools=[{"type": "f"}])
    text = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    reply = chat.Reply(request, "c-1", chat.spoken(text, 1, tools=True), False, 5, 3)
    (choice,) = reply.whole()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    *chunks, usage = reply.chunks()
    assert usage["usage"] == reply.whole()["usage"]
    assert usage["usage"]["total_tokens"] == 8
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    (call,) = chunks[1]["choices"][0]["delta"]["tool_calls"]
    assert {key: call[key] for key in ("id", "type", "function")} == choice["message"][
        "tool_calls"
    ][0]
