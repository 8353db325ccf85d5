"""What a JSONL file may hold, and how its mistakes are told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_rlsd.config import JsonlSource
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.runtime.errors import UserError

GOOD = {"prompt": "1 + 1?", "answer": "2"}


def open_lines(folder: Path, *lines: object, on_malformed: str = "stop") -> JsonlProblems:
    path = folder / "train.jsonl"
    raw = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))
    return JsonlProblems(
        JsonlSource.model_validate(
            {"kind": "jsonl", "path": str(path), "on_malformed": on_malformed}
        )
    )


def _text(line: object) -> str:
    return line if isinstance(line, str) else json.dumps(line)


def talk(*messages: str) -> dict[str, object]:
    """A line whose messages are ``role`` or ``role:content``."""
    pairs = [message.partition(":") for message in messages]
    return {
        "messages": [
            {"role": role, "content": content if colon else "x"} for role, colon, content in pairs
        ]
    }


def test_a_conversation_is_a_question_and_what_follows(tmp_path: Path) -> None:
    line = talk("system:s", "user:q", "assistant:a", "tool:", "assistant:b", "user:c", "assistant")
    problems = open_lines(tmp_path, line, {**line, "privileged": True, "answer": 5})
    plain, marked = (problems[i] for i in range(len(problems)))
    messages = line["messages"]
    assert isinstance(messages, list)
    for problem in (plain, marked):
        assert list(problem.messages) == messages[:2]
        assert list(problem.demonstration) == messages[2:]
    assert (plain.answer, plain.privileged) == ("", None)
    assert (marked.answer, marked.privileged) == ("5", True)


def test_all_fields_arrive(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "é\n🙂"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "and?"},
    ]
    full = {
        "messages": messages,
        "answer": 3,
        "reference_solution": "because",
        "metadata": {"level": [1, None]},
        "id": "x",
    }
    problems = open_lines(tmp_path, full, "", "   ", GOOD)
    first, second = problems[0], problems[1]
    assert len(problems) == 2
    assert (first.id, first.answer, first.reference_solution) == ("x", "3", "because")
    assert list(first.messages) == messages
    assert first.metadata == {"level": [1, None]}
    assert second.id == "train.jsonl:4"
    assert second.messages == ({"role": "user", "content": "1 + 1?"},)
    assert (second.reference_solution, second.source) == (None, "train")


@pytest.mark.parametrize(
    ("answer", "text"), [(0, "0"), (-2.5, "-2.5"), (10**30, "1" + "0" * 30), (" 7", " 7")]
)
def test_answers_become_text(tmp_path: Path, answer: object, text: str) -> None:
    assert open_lines(tmp_path, {"prompt": "?", "answer": answer})[0].answer == text


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("0.00001", "0.00001"),
        ("1e-5", "0.00001"),
        ("2.50", "2.50"),
        ("-0.0", "-0.0"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("12345678901234567890.5", "12345678901234567890.5"),
        ("1e3", "1000"),
        ("1E400", "1" + "0" * 400),
        ("9" * 4300, "9" * 4300),
    ],
)
def test_the_digits_of_a_numeric_answer_are_those_of_its_literal(
    tmp_path: Path, literal: str, text: str
) -> None:
    problems = open_lines(tmp_path, f'{{"prompt": "?", "answer": {literal}}}')
    assert problems[0].answer == text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected one JSON object"),
        ('{"prompt": "a", "prompt": "b", "answer": 1}', "key 'prompt' stands twice"),
        ('{"prompt": "a", "answer": 1, "metadata": {"x": {"y": 1, "y": 1}}}', "key 'y' stands"),
        ('{"answer": 1, "prompt": "a", "\\u0061nswer": 2}', "key 'answer' stands twice"),
        ('{"prompt": "q", "answer": 1e4300}', "answer 1e.*4300 has more than 4300 digits"),
        ('{"prompt": "q", "answer": 1e-99999}', "more than 4300 digits"),
        ('{"prompt": "q", "answer": 1e99999999999999999999}', "exponent is out of bounds"),
        (f'{{"prompt": "q", "answer": {"9" * 4301}}}', "an integer has too many digits"),
        ('{"prompt": "q", "answer": -Infinity}', "answer must be a finite number"),
        ("[1]", "expected one JSON object, got"),
        ("[" * 100_000, "expected one JSON object"),
        (b'{"prompt": "\xff", "answer": 1}', "UTF-8"),
        ('{"prompt": "\\ud800", "answer": 1}', "UTF-8"),
        ({"prompt": "q"}, "missing field 'answer'"),
        ({"answer": 1}, "either prompt or messages"),
        ({**GOOD, "messages": []}, "either prompt or messages"),
        ({**GOOD, "prompt": " \n"}, "prompt must be text that is not empty"),
        ({**GOOD, "prompt": 5}, "prompt must be text"),
        ({**GOOD, "answer": None}, "answer must be"),
        ({**GOOD, "answer": True}, "answer must be"),
        ({**GOOD, "answer": ""}, "answer must be"),
        ('{"prompt": "q", "answer": NaN}', "answer must be a finite number"),
        ({**GOOD, "reference_solution": 5}, "reference_solution must be text"),
        ({**GOOD, "metadata": []}, "metadata must be an object"),
        ({**GOOD, "id": 7}, "id must be text"),
        ({**GOOD, "solution": "x"}, "unknown field 'solution'.*metadata"),
        ({"messages": [], "answer": 1}, "messages must be a list that is not empty"),
        ({"messages": "hi", "answer": 1}, "messages must be a list"),
        ({"messages": [{"role": "user"}], "answer": 1}, "each message must be"),
        ({"messages": [{"role": "robot", "content": "x"}], "answer": 1}, "each message must be"),
        ({**GOOD, "privileged": True}, "privileged must be true or false, and stand beside a conv"),
        (talk("user", "system"), "the last message must be the user's"),
        (talk("user", "tool", "user"), "message 2: each message must be"),
        (talk("assistant"), r"message 1 \(assistant\): what comes before the assistant's first"),
        (talk("system", "assistant"), r"message 2 \(assistant\): what comes before"),
        (talk("tool", "user", "assistant"), r"message 3 \(assistant\): what comes before"),
        (talk("user:", "assistant"), r"message 1 \(user\): the question is empty"),
        (talk("user", "assistant: ", "user", "assistant"), r"message 2 .*the turn is empty"),
        (talk("user", "assistant", "assistant"), r"message 3 .*a second turn of the assistant"),
        (talk("user", "assistant", "tool", "tool", "assistant"), r"message 4 \(tool\): a second"),
        (
            talk("user", "assistant", "system", "assistant"),
            r"message 3 \(system\): expected",
        ),
        (talk("user", "robot", "assistant"), "message 2: each message must be.*tool"),
        ({**talk("user", "assistant"), "answer": ""}, "answer must be"),
        ({**talk("user", "assistant"), "privileged": 0}, "privileged must be true or false"),
        ({**talk("user", "assistant"), "privileged": True}, "privileged needs reference_solution"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, expected: str) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl:3: .*{expected}"):
        open_lines(tmp_path, GOOD, "", line, GOOD)


def test_malformed_lines_can_be_skipped(tmp_path: Path) -> None:
    lines: list[object] = [GOOD, "{", GOOD, *(["nonsense"] * 10), GOOD]
    problems = open_lines(tmp_path, *lines, on_malformed="skip")
    assert [problems[i].id for i in range(len(problems))] == [
        "train.jsonl:1",
        "train.jsonl:3",
        "train.jsonl:14",
    ]
    (note,) = problems.notes()
    assert "skipped 11 malformed rows: " in note
    assert "train.jsonl:2" in note
    assert note.count("train.jsonl:") < 11


def test_a_second_use_of_an_id_is_malformed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":2: id 'a' is taken"):
        open_lines(tmp_path, {**GOOD, "id": "a"}, {**GOOD, "id": "a"})


@pytest.mark.parametrize("on_malformed", ["stop", "skip"])
def test_a_file_without_problems_is_refused(tmp_path: Path, on_malformed: str) -> None:
    with pytest.raises(UserError, match="holds no problem: it is empty"):
        open_lines(tmp_path, "", "  ", on_malformed=on_malformed)
    missing = JsonlSource(kind="jsonl", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        JsonlProblems(missing)


def test_a_file_of_malformed_lines_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 2 rows are malformed(.|\n)*train\.jsonl:1"):
        open_lines(tmp_path, "x", "y", on_malformed="skip")


def test_a_file_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    problems = open_lines(tmp_path, GOOD, GOOD)
    (tmp_path / "train.jsonl").write_text("short")
    with pytest.raises(UserError, match=r"train\.jsonl:2: the file was changed"):
        problems[1]


def test_a_file_edited_while_in_use_is_noticed_though_it_is_valid(tmp_path: Path) -> None:
    problems = open_lines(tmp_path, GOOD, {**GOOD, "answer": "3"})
    path = tmp_path / "train.jsonl"
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert problems[1].answer == "3"  # another date, the same content
    path.write_bytes(b"\n".join(reversed(content.split(b"\n"))))
    os.utime(path, ns=(2, 2))
    with pytest.raises(UserError, match="its content is not the one that was checked"):
        problems[1]


def test_a_default_id_may_not_be_taken_either(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":2: id 'train\.jsonl:2' is taken"):
        open_lines(tmp_path, {**GOOD, "id": "train.jsonl:2"}, GOOD)
    kept = open_lines(tmp_path, GOOD, {**GOOD, "id": "train.jsonl:1"}, GOOD, on_malformed="skip")
    assert [kept[i].id for i in range(len(kept))] == ["train.jsonl:1", "train.jsonl:3"]
