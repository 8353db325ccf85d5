"""Does a folder's tokenizer fit the model's embedding? Read from its files, without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_token_ids(folder: str | Path, vocab_size: int) -> None:
    """Raise UserError if some token id has no row in an embedding of ``vocab_size`` rows.

    Looks at tokenizer.json, tokenizer.model (sentencepiece), added_tokens.json and the special ids
    in generation_config.json. A folder without a tokenizer passes.
    """
    folder = Path(folder)
    problems = []
    for file, largest in _largest_ids(folder):
        if largest >= vocab_size:
            problems.append(f"{file} has token id {largest}")
    generation = folder / "generation_config.json"
    for key, value in read_json_object(generation).items() if generation.is_file() else ():
        ids = value if isinstance(value, list) else [value]
        if key in _SPECIAL and any(type(i) is int and i >= vocab_size for i in ids):
            problems.append(f"{generation.name} has {key}={value}")
    if problems:
        raise UserError(
            f"the tokenizer in {folder} does not fit the embedding of {vocab_size} rows: "
            + "; ".join(problems)
        )


def _largest_ids(folder: Path) -> list[tuple[str, int]]:
    found: list[tuple[str, Sequence[int]]] = []
    whole, added, pieces = (
        folder / name for name in ("tokenizer.json", "added_tokens.json", "tokenizer.model")
    )
    if whole.is_file():
        content = read_json_object(whole)
        ids = [token["id"] for token in content.get("added_tokens") or []]
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        found.append((whole.name, ids))
    if added.is_file():
        found.append((added.name, list(read_json_object(added).values())))
    if pieces.is_file() and not whole.is_file():
        found.append((pieces.name, range(_sentencepiece_size(pieces))))
    try:
        return [(name, max(ids)) for name, ids in found if len(ids)]
    except TypeError as error:
        raise UserError(f"{folder}: a token id is not a number: {error}") from error


def _sentencepiece_size(path: Path) -> int:
    import sentencepiece  # slow to import and rarely needed

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model: {error}") from error
