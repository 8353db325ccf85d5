"""The turns of a conversation: the model's as text, and as token ids what stands between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlsd.data.chat_template import NO_OPTIONS
from megatron_rlsd.data.tokenizers import Tokenizer
from megatron_rlsd.runtime.errors import UserError


class ChatTurns:
    """Renders an environment's messages as the chat template does, without the turns before them.

    A model's turn is never made into text and back: other tokens may spell the same text, and the
    policy would learn from tokens that it did not sample.
    """

    def __init__(self, tokenizer: Tokenizer, role: str) -> None:
        """Raises UserError if the chat template refuses messages of this role, or hides them.

        role: of the messages, ``user`` or ``tool``.
        """
        self._tokenizer, self._role = tokenizer, role
        closing = tokenizer.after_turn([], add_generation_prompt=False)
        end = tokenizer.end_of_turn_id
        self._ending = closing[: closing.index(end) + 1] if end in closing else []
        shown = [tokenizer.after_turn([{"role": role, "content": text}]) for text in ("1", "2")]
        if shown[0] == shown[1] or shown[0][: len(self._ending)] != self._ending:
            raise UserError(
                f"the chat template does not show messages of role {role!r} after an assistant's; "
                "set environment.role, or tokenizer.chat_template"
            )

    def between(
        self, turn_ids: list[int], text: str, options: Mapping[str, Any] = NO_OPTIONS
    ) -> list[int]:
        """The ids from the end of a turn to the beginning of the next, with ``text`` as message.

        options: variables of the chat template, over those of the configuration.

        turn_ids: the model's turn; where it ended by itself, its end-of-turn token is not repeated.
        """
        return self.between_turns(turn_ids, [{"role": self._role, "content": text}], options)

    def between_turns(
        self,
        turn_ids: list[int],
        messages: Sequence[dict[str, str]],
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """As ``between``, with any messages after the turn.

        Raises UserError if the chat template refuses them.
        """
        ids = self._tokenizer.after_turn(list(messages), options=options)
        ended = bool(turn_ids) and turn_ids[-1] == self._tokenizer.end_of_turn_id
        return ids[len(self._ending) :] if ended else ids


class TurnText:
    """Decodes a turn of the model, without and with what is not in its response's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._prefills = tokenizer, dict[str, str]()
        self._prefill(NO_OPTIONS)

    def of(self, ids: list[int], options: Mapping[str, Any] = NO_OPTIONS) -> tuple[str, str | None]:
        """``RewardInput.response`` and ``turn`` of these tokens; the prompt had these options."""
        response = self._tokenizer.decode(ids)
        if ids and ids[-1] in self._tokenizer.stop_token_ids:
            ids = ids[:-1]
        turn = self._prefill(options) + self._tokenizer.decode(ids, special=True)
        return response, None if turn == response else turn

    def _prefill(self, options: Mapping[str, Any]) -> str:
        key = repr(sorted(options.items()))
        if key not in self._prefills:
            self._prefills[key] = self._tokenizer.template.prefill(options)
        return self._prefills[key]
