"""The parts of the SGLang client that decide something without a server."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import time
from typing import Any

import httpx2
import psutil
import pytest

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import ServerFault, raise_for_status
from megatron_rlsd.rollout.sglang.balance import choose
from megatron_rlsd.rollout.sglang.calls import continued, joined
from megatron_rlsd.rollout.sglang.process import (
    ServerProcess,
    server_command,
    server_environment,
)
from megatron_rlsd.rollout.sglang.replies import (
    generate_body,
    parse_generation,
    parse_response_scores,
    parse_scores,
    read_response,
)
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.batches import plain

REQUEST = GenerationRequest([5, 6, 7], SamplingParams(4, 0.7, stop_token_ids=(2, 9)), seed=3)
ANSWER = {
    "output_ids": [30, 31, 2],
    "meta_info": {
        "id": "r.",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 3,
        "weight_version": "8",
        "weight_versions": [{"version": "8", "start": 0, "end": 3}],
        "output_token_logprobs": [[-0.5, 30, None], [-1.25, 31, None], [0.0, 2, None]],
        "completion_tokens": 3,
    },
}


SERVER = "server 1 (http://x)"


def parse(answer, versions=range(8, 9), request=REQUEST):
    return parse_generation(
        read_response(json.dumps(answer).encode(), SERVER),
        request,
        rid="r.",
        vocab_size=40,
        versions={str(version): version for version in versions},
        server=SERVER,
    )


def span(version, start, end):
    return {"version": str(version), "start": start, "end": end}


def changed(path, value):
    answer = copy.deepcopy(ANSWER)
    node: Any = answer
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return answer


def test_a_consistent_answer_is_taken_as_it_is():
    generation = plain(parse(ANSWER))
    assert generation.token_ids == [30, 31, 2]
    assert generation.log_probs == [-0.5, -1.25, 0.0]
    assert (generation.finish_reason, generation.weight_version) == ("stop", 8)


def test_an_answer_across_weight_updates_says_which_weights_sampled_each_token():
    answer = changed(("meta_info", "weight_versions"), [span(6, 0, 1), span(8, 1, 3)])
    mixed = plain(parse(answer, range(6, 9)))
    assert (mixed.weight_version, mixed.token_versions) == (6, [6, 8, 8])
    for spans in (
        [span(8, 0, 1), span(6, 1, 3)],  # falls
        [span(6, 0, 1), span(8, 2, 3)],  # a gap
        [span(6, 0, 1), span(8, 1, 2)],  # a token short
        [span(5, 0, 1), span(8, 1, 3)],  # older than the request
    ):
        with pytest.raises(ServerFault, match="weight versions"):
            parse(changed(("meta_info", "weight_versions"), spans), range(6, 9))


def test_a_response_in_parts_is_asked_for_and_put_together_again():
    aborted = changed(("meta_info", "finish_reason"), {"type": "abort"})
    aborted["output_ids"] = [30, 31]
    aborted["meta_info"]["output_token_logprobs"].pop()
    aborted["meta_info"]["weight_versions"] = [span(8, 0, 2)]
    first = parse(aborted)
    rest = continued(REQUEST, [first])
    assert (rest.prompt_ids, rest.params.max_new_tokens) == ([5, 6, 7, 30, 31], 2)
    assert rest.seed == REQUEST.seed
    whole = joined([first, Generation.of([33, 2], [-0.1, -0.2], "stop", 11)])
    expected = Generation.of(
        [30, 31, 33, 2], [-0.5, -1.25, -0.1, -0.2], "stop", 8, token_versions=[8, 8, 11, 11]
    )
    assert plain(whole) == plain(expected)
    again = joined([first, Generation.of([33, 2], [-0.1, -0.2], "stop", 8)])
    assert (again.weight_version, again.token_versions) == (8, None)


def aborted(*ids):
    answer = changed(("output_ids",), list(ids))
    answer["meta_info"] |= {
        "finish_reason": {"type": "abort"},
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "weight_versions": [span(8, 0, len(ids))],
    }
    return answer


@pytest.mark.parametrize(
    ("ids", "finish"),
    [
        ((), "abort"),
        ((30, 31), "abort"),
        # SGLang looks at the abort first, whatever the last token was.
        ((30, 2), "stop"),
        ((9,), "stop"),
        ((30, 31, 32, 33), "length"),
        ((30, 31, 32, 9), "stop"),
    ],
)
def test_an_abort_at_or_after_a_responses_last_token_is_its_end(ids, finish):
    generation = parse(aborted(*ids))
    assert (generation.token_ids.tolist(), generation.finish_reason) == (list(ids), finish)


META = "meta_info"
LOG_PROBS = (META, "output_token_logprobs")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("output_ids",), [30, 2], r"the log-probabilities of \[30, 2\]"),
        (("output_ids",), [30, 40, 2], r"output_ids below 40"),
        (("output_ids",), [30, -1, 2], r"output_ids\.1: .*greater than or equal to 0"),
        (("output_ids",), [30, True, 2], r"output_ids\.1: .*valid integer"),
        (("output_ids",), "30", r"output_ids: .*valid array"),
        (("output_ids",), [30, 9, 2], r"no token after a stop token"),
        (("output_ids",), [], r"1 to 4 output_ids"),
        (("output_ids",), [30] * 4 + [2], r"1 to 4 output_ids"),
        (("output_ids",), [30, 31, 12], r"stops after one of the tokens \[2, 9\], got 12"),
        ((META, "finish_reason"), {"type": "length"}, r"4 output_ids at finish_reason=length"),
        ((META, "finish_reason"), {"type": "error"}, r"finish_reason\.type: .*'stop' or 'abort'"),
        ((META, "finish_reason"), None, r"finish_reason: .*an object"),
        ((META, "finish_reason"), 7, r"finish_reason: .*an object"),
        ((META, "id"), "other.", r"an answer to this request, got 'other\.'"),
        ((META, "prompt_tokens"), 4, r"prompt_tokens=3, got 4"),
        ((META, "prompt_tokens"), "3", r"prompt_tokens: .*valid integer"),
        ((META, "cached_tokens"), -1e300, r"cached_tokens: .*valid integer"),
        ((META, "weight_version"), "7", r"expected weight versions 8, got"),
        ((META, "weight_version"), 8, r"weight_version: .*valid string"),
        ((META, "weight_versions"), [span(7, 0, 1), span(8, 1, 3)], r"weight versions 8, got"),
        ((META, "weight_versions"), [span(8, 0, 3 * 10**8)], r"weight versions of 3 tokens in"),
        ((META, "weight_versions"), [span(8, 0, "3")], r"weight_versions\.0\.end: .*integer"),
        ((META, "weight_versions"), ["8"], r"weight_versions\.0: .*an object"),
        (LOG_PROBS, None, r"output_token_logprobs: .*valid array"),
        (LOG_PROBS, [], r"the log-probabilities of \[30, 31, 2\]"),
        ((*LOG_PROBS, 1), [-1.0, 30, None], r"the log-probabilities of \[30, 31, 2\]"),
        ((*LOG_PROBS, 1), [-1.0, 31], r"output_token_logprobs\.1\.2: Field required"),
        ((*LOG_PROBS, 1), [None, 31, None], r"a finite log-probability"),
        ((*LOG_PROBS, 1), [float("nan"), 31, None], r"a finite log-probability"),
        ((*LOG_PROBS, 1), [0.4, 31, None], r"a finite log-probability"),
        ((META,), None, r"meta_info: .*an object"),
    ],
)
def test_an_inconsistent_answer_names_server_request_and_expectation(path, value, expected):
    with pytest.raises(
        ServerFault, match=rf"server 1 \(http://x\)(, request 'r\.')?: .*{expected}"
    ):
        parse(changed(path, value))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"<html>",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff\xfe",
        json.dumps(ANSWER)[:-9].encode(),
        json.dumps(ANSWER).replace('"prompt_tokens": 3', '"prompt_tokens": -1e400').encode(),
        json.dumps(ANSWER).replace('"prompt_tokens": 3', f'"prompt_tokens": {"9" * 5000}').encode(),
        json.dumps(ANSWER).replace("[30, 31, 2]", f"[{'true,' * 10**6}2]").encode(),
    ],
)
def test_what_is_no_answer_at_all_is_a_fault_of_the_server_and_told_in_one_line(content):
    with pytest.raises(ServerFault, match=r"server 1 \(http://x\): ") as caught:
        read_response(content, SERVER)
    assert len(str(caught.value)) < 600
    with pytest.raises(ServerFault, match="http://x: "):
        parse_scores(content, [4, 39, 6], vocab_size=40, server="http://x")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no\r\nsuch\n\npage", "HTTP 404: no such page"),
        (b'{"error": {"message": "Traceback:\\n  File x\\u0085"}}', "HTTP 404: Traceback: File x"),
        (b"\n", r"HTTP 404: \(no message\)"),
    ],
)
def test_a_refusal_is_told_in_one_line(content: bytes, told: str) -> None:
    with pytest.raises(EngineError, match=rf"^server 0: {told}$"):
        raise_for_status(httpx2.Response(404), content, "server 0")


def test_a_stop_that_nobody_asked_for_is_told_with_its_remedy():
    answer = changed((*LOG_PROBS, 2), [0.0, 12, None])
    answer["output_ids"][2] = answer[META]["finish_reason"]["matched"] = 12
    with pytest.raises(EngineError, match=r"after token 12.*rollout\.stop_token_ids") as caught:
        parse(answer)
    # Not the server's fault: another one would do the same.
    assert not isinstance(caught.value, ServerFault)


def test_the_body_leaves_nothing_to_a_servers_defaults():
    params = generate_body(REQUEST, "r.")["sampling_params"]
    assert params["top_k"] == -1
    assert (params["repetition_penalty"], params["min_p"]) == (1.0, 0.0)
    assert params["stop_token_ids"] == [2, 9]


def test_scores_know_that_sglang_reports_the_last_id_as_zero():
    def answer(*ids):
        entries = [[None if i == 0 else -1.0, t, None] for i, t in ids]
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": entries}
        return json.dumps({META: meta}).encode()

    reply = answer(*enumerate([4, 0, 6]))
    assert parse_scores(reply, [4, 39, 6], vocab_size=40, server="s").tolist() == [-1.0, -1.0]
    with pytest.raises(ServerFault, match="not of the tokens sent"):
        parse_scores(reply, [4, 38, 6], vocab_size=40, server="s")


def test_scores_of_a_response_are_believed_where_they_are_of_its_tokens():
    meta = {
        "prompt_tokens": 4,
        "input_token_logprobs": [[None, 7, None], [-1.5, 8, None], [-2.5, 0, None]],
    }

    def parse_response(prompt, response, **changes):
        reply = json.dumps({"meta_info": meta | changes}).encode()
        return parse_response_scores(reply, prompt, response, vocab_size=40, server="http://x")

    assert parse_response([5, 7], [8, 39]).tolist() == [-1.5, -2.5]
    for prompt, response in (([5, 7], [8, 38]), ([5, 6], [8, 39]), ([5, 7], [8])):
        with pytest.raises(
            ServerFault, match=r"http://x: log-probabilities of .* not of the token"
        ):
            parse_response(prompt, response)
    with pytest.raises(ServerFault, match="read 4 tokens of the 5 sent"):
        parse_response([4, 5, 7], [8, 39])
    broken = [[None, 7, None], [float("nan"), 8, None], [-2.5, 0, None]]
    with pytest.raises(ServerFault, match="expected a finite log-probability"):
        parse_response([5, 7], [8, 39], input_token_logprobs=broken)


def test_a_prompt_stays_with_its_server_until_that_is_too_busy():
    loads = {"a": 100, "b": 60}
    assert choose(loads, None, slack=0) == "b"
    assert choose(loads, "a", slack=40) == "a"
    assert choose(loads, "a", slack=39) == "b"
    assert choose(loads, "gone", slack=1000) == "b"


def test_flags_reach_the_command_line(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.touch()
    config = SGLangConfig(
        python=str(python),
        device="cuda",
        tensor_parallel=2,
        first_gpu=4,
        args={
            "mem_fraction_static": 0.8,
            "enable_memory_saver": True,
            "disable_radix_cache": False,
            "dtype": "float16",
            "cuda-graph-bs": [1, 2],
            "weight_version": "mine",
            "json_model_override_args": {"a": 1},
        },
        env={"NCCL_DEBUG": "WARN"},
    )
    command = server_command(config, model="/m", dtype="bfloat16", index=1, port=30, label="l")
    line = " ".join(command)
    assert "sglang/launch/launch.py --model-path /m" in line
    assert "--tp-size 2" in line
    assert "--base-gpu-id 6" in line
    assert "--weight-version l" in line
    assert "--mem-fraction-static 0.8 --enable-memory-saver --cuda-graph-bs 1 2" in line
    assert "--dtype float16" in line
    assert "radix" not in line
    assert '--json-model-override-args {"a": 1}' in line

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    env = server_environment(config)
    # Or SGLang would join the trainer's process group.
    assert not {"RANK", "MASTER_PORT"} & env.keys()
    assert env["NCCL_DEBUG"] == "WARN"


@pytest.mark.process
def test_a_warning_to_the_whole_process_tree_ends_no_server(tmp_path):
    (tmp_path / "log").touch(0o644)
    process = ServerProcess(["sleep", "600"], os.environ, tmp_path / "log")
    try:
        # Whatever servers print is for the user alone.
        assert stat.S_IMODE(process.log.stat().st_mode) == 0o600
        guard = psutil.Process(process.group)
        deadline = time.monotonic() + 20
        while not guard.children():
            # Also while the guard itself only starts.
            guard.send_signal(signal.SIGUSR1)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (server,) = guard.children()
        server.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        assert process.running
        assert server.is_running()
    finally:
        process.stop()
    assert not psutil.pid_exists(server.pid)
