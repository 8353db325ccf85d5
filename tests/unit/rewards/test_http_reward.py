"""Judges over HTTP: a real server on a real port that answers and fails in every way."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import RewardConfig, load_config
from megatron_rlsd.config.secrets import MASK
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rewards.http import asking
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput, RewardResult
from tests.unit.rewards.judge_server import (
    Answer,
    Connection,
    JudgeServer,
    Request,
    hang,
    hang_up,
    never_end,
    reply,
    speak_another_protocol,
)

Sample = Callable[..., RewardInput]
KEY = "sk-0815"
OWN = {"request": {"text": "{{ response }}"}, "score": "score"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_PAUSE_SECONDS", 0.01)


def config(url: str | list[str], *, pool: dict[str, Any] | None = None, **entry: Any) -> Any:
    form = OWN if "form" not in entry and "request" not in entry else {}
    entry = {"name": "http", "url": url, "timeout_seconds": 5, **form, **entry}
    return RewardConfig.model_validate({"functions": [entry], "max_error_share": 1, **(pool or {})})


def judged(url: str | list[str], samples: list[RewardInput], **entry: Any) -> list[RewardResult]:
    with RewardPool(config(url, **entry)) as pool:
        return pool.score(samples)


def chat(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": turn, "finish_reason": finish_reason}]}


DEEP = b"[" * 100_000
FAILURES: dict[str, tuple[Answer, str, int]] = {
    "hangs": (hang, "no answer within 0.3 s", 2),
    "hangs up": (hang_up, "disconnected", 2),
    "another protocol": (speak_another_protocol, "illegal status line", 2),
    "500": (reply({"error": f"broke with {KEY}"}, "500 Oops"), "HTTP 500: ", 2),
    "429": (reply({}, "429 Slow down", {"Retry-After": "0"}), "HTTP 429", 2),
    "400": (reply({"error": "no"}, "400 Bad"), 'HTTP 400: {"error": "no"}', 1),
    "401": (reply({}, "401 Who?"), "is api_key the judge's?", 1),
    "redirects": (
        reply(b"", "307 Away", {"Location": f"http://elsewhere/?key={KEY}"}),
        f"HTTP 307 to 'http://elsewhere/?key={MASK}', which is not followed",
        1,
    ),
    "html": (reply(b"<html>hello</html>"), "the reply is not JSON", 2),
    "no utf-8": (reply(b'{"score": "\xff\xfe"}'), "the reply is not JSON", 2),
    "empty": (reply(b""), "the reply is not JSON", 2),
    "cut": (reply(b'{"score"', length=100), "closed connection", 2),
    "too deep": (reply(DEEP), "nested too deeply", 2),
    "too long": (never_end, "read no further", 1),
    "encoded": (reply(b"x", headers={"Content-Encoding": "gzip"}), "encoded as 'gzip'", 2),
    "nan": (reply(b'{"score": NaN}'), "NaN is not JSON", 2),
    "infinite": (reply(b'{"score": 1e999}'), "is inf, which is not a finite number", 1),
    "huge": (reply(b'{"score": 1' + b"0" * 400 + b"}"), "not a finite number", 1),
    "text": (reply({"score": "0.5"}), 'the score "0.5" is not a number', 1),
    "null": (reply({"score": None}), "the score is null", 1),
    "list": (reply({"score": [1]}), "is not a number", 1),
    "no score": (reply({"scores": 1}), "no 'score' in the reply", 1),
    "no object": (reply(b"3"), "no 'score' in the reply", 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_judge_that_fails_gives_no_verdict_and_says_why(
    name: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, expected, tries = FAILURES[name]
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(lambda _: answer) as server:
        limit = 0.3 if answer is hang else 5.0
        (result,) = judged(
            server.url,
            [sample("x")],
            api_key="env:JUDGE_KEY",
            max_retries=1,
            timeout_seconds=limit,
        )
    assert (result.value, result.parts) == (None, {"http": None})
    assert expected in result.errors["http"]
    assert KEY not in str(result)
    assert len(server.requests) == tries
    assert all(r.headers["authorization"] == f"Bearer {KEY}" for r in server.requests)
    assert result.timed_out == (("http",) if answer is hang else ())
    assert ("2 tries" in result.errors["http"]) == (tries == 2)


def test_nobody_there_is_a_verdict_of_none_and_stops_a_run_with_the_reason(sample: Sample) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (result,) = judged(url, [sample("x")], max_retries=1)
        with pytest.raises(UserError, match=r"(?s)2 of 2 reward calls.*connection") as caught:
            judged(url, [sample("x"), sample("y")], max_retries=0, pool={"max_error_share": 0.5})
        with pytest.raises(UserError, match="'http' failed on problem 'p0'"):
            judged(url, [sample("x")], max_retries=0, pool={"on_error": "stop"})
    assert result.value is None
    assert "failed" in result.errors["http"]
    assert url in str(caught.value)


def test_what_works_again_is_judged_and_other_addresses_are_taken(sample: Sample) -> None:
    seen: dict[str, int] = {}

    def answer(request: Request) -> Answer:
        text = request.body["text"]
        seen[text] = seen.get(text, 0) + 1
        if seen[text] < 3:
            return reply({}, "503 Busy")
        return reply({"score": int(text)})

    samples = [sample(str(n)) for n in range(40)]
    with JudgeServer(answer) as server:
        results = judged(server.url, samples, max_in_flight=5)
        assert [r.value for r in results] == list(range(40))
        assert server.most_at_once <= 5
        seen.clear()
        with JudgeServer(lambda _: hang_up) as dead:
            seen |= {str(n): 9 for n in range(40)}
            results = judged([dead.url, server.url], samples, max_retries=1)
        assert [r.value for r in results] == list(range(40))
        assert 0 < len(dead.requests) < 40


def test_the_deadline_bounds_all_tries_and_the_waiting(sample: Sample) -> None:
    with JudgeServer(lambda _: hang) as server:
        first, second = judged(
            server.url,
            [sample("x"), sample("y")],
            max_in_flight=1,
            timeout_seconds=0.2,
            deadline_seconds=0.5,
            pool={"on_error": "stop"},
        )
    assert first.timed_out == second.timed_out == ("http",)
    assert "no verdict within 0.5 s; the last try: " in first.errors["http"]
    assert second.errors["http"] == "no verdict within 0.5 s, in which it had no turn"


def test_requests_are_templates_over_all_that_is_known(sample: Sample) -> None:
    request = {
        "exact": "{{ num_tokens }}",
        "text": "Q: {{ question }} {{ metadata['level'] }}, {{ 'right' if answer == '7' else '' }}",
        "chat": "{{ conversation }}",
        "list": ["{{ reference_solution }}", 1, None, True],
    }
    # A lone surrogate and what looks like a template are a response's text and nothing more.
    hostile = '{{ 7 * 7 }} {% raw %} \ud800 \x00 "}'
    with JudgeServer(lambda _: reply({"a": [{"b": -2.5}]})) as server:
        (result,) = judged(
            server.url + "/judge?version=2",
            [sample(hostile, metadata={"level": 3})],
            request=request,
            score="$.a[0].b",
        )
    assert result.value == -2.5
    (asked,) = server.requests
    assert asked.path == "/judge?version=2"
    assert asked.body == {
        "exact": 10,
        "text": "Q: ? 3, right",
        "chat": [{"role": "user", "content": "?"}, {"role": "assistant", "content": hostile}],
        "list": [None, 1, None, True],
    }


def test_a_template_that_fails_on_a_response_costs_that_one(sample: Sample) -> None:
    request = {"levels": "{{ samples | map(attribute='metadata.level') | list }}"}

    def answer(request: Request) -> Answer:
        return reply({"scores": [{"of": level} for level in request.body["levels"]]})

    samples = [sample("x", metadata={"level": n} if n != 3 else {}) for n in range(6)]
    with JudgeServer(answer) as server:
        results = judged(server.url, samples, request=request, score="scores.*.of", batch_size=6)
    assert [r.value for r in results] == [0, 1, 2, None, 4, 5]
    assert "UndefinedError" in results[3].errors["http"]


def test_of_a_batch_only_what_the_judge_refuses_has_no_verdict(sample: Sample) -> None:
    def answer(request: Request) -> Answer:
        texts = request.body["text"]
        if "long" in texts:
            return reply({"error": "too long"}, "400 Bad Request")
        return reply([{"embedding": [None if t == "null" else float(t)]} for t in texts])

    texts = ["1", "2", "long", "null", "5"]
    samples = [sample(text) for text in texts]
    settings = {"form": "sglang_reward_model", "prompt": "{{ response }}", "batch_size": 5}
    with JudgeServer(answer) as server:
        results = judged(server.url, samples, **settings)
        assert [r.value for r in results] == [1, 2, None, None, 5]
        assert "too long" in results[2].errors["http"]
        assert results[3].errors["http"] == "the score is null"
        assert {r.path for r in server.requests} == {"/classify"}
    with JudgeServer(lambda _: reply([{"embedding": [1.0]}] * 4)) as server:
        results = judged(server.url, samples, **settings, max_retries=0)
    assert {r.value for r in results} == {None}
    assert "expected 5 scores, got 4" in results[0].errors["http"]


def test_a_reward_models_chat_template_shows_the_response(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    settings = {"form": "sglang_reward_model", "chat_template": str(tmp_path), "model": "rm"}
    with JudgeServer(lambda _: reply([{"embedding": [0.25, 9]}])) as server:
        (result,) = judged(server.url, [sample("four")], **settings)
    assert result.value == 0.25
    assert server.requests[0].body == {"model": "rm", "text": ["<s>[user]?[assistant]four"]}


CHATS: dict[str, tuple[Any, float | str]] = {
    "plain": (chat("It agrees.\n**Score:** 1"), 1.0),
    "last": (chat("Score: 0? No. Score: 0.75"), 0.75),
    "thought": (chat("<think>Score: 1</think>I cannot say."), "no score in the reply"),
    "refused": (chat(None, refusal="I cannot judge this"), "the judge refused"),
    "no text": (chat(None), "said no text"),
    "cut": (chat("Score: 1", "length"), 'ended by "length"'),
    "filtered": (chat("Score: 1", "content_filter"), "ended by"),
    "unparsable": (chat("I am not sure."), 'no score in the reply: "I am not sure."'),
    "outside": (chat("Score: 100"), "the score 100 is not within 0 to 1"),
    "no choice": ({"choices": []}, "no '0' in choices"),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_judge_that_refuses_or_says_no_score_gives_no_verdict(
    name: str, sample: Sample
) -> None:
    said, expected = CHATS[name]
    with JudgeServer(lambda _: reply(said)) as server:
        settings = {"form": "chat", "model": "judge", "score_range": [0, 1], "system": "Be fair."}
        (result,) = judged(server.url + "/v1/", [sample("It is 7.")], **settings)
    if isinstance(expected, float):
        assert result.value == expected
    else:
        assert result.value is None
        assert expected in result.errors["http"]
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body["temperature"] == 0
    assert [m["role"] for m in request.body["messages"]] == ["system", "user"]
    assert "It is 7." in request.body["messages"][1]["content"]


def test_words_stand_for_scores_and_other_words_for_none(sample: Sample) -> None:
    def answer(request: Request) -> Answer:
        return reply(chat(f"Verdict: {request.body['messages'][0]['content']}"))

    settings = {
        "form": "chat",
        "model": "m",
        "prompt": "{{ response }}",
        "score_pattern": r"Verdict: (\w+)",
        "verdicts": {"right": 1, "wrong": 0},
        "body": {"max_tokens": 5},
    }
    with JudgeServer(answer) as server:
        samples = [sample(word) for word in ("Right", "wrong", "maybe")]
        results = judged(server.url, samples, **settings)
    assert [r.value for r in results] == [1, 0, None]
    assert server.requests[0].body["max_tokens"] == 5


def test_a_pattern_that_takes_for_ever_is_given_up(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rlsd.rewards.http.replies.MATCH_SECONDS", 0.1)
    with JudgeServer(lambda _: reply(chat("a" * 5000 + "!"))) as server:
        settings = {"form": "chat", "model": "m", "score_pattern": r"((?:a|aa|a?)+)$"}
        (result,) = judged(server.url, [sample("x")], **settings)
    assert result.errors["http"] == "score_pattern took longer than 0.1 s"


@pytest.mark.process
def test_judges_are_asked_while_workers_score(sample: Sample, tmp_path: Path) -> None:
    """The worker waits for what the judge does, and would wait in vain for one asked later."""
    called = tmp_path / "called"
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import time, pathlib\n"
        "def rule(sample):\n"
        f"    while not pathlib.Path({str(called)!r}).exists(): time.sleep(0.01)\n"
        "    return len(sample.response)\n"
    )

    async def answer(request: Request, connection: Connection) -> None:
        called.touch()
        await asyncio.sleep(0)
        await reply({"score": 10})(request, connection)

    with JudgeServer(lambda _: answer) as server:
        entries = config(server.url).model_dump()["functions"]
        functions = [{"name": f"{rule}:rule"}, {**entries[0], "weight": 2}, {"name": "exact_match"}]
        settings = {"functions": functions, "workers": 1, "timeout_seconds": 20}
        with RewardPool(RewardConfig.model_validate(settings)) as pool:
            results = pool.score([sample("a"), sample("abc")])
    assert [r.parts["rule"] for r in results] == [1, 3]
    assert [r.parts["http"] for r in results] == [10, 10]
    assert [r.value for r in results] == [21, 23]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no form": ({"request": None, "score": None}, "form=own needs request and score"),
    "a key too many": ({"form": "chat", "model": "m", "score": "x"}, "chat has no use for score"),
    "no model": ({"form": "chat"}, "form=chat needs model"),
    "no scheme": ({"url": "judge:30000"}, "must begin with http"),
    "a login": ({"url": "http://me:you@judge"}, "no user name or password"),
    "a key in the address": ({"url": f"http://judge/?api_key={KEY}"}, "give api_key"),
    "params": ({"params": {"url": "x"}}, "beside its name, not under params"),
    "two texts": (
        {"form": "sglang_reward_model", "prompt": "x", "chat_template": "y"},
        "either prompt or chat_template",
    ),
    "a batch of chats": ({"form": "chat", "model": "m", "batch_size": 2}, "batch_size=1"),
    "verdicts alone": ({"verdicts": {"a": 1}}, "verdicts needs score_pattern"),
    "no template": ({"request": "{{ response"}, "is not a Jinja template"),
    "no expression": ({"request": "{{ 1 + }}"}, "is not a Jinja"),
    "no pattern": ({"score_pattern": "("}, "is not a regular expression"),
    "no group": ({"score_pattern": "x"}, "has no group"),
    "no path": ({"score": "a..b"}, "is not a path such as"),
    "no star": ({"batch_size": 4}, "batch_size=4 needs a score for each response"),
    "no variable": ({"api_key": "env:NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
    "no folder": (
        {"form": "sglang_reward_model", "chat_template": "/nowhere"},
        "neither chat_template.jinja",
    ),
    "a long deadline": ({"deadline_seconds": 1e6}, "must be below distributed.timeout_seconds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_the_run(name: str, tmp_path: Path) -> None:
    changes, expected = WRONG[name]
    entry = {"name": "http", "url": "http://judge", **({} if "form" in changes else OWN)}
    raw = {
        "run_dir": "run",
        "model": {"hf_path": "model"},
        "data": {"train": [{"kind": "jsonl", "path": "questions.jsonl"}]},
        "reward": {"functions": [{**entry, **changes}]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        RewardPool(load_config(path).reward)
    assert expected in str(caught.value)
    assert "reward.functions.0" in str(caught.value)
    assert KEY not in str(caught.value)
