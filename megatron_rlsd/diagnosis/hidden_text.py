"""Words that users' code and settings look for, and that no response's text holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.data import Tokenizer
from megatron_rlsd.diagnosis.check import Doubt
from megatron_rlsd.environments.registry import ENVIRONMENTS
from megatron_rlsd.plugins import Registry
from megatron_rlsd.rewards.registry import REWARDS
from megatron_rlsd.runtime.errors import UserError

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_READS_TURN = re.compile(r"\.(?:turn|texts)\b")


def check_hidden_text(config: Config, tokenizer: Tokenizer) -> str:
    """Tags that the chat template writes itself, or that are special tokens.

    Doubt where a reward or an environment of the user's names one without reading
    ``RewardInput.turn``, and where the warm start would write one twice, or as other tokens than
    the template does.
    """
    prefill = tokenizer.template.prefill()
    hidden = dict.fromkeys(tokenizer.special_names, "which is a special token here")
    hidden |= dict.fromkeys(_TAG.findall(prefill), "which the chat template writes itself")
    doubts = []
    for function in config.reward.functions:
        source = _source(REWARDS, function.name, function.params)
        if _READS_TURN.search(source):
            continue
        for tag, why in _named(hidden, source):
            doubts.append(
                f"reward {function.name} names {tag}, {why}: sample.response lacks it, sample.turn "
                "has it"
            )
    for name, params in config.environment.classes().values():
        for tag, why in _named(hidden, _source(ENVIRONMENTS, name, params)):
            doubts.append(f"environment {name} names {tag}, {why}: the turns it is given lack it")
    target = config.prompts.sft_response
    if prefill.strip() and target.lstrip().startswith(prefill.strip()):
        doubts.append(
            f"prompts.sft_response begins with {prefill.strip()!r}, which the chat template has "
            "written by then: the warm start would teach to write it twice"
        )
    for tag, _ in _named(dict.fromkeys(tokenizer.special_names, ""), target):
        doubts.append(
            f"prompts.sft_response names the special token {tag}: it is taught as plain text, that "
            "is as other tokens"
        )
    if doubts:
        raise Doubt("; ".join(doubts))
    begins = f"the chat template begins a response with {prefill!r}" if prefill else ""
    return begins or "a response's text holds all that the model writes"


def _named(hidden: dict[str, str], text: str) -> list[tuple[str, str]]:
    return [(tag, why) for tag, why in sorted(hidden.items()) if tag in text]


def _source(registry: Registry[Any], name: str, params: dict[str, Any]) -> str:
    """The text of a user's file that ``name`` is found in; empty for code of this package."""
    try:
        path = registry.locate(name, params).path
        return "" if path is None else Path(path).read_text(encoding="utf-8")
    except (UserError, OSError, UnicodeDecodeError):
        return ""  # the check that loads it says so
