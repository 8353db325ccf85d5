"""The tokenizer files of a Hugging Face folder, read and checked; no code of the folder is run.

Ids are those of tokenizer.json. transformers' AutoTokenizer may build a tokenizer anew by the class
that tokenizer_config.json or the model's type names, with other rules than the file's. It is used
for folders without a tokenizer.json alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megatron_rlsd.data.chat_template import MAX_TEMPLATE_BYTES
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import MAX_JSON_BYTES, read_json_object
from megatron_rlsd.runtime.small_files import read_text

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
WAY_OUT = "give tokenizer.path a folder with a tokenizer.json, as save_pretrained writes it"


@dataclass(frozen=True)
class HFFiles:
    """What a folder says about its tokenizer."""

    backend: Tokenizer
    special_tokens: dict[str, str]
    """Name (bos_token) -> text, of those that have an id: a template's variables."""
    templates: dict[str, str]
    """Name -> chat template; ``default`` is the one used without a name."""
    settings: dict[str, Any]
    """tokenizer_config.json; empty where there is none."""
    from_file: bool
    """Is there a tokenizer.json?"""


def read_hf_files(folder: Path) -> HFFiles:
    """Raises UserError that names the file, and the key in it, that is not as expected."""
    settings_path = folder / CONFIG_FILE
    settings = read_json_object(settings_path) if settings_path.exists() else {}
    templates = _templates(folder, settings)
    if (folder / TOKENIZER_FILE).exists():
        backend = _backend(folder / TOKENIZER_FILE)
        named = _named_tokens(folder, settings)
        _add_declared(backend, settings, settings_path)
        special = _in_vocabulary(backend, named, settings_path)
        return HFFiles(backend, special, templates, settings, from_file=True)
    backend, special = _converted(folder, settings)
    return HFFiles(backend, special, templates, settings, from_file=False)


def _backend(path: Path) -> Tokenizer:
    # Before the library reads it: a size that ends, and an error in words.
    content = read_text(path, MAX_JSON_BYTES)
    try:
        backend = Tokenizer.from_str(content)
        backend.no_truncation()
        backend.no_padding()
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic in Rust is raised as
            raise
        raise UserError(f"{path} is not a tokenizer: {error}") from None
    return backend


def _converted(folder: Path, settings: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """By transformers, from vocab.json and merges.txt, or from a model of sentencepiece."""
    from transformers import AutoTokenizer  # slow to import

    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        backend = found.backend_tokenizer
    except Exception as error:
        own_code = "; its tokenizer is code, which is never run" if "auto_map" in settings else ""
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"no HF tokenizer can be loaded from {folder}{own_code}: {text[0]}; {WAY_OUT}"
        ) from error
    special = found.special_tokens_map
    return backend, {name: text for name, text in special.items() if isinstance(text, str)}


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files go before tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    if (folder / TEMPLATE_FILE).exists():
        found["default"] = read_text(folder / TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = read_text(path, MAX_TEMPLATE_BYTES)
    given = settings.get("chat_template")
    if found or given is None:
        return found
    path = folder / CONFIG_FILE
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, dict) and all(isinstance(t, str) for t in given.values()):
        found.update(given)
    elif isinstance(given, list) and all(_is_named_template(each) for each in given):
        found.update({each["name"]: each["template"] for each in given})
    else:
        raise UserError(
            f"{path}: chat_template must be a text or a list of objects with name and template, "
            f"got {_shown(given)}"
        )
    for name, text in found.items():
        if len(text) > MAX_TEMPLATE_BYTES:
            raise UserError(
                f"{path}: the chat template {name!r} has {len(text):,} characters, more than the "
                f"{MAX_TEMPLATE_BYTES:,} allowed"
            )
    return found


def _is_named_template(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("name", "template")
    )


def _named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Name -> token, or tokens; special_tokens_map.json is read where the format is the old one."""
    found = dict(_tokens_in(settings, folder / CONFIG_FILE))
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and legacy.exists():
        found.update(_tokens_in(read_json_object(legacy), legacy))
    return found


def _tokens_in(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str | list[str]]]:
    for key, value in content.items():
        if key in LISTS and isinstance(value, list):
            yield key, [_token(each, path, key) for each in value]
        elif key in LISTS and isinstance(value, dict):
            for name, each in value.items():
                yield name, _token(each, path, f"{key}.{name}")
        elif key in LISTS and value is not None:
            raise UserError(f"{path}: {key} must be a list of tokens, got {_shown(value)}")
        elif key in NAMED and value is not None:
            yield key, _token(value, path, key)
        elif key.endswith("_token") and isinstance(value, str):
            yield key, value


def _token(value: Any, path: Path, key: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise UserError(
            f"{path}: {key} must be a token's text, or an object with its content, got "
            f"{_shown(value)}"
        )
    return text


def _add_declared(backend: Tokenizer, settings: Mapping[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json has; their ids there must be those they get."""
    declared = settings.get("added_tokens_decoder")
    if declared is None:
        return
    if not isinstance(declared, dict):
        raise UserError(f"{path}: added_tokens_decoder must be an object, got {_shown(declared)}")
    for key in sorted(declared, key=lambda text: int(text) if text.isdecimal() else -1):
        text = _token(declared[key], path, f"added_tokens_decoder.{key}")
        if not key.isdecimal():
            raise UserError(f"{path}: added_tokens_decoder has {key!r} in place of a token id")
        if backend.token_to_id(text) is None:
            special = isinstance(declared[key], dict) and bool(declared[key].get("special"))
            added = AddedToken(text, special=special, normalized=False)
            (backend.add_special_tokens if special else backend.add_tokens)([added])
        if (found := backend.token_to_id(text)) != int(key):
            raise UserError(
                f"{path}: added_tokens_decoder gives {text!r} the id {key}, {TOKENIZER_FILE} gives "
                f"it {found}"
            )


def _in_vocabulary(
    backend: Tokenizer, named: Mapping[str, str | list[str]], path: Path
) -> dict[str, str]:
    """The named tokens that have an id; each is then matched as a special token."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    found: dict[str, str] = {}
    for name, value in named.items():
        for text in value if isinstance(value, list) else [value]:
            if backend.token_to_id(text) is None:
                if name in ("bos_token", "eos_token"):
                    raise UserError(f"{path}: {name}={text!r} is not a token of {TOKENIZER_FILE}")
                continue
            if text not in added:
                backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            if isinstance(value, str):
                found[name] = text
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
