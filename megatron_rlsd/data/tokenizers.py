"""What the program needs of a tokenizer, and the choice of one by configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data.chat_template import NO_OPTIONS, ChatTemplate
from megatron_rlsd.data.hf_files import TOKENIZER_FILE
from megatron_rlsd.data.hf_tokenizer import EXACT_CLASS, HFTokenizer
from megatron_rlsd.data.probes import check_template
from megatron_rlsd.data.sentencepiece_tokenizer import (
    MADE_FROM,
    MODEL_FILE,
    SentencePieceTokenizer,
)
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object
from megatron_rlsd.runtime.warn import warn

_WITHOUT_TEMPLATE = TokenizerConfig(chat_template="{{ messages[0].content }}")


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are plain ints in [0, vocab_size).

    Only a chat template writes control tokens: their names in messages, and in text that is
    encoded, stay text.
    """

    template: ChatTemplate

    eos_token_id: int
    end_of_turn_id: int
    """Ends an assistant turn in the chat template: the last token of a supervised target."""
    stop_token_ids: tuple[int, ...]
    """Generation ends at any of these: end of turn, eos, and what generation_config.json adds."""
    pad_token_id: int
    bos_token_id: int | None
    vocab_size: int
    special_names: frozenset[str]
    """Names of the tokens that ``decode`` leaves out."""

    def encode(self, text: str) -> list[int]:
        """Plain text to ids: nothing is added, and the name of a special token is only text."""

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Ids to text; ids beyond the vocabulary are left out, and special tokens unless
        ``special``: then their names are written."""

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Chat messages (role, content) to ids; UserError if the template refuses them.

        options: variables of the template, over those of the configuration.
        """

    def after_turn(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """What the chat template puts after an assistant's content when ``messages`` follow, to
        ids: the end of the turn, the messages, the next generation prompt. UserError if the
        template refuses them."""

    def save(self, folder: Path) -> None:
        """Write everything that load_tokenizer, and others, need into ``folder``: the same ids,
        the chat template in use, and no reference to code."""

    def is_special(self, token_id: int) -> bool:
        """Is it a control token?"""


def load_tokenizer(config: TokenizerConfig, default_path: str | Path) -> Tokenizer:
    """The tokenizer at ``config.path``, or at ``default_path`` (the model folder) without one.

    ``auto`` takes sentencepiece for a .model file and for a folder that has tokenizer.model and no
    tokenizer.json or tokenizer_config.json of another's making. Raises UserError if there is no
    tokenizer, or no chat template that shows a question.
    """
    path = Path(config.path or default_path)
    key = "tokenizer.path" if config.path else "model.hf_path, as tokenizer.path is not set"
    if not path.exists():
        raise UserError(f"tokenizer {path} ({key}) does not exist")
    tokenizer = _opened(config, path, key)
    check_template(tokenizer)
    if tokenizer.template.writes_the_date:
        warn(
            "the chat template writes the date of the day: here it is tokenizer.template_date=%s "
            "in every prompt, so that prompts stay the same; servers of an export write their own",
            config.template_date,
        )
    return tokenizer


def warn_of_other_ids(tokenizer: Tokenizer) -> None:
    """Warn where AutoTokenizer, which other programs use, gives other ids than tokenizer.json."""
    if isinstance(tokenizer, HFTokenizer) and (what := tokenizer.difference_from_transformers()):
        warn(
            "AutoTokenizer of transformers %s reads %s otherwise than its tokenizer.json says "
            "(tokenizer_class=%s): %s. The ids here are those of tokenizer.json; a program that "
            "loads an export by AutoTokenizer may have others, by %s it has the same",
            *(version("transformers"), tokenizer.folder, tokenizer.named_class, what, EXACT_CLASS),
        )


def warn_of_other_ids_in(folder: Path) -> None:
    """As ``warn_of_other_ids``, of a folder that may have no chat template, or no tokenizer."""
    if (folder / TOKENIZER_FILE).exists():
        warn_of_other_ids(HFTokenizer(folder, _WITHOUT_TEMPLATE))


def plain_encoder(folder: Path) -> Callable[[str], list[int]]:
    """Text to ids by the tokenizer of a folder, with or without a chat template.

    Raises UserError if it has no tokenizer.
    """
    return _opened(_WITHOUT_TEMPLATE, folder, str(folder)).encode


def _opened(config: TokenizerConfig, path: Path, key: str) -> Tokenizer:
    kind = config.kind
    if kind == "auto":
        kind = "sentencepiece" if _is_bare_sentencepiece(path) else "hf"
    if kind == "hf":
        return HFTokenizer(path, config)
    model_file = path / MODEL_FILE if path.is_dir() else path
    if not model_file.is_file():
        raise UserError(f"tokenizer folder {path} ({key}) has no {MODEL_FILE}")
    return SentencePieceTokenizer(model_file, config)


def _is_bare_sentencepiece(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".model"
    settings = path / "tokenizer_config.json"
    if not (path / MODEL_FILE).is_file():
        return False
    if settings.exists():
        return read_json_object(settings).get(MADE_FROM) == MODEL_FILE
    return not (path / "tokenizer.json").exists()
