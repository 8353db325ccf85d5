"""Rows of parquet files and of folders of the datasets library, a part of a file at a time.

A part is a row group of a parquet file, or a record batch of an Arrow file. No more than a part's
rows are held at once, and of a large part only some of them.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlsd.config import HfSource, ParquetSource
from megatron_rlsd.data.columns import Kind
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object

BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 1024
CACHE_BYTES = 128 * 2**20
"""Decoded row groups that are kept, in bytes; a larger group is read anew for each row."""
BUFFER_BYTES = 2**20
INDEX_COLUMN = re.compile(r"__index_level_\d+__")
"""What pandas adds."""


@dataclass(frozen=True)
class Part:
    file: int
    """Number of its file."""
    place: int
    """Number of the row group, or the byte at which the record batch begins."""
    rows: int
    num_bytes: int
    """Size of its columns, decompressed."""


class RowFiles(Protocol):
    """Files with the same columns, whose rows are numbered through from 0."""

    paths: Sequence[Path]
    schema: pa.Schema
    parts: Sequence[Part]

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The part's rows, some at a time; pa.ArrowException or OSError for a broken file."""

    def row(self, part: Part, offset: int, columns: Sequence[str]) -> pa.RecordBatch | pa.Table:
        """One row of it."""


class ParquetFiles:
    """See RowFiles."""

    def __init__(self, source: ParquetSource) -> None:
        self.paths = _parquet_paths(Path(source.path))
        self.parts: list[Part] = []
        self.schema = pa.schema([])
        self._kept: OrderedDict[Part, pa.Table] = OrderedDict()
        for number, path in enumerate(self.paths):
            with _named(path), self._open(path) as file:
                self.schema = _same_schema(self.schema, file.schema_arrow, path, number)
                for group in range(file.num_row_groups):
                    about = file.metadata.row_group(group)
                    self.parts.append(Part(number, group, about.num_rows, about.total_byte_size))

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * part.rows // max(1, part.num_bytes)))
        with self._open(self.paths[part.file]) as file:
            yield from file.iter_batches(
                size, row_groups=[part.place], columns=list(columns), use_threads=False
            )

    def row(self, part: Part, offset: int, columns: Sequence[str]) -> pa.RecordBatch | pa.Table:
        if part.num_bytes > CACHE_BYTES:
            before = 0
            for batch in self.batches(part, columns):
                if offset < before + batch.num_rows:
                    return batch.slice(offset - before, 1)
                before += batch.num_rows
            raise pa.ArrowInvalid(f"row group {part.place} ends after {before} rows")
        if part not in self._kept:
            with self._open(self.paths[part.file]) as file:
                self._kept[part] = file.read_row_group(
                    part.place, columns=list(columns), use_threads=False
                )
            while sum(table.nbytes for table in self._kept.values()) > CACHE_BYTES:
                if len(self._kept) == 1:
                    break
                self._kept.popitem(last=False)
        self._kept.move_to_end(part)
        return self._kept[part].slice(offset, 1)

    def notes(self) -> list[str]:
        """Row groups that make the drawing of questions slow."""
        large = [part for part in self.parts if part.num_bytes > CACHE_BYTES]
        if not large:
            return []
        worst = max(large, key=lambda part: part.num_bytes)
        return [
            f"{self.paths[worst.file]}: row group {worst.place} has {worst.rows} rows in "
            f"{worst.num_bytes / 2**20:.0f} MiB, and up to all of it is read for each question: "
            "write it with smaller row groups (row_group_size=1000)"
        ]

    def _open(self, path: Path) -> pq.ParquetFile:
        # Read through a buffer, column chunk by column chunk, never a whole row group's bytes.
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


