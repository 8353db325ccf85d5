"""What every engine refuses before it generates anything."""

from __future__ import annotations

import math

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.types import GenerationRequest


def check_request(
    request: GenerationRequest, index: int, vocab_size: int, max_positions: int | None
) -> None:
    """EngineError that names request ``index`` if it cannot be served.

    That is: an empty prompt, token ids beyond the vocabulary, sampling parameters out of range, and
    a sequence that could pass ``max_positions`` (None: no bound).
    """
    params = request.params
    prompt_length = len(request.prompt_ids)
    total = prompt_length + params.max_new_tokens
    outside = [
        token
        for token in (*request.prompt_ids, *params.stop_token_ids)
        if not 0 <= token < vocab_size
    ]
    if prompt_length == 0:
        problem = "the prompt is empty"
    elif outside:
        problem = f"token ids {outside[:8]} are outside the vocabulary of {vocab_size}"
    elif params.max_new_tokens < 1:
        problem = f"max_new_tokens must be at least 1, got {params.max_new_tokens}"
    elif not (math.isfinite(params.temperature) and params.temperature >= 0):
        problem = f"temperature must be finite and at least 0, got {params.temperature}"
    elif not 0 < params.top_p <= 1:
        problem = f"top_p must lie in (0, 1], got {params.top_p}"
    elif params.top_k < 0:
        problem = f"top_k must be at least 0, got {params.top_k}"
    elif max_positions is not None and total > max_positions:
        problem = (
            f"{prompt_length} prompt tokens + {params.max_new_tokens} max_new_tokens = {total} "
            f"exceed the model's max_position_embeddings of {max_positions}"
        )
    else:
        return
    raise EngineError(f"request {index}: {problem}")
