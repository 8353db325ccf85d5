"""Public benchmarks: from their files to our form, and how the field asks, grades and samples them.

Nothing is fetched: the files are given by path, in the layout in which they are published. A
benchmark's answers are graded by reward functions that anyone may use (``rewards``).
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlsd.data.records import Malformed, problem_of
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import parse_json

BenchmarkRow = dict[str, Any]
LETTERS = "ABCDEFGHIJ"
NO_OPTION = "N/A"
"""What MMLU-Pro writes in place of an option that is not there."""

BOXED = "Reason step by step and put your final answer within \\boxed{}."
HASHES = "Think step by step, then give the final answer as a number after ####."
LETTER = (
    "Think step by step. End your response with a line of the form Answer: X, where X is the "
    "letter of the right option."
)
REASONING = {"temperature": 0.6, "top_p": 0.95, "max_response_tokens": 32768, "greedy": False}
"""How models that think are commonly sampled (DeepSeek-R1, Qwen3)."""


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    problems: int
    """How many its published set has."""
    convert: Callable[[BenchmarkRow], BenchmarkRow]
    """From a published row to a record of ours; KeyError for a column that is missing."""
    format_instruction: str
    reward: BenchmarkRow
    """An entry of ``reward.functions``."""
    evaluation: BenchmarkRow
    """Keys of ``eval``."""

    def settings(self) -> dict[str, BenchmarkRow]:
        """Sections of a configuration that evaluates it."""
        return {
            "prompts": {"format_instruction": self.format_instruction},
            "reward": {"functions": [self.reward]},
            "eval": dict(self.evaluation),
        }


def _gsm8k(row: BenchmarkRow) -> BenchmarkRow:
    """``answer`` ends with ``#### N``, and has its calculations in ``<<1+1=2>>``."""
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise Malformed("answer has no line '#### N'")
    return {
        "prompt": row["question"],
        "answer": answer.strip().replace(",", ""),
        "reference_solution": re.sub(r"<<[^<>]*>>", "", solution).strip(),
    }


def _math500(row: BenchmarkRow) -> BenchmarkRow:
    metadata = {key: row[key] for key in ("subject", "level", "unique_id") if key in row}
    return {
        "prompt": row["problem"],
        "answer": row["answer"],
        "reference_solution": row.get("solution"),
        "metadata": metadata,
    }


def _aime(row: BenchmarkRow) -> BenchmarkRow:
    """Publishers write ``problem``, ``Problem`` or ``question``; answers are whole numbers."""
    named = {key.lower(): value for key, value in row.items()}
    answer = str(named["answer"]).strip()
    if not re.fullmatch(r"\d{1,3}", answer):
        raise Malformed(f"answer must be a whole number from 0 to 999, got {answer!r}")
    return {
        "prompt": named["problem"] if "problem" in named else named["question"],
        "answer": str(int(answer)),
        "reference_solution": named.get("solution"),
    }


def _gpqa(row: BenchmarkRow) -> BenchmarkRow:
    """Its file has the right answer first: choices are shuffled, each question's in its own way."""
    right = row["Correct Answer"].strip()
    choices = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    order = list(range(len(choices)))
    name = hashlib.sha256(row["Question"].encode()).hexdigest()
    random.Random(f"gpqa/{name}").shuffle(order)
    return {
        "prompt": _with_choices(row["Question"].strip(), [choices[each] for each in order]),
        "answer": LETTERS[order.index(0)],
        "reference_solution": row.get("Explanation"),
        "metadata": {
            key: row[key] for key in ("Subdomain", "High-level domain", "Record ID") if row.get(key)
        },
    }


def _mmlu_pro(row: BenchmarkRow) -> BenchmarkRow:
    """Up to ten options in their published order."""
    options, answer = row["options"], row["answer"]
    # Text would be taken apart into its characters.
    if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
        raise Malformed(f"options must be a list of texts, got {options!r:.80}")
    options = [option for option in options if option != NO_OPTION]
    if answer not in [*LETTERS[: len(options)]]:
        raise Malformed(f"answer {answer!r} is not the letter of one of {len(options)} options")
    return {
        "prompt": _with_choices(row["question"].strip(), options),
        "answer": answer,
        "reference_solution": row.get("cot_content"),
        "metadata": {key: row[key] for key in ("category", "src", "question_id") if key in row},
    }


def _with_choices(question: str, choices: list[str]) -> str:
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, "", *lines])


_MATH: BenchmarkRow = {"name": "math_verify"}
_AIME = (_aime, BOXED, _MATH, {**REASONING, "n_samples": 32, "pass_at_k": [1, 32]})
BENCHMARKS = {
    "gsm8k": Benchmark(
        1319,
        _gsm8k,
        HASHES,
        {
            "name": "exact_match",
            "params": {"pattern": r"####\s*\$?\s*([-+]?[\d,]*\.?\d+)", "numeric": True},
        },
        {"greedy": True, "n_samples": 0, "pass_at_k": [1], "max_response_tokens": 2048},
    ),
    "math500": Benchmark(
        500, _math500, BOXED, _MATH, {**REASONING, "n_samples": 4, "pass_at_k": [1, 4]}
    ),
    "aime24": Benchmark(30, *_AIME),
    "aime25": Benchmark(30, *_AIME),
    "gpqa_diamond": Benchmark(
        198,
        _gpqa,
        LETTER,
        {"name": "choice", "params": {"letters": LETTERS[:4]}},
        {**REASONING, "n_samples": 8, "pass_at_k": [1, 8]},
    ),
    "mmlu_pro": Benchmark(
        12032,
        _mmlu_pro,
        LETTER,
        {"name": "choice", "params": {"letters": LETTERS}},
        {"greedy": True, "n_samples": 0, "pass_at_k": [1], "max_response_tokens": 4096},
    ),
}


def benchmark(name: str) -> Benchmark:
    """UserError for a name that is not in the table."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def prepared(name: str, path: Path) -> list[BenchmarkRow]:
    """The records of a published file, in its order, each with an id of the benchmark's name.

    Raises UserError by file and row for what is not in the published layout.
    """
    convert = benchmark(name).convert
    records: list[BenchmarkRow] = []
    row: BenchmarkRow = {}
    try:
        for row in _rows(path):
            record = {key: value for key, value in convert(row).items() if value is not None}
            record = {"id": f"{name}/{len(records) + 1}", **record}
            problem_of(record, "", name)
            records.append(record)
    except (Malformed, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}, row {len(records) + 1}: not as {name} is published: {error}"
        ) from error
    except KeyError as error:
        place, columns = f"{path}, row {len(records) + 1}", ", ".join(map(str, row))
        raise UserError(
            f"{place}: not as {name} is published: it has no column {error}, but {columns}"
        ) from error
    if not records:
        raise UserError(f"{path} holds no problem")
    return records


def _rows(path: Path) -> Iterator[BenchmarkRow]:
    if not path.is_file():
        raise UserError(f"data file {path} does not exist or is not a file")
    if path.suffix == ".parquet":
        # Only where such a file is given is pyarrow needed.
        from megatron_rlsd.data.row_files import parquet_rows

        yield from parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for line in file:
                if line.strip():
                    yield _object(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _object(line: str) -> BenchmarkRow:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise Malformed(f"expected one JSON object a line: {error}") from error
    if not isinstance(row, dict):
        raise Malformed("expected one JSON object a line")
    return row


def as_jsonl(records: list[BenchmarkRow]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
