"""A Hugging Face tokenizer folder, through transformers; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.errors import UserError

TURN = "\ue000TURN\ue000"
"""Stands for an assistant's content, wherever only what follows it is asked for."""


class HFTokenizer:
    """Wraps AutoTokenizer; see ``tokenizers.Tokenizer`` for what the methods promise.

    The chat template is applied as transformers does it: the name of a special token inside a
    message becomes that token. ``encode`` is stricter, there it stays text.

    Raises UserError if the folder does not load, or has no eos token or chat template.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"no HF tokenizer can be loaded from {folder}: {error}") from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {folder} has no chat template; set tokenizer.chat_template"
            )
        stops = _generation_stops(folder)
        if self._tokenizer.eos_token_id is None and not stops:
            raise UserError(f"the tokenizer in {folder} has no eos token")
        eos = self._tokenizer.eos_token_id
        self.eos_token_id: int = stops[0] if eos is None else eos
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_token_ids = tuple(dict.fromkeys([self.end_of_turn_id, self.eos_token_id, *stops]))
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        # Added tokens may leave gaps, so the number of tokens is no bound on the ids.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            [i for i in ids if i < self.vocab_size],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        return self._render(messages, tokenize=True, add_generation_prompt=add_generation_prompt)

    def after_turn(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": TURN}]
        text = self._render(
            [*turns, *messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        _, found, rest = text.partition(TURN)
        if not found:
            raise UserError("the chat template does not show what the assistant said")
        # As the template's own text is read: markers are special tokens.
        return self._tokenizer.encode(rest, add_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; generation_config.json belongs to the model and is not."""
        self._tokenizer.save_pretrained(folder)

    def _render(self, messages: list[dict[str, str]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, return_dict=False, **options)
        except (TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise UserError(
                f"the chat template refuses messages of roles {roles}: {error}"
            ) from error

    def _find_end_of_turn(self) -> int:
        """The first special token after an assistant's content, or eos if the template has none."""
        content = "CONTENT"
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": content}]
        _, found, closing = self._render(turns, tokenize=False).rpartition(content)
        if not found:
            return self.eos_token_id
        special = set(self._tokenizer.all_special_ids) | {
            token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.special
        }
        ids = self._tokenizer.encode(closing, add_special_tokens=False)
        return next((i for i in ids if i in special), self.eos_token_id)


def _generation_stops(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json (one id or several), where there is such a file."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        stops = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from error
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list) else [stops]
