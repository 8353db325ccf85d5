"""Requests as SGLang takes them, and its answers, believed only where they are consistent."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from torch import Tensor

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.routes import RoutesShape
from megatron_rlsd.rollout.sglang.client import ServerFault
from megatron_rlsd.types import Generation, GenerationRequest

ROUNDING = 1e-3
"""A log-probability may exceed 0 by rounding, not by more."""


def generate_body(
    request: GenerationRequest, rid: str, *, with_routes: bool = False
) -> dict[str, Any]:
    """The JSON of POST /generate: every parameter is given, so no default of a server counts."""
    params = request.params
    routes = {"return_routed_experts": True} if with_routes else {}
    return routes | {
        "rid": rid,
        "input_ids": request.prompt_ids,
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(params.stop_token_ids),
            # Obeyed by servers started with --enable-deterministic-inference.
            "sampling_seed": request.seed,
        },
    }


def parse_generation(
    reply: Any,
    request: GenerationRequest,
    *,
    rid: str,
    vocab_size: int,
    versions: range,
    server: str,
    routes: RoutesShape | None = None,
) -> Generation:
    """The generation in a reply of POST /generate; one that was aborted has what there was by then.

    Raises ServerFault that names the server, the request and what was expected: for an answer to
    another request, ids outside the vocabulary, more or fewer tokens than the finish reason
    implies, log-probabilities that are missing, no numbers or of other tokens, tokens sampled
    by other weights than ``versions``, and routed experts that are not of the shape ``routes``
    (None: not asked for). Raises EngineError where the server ended the response after a token that
    was not asked for, and where it does not record routed experts.
    """

    def bad(expected: str, got: Any) -> NoReturn:
        raise ServerFault(
            f"{server}, request {rid!r}: expected {expected}, got {got!r:.200} in the answer"
        )

    if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
        bad("an object with output_ids and meta_info", reply)
    meta = reply["meta_info"]
    if meta.get("id") != rid:
        bad("an answer to this request", meta.get("id"))
    finish = (meta.get("finish_reason") or {}).get("type")
    # One that was aborted before it began does not say.
    if meta.get("prompt_tokens", "abort") not in (len(request.prompt_ids), finish):
        bad(f"prompt_tokens={len(request.prompt_ids)}", meta.get("prompt_tokens"))

    ids = reply.get("output_ids")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        bad(f"output_ids below {vocab_size}", ids)
    limit = request.params.max_new_tokens
    stops = set(request.params.stop_token_ids)
    if finish == "length":
        if len(ids) != limit:
            bad(f"{limit} output_ids at finish_reason=length", len(ids))
    elif finish == "stop":
        if not 1 <= len(ids) <= limit:
            bad(f"1 to {limit} output_ids at finish_reason=stop", len(ids))
        if ids[-1] not in stops:
            raise EngineError(
                f"{server} ends responses after token {ids[-1]}, an end token of its model's "
                "config.json or generation_config.json that is not among the stop tokens "
                f"{sorted(stops)}; add it to rollout.stop_token_ids"
            )
    elif finish != "abort":
        bad("finish_reason length, stop or abort", meta.get("finish_reason"))
    if stops.intersection(ids[:-1]):
        bad("no token after a stop token", ids)

    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        got = len(entries) if isinstance(entries, list) else entries
        bad(f"{len(ids)} output_token_logprobs", got)
    log_probs = []
    for token, entry in zip(ids, entries, strict=True):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            bad(f"the log-probability of token {token}", entry)
        log_probs.append(_log_prob(entry[0], entry, bad))
    tokens = _token_versions(meta, len(ids), versions, bad)
    first = tokens[0] if tokens else versions.start
    mixed = tokens if tokens and tokens[-1] != first else []
    chosen = None
    if routes is not None and ids:
        chosen = _routed_experts(meta, len(request.prompt_ids) + len(ids) - 1, routes, finish, bad)
        if chosen is None and finish != "abort":
            raise EngineError(
                f"{server} does not say which experts its tokens took, as algorithm.routing_replay="
                "rollout needs it; start it with --enable-return-routed-experts"
            )
    return Generation(ids, log_probs, finish, first, mixed, routed_experts=chosen)


def _routed_experts(
    meta: dict[str, Any], tokens: int, routes: RoutesShape, finish: str, bad: Any
) -> Tensor | None:
    """The experts that each token took, as SGLang's meta_info has them; None: it has not."""
    if (text := meta.get("routed_experts")) is None:
        return None
    found = routes.decode(text, tokens)
    if isinstance(found, str):
        # Of a response that an update interrupts the next stay brings the routes as well.
        return None if finish == "abort" else bad(f"the routed experts of {tokens} tokens", found)
    return found


