"""The one limit on the length of every sequence of a run."""

from __future__ import annotations

from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.data.prompts import PromptBuilder
from megatron_rlsd.data.tokenizers import Tokenizer
from megatron_rlsd.hf_bridge import load_hf_config, max_positions


def build_prompts(config: Config, hf_config: dict[str, Any], tokenizer: Tokenizer) -> PromptBuilder:
    """Prompts of student and teacher that leave the model room for a response.

    With a teacher that is another model (``teacher.hf_path``) the shorter of both counts.
    """
    known = [max_positions(hf_config)]
    if config.teacher.hf_path is not None:
        known.append(max_positions(load_hf_config(config.teacher.hf_path)))
    return PromptBuilder(
        config.prompts,
        config.teacher,
        tokenizer,
        positions=min((each for each in known if each is not None), default=None),
        max_response_tokens=config.rollout.max_response_tokens,
    )
