"""A sentencepiece model with a Jinja chat template, and the training of a small one.

Markers are the pieces that give a chat its structure: control symbols, and user-defined symbols
that look like <...> or [...]. Only the chat template can produce them. The same characters inside
a message, or in text given to ``encode``, stay text: a question or a hint cannot end its own turn.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data.chat_template import (
    MAX_TEMPLATE_BYTES,
    NO_OPTIONS,
    ChatTemplate,
    template_from,
)
from megatron_rlsd.data.probes import CONVERSATION, TEXTS
from megatron_rlsd.data.stop_tokens import end_tokens
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.small_files import read_text

MODEL_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"
MADE_FROM = "made_from"
"""In tokenizer_config.json: the tokenizer.json beside it says the same for other programs."""

END_OF_TURN = "<|end|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SPACE_PIECE = "\u2581"
_LONGEST_SENTENCE_BYTES = 1 << 20


class SentencePieceTokenizer:
    """See ``tokenizers.Tokenizer`` for what the methods promise.

    Raises UserError if the model does not load, has no eos piece, or comes without a chat
    template (neither ``chat_template`` nor chat_template.jinja beside the model).
    """

    def __init__(self, model_file: Path, config: TokenizerConfig | None = None) -> None:
        config = TokenizerConfig() if config is None else config
        self._model_file = model_file
        self._converted: dict[str, str] | None = None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model_file} is not a sentencepiece model: {error}") from error
        if self._model.eos_id() < 0:
            raise UserError(f"{model_file} has no eos piece")
        self.vocab_size: int = self._model.vocab_size()
        self.eos_token_id: int = self._model.eos_id()
        pad = self._model.pad_id()
        self.pad_token_id: int = pad if pad >= 0 else self.eos_token_id
        bos = self._model.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.template = self._template(config)
        self._markers = self._find_markers()
        self.special_names = frozenset(self._markers)
        self._marker_pattern = re.compile(
            "|".join(sorted(map(re.escape, self._markers), key=len, reverse=True))
        )
        self._never_text = {*self._markers.values(), self._model.unk_id()}
        self._has_bytes = any(self._model.is_byte(i) for i in range(self.vocab_size))
        self.end_of_turn_id = self._find_end_of_turn()
        stops = end_tokens(model_file.parent, self.vocab_size)
        self.stop_token_ids = tuple(dict.fromkeys([self.end_of_turn_id, self.eos_token_id, *stops]))

    def encode(self, text: str) -> list[int]:
        # A user-defined marker would be matched anywhere in the text; cut in two, it is not.
        cuts = [match.start() + 1 for match in self._marker_pattern.finditer(text)]
        bounds = [0, *cuts, len(text)]
        ids: list[int] = []
        for start, end in pairwise(bounds):
            ids += self._encode_without_markers(text[start:end])
        return ids

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        if not special:
            return self._model.decode(
                [i for i in ids if i < self.vocab_size and i not in self._never_text]
            )
        names = {number: name for name, number in self._markers.items()}
        text, start = "", 0
        for at, number in enumerate(ids):
            if number in names:
                text += self.decode(ids[start:at]) + names[number]
                start = at + 1
        return text + self.decode(ids[start:])

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        text, guard = self._render(messages, add_generation_prompt, options)
        return [i for part in self._split(text, guard) for i in part]

    def after_turn(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        turn = _unused_character([self.template.source, *(m["content"] for m in messages)])
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": turn}]
        text, guard = self._render([*turns, *messages], add_generation_prompt, options)
        _, found, rest = text.partition(turn)
        if not found:
            raise UserError("the chat template does not show what the assistant said")
        return [i for part in self._split(rest, guard) for i in part]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / MODEL_FILE
        if not target.exists() or not target.samefile(self._model_file):
            shutil.copyfile(self._model_file, target)
        (folder / TEMPLATE_FILE).write_text(self.template.exported(), encoding="utf-8")
        self._save_for_others(folder)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._markers.values()

    def _save_for_others(self, folder: Path) -> None:
        """Write tokenizer.json, which transformers and engines read, if it gives the same ids."""
        if self._converted is None:
            self._converted = self._convert(folder)
        for name, content in self._converted.items():
            (folder / name).write_text(content, encoding="utf-8")

    def _convert(self, folder: Path) -> dict[str, str]:
        """Name of a file -> its content; empty if transformers makes another tokenizer of it."""
        from transformers import PreTrainedTokenizerFast  # slow to import

        names = {"eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        if self.bos_token_id is not None:
            names["bos_token"] = self.bos_token_id
        special = {name: self._model.id_to_piece(i) for name, i in names.items()}
        try:
            converted = PreTrainedTokenizerFast.from_pretrained(
                folder, local_files_only=True, **special
            )
            same = all(
                converted.encode(text, add_special_tokens=False) == self.encode(text)
                for text in TEXTS
            ) and converted.apply_chat_template(
                list(CONVERSATION), add_generation_prompt=True, return_dict=False
            ) == self.apply_chat_template(list(CONVERSATION))
        except Exception:  # a model of a kind that it does not convert, a template it refuses
            same = False
        if not same:
            return {}
        settings = {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            MADE_FROM: MODEL_FILE,
        }
        return {
            "tokenizer.json": converted.backend_tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }

    def _template(self, config: TokenizerConfig) -> ChatTemplate:
        file = self._model_file.with_name(TEMPLATE_FILE)
        if config.chat_template is not None:
            source = template_from(config.chat_template, {}, str(self._model_file))
        elif file.exists():
            source = read_text(file, MAX_TEMPLATE_BYTES)
        else:
            raise UserError(
                f"{self._model_file} comes without a chat template: set tokenizer.chat_template, "
                f"or put {TEMPLATE_FILE} beside it"
            )
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        texts = {n: "" if i is None else self._model.id_to_piece(i) for n, i in ids.items()}
        return ChatTemplate(source, texts, config.chat_template_kwargs, config.template_date)

    def _render(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool,
        options: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The rendered text and the guard character in it."""
        # The contents carry a private character inside whatever could be read as a marker. It
        # survives anything a template does to them (trim, concatenation) and is taken out again
        # once the template's own markers are known.
        guard = _unused_character([self.template.source, *(m["content"] for m in messages)])
        guarded = [{**m, "content": self._guard(m["content"], guard)} for m in messages]
        text = self.template.render(guarded, add_generation_prompt, options)
        return text, guard

    def _split(self, text: str, guard: str) -> Iterator[list[int]]:
        """Ids of rendered text: one per marker, and those of the plain text between markers."""
        start = 0
        for match in self._marker_pattern.finditer(text):
            yield self.encode(text[start : match.start()].replace(guard, ""))
            yield [self._markers[match.group()]]
            start = match.end()
        yield self.encode(text[start:].replace(guard, ""))

    def _guard(self, content: str, guard: str) -> str:
        # After every character that opens a marker, so that none can form across the end of the
        # content either.
        for opening in {marker[0] for marker in self._markers}:
            content = content.replace(opening, opening + guard)
        return content

    def _encode_without_markers(self, text: str) -> list[int]:
        # Inside the model U+2581 stands for the space; the character itself goes in as bytes.
        if _SPACE_PIECE not in text or not self._has_bytes:
            return self._model.encode(text)
        as_bytes = [
            self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_PIECE.encode("utf-8")
        ]
        first, *others = text.split(_SPACE_PIECE)
        ids = list(self._model.encode(first))
        for part in others:
            ids += as_bytes + self._model.encode(part)
        return ids

    def _find_markers(self) -> dict[str, int]:
        """Text of each marker to its id; user-defined pieces are the ones ``encode`` matches."""
        markers = {}
        for i in range(self.vocab_size):
            piece = self._model.id_to_piece(i)
            bracketed = re.fullmatch(r"<.+>|\[.+\]", piece) is not None
            user_defined = (
                bracketed
                and not self._model.is_byte(i)
                and not self._model.is_unknown(i)
                and piece in self._model.encode(piece, out_type=str)
            )
            if self._model.is_control(i) or user_defined:
                markers[piece] = i
        return markers

    def _find_end_of_turn(self) -> int:
        """The first marker after an assistant's content, or eos if the template has none."""
        content = self.encode("CONTENT")
        ids = self.apply_chat_template(
            [{"role": "user", "content": "."}, {"role": "assistant", "content": "CONTENT"}],
            add_generation_prompt=False,
        )
        ends = [
            at + len(content) for at in range(len(ids)) if ids[at : at + len(content)] == content
        ]
        closing = ids[ends[-1] :] if ends else []
        return next((i for i in closing if i in self._markers.values()), self.eos_token_id)