def _token_versions(meta: dict[str, Any], count: int, versions: range, bad: Any) -> list[int]:
    """Version by token, from SGLang's spans or from the one version of the whole answer."""
    whole = [{"version": meta.get("weight_version"), "start": 0, "end": count}]
    spans = meta.get("weight_versions") or whole
    known = {str(version): version for version in versions}
    found: list[int] = []
    for span in (*spans, {**whole[0], "start": count}):
        version = span.get("version")
        if version not in known or span.get("start") != len(found):
            bad(f"weight versions {' to '.join(known)} of tokens in order", spans + whole)
        found += [known[version]] * (span["end"] - len(found))
    if len(found) != count or found != sorted(found):
        bad(f"weight versions, none falling, of {count} tokens", spans)
    return found


def score_body(token_ids: list[int], rid: str) -> dict[str, Any]:
    """Asks for the log-probabilities of given tokens; the one token sampled is not looked at."""
    return {
        "rid": rid,
        "input_ids": token_ids,
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
    }


def parse_scores(reply: Any, token_ids: list[int], *, vocab_size: int, server: str) -> list[float]:
    """log_softmax(logits) of every token but the first, at temperature 1."""
    return _scores(reply, token_ids, vocab_size, server)


def response_score_body(prompt_ids: list[int], response_ids: list[int], rid: str) -> dict[str, Any]:
    """Asks for the log-probabilities of a response's tokens; nothing is sampled.

    Whatever the temperature said here, SGLang takes log_softmax of the logits as they are.
    """
    return {
        "rid": rid,
        "input_ids": prompt_ids + response_ids,
        "return_logprob": True,
        # The entry of the prompt's last token, which is empty, comes first.
        "logprob_start_len": len(prompt_ids) - 1,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }


def parse_response_scores(
    reply: Any, prompt_ids: list[int], response_ids: list[int], *, vocab_size: int, server: str
) -> list[float]:
    """log_softmax(logits) of every token of the response, at temperature 1.

    Raises ServerFault for scores that are missing, no numbers, or of other tokens.
    """
    scores = _scores(reply, [prompt_ids[-1], *response_ids], vocab_size, server)
    read = reply["meta_info"].get("prompt_tokens")
    if read != len(prompt_ids) + len(response_ids):
        raise ServerFault(
            f"{server}: it read {read} tokens of the {len(prompt_ids) + len(response_ids)} sent"
        )
    return scores


def _scores(reply: Any, token_ids: list[int], vocab_size: int, server: str) -> list[float]:
    # SGLang scores the vocabulary's last id as it is, and reports it as 0.
    echoed = [0 if token == vocab_size - 1 else token for token in token_ids]
    try:
        entries = reply["meta_info"]["input_token_logprobs"]
        found = [entry[1] for entry in entries]
    except (KeyError, TypeError, IndexError):
        raise ServerFault(f"{server}: expected input_token_logprobs, got {reply!r:.200}") from None
    if found != echoed:
        raise ServerFault(f"{server}: log-probabilities of {found!r:.200}, not of the tokens sent")

    def bad(expected: str, got: Any) -> NoReturn:
        raise ServerFault(f"{server}: expected {expected}, got {got!r:.200}")

    return [_log_prob(entry[0], entry, bad) for entry in entries[1:]]


def _log_prob(value: Any, entry: Any, bad: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value > ROUNDING:
        bad("a finite log-probability", entry)
    return float(value)
