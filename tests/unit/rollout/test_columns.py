"""Token lists as arrays: what is taken out of an answer is what JSON says, or nothing is."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.columns import take_entries, take_ids
from megatron_rlsd.rollout.sglang.replies import parse_response_scores, read_response

KEY = "output_token_logprobs"


def compact(answer: Any) -> bytes:
    """As SGLang writes it."""
    return json.dumps(answer, separators=(",", ":")).encode()


def answer_of(entries: Any, ids: Any = (30, 31), **meta: Any) -> dict[str, Any]:
    """Its keys in SGLang's order; a text with all that might be taken for a list."""
    return {
        "text": f'"{KEY}":[[-1.0,2,null]] \\"{KEY}":[[ é',
        "output_ids": ids,
        "meta_info": {
            "id": "r.",
            "finish_reason": {"type": "length", "length": 2},
            "prompt_tokens": 3,
            "weight_version": "8",
            "input_token_logprobs": [],
            KEY: entries,
            "completion_tokens": 2,
            **meta,
        },
    }


def entries_in(text: str) -> Any:
    """What is taken of an answer whose entries are ``text``."""
    content = compact(answer_of("HERE")).replace(b'"HERE"', text.encode())
    return take_entries(content, KEY.encode())


def test_columns_have_the_bits_of_each_number() -> None:
    rng = random.Random(1)
    for count in (1, 2, 700):
        ids = [rng.randrange(2 ** rng.randrange(1, 32)) for _ in range(count)]
        values = [-rng.random() * 10.0 ** rng.randrange(-300, 300) for _ in ids]
        values[:2] = [rng.choice([0, -3, -0.0, -5e-324, -1e-5]), -1.1920928955078125e-07][:count]
        content = compact(answer_of([[v, i, None] for v, i in zip(values, ids, strict=True)], ids))
        (entries, rest), (found, _) = (
            take_entries(content, KEY.encode()),
            take_ids(content, b"output_ids"),
        )
        assert found.tolist() == entries.ids.tolist() == ids
        assert np.array_equal(entries.log_probs.view(np.int64), np.array(values).view(np.int64))
        assert json.loads(rest) == answer_of([], ids)


def test_a_first_entry_without_a_log_probability_is_missing() -> None:
    entries, _ = entries_in("[[null,7,null],[-0.5,8,null]]")
    assert math.isnan(entries.log_probs[0])
    assert (entries.log_probs[1], entries.ids.tolist()) == (-0.5, [7, 8])
    content = compact({"meta_info": {"prompt_tokens": 4, "input_token_logprobs": "HERE"}})
    scored = content.replace(b'"HERE"', b"[[null,7,null],[-0.5,8,null],[-0.25,0,null]]")
    found = parse_response_scores(scored, [5, 7], [8, 39], vocab_size=40, server="s")
    assert found.tolist() == [-0.5, -0.25]


@pytest.mark.parametrize(
    "entries",
    [
        *("[]", "[[]]", "[[-1,2,null]", "[-1,2,null]", '[[-1,2,"a"]]', "[[-1,2]]"),
        *("[[-1,2,null,null]]", "[[-1,2,null],[-1,2,null,3]]"),
        *("[[-1,2,null],[null,3,null]]", "[[-1,2,null],[-1,null,null]]", "[[null,null,null]]"),
        *("[[-1,2,null],[-1,2,null],[],[-1,2,null]]", "[[[-1],2,null]]", "[[-1,[2],null]]"),
        *("[[-1,2,lull]]", "[[-1,2,9ull]]", "[[-1,2,nu+ll]]", "[[-1,2,null],[n,3,null]]"),
        *("[[-0.n,2,null]]", "[[9e88,n0e87,null]]", "[[-1,2,null],[-1,2,nul],[-1,2,null]]"),
        *("[[-1,2.5,null]]", "[[-1,-2,null]]", "[[-1,4294967296,null]]", "[[-1,1e400,null]]"),
        *("[[NaN,2,null]]", "[[-01,2,null]]", "[[-1.,2,null]]", "[[+1,2,null]]", "[[true,2,null]]"),
        *("[[-1,2,null] ,[-1,3,null]]", "[[-1,2,null],null]"),
        *("[[,2,null]]", "[[-1,2,null],[-1,,null]]", "[[-1,2,null]]" + f',"{KEY}":[]'),
        '[["-1",2,null]]',
    ],
)  # fmt: skip
def test_what_is_not_in_that_form_is_left_for_the_strict_reader(entries: str) -> None:
    assert entries_in(entries) is None


def test_a_text_and_a_key_that_ends_alike_are_no_list() -> None:
    content = compact({"text": f'"{KEY}":[[-1,2,null]]', f'x"{KEY}': [[-1, 2, None]]})
    taken = take_entries(content, KEY.encode())
    assert taken is None or f"{KEY}" in json.loads(taken[1])["text"]
    with pytest.raises(ServerFault, match=r"server 0: output_ids: Field required"):
        read_response(content, "server 0")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer | {"output_ids": [30, 2**40]},
        lambda answer: answer | {"output_ids": [30, -1]},
        lambda answer: answer | {"meta_info": answer["meta_info"] | {"id": 7}},
        lambda answer: answer | {"meta_info": answer["meta_info"] | {KEY: [[-1.0, 30]]}},
        lambda answer: {"output_ids": [30], KEY: [[-1.0, 30, None]], "meta_info": {}},
    ],
)
def test_a_refusal_says_the_same_of_both_forms(spoil: Any) -> None:
    spoilt = spoil(answer_of([[-0.5, 30, None], [-0.25, 31, None]]))

    def told(content: bytes) -> Any:
        try:
            return read_response(content, "server 0").output_ids.tolist()
        except ServerFault as fault:
            return str(fault)

    assert told(compact(spoilt)) == told(json.dumps(spoilt).encode())