def train_sentencepiece(
    texts: Iterable[str],
    out_dir: Path,
    vocab_size: int,
    markers: Sequence[str] = ROLE_MARKERS,
    end_of_turn: str = END_OF_TURN,
    chat_template: str = DEFAULT_CHAT_TEMPLATE,
    phrase_pieces: bool = False,
) -> SentencePieceTokenizer:
    """Train a byte-pair model that gives any text back exactly, and save it with its template.

    Digits and newlines are single tokens, unknown characters become bytes, and nothing is
    normalised. With ``phrase_pieces`` a piece may span words, which makes recurring phrases short.
    ``end_of_turn`` is the eos piece; ``markers`` are the other control symbols of the
    template. The model has at most ``vocab_size`` pieces, fewer if the texts do not give that many.
    Raises UserError if training fails, for instance because ``vocab_size`` cannot hold the 256
    bytes and the characters of the texts.
    """
    # The trainer drops any text that holds a tab, without a word.
    lines = (line for text in texts for line in re.split(r"[\n\t]", text) if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            split_by_whitespace=not phrase_pieces,
            max_sentencepiece_length=100 if phrase_pieces else 16,
            required_chars="0123456789",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=_LONGEST_SENTENCE_BYTES,
            pad_id=0,
            pad_piece="<pad>",
            unk_id=1,
            unk_piece="<unk>",
            bos_id=-1,
            eos_id=2,
            eos_piece=end_of_turn,
            control_symbols=list(markers),
            user_defined_symbols=["\n"],
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot train a sentencepiece model of {vocab_size} pieces on these texts: {error}"
        ) from error
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MODEL_FILE).write_bytes(model.getvalue())
    (out_dir / TEMPLATE_FILE).write_text(chat_template)
    return SentencePieceTokenizer(out_dir / MODEL_FILE)


def _unused_character(texts: list[str]) -> str:
    """A private-use character that none of the texts holds."""
    used = set().union(*texts)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)
