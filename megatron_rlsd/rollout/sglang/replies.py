"""Requests as SGLang takes them, and its answers, believed only where they are consistent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import numpy as np
from pydantic import FailFast, Field
from torch import Tensor

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.routes import RoutesShape
from megatron_rlsd.rollout.sglang.answers import ServerFault, Strict, read_strictly
from megatron_rlsd.rollout.sglang.columns import Entries, take_entries, take_ids
from megatron_rlsd.types import FinishReason, Generation, GenerationRequest

if TYPE_CHECKING:
    from megatron_rlsd.rollout.sglang.columns import Ids
    from megatron_rlsd.types import FloatArray, IntArray

ROUNDING = 1e-3
"""A log-probability may exceed 0 by rounding, not by more."""
REPLY_BYTES = 1 << 16
"""The size of an answer without any token."""
TOKEN_BYTES = 256
"""Most that an answer says of one token: its id, its log-probability (about 50 bytes), its text
where a server was started with a tokenizer, and a span of weight versions."""

Count = Annotated[int, Field(ge=0)]
# The first of a million bad entries says enough; a list of all errors would fill the memory.
Bad = Callable[[str, Any], NoReturn]
IdList = Annotated[list[Count], FailFast()]
EntryList = Annotated[list[tuple[float | None, int, Any]], FailFast()]
"""[log-probability or null, token id, text or null] each."""


class Finish(Strict):
    type: Literal["length", "stop", "abort"]
    matched: Any = None
    """The token after which it stopped."""


class Span(Strict):
    """Tokens [start, end) of a response and the label of the weights that sampled them."""

    version: str
    start: Count
    end: Count


class ResponseMeta(Strict):
    id: str
    finish_reason: Finish
    prompt_tokens: Count | None = None
    """None: the request was aborted before it began."""
    weight_version: str
    weight_versions: Annotated[list[Span], FailFast()] = []
    """Empty: ``weight_version`` sampled all tokens."""
    cached_tokens: Count | None = None
    routed_experts: Any = None


class _SampledMeta(ResponseMeta):
    output_token_logprobs: EntryList


class _Sampled(Strict):
    """An answer to POST /generate that samples."""

    output_ids: IdList
    meta_info: _SampledMeta


class _ScoreMeta(Strict):
    prompt_tokens: Count
    input_token_logprobs: EntryList


class _Scored(Strict):
    """An answer to POST /generate that scores given tokens."""

    meta_info: _ScoreMeta


@dataclass(frozen=True, eq=False)
class ResponseReply:
    """An answer to POST /generate that samples, read but not yet believed."""

    output_ids: Ids
    """[T] int64."""
    entries: Entries
    """Log-probabilities and whose they are, [T'] each."""
    meta_info: ResponseMeta


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


def reply_limit(request: GenerationRequest, routes: RoutesShape | None = None) -> int:
    """Bytes that an answer to ``request`` may have; one that is longer is not read on."""
    tokens = request.params.max_new_tokens
    limit = REPLY_BYTES + TOKEN_BYTES * tokens
    if routes is not None:
        limit += routes.text_bytes(len(request.prompt_ids) + tokens)
    return limit


def score_limit(num_tokens: int) -> int:
    """Bytes that the scores of ``num_tokens`` given tokens may have."""
    return REPLY_BYTES + TOKEN_BYTES * num_tokens


def read_response(content: bytes, server: str) -> ResponseReply:
    """The answer in ``content``; ServerFault that says what it is not."""
    key = b"output_token_logprobs"
    if (taken := take_entries(content, key)) and (more := take_ids(taken[1], b"output_ids")):
        (entries, _), (ids, rest) = taken, more
        try:
            said = read_strictly(_Sampled, rest, server)
        except ServerFault:
            pass  # the whole answer tells better what is wrong
        else:
            if not said.output_ids and not said.meta_info.output_token_logprobs:
                return ResponseReply(ids, entries, said.meta_info)
    said = read_strictly(_Sampled, content, server)
    entries = _columns(said.meta_info.output_token_logprobs)
    meta = said.meta_info.model_copy(update={"output_token_logprobs": []})
    return ResponseReply(_int64(said.output_ids), entries, meta)


def _columns(entries: list[tuple[float | None, int, Any]]) -> Entries:
    """The same as arrays."""
    values = [np.nan if value is None else value for value, _, _ in entries]
    return Entries(np.array(values, np.float64), _int64([token for _, token, _ in entries]))


def _int64(numbers: list[int]) -> Ids:
    """The numbers [N] int64; one that is larger, and so no id, is the largest there is."""
    most = np.iinfo(np.int64).max
    return np.array([max(-most, min(each, most)) for each in numbers], np.int64)


def parse_generation(
    reply: ResponseReply,
    request: GenerationRequest,
    *,
    rid: str,
    vocab_size: int,
    versions: Mapping[str, int],
    server: str,
    routes: RoutesShape | None = None,
) -> Generation:
    """The generation in a reply of POST /generate; one that was aborted has what there was by then.

    An abort that comes with or after a response's last token is not an interruption: the response
    is finished, by the stop token that it ends in (``stop``) or with all its tokens (``length``).

    versions: label -> weight version, for the weights that may have sampled it, oldest first.
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

    meta, ids, entries = reply.meta_info, reply.output_ids, reply.entries
    finish: FinishReason = meta.finish_reason.type
    if meta.id != rid:
        bad("an answer to this request", meta.id)
    unsaid = meta.prompt_tokens is None and finish == "abort"
    if meta.prompt_tokens != len(request.prompt_ids) and not unsaid:
        bad(f"prompt_tokens={len(request.prompt_ids)}", meta.prompt_tokens)
    if (ids >= vocab_size).any():
        bad(f"output_ids below {vocab_size}", _shown(ids))
    limit, stops = request.params.max_new_tokens, set(request.params.stop_token_ids)
    fewest = {"length": limit, "stop": 1, "abort": 0}[finish]
    if not fewest <= len(ids) <= limit:
        bad(f"{fewest} to {limit} output_ids at finish_reason={finish}", len(ids))
    last = int(ids[-1]) if len(ids) else None
    if finish == "stop" and last not in stops:
        if meta.finish_reason.matched != last:
            bad(f"a response that stops after one of the tokens {sorted(stops)}", last)
        raise EngineError(
            f"{server} ends responses after token {last}, an end token of its model's "
            "config.json or generation_config.json that is not among the stop tokens "
            f"{sorted(stops)}; add it to rollout.stop_token_ids"
        )
    if any((ids[:-1] == stop).any() for stop in stops):
        bad("no token after a stop token", _shown(ids))

    if not np.array_equal(entries.ids, ids):
        bad(f"the log-probabilities of {_shown(ids)!r:.200}", f"those of {_shown(entries.ids)}")
    log_probs = entries.log_probs
    _check_log_probs(entries, bad)
    tokens = _token_versions(meta, len(ids), versions, bad)
    chosen = None
    if routes is not None and len(ids):
        chosen = _routed_experts(meta, len(request.prompt_ids) + len(ids) - 1, routes, finish, bad)
        if chosen is None and finish != "abort":
            raise EngineError(
                f"{server} does not say which experts its tokens took, as algorithm.routing_replay="
                "rollout needs it; start it with --enable-return-routed-experts"
            )
    if finish == "abort" and len(ids):
        ends = "stop" if last in stops else "length" if len(ids) == limit else None
        if ends is not None and (routes is None or chosen is not None):
            finish = ends  # type: ignore[assignment]
        elif ends is not None:
            # The next stay brings the routes, and has to sample something to bring them.
            ids, log_probs, tokens = ids[:-1], log_probs[:-1], tokens[:-1]
    first = int(tokens[0]) if len(tokens) else next(iter(versions.values()))
    return Generation(
        token_ids=ids.astype(np.int32),
        log_probs=log_probs.astype(np.float32),
        finish_reason=finish,
        weight_version=first,
        token_versions=tokens if len(tokens) and tokens[-1] != first else None,
        routed_experts=chosen,
    )


def _routed_experts(
    meta: ResponseMeta, tokens: int, routes: RoutesShape, finish: str, bad: Any
) -> Tensor | None:
    """The experts that each token took, as SGLang's meta_info has them; None: it has not."""
    if (text := meta.routed_experts) is None:
        return None
    found = routes.decode(text, tokens)
    if isinstance(found, str):
        # After an update interrupts a response, its next stay brings the routes as well.
        return None if finish == "abort" else bad(f"the routed experts of {tokens} tokens", found)
    return found


def _token_versions(
    meta: ResponseMeta, count: int, versions: Mapping[str, int], bad: Bad
) -> IntArray:
    """[count] int32, from SGLang's spans or from the one version of the whole answer."""
    spans = meta.weight_versions or [Span(version=meta.weight_version, start=0, end=count)]
    found = np.empty(count, np.int32)
    done = oldest = 0
    for span in spans:
        if span.end > count or span.start != done or span.end < span.start:
            bad(f"weight versions of {count} tokens in order", spans)
        if span.version not in versions:
            bad(f"weight versions {_listed(versions)}", spans)
        version = versions[span.version]
        if span.end > span.start and version < oldest:
            bad(f"weight versions, none falling, of {count} tokens", spans)
        found[done : span.end] = version
        done, oldest = span.end, version if span.end > span.start else oldest
    if meta.weight_version not in versions:
        bad(f"weight versions {_listed(versions)}", meta.weight_version)
    if done != count:
        bad(f"weight versions, none falling, of {count} tokens", spans)
    return found


def _listed(versions: Mapping[str, int]) -> str:
    return " to ".join(dict.fromkeys((next(iter(versions)), next(reversed(list(versions))))))


def score_body(token_ids: list[int], rid: str) -> dict[str, Any]:
    """Asks for the log-probabilities of given tokens; the one token sampled is not looked at."""
    return {
        "rid": rid,
        "input_ids": token_ids,
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
    }


def parse_scores(
    content: bytes, token_ids: list[int], *, vocab_size: int, server: str
) -> FloatArray:
    """[T - 1] float32: log_softmax(logits) of every token but the first, at temperature 1.

    Raises ServerFault for scores that are missing, no numbers, or of other tokens.
    """
    return _scores(content, token_ids, len(token_ids), vocab_size, server)


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
    content: bytes, prompt_ids: list[int], response_ids: list[int], *, vocab_size: int, server: str
) -> FloatArray:
    """[T] float32: log_softmax(logits) of every token of the response, at temperature 1.

    Raises ServerFault for scores that are missing, no numbers, or of other tokens.
    """
    scored = [prompt_ids[-1], *response_ids]
    return _scores(content, scored, len(prompt_ids) + len(response_ids), vocab_size, server)


