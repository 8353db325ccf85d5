"""A Hugging Face tokenizer folder: tokenizer.json, by the library of that name, and a template."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data.chat_template import NO_OPTIONS, ChatTemplate, Messages, template_from
from megatron_rlsd.data.control_text import ControlText
from megatron_rlsd.data.hf_files import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILE,
    read_hf_files,
)
from megatron_rlsd.data.probes import CONVERSATION, difference_from_transformers, probe_texts
from megatron_rlsd.data.stop_tokens import end_tokens
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.small_files import own_files

TURN = "TURN\ue000TURN"
"""Stands for an assistant's content, wherever only what follows it is asked for."""
COPIED = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt")  # fmt: skip
"""Files besides the template that make up a tokenizer."""
EXACT_CLASS = "PreTrainedTokenizerFast"
"""The tokenizer_class with which every transformers takes tokenizer.json as it is."""


class HFTokenizer:
    """See ``tokenizers.Tokenizer`` for what the methods promise.

    The name of a special token in a message, or in text given to ``encode``, stays text. So do in
    messages other than the assistant's the names of ordinary added tokens that the template uses.

    Raises UserError if the folder does not load, or has no eos token or chat template.
    """

    def __init__(self, folder: Path, config: TokenizerConfig | None = None) -> None:
        config = TokenizerConfig() if config is None else config
        self.folder, self._files = folder, read_hf_files(folder)
        self._backend = self._files.backend
        # What it matches is a setting of the library's object, and threads share that.
        self._lock = threading.Lock()
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        special = {token.content for token in added.values() if token.special}
        special.update(self._files.special_tokens.values())
        self._special = {self._added[name] for name in special if name in self._added}
        self.special_names = frozenset(t.content for t in added.values() if t.special)
        # Added tokens may leave gaps, so the number of tokens is not a bound on the ids.
        vocabulary = self._backend.get_vocab()
        self._check_ids(vocabulary)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self._own_template = self._files.templates.get("default")
        self.template = self._template(config)
        structural = [
            token.content
            for token in added.values()
            if not token.special and not token.content.isspace()
            and token.content in self.template.text
        ]  # fmt: skip
        self._text = ControlText(
            special & self._added.keys(), structural, self._added, self._encode, self.encode
        )
        stops = end_tokens(folder, self.vocab_size)
        eos = self._id_of("eos_token")
        if eos is None and not stops:
            raise UserError(f"the tokenizer in {folder} has no eos token")
        self.eos_token_id: int = stops[0] if eos is None else eos
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_token_ids = tuple(dict.fromkeys([self.end_of_turn_id, self.eos_token_id, *stops]))
        pad = self._id_of("pad_token")
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.bos_token_id = self._id_of("bos_token")

    def encode(self, text: str) -> list[int]:
        return self._encode(text, special_as_text=True)

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        return self._backend.decode(
            [i for i in ids if i < self.vocab_size], skip_special_tokens=not special
        )

    @property
    def named_class(self) -> str | None:
        """tokenizer_class of tokenizer_config.json."""
        named = self._files.settings.get("tokenizer_class")
        return named if isinstance(named, str) else None

    def difference_from_transformers(self, saved: Path | None = None) -> str:
        """Where AutoTokenizer reads this folder otherwise, in words; empty if it gives the same ids
        of short texts. ``saved``: a folder that ``save`` wrote; then of a conversation as well."""
        names = [name for name, number in self._added.items() if number in self._special]
        probes = {text: self._encode(text) for text in probe_texts(names)}
        conversation = None
        if saved is not None and not self.template.writes_the_date:
            try:
                conversation = self.apply_chat_template(list(CONVERSATION))
            except UserError:  # of roles: such a template has no conversations
                conversation = None
        return difference_from_transformers(saved or self.folder, probes, conversation)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        rendered = self.template.render(self._text.mark(messages), add_generation_prompt, options)
        return self._text.encode(rendered)

    def after_turn(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": TURN}]
        marked = [*turns, *self._text.mark(messages)]
        rendered = self.template.render(marked, add_generation_prompt, options)
        _, found, rest = rendered.partition(TURN)
        if not found:
            raise UserError("the chat template does not show what the assistant said")
        return self._text.encode(rest)

    def save(self, folder: Path) -> None:
        """tokenizer.json is copied, so that its ids stay; the template is the one in use, with
        ``chat_template_kwargs`` as defaults. No reference to code of the source folder is kept."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.folder):
            raise UserError(f"{folder} is the folder that the tokenizer was read from")
        for path in own_files(self.folder, COPIED):
            shutil.copyfile(path, folder / path.name)
        if not self._files.from_file:
            self._backend.save(str(folder / TOKENIZER_FILE))
        settings = dict(self._files.settings) | self._files.special_tokens
        settings.pop("auto_map", None)
        template = self.template.exported()
        if template == self._own_template:
            for path in own_files(self.folder, [TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*.jinja"]):
                target = folder / path.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        else:
            # Nothing may be left that goes before it.
            settings.pop("chat_template", None)
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        # Other classes have rules of their own, which differ by transformers' release.
        settings["tokenizer_class"] = EXACT_CLASS
        (folder / CONFIG_FILE).write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def _template(self, config: TokenizerConfig) -> ChatTemplate:
        named = self._files.templates
        if config.chat_template is not None:
            source = template_from(config.chat_template, named, str(self.folder))
        elif "default" in named:
            source = named["default"]
        elif named:
            raise UserError(
                f"{self.folder} has the chat templates {', '.join(sorted(named))} and no default; "
                "set tokenizer.chat_template to one of these names"
            )
        else:
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template; set tokenizer.chat_template"
            )
        return ChatTemplate(
            source, self._files.special_tokens, config.chat_template_kwargs, config.template_date
        )

    def _encode(self, text: str, special_as_text: bool = False) -> list[int]:
        with self._lock:
            self._backend.encode_special_tokens = special_as_text
            return self._backend.encode(text, add_special_tokens=False).ids

    def _check_ids(self, vocabulary: Mapping[str, int]) -> None:
        """Raise UserError if ordinary text could become an added token, by having its id."""
        added = {number: name for name, number in self._added.items()}
        for name, number in vocabulary.items():
            if added.get(number, name) != name:
                raise UserError(
                    f"{self.folder / TOKENIZER_FILE} gives the id {number} to {name!r} and to the "
                    f"added token {added[number]!r}: text would become that token"
                )

    def _id_of(self, name: str) -> int | None:
        text = self._files.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _find_end_of_turn(self) -> int:
        """The first special token after an assistant's content, or eos if the template has none."""
        content = "CONTENT"
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": content}]
        _, found, closing = self.template.render(turns, False).rpartition(content)
        ids = self._encode(closing) if found else []
        return next((i for i in ids if i in self._special), self.eos_token_id)
