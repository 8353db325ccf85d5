"""From a row as a file's columns are called to the fields that ``records`` knows."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from megatron_rlsd.config import FileSource
from megatron_rlsd.data.records import FIELDS, Malformed, shown
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import parse_json

Kind = Literal["text", "list", "object", "other"]
"""What a column holds, as far as a layout is told by it."""

NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio", "tools")
"""Columns of verl and TRL whose content would have to be part of the prompt."""


class Columns:
    """Finds the fields of a problem in the rows of one file or of several alike ones.

    A column that has no place in the layout is refused where the layout is our own, as in JSONL;
    verl's and TRL's other columns become entries of metadata, which reward functions read.
    """

    def __init__(self, source: FileSource, kinds: Mapping[str, Kind]) -> None:
        """kinds: the file's columns. Raises UserError for a column in ``source.columns`` or a
        layout that the file does not have."""
        self._path = Path(source.path)
        self.layout = _layout_of(kinds) if source.layout == "auto" else source.layout
        chosen = source.columns.model_dump(exclude_none=True)
        metadata = chosen.pop("metadata", None)
        self._entries = metadata if isinstance(metadata, list) else []
        self._objects = [metadata] if isinstance(metadata, str) else []
        self._fields: dict[str, str] = {}
        self._rest: list[str] = []
        self.as_they_are = self.layout == "own" and not chosen and metadata is None
        """Are the rows our own records already?"""
        self.unread: list[str] = []
        """Columns that no field is read from."""
        if not self.as_they_are:
            self._place(chosen, kinds)
        self.read = sorted(
            kinds if self.as_they_are else {_top(path, kinds) for path in self._all_paths()}
        )
        """Columns that have to be read."""

    def identity(self) -> Any:
        """JSON data from which it follows how a row becomes a problem; None: as it is."""
        if self.as_they_are:
            return None
        return [self._fields, self._objects, self._entries, self._rest]

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in one row of plain JSON data (and Decimals); Malformed where it has none."""
        if self.as_they_are:
            return dict(row)
        record = {field: _at(row, path) for field, path in self._fields.items()}
        if isinstance(record.get("prompt"), list):
            record["messages"] = record.pop("prompt")
        completion = record.pop("completion", None)
        if completion is not None:
            record["messages"] = [
                *_turns(record.pop("prompt", None) or record.get("messages"), "user"),
                *_turns(completion, "assistant"),
            ]
        record["metadata"] = self._metadata(row) or None
        return {field: value for field, value in record.items() if value is not None}

    def notes(self) -> list[str]:
        """What a user should see in the log."""
        notes = []
        if self.layout != "own":
            notes.append(f"{self._path}: read as the layout of {self.layout}")
        if self.unread:
            notes.append(f"{self._path}: columns not read: {', '.join(self.unread)}")
        return notes

    def _all_paths(self) -> Iterable[str]:
        return [*self._fields.values(), *self._objects, *self._entries, *self._rest]

    def _place(self, chosen: Mapping[str, str], kinds: Mapping[str, Kind]) -> None:
        for path in [*chosen.values(), *self._objects, *self._entries]:
            if _top(path, kinds) not in kinds:
                raise UserError(
                    f"{self._path} has no column {path!r}, which the source's columns name; it has "
                    f"{', '.join(kinds)}"
                )
        taken = {_top(path, kinds) for path in [*chosen.values(), *self._objects, *self._entries]}
        known = {
            field: paths
            for field, paths in _PLACES[self.layout].items()
            # prompt and messages are one thing: who names one has named the other.
            if field not in chosen and not {field, *chosen} >= {"prompt", "messages"}
        }
        self._fields = dict(chosen)
        for field, candidates in known.items():
            free = [path for path in candidates if _top(path, kinds) in kinds.keys() - taken]
            if free:
                self._fields[field] = free[0]
                taken.add(_top(free[0], kinds))
        if not self._objects and not self._entries:
            usual = ("metadata",) if self.layout == "own" else ("extra_info", "metadata")
            self._objects = [name for name in usual if name in kinds]
        # A field inside of extra_info may be named on its own: the object is metadata all the same.
        taken |= set(self._objects)
        others = [name for name in kinds if name not in taken]
        if self.layout == "own":
            self.unread = others
        else:
            self._rest = others

    def _metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for path in self._objects:
            value = _at(row, path)
            if isinstance(value, str) and value.strip():
                value = _parsed(value, path)
            if value is None or value == "":
                continue
            if not isinstance(value, dict):
                raise Malformed(f"metadata ({path}) must be an object, got {shown(value)}")
            metadata |= value
        for path in [*self._entries, *self._rest]:
            value = _at(row, path)
            if value is None:
                continue
            if path in NOT_TEXT and value:
                raise Malformed(
                    f"column {path} is not empty: prompts are text, and this would be left out of "
                    "them"
                )
            name = path.rpartition(".")[2] if path in self._entries else path
            if name in metadata and metadata[name] != value:
                raise Malformed(f"metadata has two values of {name!r}")
            metadata[name] = value
        return metadata


_OWN: dict[str, tuple[str, ...]] = {field: (field,) for field in FIELDS if field != "metadata"}
_PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "own": _OWN,
    "verl": {"prompt": ("prompt",), "answer": ("reward_model.ground_truth",)},
    "trl": {
        "prompt": ("prompt", "messages"),
        "completion": ("completion",),
        "answer": ("answer", "ground_truth", "solution"),
        "reference_solution": ("reference_solution", "solution"),
        "id": ("id",),
    },
}
"""Field -> the columns that it may stand in, the first that the file has."""


def plain(value: Any) -> Any:
    """A value of a column as JSON data; a Decimal stays one. Malformed for raw bytes."""
    if value is None or isinstance(value, str | int | float | Decimal):
        return value
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        raise Malformed(f"expected text, got {shown(value)}")
    return str(value)


def without_decimals(value: Any) -> Any:
    """The same with Decimals as their digits: metadata has to be JSON."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return {key: without_decimals(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_decimals(each) for each in value]
    return value


def _layout_of(kinds: Mapping[str, Kind]) -> str:
    prompt = kinds.get("prompt")
    if prompt == "list" and kinds.get("reward_model") == "object":
        return "verl"
    if prompt == "list" or (prompt is not None and "completion" in kinds):
        return "trl"
    return "own"


def _top(path: str, names: Collection[str]) -> str:
    """The column that a path begins in; one whose own name has a dot comes first."""
    return path if path in names else path.partition(".")[0]


def _at(row: Mapping[str, Any], path: str) -> Any:
    """What stands at the path; None where nothing does."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _turns(value: Any, role: str) -> list[Any]:
    """Messages of TRL's prompt or completion, which may be plain text."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise Malformed(f"prompt and completion must be text or messages, got {shown(value)}")


def _parsed(text: str, path: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise Malformed(f"metadata ({path}) is text that is not a JSON object: {error}") from None
