"""Short texts that show what a tokenizer and its chat template do, for checks at every start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rlsd.runtime.errors import UserError

TEXTS = (
    "0123456789 12 345 6789 1,234,567.89 3.14e-5 v2.0",
    " one  two   three\tfour\t\tfive ",
    "line\nline\n\nline\r\n  indented\n\n\n",
    "It's we'll I'M don't WE'VE 'quoted'",
    "def f(x):\n    return x**2 + {'a': [1, 2]}  # done\n",
    "é漢字かな 한국어 🙂👩‍👩‍👧 ½ ﬁ e\u0301 Ω \u00a0\u2003 x²",
    "$\\frac{1}{2}$ \\boxed{42} <b>&amp;</b> a_b-c/d\\e",
)
"""Digits, spaces, line breaks, apostrophes, code, other scripts, mathematics: where splitting rules
differ."""
AFTER_SPECIAL = ("word", " word", "\nword", "123", "  ", "é")
"""Texts directly behind a special token, where some rules add or take a space."""
QUESTION = 'Is 17 + 25 < 43 & "x" odd?\n\nSay why.'
CONVERSATION = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "No: 42 is even."},
    {"role": "user", "content": "And 2 + 2?"},
)


class Chat(Protocol):
    """The part of ``tokenizers.Tokenizer`` that the checks use."""

    def decode(self, ids: list[int], /) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]: ...


def check_template(tokenizer: Chat) -> None:
    """Raise UserError for a template that hides the question, or which leaves no room for an
    answer."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages)
    shown = tokenizer.decode(prompt)
    if _letters(QUESTION) not in _letters(shown):
        raise UserError(
            f"the chat template drops the user's message: of {QUESTION!r} it makes {shown!r}; set "
            "tokenizer.chat_template to one that shows messages whose content is a text"
        )
    if not prompt:
        raise UserError("the chat template gives an empty prompt")


def check_system(tokenizer: Chat, system: str) -> None:
    """Raise UserError for a template that hides ``prompts.system``."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
    shown = tokenizer.decode(tokenizer.apply_chat_template(messages))
    if _letters(system) not in _letters(shown):
        raise UserError(
            f"the chat template drops prompts.system={system[:60]!r}; put it into "
            "prompts.format_instruction, or set tokenizer.chat_template"
        )


def difference_from_transformers(
    folder: Path, probes: Mapping[str, list[int]], conversation: list[int] | None
) -> str:
    """Where AutoTokenizer reads ``folder`` otherwise, in words; empty: nowhere.

    probes: text -> the ids that it should give; conversation: those of ``CONVERSATION``.
    """
    from transformers import AutoTokenizer  # slow to import

    try:
        theirs: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        return f"it cannot load the folder: {error}"
    for text, wanted in probes.items():
        if (got := theirs.encode(text, add_special_tokens=False)) != wanted:
            return f"of {text!r} it makes {got} in place of {wanted}"
    if conversation is None:
        return ""
    try:
        got = theirs.apply_chat_template(
            list(CONVERSATION), add_generation_prompt=True, return_dict=False
        )
    except Exception as error:
        return f"it cannot render a conversation: {error}"
    return (
        ""
        if got == conversation
        else f"of a conversation it makes {got} in place of " + (f"{conversation}")
    )


def probe_texts(special_names: Sequence[str]) -> list[str]:
    """``TEXTS``, and texts behind some of the tokenizer's own special tokens."""
    return [*TEXTS, *(name + text for name in special_names[:4] for text in AFTER_SPECIAL)]


def _letters(text: str) -> str:
    """What is left if spaces, and cases, which some tokenizers change, do not count."""
    return "".join(text.casefold().split())
