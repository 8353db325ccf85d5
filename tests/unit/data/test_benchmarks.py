"""Public benchmarks: small files in the layout that they are published in, and their graders."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlsd.commands.prepare import main
from megatron_rlsd.config import JsonlSource, RewardConfig, parse_config
from megatron_rlsd.data import evaluation_problems
from megatron_rlsd.data.benchmarks import BENCHMARKS, prepared
from megatron_rlsd.rewards import REWARDS
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem, RewardInput

GSM8K = {
    "question": "Tom has 1,000 eggs and sells half. How many are left?",
    "answer": "He sells 1000/2 = <<1000/2=500>>500.\nSo 1000-500 = <<1000-500=500>>500.\n#### 500",
}
MATH = {
    "problem": "What is $1+1$?",
    "solution": "It is $\\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
AIME = {"id": 60, "problem": "Find $m+n$.", "solution": "So $25$.", "answer": "025", "year": "2024"}
GPQA = {
    "Question": "Which is heaviest?",
    "Correct Answer": "lead\n",
    "Incorrect Answer 1": "wood",
    "Incorrect Answer 2": "cork",
    "Incorrect Answer 3": "foam",
    "Explanation": "By density.",
    "Subdomain": "Physics (general)",
    "Record ID": "rec1",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which one?",
    "options": [f"option {n}" for n in range(9)] + ["N/A"],
    "answer": "I",
    "answer_index": 8,
    "cot_content": "A: Because.",
    "category": "business",
    "src": "somewhere",
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize(
    ("name", "row", "answer", "solution"),
    [
        ("gsm8k", GSM8K, "500", "He sells 1000/2 = 500.\nSo 1000-500 = 500."),
        ("math500", MATH, "2", "It is $\\boxed{2}$."),
        ("aime24", AIME, "25", "So $25$."),
        ("aime25", {"question": "Find $m+n$.", "answer": 70}, "70", None),
        ("aime24", {"ID": "2024-I-4", "Problem": "p", "Solution": "s", "Answer": 0}, "0", "s"),
        ("mmlu_pro", MMLU_PRO, "I", "A: Because."),
    ],
)
def test_a_published_row_becomes_a_problem(
    tmp_path: Path, ending: str, name: str, row: dict[str, Any], answer: str, solution: str | None
) -> None:
    path, out = written(tmp_path / f"published{ending}", [row, row]), tmp_path / "out.jsonl"
    if name == "mmlu_pro" and ending == ".csv":
        # Its options are a list, which CSV does not have.
        assert main([name, str(path), str(out)]) == 2
        assert not out.exists()
        return
    assert main([name, str(path), str(out)]) == 0
    first, second = evaluation_problems(JsonlSource(kind="jsonl", path=str(out)), None)
    assert (first.id, second.id) == (f"{name}/1", f"{name}/2")
    assert (first.answer, first.reference_solution) == (answer, solution)
    asked = row.get("question", row.get("problem", row.get("Problem")))
    assert first.messages[0]["content"].startswith(asked)


def test_options_have_letters_and_those_that_are_not_there_have_none(tmp_path: Path) -> None:
    (record,) = prepared("mmlu_pro", written(tmp_path / "t.parquet", [MMLU_PRO]))
    lines = record["prompt"].splitlines()
    assert lines[0] == "Which one?"
    assert lines[2:] == [f"{letter}) option {n}" for n, letter in enumerate("ABCDEFGHI")]
    assert record["metadata"]["category"] == "business"


def test_choices_are_shuffled_in_a_way_that_follows_from_the_question(tmp_path: Path) -> None:
    rows = [{**GPQA, "Question": f"Question {n}?"} for n in range(200)]
    records = prepared("gpqa_diamond", written(tmp_path / "gpqa_diamond.csv", rows))
    backwards = prepared("gpqa_diamond", written(tmp_path / "back.csv", rows[::-1]))
    assert [r["prompt"] for r in records] == [r["prompt"] for r in backwards[::-1]]
    letters = [record["answer"] for record in records]
    assert all(30 <= letters.count(letter) <= 70 for letter in "ABCD"), letters
    for record in records:
        assert f"{record['answer']}) lead" in record["prompt"].splitlines()
        assert record["reference_solution"] == "By density."


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("gsm8k", {"question": "q", "answer": "no number"}, "row 2: .*no line '#### N'"),
        ("gsm8k", {"question": None, "answer": "#### 1"}, "row 2: .*either prompt or messages"),
        ("math500", {"problem": "p"}, "row 2: .*no column 'answer', but problem"),
        ("aime24", {"problem": "p", "answer": "x+1"}, "row 2: .*whole number from 0 to 999"),
        ("gpqa_diamond", MATH, "row 2: .*no column 'Correct Answer'"),
        ("mmlu_pro", {**MMLU_PRO, "answer": "AB"}, "row 2: .*'AB' is not the letter of one of 9"),
        ("mmlu_pro", {**MMLU_PRO, "answer": ""}, "row 2: .*'' is not the letter of one of 9"),
        ("mmlu_pro", {**MMLU_PRO, "options": "ABCDEFGHIJ"}, "row 2: .*must be a list of texts"),
        ("mmlu_pro", {**MMLU_PRO, "options": [*range(10)]}, "row 2: .*must be a list of texts"),
        ("mmlu_pro", {**MMLU_PRO, "answer": "J"}, "row 2: .*'J' is not the letter of one of 9"),
        ("gsm8k", [1], "row 2: .*one JSON object a line"),
        ("aime26", {}, "unknown benchmark 'aime26'; there are gsm8k"),
    ],
)
def test_what_is_not_as_published_is_named(
    tmp_path: Path, name: str, row: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good: dict[str, Any] = {"gsm8k": GSM8K, "math500": MATH, "aime24": AIME, "gpqa_diamond": GPQA}
    path = written(tmp_path / "t.jsonl", [good.get(name, MMLU_PRO), row])
    with pytest.raises(UserError, match=expected):
        prepared(name, path)
    assert main([name, str(path), str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()
    assert "Traceback" not in capsys.readouterr().err


GSM8K_PAIRS = [
    ("18", "#### 18", 1),
    ("18", "####18", 1),
    ("18", "so\n#### 18.", 1),
    ("18", "#### 18.00", 1),
    ("18", "#### $18", 1),
    ("18", "#### 18 dollars", 1),
    ("1500", "#### 1,500", 1),
    ("1500", "#### 1,500.0", 1),
    ("-3", "#### -3", 1),
    ("0.5", "#### .5", 1),
    ("18", "#### 17\n#### 18", 1),
    ("18", "#### 18\n", 1),
    ("18", "#### +18", 1),
    ("18", "#### 18\n#### 17", 0),
    ("18", "#### 180", 0),
    ("18", "18", 0),
    ("18", "", 0),
    ("18", "#### -18", 0),
    ("18", "#### eighteen", 0),
    ("1500", "#### 1,50", 0),
    ("3", "### 3", 0),
]
MATH_PAIRS = [
    (r"\frac{1}{2}", r"\boxed{\frac12}", 1),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \frac{\pi}{2})}", 1),
    ("p - q", r"\boxed{-q+p}", 1),
    (r"6 - 5i", r"\boxed{6-5i}", 1),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", 1),
    (r"3\sqrt{13}", r"\boxed{\sqrt{117}}", 1),
    ("42", r"\boxed{42}", 1),
    ("42", r"\boxed{41} no, \boxed{42}", 1),
    (r"90^\circ", r"\boxed{90}", 1),
    ("1,-2", r"\boxed{-2, 1}", 1),
    (r"\$32,\!348", r"\boxed{32348}", 1),
    (r"10,\!080", r"\boxed{10080}", 1),
    (r"11,\! 111,\! 111,\! 100", r"\boxed{11,111,111,100}", 1),
    (r"10,\!080", r"\boxed{10.08}", 0),
    (r"1,\!23", r"\boxed{123}", 0),
    (r"\text{(C)}", r"\boxed{C}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac13}", 0),
    ("42", r"\boxed{42} so \boxed{41}", 0),
    ("p - q", r"\boxed{q-p}", 0),
    (r"\text{Evelyn}", r"\boxed{Angela}", 0),
    ("42", "", 0),
    ("(3,1)", r"\boxed{(1,3)}", 0),
    ("1,-2", r"\boxed{1}", 0),
]
AIME_PAIRS = [
    *[(str(n), rf"so \boxed{{{n}}}.", 1) for n in (0, 7, 25, 204, 999)],
    ("25", r"\boxed{025}", 1),
    ("7", r"\boxed{007}", 1),
    ("204", r"$\boxed{204}$", 1),
    ("204", r"\boxed{\textbf{204}}", 1),
    ("204", r"\boxed{\text{204}}", 1),
    ("204", r"\boxed{12} then \boxed{204}", 1),
    ("204", r"\boxed{204.0}", 1),
    ("204", r"\boxed{203}", 0),
    ("204", r"\boxed{2040}", 0),
    ("204", r"\boxed{-204}", 0),
    ("204", r"\boxed{204} or rather \boxed{12}", 0),
    ("204", r"\boxed{}", 0),
    ("204", "", 0),
    ("25", r"\boxed{2.5}", 0),
    ("25", r"\boxed{x}", 0),
]
CHOICE_PAIRS = [
    ("B", "Answer: B", 1),
    ("B", "ANSWER: B", 1),
    ("B", "**Answer: B**", 1),
    ("B", "**Answer:** B", 1),
    ("B", "Answer: (B)", 1),
    ("B", "Answer: $B$", 1),
    ("B", r"Answer: $\boxed{B}$", 1),
    ("B", r"Answer: \text{B}", 1),
    ("B", "the answer is (B).", 1),
    ("B", "The answer is B because it is so", 1),
    ("B", r"\boxed{B}", 1),
    ("B", r"\boxed{\text{B}}", 1),
    ("B", r"\boxed{(B) lead}", 1),
    ("B", "Answer: A\nNo.\nAnswer: B", 1),
    ("B", "Answer: B) lead", 1),
    ("A", "Answer: A", 1),
    ("A", "Answer: A\n\nthat is all", 1),
    ("B", "Answer: C", 0),
    ("B", "Answer: B\nAnswer: C", 0),
    ("B", "B", 0),
    ("B", "", 0),
    ("A", "The answer is a sum", 0),
    ("A", "Answer: A sum of two", 0),
    ("B", "Answer: Both", 0),
    ("B", "Answer: b-carotene", 0),
    ("B", "Answer: Z", 0),
]
MMLU_PAIRS = [
    *CHOICE_PAIRS,
    *[(letter, f"the answer is ({letter})", 1) for letter in "ABCDEFGHIJ"],
    ("I", "Answer: I", 1),
    ("I", "Answer: I think so", 0),
    ("J", "Answer: I", 0),
    ("J", "Answer: K", 0),
]
PAIRS = {
    "gsm8k": GSM8K_PAIRS,
    "math500": MATH_PAIRS,
    "aime24": AIME_PAIRS,
    "aime25": AIME_PAIRS,
    "gpqa_diamond": CHOICE_PAIRS,
    "mmlu_pro": MMLU_PAIRS,
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_grader(name: str) -> None:
    assert len(PAIRS[name]) >= 20
    entry = RewardConfig.model_validate(BENCHMARKS[name].settings()["reward"]).functions[0]
    grade = REWARDS[entry.name].code
    wrong = []
    for answer, response, expected in PAIRS[name]:
        problem = Problem(id="x", messages=(), answer=answer)
        sample = RewardInput(
            problem=problem,
            response=response,
            num_tokens=1,
            max_tokens=9,
            finish_reason="stop",
        )
        if grade(sample, **entry.params) != expected:
            wrong.append((answer, response))
    assert not wrong


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_preset_is_a_configuration(name: str) -> None:
    source = {"kind": "jsonl", "path": "x.jsonl"}
    config = parse_config(
        {
            "run_dir": "x",
            "model": {"hf_path": "x"},
            "data": {"train": [source]},
            **BENCHMARKS[name].settings(),
        }
    )
    assert config.eval.greedy or config.eval.n_samples > 1
