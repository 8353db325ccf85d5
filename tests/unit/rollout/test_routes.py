"""Routed experts on their way from a server: checked, cut to shape, put together again."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.routes import RoutesShape, recording
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.calls import joined_routes
from megatron_rlsd.rollout.sglang.process import giving_memory_back
from megatron_rlsd.rollout.sglang.replies import generate_body, parse_generation, read_response
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams

SHAPE = RoutesShape((True, False, True), num_experts=4, experts_per_token=2)
REQUEST = GenerationRequest([5, 6, 7], SamplingParams(2), seed=3)
TOKENS = 4
"""3 of the prompt and 2 sampled, from the last of which nothing was computed."""
ROUTES = torch.tensor([[3, 1], [0, 0], [0, 2]]).repeat(TOKENS, 1, 1)


def answer(routes: torch.Tensor | str | None, finish: str = "length") -> dict[str, object]:
    if isinstance(routes, torch.Tensor):
        routes = base64.b64encode(routes.to(torch.int32).numpy().tobytes()).decode()
    return {
        "output_ids": [30, 31],
        "meta_info": {
            "id": "r.",
            "finish_reason": {"type": finish},
            "prompt_tokens": 3,
            "weight_version": "8",
            "output_token_logprobs": [[-0.5, 30, None], [-1.25, 31, None]],
            "routed_experts": routes,
        },
    }


def parse(reply: dict[str, object]) -> Generation:
    return parse_generation(
        *(read_response(json.dumps(reply).encode(), "server 1"), REQUEST),
        rid="r.",
        vocab_size=40,
        versions={"8": 8},
        server="server 1",
        routes=SHAPE,
    )


def test_routes_are_asked_for_and_taken_as_they_are() -> None:
    assert generate_body(REQUEST, "r.", with_routes=True)["return_routed_experts"] is True
    assert "return_routed_experts" not in generate_body(REQUEST, "r.")
    found = parse(answer(ROUTES)).routed_experts
    assert found is not None
    assert found.dtype == torch.int16
    assert torch.equal(found, ROUTES.short())


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (ROUTES[1:], r"72 bytes for \[4, 3, 2\] numbers"),
        (ROUTES + 1, r"experts 1 to 4 of 4"),
        (ROUTES - 1, r"experts -1 to 2 of 4"),
        # What SGLang returns of tokens that it did not record.
        (torch.zeros_like(ROUTES), r"an expert that is taken twice by one token"),
        ("not base64", r"not base64"),
    ],
)
def test_routes_that_no_model_takes_make_the_request_go_elsewhere(
    routes: torch.Tensor | str, message: str
) -> None:
    with pytest.raises(ServerFault, match=rf"routed experts of 4 tokens, got .*{message}"):
        parse(answer(routes))
    # An interrupted response is asked for again, with its prefix. One that was whole by then goes
    # on without its last token, for the routes come with a token.
    again = parse(answer(routes, "abort"))
    assert (again.routed_experts, again.finish_reason, again.token_ids.tolist()) == (
        None,
        "abort",
        [30],
    )
    assert parse(answer(ROUTES, "abort")).finish_reason == "length"


def test_a_server_that_records_no_routes_stops_the_run() -> None:
    with pytest.raises(EngineError, match="start it with --enable-return-routed-experts") as error:
        parse(answer(None))
    assert not isinstance(error.value, ServerFault)


def test_each_tokens_routes_are_those_of_the_weights_that_used_them_first() -> None:
    first, second = torch.zeros(3, 1, 2), torch.ones(7, 1, 2)
    whole = joined_routes([None, first, None, second])
    assert whole is not None
    assert whole[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert joined_routes([None]) is None


def test_servers_are_started_with_what_is_needed() -> None:
    own = SGLangConfig(device="cuda", args={"mem_fraction_static": 0.5})
    assert recording(own).args == {"enable_return_routed_experts": True, **own.args}
    assert giving_memory_back(own).args == {"enable_memory_saver": True, **own.args}
    # SGLang does not start with its memory saver where there is no GPU.
    assert giving_memory_back(own.model_copy(update={"device": "cpu"})).args == own.args