def _scores(
    content: bytes, token_ids: list[int], sent: int, vocab_size: int, server: str
) -> FloatArray:
    found, prompt_tokens = _read_scores(content, server)
    # SGLang scores the vocabulary's last id as it is, and reports it as 0.
    echoed = [0 if token == vocab_size - 1 else token for token in token_ids]
    if found.ids.tolist() != echoed:
        told = f"{_shown(found.ids)!r:.200}"
        raise ServerFault(f"{server}: log-probabilities of {told}, not of the tokens sent")
    if prompt_tokens != sent:
        raise ServerFault(f"{server}: it read {prompt_tokens} tokens of the {sent} sent")

    def bad(expected: str, got: Any) -> NoReturn:
        raise ServerFault(f"{server}: expected {expected}, got {got!r:.200}")

    scores = Entries(found.log_probs[1:], found.ids[1:])
    _check_log_probs(scores, bad)
    return scores.log_probs.astype(np.float32)


def _read_scores(content: bytes, server: str) -> tuple[Entries, int]:
    """The entries, and the tokens of the prompt; ServerFault that says what it is not."""
    if taken := take_entries(content, b"input_token_logprobs"):
        entries, rest = taken
        try:
            meta = read_strictly(_Scored, rest, server).meta_info
        except ServerFault:
            pass  # the whole answer tells better what is wrong
        else:
            if not meta.input_token_logprobs:
                return entries, meta.prompt_tokens
    meta = read_strictly(_Scored, content, server).meta_info
    return _columns(meta.input_token_logprobs), meta.prompt_tokens


def _check_log_probs(entries: Entries, bad: Bad) -> None:
    values = entries.log_probs
    # A comparison with NaN is False, so NaN is found as well.
    wrong = ~((values <= ROUNDING) & (values > -np.inf))
    if wrong.any():
        at = int(wrong.argmax())
        bad("a finite log-probability", [float(values[at]), int(entries.ids[at])])


def _shown(ids: Ids) -> list[int]:
    """The first of them, for a message."""
    return ids[:100].tolist()
