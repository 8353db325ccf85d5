"""Problems from parquet files and folders of the datasets library: the same rules as JSONL."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlsd.config import HfSource, JsonlSource, ParquetSource
from megatron_rlsd.data import build_sources, evaluation_problems, evaluation_sets, row_files
from megatron_rlsd.data.columnar import ColumnarProblems
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.evaluate import _source
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

DATA = Path(__file__).parents[2] / "data"
GOOD = {"prompt": "1 + 1?", "answer": "2"}
QUESTION = [{"role": "user", "content": "1 + 1?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": QUESTION,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 7, "answer": "one and one is two"},
}


def write(path: Path, rows: list[dict[str, Any]] | pa.Table, group: int = 2) -> Path:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=group)
    return path


def source(path: Path, **settings: Any) -> ParquetSource:
    return ParquetSource.model_validate({"kind": "parquet", "path": str(path), **settings})


def problems(path: Path, **settings: Any) -> list[Problem]:
    table = ColumnarProblems(source(path, **settings))
    return [table[index] for index in range(len(table))]


def count_rows(folder: Path, count: int, name: str = "a") -> tuple[ParquetSource, JsonlSource]:
    """The same problems as a parquet file and as JSONL."""
    rows = [{"prompt": f"{name} {i}", "answer": i, "id": f"{name}{i}"} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = source(write(folder / f"{name}.parquet", rows, group=3))
    return columns, JsonlSource(kind="jsonl", path=str(path))


def test_the_stream_is_that_of_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    columns, lines = count_rows(tmp_path, 20)
    ours, theirs = build_sources([columns], seed=3), build_sources([lines], seed=3)
    assert ours.next(70) == theirs.next(70)
    state = json.loads(json.dumps(ours.state()))
    resumed = build_sources([columns], seed=3)
    resumed.load_state(state)
    assert resumed.next(30) == theirs.next(30)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.parquet", "parquet"), ("a.jsonl", "jsonl"), ("hf_splits/test", "hf")]
)
def test_rlsd_evaluate_takes_each_kind(name: str, kind: str) -> None:
    assert _source(f"set={DATA / name}")["kind"] == kind


def test_all_fields_arrive(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "system", "content": "s"}, *QUESTION],
            "answer": "3",
            "reference_solution": "because",
            "metadata": {"level": [1, None], "when": datetime.date(2026, 1, 2)},
            "id": "x",
        },
        {"messages": QUESTION, "answer": " 4", "metadata": None},
    ]
    first, second = problems(write(tmp_path / "train.parquet", rows))
    assert (first.id, first.answer, first.reference_solution) == ("x", "3", "because")
    assert list(first.messages) == rows[0]["messages"]
    assert first.metadata == {"level": [1, None], "when": "2026-01-02"}
    assert (second.id, second.answer, second.source) == ("train.parquet:2", " 4", "train")
    assert (second.reference_solution, second.metadata) == (None, {})


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([0.00001]), "0.00001"),
        (pa.array([np.float32(0.1)]), "0.1"),
        (pa.array([2**62]), str(2**62)),
        (pa.array([Decimal("2.50")]), "2.50"),
        (pa.array(["  7"]).dictionary_encode(), "  7"),
    ],
)
def test_answers_keep_their_digits(tmp_path: Path, column: pa.Array, text: str) -> None:
    table = pa.table({"prompt": ["?"], "answer": column})
    (problem,) = problems(write(tmp_path / "a.parquet", table))
    assert problem.answer == text


BAD: list[tuple[dict[str, Any], str]] = [
    ({**GOOD, "answer": None}, "missing field 'answer'"),
    ({**GOOD, "answer": " "}, "answer must be"),
    ({**GOOD, "prompt": ""}, "prompt must be text that is not empty"),
    ({**GOOD, "prompt": None}, "either prompt or messages"),
    ({**GOOD, "messages": QUESTION}, "either prompt or messages"),
    ({**GOOD, "prompt": None, "messages": [{"role": "user"}]}, "each message must be"),
    ({**GOOD, "id": "a"}, "id 'a' is taken"),
]


@pytest.mark.parametrize(("row", "expected"), BAD)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    good = {**GOOD, "messages": None, "id": None}
    rows = [{**good, "id": "a"}, good, {**good, **row}, good]
    schema = pa.Table.from_pylist([{**good, "messages": QUESTION, "id": "a"}]).schema
    path = write(tmp_path / "t.parquet", pa.Table.from_pylist(rows, schema))
    with pytest.raises(UserError, match=rf"t\.parquet, row 3: .*{expected}"):
        ColumnarProblems(source(path))
    table = ColumnarProblems(source(path, on_malformed="skip"))
    assert [table[i].id for i in range(len(table))] == ["a", "t.parquet:2", "t.parquet:4"]
    (note,) = table.notes()
    assert "skipped 1 malformed rows" in note
    assert "row 3" in note


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([True, False, True]), "answer must be"),
        (pa.array([1.0, 2.0, float("nan")]), "answer must be a finite number"),
        (pa.array([b"1", b"2", b"3"]), "expected text, got b'1'"),
        (
            pa.Array.from_buffers(
                pa.string(), 3, pa.array([b"1", b"2", b"\xff"], pa.binary()).buffers()
            ),
            "UTF-8",
        ),
        (pa.array([["1"], ["2"], ["3"]]), "answer must be"),
    ],
)
def test_an_answer_of_another_type_is_named(
    tmp_path: Path, column: pa.Array, expected: str
) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "answer": column})
    with pytest.raises(UserError, match=rf"t\.parquet, row \d: .*{expected}"):
        ColumnarProblems(source(write(tmp_path / "t.parquet", table)))


def test_verls_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [VERL, VERL])
    first, second = problems(path)
    assert list(first.messages) == QUESTION
    assert (first.answer, first.reference_solution, first.id) == ("2", None, "train.parquet:1")
    assert first.metadata == {
        "split": "train",
        "index": 7,
        "answer": "one and one is two",
        "data_source": "openai/gsm8k",
        "ability": "math",
    }
    (solved, _) = problems(path, columns={"reference_solution": "extra_info.answer"})
    assert solved.reference_solution == "one and one is two"
    assert solved.metadata == first.metadata
    assert second.id == "train.parquet:2"


@pytest.mark.parametrize(
    ("row", "answer", "solution", "metadata"),
    [
        ({"prompt": QUESTION, "solution": "2"}, "2", None, {}),
        ({"prompt": QUESTION, "ground_truth": 2, "level": "easy"}, "2", None, {"level": "easy"}),
        ({"prompt": QUESTION, "answer": "2", "solution": "1+1=2"}, "2", "1+1=2", {}),
    ],
)
def test_trls_rows(
    tmp_path: Path, row: dict[str, Any], answer: str, solution: str, metadata: dict[str, Any]
) -> None:
    for found in (
        problems(write(tmp_path / "t.parquet", [row])),
        _lines(tmp_path / "t.jsonl", [row]),
    ):
        assert list(found[0].messages) == QUESTION
        assert (found[0].answer, found[0].reference_solution) == (answer, solution)
        assert found[0].metadata == metadata


@pytest.mark.parametrize("text", [True, False])
def test_trls_completions_are_imitated(tmp_path: Path, text: bool) -> None:
    reply = {"role": "assistant", "content": "2"}
    row: dict[str, Any] = {"prompt": QUESTION, "completion": [reply]}
    if text:
        row = {"prompt": "1 + 1?", "completion": "2"}
    (problem,) = problems(write(tmp_path / "t.parquet", [row]))
    assert list(problem.messages) == QUESTION
    assert list(problem.demonstration) == [reply]


def test_jsonl_in_verls_layout_keeps_an_answers_literal(tmp_path: Path) -> None:
    row = json.dumps(VERL).replace('"ground_truth": "2"', '"ground_truth": 0.00001')
    (tmp_path / "t.jsonl").write_text(row + "\n" + json.dumps({**VERL, "level": 3}))
    table = JsonlProblems(JsonlSource(kind="jsonl", path=str(tmp_path / "t.jsonl")))
    assert (table[0].answer, table[1].metadata["level"]) == ("0.00001", 3)


def test_pictures_and_tools_are_not_left_out_in_silence(tmp_path: Path) -> None:
    rows = [{**VERL, "images": []}, {**VERL, "images": ["cat.png"]}]
    with pytest.raises(UserError, match=r"row 2: column images is not empty"):
        problems(write(tmp_path / "t.parquet", rows))


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [
        {"question": "q?", "gold": {"final": 5}, "why": "so", "topic": "sums", "x.y": "k", "n": 1}
    ]
    path = write(tmp_path / "t.parquet", rows)
    columns = {
        "prompt": "question",
        "answer": "gold.final",
        "reference_solution": "why",
        "metadata": ["topic", "n"],
        "id": "x.y",
    }
    table = ColumnarProblems(source(path, columns=columns))
    problem = table[0]
    assert problem.messages[0]["content"] == "q?"
    assert (problem.answer, problem.reference_solution, problem.id) == ("5", "so", "k")
    assert problem.metadata == {"topic": "sums", "n": 1}
    del columns["reference_solution"]
    assert ColumnarProblems(source(path, columns=columns)).notes() == [
        f"{path}: columns not read: why"
    ]
    assert ColumnarProblems(source(path, columns=columns)).digest != table.digest
    with pytest.raises(UserError, match=r"no column 'answr'.*it has question, gold"):
        problems(path, columns={**columns, "answer": "answr"})
    with pytest.raises(UserError, match=r"unknown column 'gold' .*the source's columns"):
        problems(path)


def test_metadata_may_be_json_text(tmp_path: Path) -> None:
    rows = [{**GOOD, "extra": '{"a": [1]}'}, {**GOOD, "extra": ""}, {**GOOD, "extra": "[1]"}]
    path = write(tmp_path / "t.parquet", rows)
    settings = {"columns": {"metadata": "extra"}, "on_malformed": "skip"}
    assert [p.metadata for p in problems(path, **settings)] == [{"a": [1]}, {}]


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    for name, count in (("b", 3), ("a", 4), ("c", 2)):
        count_rows(tmp_path, count, name)
    write(tmp_path / "aa.parquet", pa.table({"prompt": [""], "answer": [1], "id": ["z"]})[:0])
    found = problems(tmp_path)
    assert [p.id for p in found] == [f"a{i}" for i in range(4)] + [
        *(f"b{i}" for i in range(3)),
        *(f"c{i}" for i in range(2)),
    ]
    write(tmp_path / "d.parquet", [{"prompt": "q", "answer": 1, "id": ""}, {"prompt": " "}])
    with pytest.raises(UserError, match=r"d\.parquet, row 2: prompt must be text"):
        problems(tmp_path)
    write(tmp_path / "d.parquet", [{"prompt": "q", "answer": "text"}])
    with pytest.raises(UserError, match=r"d\.parquet has other columns than the files before"):
        problems(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.parquet does not exist"):
        problems(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"holds no \*\.parquet file"):
        problems(tmp_path)
    path = write(tmp_path / "t.parquet", [GOOD] * 6)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        problems(path)
    path.write_bytes(b"\0" * 200 + whole[200:])
    with pytest.raises(UserError, match=r"t\.parquet(, row 1:)? cannot be read"):
        problems(path)
    with pytest.raises(UserError, match="holds no problem: it is empty"):
        problems(write(path, pa.table({"prompt": [""], "answer": [""]})[:0]))


def test_a_file_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [GOOD, {**GOOD, "answer": "3"}, GOOD])
    table = ColumnarProblems(source(path))
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert table[1].answer == "3"  # another date, the same content
    write(path, [{**GOOD, "answer": "3"}, GOOD, GOOD])
    with pytest.raises(UserError, match=r"row 2: .*its content is not the one"):
        table[1]


def test_reordered_rows_are_other_data(tmp_path: Path) -> None:
    columns, _ = count_rows(tmp_path, 6)
    state = build_sources([columns], seed=0).state()
    table = pq.read_table(columns.path)
    write(Path(columns.path), table.take([5, 4, 3, 2, 1, 0]), group=3)
    with pytest.raises(UserError, match="the content of a has changed since"):
        build_sources([columns], seed=0).load_state(state)


def test_a_large_row_group_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, lines = count_rows(tmp_path, 7)
    monkeypatch.setattr(row_files, "CACHE_BYTES", 1)
    monkeypatch.setattr(row_files, "BATCH_BYTES", 1)
    table, expected = ColumnarProblems(columns), JsonlProblems(lines)
    for index in (6, 0, 4, 3):
        assert table[index].id == expected[index].id
    (note,) = table.notes()
    assert "up to all of it is read for each question" in note


def test_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, _ = count_rows(tmp_path, 30)
    table = ColumnarProblems(columns)
    sizes = max(part.num_bytes for part in table._files.parts)
    monkeypatch.setattr(row_files, "CACHE_BYTES", 2 * sizes)
    assert [table[index].id for index in range(29, -1, -1)] == [f"a{i}" for i in range(29, -1, -1)]
    assert len(table._files._kept) < 10  # type: ignore[union-attr]


def hf(path: Path, split: str | None = None) -> HfSource:
    return HfSource(kind="hf", path=str(path), split=split)


def test_a_folder_that_the_datasets_library_wrote() -> None:
    """tests/data/hf_splits: datasets 5.2.0, save_to_disk, the training split in two files."""
    table = ColumnarProblems(hf(DATA / "hf_splits", "train"))
    assert len(table) == 5
    for index in (4, 0, 1, 2, 3):
        problem = table[index]
        assert problem.messages[0]["content"] == f"{index} + 1?"
        assert problem.answer == str(index + 1)
        hint = None if index == 1 else f"one more than {index}"
        assert problem.reference_solution == hint
        assert problem.metadata == {"level": index, "tags": ["a", None]}
    assert table[4].id.endswith("-of-00002.arrow:2")
    assert len(evaluation_problems(hf(DATA / "hf_splits/test"), None)) == 1
    assert list(evaluation_sets([hf(DATA / "hf_splits", "test")], None)) == ["hf_splits"]


def test_a_folder_that_is_no_such_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the splits train, test; choose one"):
        ColumnarProblems(hf(DATA / "hf_splits"))
    with pytest.raises(UserError, match=r"has the splits train, test; not 'dev'"):
        ColumnarProblems(hf(DATA / "hf_splits", "dev"))
    with pytest.raises(UserError, match=r"is a single data set"):
        ColumnarProblems(hf(DATA / "hf_splits/test", "test"))
    with pytest.raises(UserError, match=r"has no state\.json"):
        ColumnarProblems(hf(tmp_path))
    folder = shutil.copytree(DATA / "hf_splits/train", tmp_path / "copy")
    (arrow, _) = sorted(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:700])
    with pytest.raises(UserError, match=r"arrow.* cannot be read"):
        ColumnarProblems(hf(folder))
    arrow.unlink()
    with pytest.raises(UserError, match=r"state\.json names, does not exist"):
        ColumnarProblems(hf(folder))


def _lines(path: Path, rows: list[dict[str, Any]]) -> list[Problem]:
    path.write_text("\n".join(map(json.dumps, rows)))
    table = JsonlProblems(JsonlSource(kind="jsonl", path=str(path)))
    return [table[index] for index in range(len(table))]