class ArrowFiles:
    """See RowFiles: a folder that ``save_to_disk`` wrote, read without the datasets library.

    Every part is mapped when it is read and let go of again: a page that was read is not kept.
    """

    def __init__(self, source: HfSource) -> None:
        self.paths = _arrow_paths(Path(source.path), source.split)
        self.parts: list[Part] = []
        self.schema = pa.schema([])
        for number, path in enumerate(self.paths):
            with _named(path), pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_stream(file)
                self.schema = _same_schema(self.schema, reader.schema, path, number)
                if any(pa.types.is_dictionary(each.type) for each in reader.schema):
                    raise UserError(f"{path} has dictionary-encoded columns: cast them to text")
                while True:
                    begin = file.tell()
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        break
                    if batch.num_rows:
                        self.parts.append(Part(number, begin, batch.num_rows, file.tell() - begin))

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.paths[part.file])) as file:
            batch = self._batch(file, part, columns)
            for start in range(0, part.rows, MAX_BATCH_ROWS):
                yield batch.slice(start, MAX_BATCH_ROWS)

    def row(self, part: Part, offset: int, columns: Sequence[str]) -> pa.RecordBatch | pa.Table:
        with pa.memory_map(str(self.paths[part.file])) as file:
            return self._batch(file, part, columns).slice(offset, 1)

    def notes(self) -> list[str]:
        return []

    def _batch(self, file: Any, part: Part, columns: Sequence[str]) -> pa.RecordBatch:
        file.seek(part.place)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema)
        return batch.select(list(columns))


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a small file; UserError for a broken one."""
    files = ParquetFiles(ParquetSource(kind="parquet", path=str(path)))
    for part in files.parts:
        with _named(path):
            for batch in files.batches(part, files.schema.names):
                yield from batch.to_pylist()


def starts(parts: Sequence[Part]) -> list[int]:
    """The number of the first row of each part."""
    return list(accumulate((part.rows for part in parts), initial=0))[:-1]


def kinds_of(schema: pa.Schema) -> dict[str, Kind]:
    """What each column holds; the index that pandas adds is none."""
    return {
        field.name: _kind(field.type) for field in schema if not INDEX_COLUMN.fullmatch(field.name)
    }


def _kind(kind: pa.DataType) -> Kind:
    types = pa.types
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "list"
    return "object" if types.is_struct(kind) or types.is_map(kind) else "other"


class _named:
    """Whatever is wrong with a file is told with its name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError):
            raise UserError(f"{self._path} cannot be read: {error}") from error


def _same_schema(first: pa.Schema, schema: pa.Schema, path: Path, number: int) -> pa.Schema:
    if number == 0 or schema.equals(first):
        return schema
    raise UserError(
        f"{path} has other columns than the files before it: {_columns(schema)}, not "
        f"{_columns(first)}"
    )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _parquet_paths(path: Path) -> list[Path]:
    if path.is_dir():
        if found := sorted(path.glob("*.parquet")):
            return found
        raise UserError(f"data folder {path} holds no *.parquet file")
    if not path.is_file():
        raise UserError(f"data file {path} does not exist or is not a file")
    return [path]


def _arrow_paths(path: Path, split: str | None) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"data folder {path} does not exist or is not a folder")
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = read_json_object(splits).get("splits", [])
        if split not in names:
            raise UserError(
                f"data folder {path} has the splits {', '.join(map(str, names))}; "
                + ("choose one with split" if split is None else f"not {split!r}")
            )
        path /= str(split)
    elif split is not None:
        raise UserError(f"data folder {path} is a single data set, without split {split!r}")
    state = path / "state.json"
    if not state.is_file():
        raise UserError(
            f"data folder {path} has no state.json: save_to_disk of the datasets library writes one"
        )
    about = read_json_object(state)
    if about.get("_indices_files") or about.get("_indices_data_files"):
        raise UserError(
            f"data folder {path} is a selection over a larger table: save it after "
            "flatten_indices()"
        )
    files = [path / Path(each["filename"]).name for each in about.get("_data_files") or []]
    if not files:
        raise UserError(f"data folder {path} names no file in its state.json")
    for file in files:
        if not file.is_file():
            raise UserError(f"data file {file}, which {state} names, does not exist")
    return files
