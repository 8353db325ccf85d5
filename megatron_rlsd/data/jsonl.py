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
from megatron_rlsd.data.digest import DIGITS
from megatron_rlsd.data.intake import Intake
from megatron_rlsd.data.records import Malformed, problem_of, shown
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
        self._intake = Intake(self._path, skip_malformed=source.on_malformed == "skip")
        self._seen = self._state_of_file()
        self._check_every_line()
        self._lines, self._offsets = self._intake.finish(lambda *row: self._read(*row).id)
        self.digest = self._intake.digest
        """The digest of the file's content: a reordered or edited one has another."""

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Problem:
        """Read one problem; UserError if the file was changed since it was opened."""
        line_number = self._lines[index]
        try:
            self._check_unchanged()
            return self._read(line_number, self._offsets[index])
        except (OSError, Malformed) as error:
            raise UserError(
                f"{self._path}:{line_number}: the file was changed or removed while in use: {error}"
            ) from error

    def notes(self) -> list[str]:
        return self._intake.notes()

    def _check_every_line(self) -> None:
        offset = 0
        with self._path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                self._intake.digest_of(line)
                if not line.strip():
                    continue
                try:
                    problem = self._problem(line, line_number)
                except Malformed as error:
                    self._intake.refuse(line_number, error)
                else:
                    self._intake.keep(line_number, start, problem.id)

    def _read(self, line_number: int, offset: int) -> Problem:
        with self._path.open("rb") as file:
            file.seek(offset)
            return self._problem(file.readline(), line_number)

    def _problem(self, line: bytes, line_number: int) -> Problem:
        return problem_of(_parse(line), f"{self._path.name}:{line_number}", self.name)

    def _state_of_file(self) -> tuple[int, int]:
        state = self._path.stat()
        return state.st_size, state.st_mtime_ns

    def _check_unchanged(self) -> None:
        """Raise Malformed if the file has another content; another date alone does no harm."""
        state = self._state_of_file()
        if state == self._seen:
            return
        with self._path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS] != self.digest:
                raise Malformed("its content is not the one that was checked")
        self._seen = state


def _parse(line: bytes) -> dict[str, Any]:
    """One object; its ``answer``, if it is a number, as the Decimal of the literal."""
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
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        record["answer"] = _literal(text)
    return record


def _literal(text: str) -> Decimal:
    """The number under ``answer`` as it is written; a float has lost digits, or is infinite."""
    try:
        return json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=Decimal)[
            "answer"
        ]
    except InvalidOperation:
        raise Malformed("a number's exponent is out of bounds") from None
