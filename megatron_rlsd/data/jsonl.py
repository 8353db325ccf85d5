"""Problems from a JSONL file: one object a line; ``records`` says what it may hold.

Every line is checked when the file is opened. Only byte offsets stay in memory; a problem is read
again when it is drawn.
"""

from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_rlsd.config import JsonlSource
from megatron_rlsd.data.columns import Columns, Kind
from megatron_rlsd.data.digest import DIGITS, digest_of
from megatron_rlsd.data.intake import Intake
from megatron_rlsd.data.records import Malformed, problem_of, shown
from megatron_rlsd.data.seen_files import SeenFiles
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import parse_json
from megatron_rlsd.types import Problem

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonlProblems:
    """The problems of one file in its order; blank lines do not count.

    Raises UserError if the file is missing or holds no usable line, and with on_malformed=stop at
    the first malformed line, by FILE:LINE and what was expected there.
    """

    def __init__(self, source: JsonlSource) -> None:
        self._path = Path(source.path)
        self.name = source.name or self._path.stem
        if not self._path.is_file():
            raise UserError(f"data file {self._path} does not exist or is not a file")
        skip = source.on_malformed == "skip"
        self._intake = Intake(self._path, lambda n: f"{self._path}:{n}", skip_malformed=skip)
        self._seen = SeenFiles([self._path])
        self._columns = self._columns_of(source)
        self._check_every_line()
        self._lines, self._offsets = self._intake.finish(lambda *row: self._read(*row).id)
        identity = self._columns.identity()
        self.digest = digest_of(self._seen.digest, identity) if identity else self._seen.digest
        """The digest of the file's content, and of how it is read: a reordered or edited one has
        another."""

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Problem:
        """Read one problem; UserError if the file was changed since it was opened."""
        line_number = self._lines[index]
        try:
            self._seen.check_unchanged()
            return self._read(line_number, self._offsets[index])
        except (OSError, Malformed) as error:
            raise UserError(
                f"{self._path}:{line_number}: the file was changed or removed while in use: {error}"
            ) from error

    def notes(self) -> list[str]:
        return [*self._columns.notes(), *self._intake.notes()]

    def _columns_of(self, source: JsonlSource) -> Columns:
        """By the first object; only a file that is not in our own layout is read for its others."""
        columns, kinds = None, dict[str, Kind]()
        with self._path.open("rb") as file:
            for line in file:
                try:
                    record = _parse(line) if line.strip() else {}
                except Malformed:  # told when every line is checked
                    continue
                kinds |= {name: _kind(v) for name, v in record.items() if v is not None}
                if columns is None and kinds:
                    columns = Columns(source, kinds)
                    if columns.as_they_are:
                        return columns
        # A file without lines has no columns to check; another message tells that it is empty.
        return Columns(source, kinds) if kinds else Columns(JsonlSource(kind="jsonl", path=""), {})

    def _check_every_line(self) -> None:
        offset, content = 0, hashlib.sha256()
        with self._path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                content.update(line)
                if not line.strip():
                    continue
                try:
                    problem = self._problem(line, line_number)
                except Malformed as error:
                    self._intake.refuse(line_number, error)
                else:
                    self._intake.keep(line_number, start, problem.id)
        self._seen.digest = content.hexdigest()[:DIGITS]

    def _read(self, line_number: int, offset: int) -> Problem:
        with self._path.open("rb") as file:
            file.seek(offset)
            return self._problem(file.readline(), line_number)

    def _problem(self, line: bytes, line_number: int) -> Problem:
        record = self._columns.record(_parse(line))
        if _is_number(record.get("answer")):
            exact = self._columns.record(_exact(line.decode("utf-8")))
            record["answer"] = exact["answer"]
        return problem_of(record, f"{self._path.name}:{line_number}", self.name)


def _parse(line: bytes) -> dict[str, Any]:
    """One object."""
    try:
        text = line.decode("utf-8")
        record = parse_json(text)
        if _SURROGATE.search(line):
            # A lone surrogate passes the JSON parser and would only fail in a tokenizer, later.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise Malformed(f"expected UTF-8 text: {error}") from error
    except ValueError as error:
        raise Malformed(f"expected one JSON object: {error}") from error
    if not isinstance(record, dict):
        raise Malformed(f"expected one JSON object, got {shown(record)}")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _exact(text: str) -> dict[str, Any]:
    """The object with numbers as they are written; a float has lost digits, or is infinite."""
    try:
        return json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=Decimal)
    except InvalidOperation:
        raise Malformed("a number's exponent is out of bounds") from None


def _kind(value: Any) -> Kind:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "object" if isinstance(value, dict) else "other"
