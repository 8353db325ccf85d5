"""Problems from parquet files and from folders of the datasets library.

As for JSONL every row is checked when the files are opened, and what stays in memory is where a
row stands; a problem is read again when it is drawn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_rlsd.config import HfSource, ParquetSource
from megatron_rlsd.data.columns import Columns, plain, without_decimals
from megatron_rlsd.data.digest import digest_of
from megatron_rlsd.data.intake import Intake
from megatron_rlsd.data.records import FIELDS, Malformed, problem_of
from megatron_rlsd.data.row_files import ArrowFiles, ParquetFiles, Part, kinds_of, starts
from megatron_rlsd.data.seen_files import SeenFiles, content_digest
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem


class ColumnarProblems:
    """The problems of one source in the order of its files and rows; rows count from 1 in a file.

    Raises UserError for files that are missing, broken or without a usable row, for columns that
    do not fit ``columns`` and ``layout``, and with on_malformed=stop at the first malformed row.
    """

    def __init__(self, source: ParquetSource | HfSource) -> None:
        path = Path(source.path)
        self.name = source.name or path.stem
        self._files = (
            ParquetFiles(source) if isinstance(source, ParquetSource) else ArrowFiles(source)
        )
        self._starts = starts(self._files.parts)
        self._file_starts = self._first_rows()
        self._seen = SeenFiles(self._files.paths)
        kinds = kinds_of(self._files.schema)
        self._columns = Columns(source, kinds)
        if unknown := sorted(kinds.keys() - set(FIELDS)) if self._columns.as_they_are else []:
            raise UserError(
                f"{path}: unknown column {unknown[0]!r} (it has {', '.join(kinds)}); known are "
                f"{', '.join(FIELDS)}: say with the source's columns which column each is read "
                "from, or name its layout (verl, trl)"
            )
        self._intake = Intake(path, self._where, skip_malformed=source.on_malformed == "skip")
        self._check_every_row()
        _, self._rows = self._intake.finish(lambda _, row: self._read(row).id)
        self._seen.digest = content_digest(self._files.paths)
        identity = self._columns.identity()
        self.digest = digest_of(self._seen.digest, identity) if identity else self._seen.digest
        """The digest of the files' content and of how it is read."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Problem:
        """Read one problem; UserError if a file was changed since it was opened."""
        row = self._rows[index]
        try:
            self._seen.check_unchanged()
            return self._read(row)
        except (OSError, Malformed, pa.ArrowException) as error:
            raise UserError(
                f"{self._where(row + 1)}: the file was changed or removed while in use: {error}"
            ) from error

    def notes(self) -> list[str]:
        return [*self._columns.notes(), *self._files.notes(), *self._intake.notes()]

    def _check_every_row(self) -> None:
        row = 0
        for part in self._files.parts:
            try:
                for batch in self._files.batches(part, self._columns.read):
                    for content in _contents(batch):
                        self._check(row, content)
                        row += 1
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{self._where(row + 1)}: cannot be read: {error}") from error

    def _check(self, row: int, content: dict[str, Any] | Malformed) -> None:
        try:
            problem = self._problem(row, content)
        except Malformed as error:
            self._intake.refuse(row + 1, error)
        else:
            self._intake.keep(row + 1, row, problem.id)

    def _problem(self, row: int, content: dict[str, Any] | Malformed) -> Problem:
        if isinstance(content, Malformed):
            raise content
        record = self._columns.record(content)
        for field in record.keys() - {"answer"}:
            record[field] = without_decimals(record[field])
        file, number = self._file_and_row(row)
        return problem_of(record, f"{self._files.paths[file].name}:{number}", self.name)

    def _read(self, row: int) -> Problem:
        at = bisect_right(self._starts, row) - 1
        part: Part = self._files.parts[at]
        found = self._files.row(part, row - self._starts[at], self._columns.read)
        (content,) = _contents(found)
        return self._problem(row, content)

    def _where(self, place: int) -> str:
        """``place``: the row over all files, from 1."""
        file, number = self._file_and_row(place - 1)
        return f"{self._files.paths[file]}, row {number}"

    def _file_and_row(self, row: int) -> tuple[int, int]:
        file = bisect_right(self._file_starts, row) - 1
        return file, row - self._file_starts[file] + 1

    def _first_rows(self) -> list[int]:
        """The first row of each file; one without rows has none, and none is looked for in it."""
        first = [0] * len(self._files.paths)
        for part in self._files.parts:
            for later in range(part.file + 1, len(first)):
                first[later] += part.rows
        return first


def _contents(rows: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | Malformed]:
    """Yield each row as JSON data without its nulls, or Malformed where it cannot be that."""
    try:
        contents = _python(rows)
    except UnicodeDecodeError:
        if rows.num_rows == 1:
            yield Malformed("expected UTF-8 text")
            return
        for number in range(rows.num_rows):
            yield from _contents(rows.slice(number, 1))
        return
    for content in contents:
        try:
            yield {
                name: _message_keys(plain(value))
                for name, value in content.items()
                if value is not None
            }
        except Malformed as error:
            yield error


def _python(rows: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Rows as dicts; a number of 32 bits or fewer with the digits that it was written with."""
    contents = rows.to_pylist(maps_as_pydicts="strict")
    for field in rows.schema:
        if pa.types.is_float16(field.type) or pa.types.is_float32(field.type):
            short = np.float16 if pa.types.is_float16(field.type) else np.float32
            for content in contents:
                if content[field.name] is not None:
                    content[field.name] = float(str(short(content[field.name])))
    return contents


def _message_keys(value: Any) -> Any:
    """Messages without keys that are null: a column has the same keys in every row."""
    if not isinstance(value, list):
        return value
    return [
        {key: each for key, each in item.items() if each is not None}
        if isinstance(item, dict)
        else item
        for item in value
    ]
