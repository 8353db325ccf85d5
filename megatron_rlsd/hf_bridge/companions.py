"""What a model's folder holds besides weights, and how it goes along to another folder.

Nothing that is copied leads out of the source folder, and no reference to code is left dangling.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlsd.runtime.json_text import read_json_object
from megatron_rlsd.runtime.small_files import own_files, read_text

COPIED_FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Copied unchanged, but for references to code."""
SETTINGS = "tokenizer_config.json"
MAX_CODE_BYTES = 2**22


def companion_files(source: Path) -> list[Path]:
    """The files of ``source`` that go along. Raises UserError as ``small_files.own_files`` does."""
    settings = source / SETTINGS
    return own_files(source, [*COPIED_FILES, *(_code(settings) if _needs_code(source) else [])])


def copy_companions(source: Path, folder: Path) -> None:
    """Copy ``companion_files``.

    Code is copied for a tokenizer that has no other form, with the files that it imports; other
    references to code (``auto_map``) are left out, as the code is.
    """
    for path in companion_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if (folder / SETTINGS).is_file() and not _needs_code(source):
        settings = read_json_object(folder / SETTINGS)
        if "auto_map" in settings:
            write_json(folder / SETTINGS, without_code(settings))


def copy_model_files(source: Path, folder: Path) -> None:
    """A new folder of everything that ``source`` has besides weights."""
    folder.mkdir()
    write_json(folder / "config.json", without_code(read_json_object(source / "config.json")))
    copy_companions(source, folder)


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that refers to no Python file of its folder."""
    return {key: value for key, value in config.items() if key != "auto_map"}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _needs_code(source: Path) -> bool:
    """Is the tokenizer code of the folder, and nothing that a library knows?"""
    settings = source / SETTINGS
    if (source / "tokenizer.json").exists() or not settings.exists():
        return False
    return "auto_map" in read_json_object(settings)


def _code(settings: Path) -> Iterator[str]:
    """Names of the Python files that ``auto_map`` names, and of those that they import."""
    named = re.findall(r'"(\w+)\.\w+"', json.dumps(read_json_object(settings)["auto_map"]))
    seen: set[str] = set()
    while named:
        name = named.pop()
        path = settings.with_name(f"{name}.py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        yield path.name
        named += re.findall(r"^\s*from \.(\w+) import", read_text(path, MAX_CODE_BYTES), re.M)
