"""Control tokens that only a chat template may write: in a message their names stay text.

Messages are marked before a template sees them: each name of a control token in them is put between
two private characters. A template may test for the name, split at it and trim around it as before.
What it renders is cut at the marks: the parts between are encoded as ever, the names as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_rlsd.data.chat_template import Messages

START, END = "\U000f5a1e", "\U000f5a1f"
"""Characters for private use; what a message has of them is dropped."""

Encode = Callable[[str], list[int]]


class ControlText:
    """Marks messages, and encodes what a template makes of marked ones."""

    def __init__(
        self,
        special: Iterable[str],
        structural: Iterable[str],
        ids: Mapping[str, int],
        encode: Encode,
        encode_as_text: Encode,
    ) -> None:
        """
        special: names that stay text in every message. structural: names that stay text in all but
        the assistant's, where they are the model's own words (``<think>``, ``<tool_call>``).
        ids: name -> token id of every added token. encode: text in which names are tokens;
        encode_as_text: text in which the special ones are not.
        """
        self._special = _any_of(special)
        self._all = _any_of([*special, *structural])
        self._marks = re.compile(f"{START}({self._all.pattern}){END}|[{START}{END}]")
        self._ids, self._encode, self._encode_as_text = ids, encode, encode_as_text

    def mark(self, messages: Messages) -> Messages:
        return [self._marked(message) for message in messages]

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a template's text: names outside marks are control tokens."""
        first, *rest = self._marks.split(rendered)
        ids = self._encode(first)
        # The first of every pair is a marked name, or None for a mark that was torn off its name.
        for name, text in zip(rest[::2], rest[1::2], strict=True):
            if name:
                ids += self._name_as_text(name)
            if text:
                ids += self._inside(self._encode, text)
        return ids

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        role = message["role"]
        found = {**message, "content": self._mark(message["content"], role)}
        if "tool_calls" in message:
            found["tool_calls"] = self._mark_all(message["tool_calls"], role)
        return found

    def _mark_all(self, data: Any, role: str) -> Any:
        """Every text of JSON data marked."""
        if isinstance(data, str):
            return self._mark(data, role)
        if isinstance(data, list):
            return [self._mark_all(each, role) for each in data]
        if isinstance(data, dict):
            return {self._mark(k, role): self._mark_all(v, role) for k, v in data.items()}
        return data

    def _mark(self, content: str, role: str) -> str:
        names = self._special if role == "assistant" else self._all
        content = content.replace(START, "").replace(END, "")
        return names.sub(f"{START}\\g<0>{END}", content)

    def _name_as_text(self, name: str) -> list[int]:
        ids = self._inside(self._encode_as_text, name)
        if self._ids[name] not in ids:
            return ids
        # A token that no tokenizer setting keeps from being matched: it does not match its halves.
        return [
            *self._inside(self._encode_as_text, name[:1]),
            *self._inside(self._encode_as_text, name[1:]),
        ]

    def _inside(self, encode: Encode, text: str) -> list[int]:
        """Ids of text that something stands before: some tokenizers put a space before a text."""
        lead = encode("\n")
        ids = encode(f"\n{text}")
        return ids[len(lead) :] if ids[: len(lead)] == lead else encode(text)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any name, the longest first; (?!) matches nothing."""
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
