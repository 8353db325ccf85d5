"""Problems from a JSONL file: one object a line.

    prompt              str; or messages, a list of {"role", "content"} that ends with the user's,
                        or with the assistant's: a conversation to imitate (megatron_rlsd.sft)
    answer              str or number; optional for a conversation
    privileged          true or false, optional, of a conversation: imitate it under the privileged
                        prompt? Default: sft.privileged_share decides
    reference_solution  str, optional
    metadata            object, optional
    id                  str, optional; default FILE:LINE

Every line is checked when the file is opened. Only byte offsets stay in memory; a problem is read
again when it is drawn.
"""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

from megatron_rlsd.config import JsonlSource
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

FIELDS = ("prompt", "messages", "answer", "reference_solution", "metadata", "id", "privileged")
ROLES = ("system", "user", "assistant")
SHOWN_SKIPS = 5


class _Malformed(ValueError):
    """What is wrong with one line and what was expected."""


class JsonlProblems:
    """The problems of one file in its order; blank lines do not count.

    Raises UserError if the file is missing or holds no usable line, and with on_malformed=stop at
    the first malformed line, by FILE:LINE and what was expected there.
    """

    def __init__(self, source: JsonlSource) -> None:
        self._path = Path(source.path)
        self.name = self._path.stem
        self.skipped = 0
        """Malformed lines left out (on_malformed=skip)."""
        self.first_skipped: list[str] = []
        """Messages of the first few of them."""
        self._offsets, self._lines = array("q"), array("q")
        self._check_every_line(skip_malformed=source.on_malformed == "skip")
        if not self._offsets:
            found = f"all {self.skipped} lines are malformed" if self.skipped else "it is empty"
            detail = "".join(f"\n  {message}" for message in self.first_skipped)
            raise UserError(f"data file {self._path} holds no problem: {found}{detail}")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int, /) -> Problem:
        """Read one problem; UserError if the file was changed since it was opened."""
        line_number = self._lines[index]
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[index])
                return self._problem(file.readline(), line_number)
        except (OSError, _Malformed) as error:
            raise UserError(
                f"{self._path}:{line_number}: the file was changed or removed while in use: {error}"
            ) from error

    def notes(self) -> list[str]:
        if not self.skipped:
            return []
        more = "; ..." if self.skipped > len(self.first_skipped) else ""
        return [
            f"{self._path}: skipped {self.skipped} malformed lines: "
            + "; ".join(self.first_skipped)
            + more
        ]

    def _check_every_line(self, *, skip_malformed: bool) -> None:
        if not self._path.is_file():
            raise UserError(f"data file {self._path} does not exist or is not a file")
        offset, ids = 0, set()
        with self._path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    problem_id = self._problem(line, line_number).id
                    if problem_id in ids:
                        raise _Malformed(f"id {problem_id!r} is taken by an earlier line")
                except _Malformed as error:
                    message = f"{self._path}:{line_number}: {error}"
                    if not skip_malformed:
                        raise UserError(message) from error
                    self.skipped += 1
                    if len(self.first_skipped) < SHOWN_SKIPS:
                        self.first_skipped.append(message)
                else:
                    ids.add(problem_id)
                    self._offsets.append(start)
                    self._lines.append(line_number)

    def _problem(self, line: bytes, line_number: int) -> Problem:
        record = _parse(line)
        unknown = sorted(record.keys() - set(FIELDS))
        if unknown:
            raise _Malformed(
                f"unknown field {unknown[0]!r}; known fields are {', '.join(FIELDS)}, and anything "
                "else belongs inside metadata"
            )
        metadata = record.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise _Malformed(f"metadata must be an object, got {_shown(metadata)}")
        messages, demonstration = _messages(record)
        return Problem(
            id=_optional_text(record, "id") or f"{self._path.name}:{line_number}",
            messages=messages,
            demonstration=demonstration,
            privileged=_privileged(record, bool(demonstration)),
            answer="" if demonstration and "answer" not in record else _answer(record),
            reference_solution=_optional_text(record, "reference_solution"),
            metadata=metadata or {},
            source=self.name,
        )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
        # A lone surrogate passes the JSON parser and would only fail in a tokenizer, much later.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise _Malformed(f"expected UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"expected one JSON object: {error}") from error
    if not isinstance(record, dict):
        raise _Malformed(f"expected one JSON object, got {_shown(record)}")
    return record


Messages = tuple[dict[str, str], ...]


def _messages(record: dict[str, Any]) -> tuple[Messages, Messages]:
    """The question's messages, and those of a conversation that follow it."""
    if ("prompt" in record) == ("messages" in record):
        raise _Malformed("expected either prompt or messages, got both or neither")
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise _Malformed(f"prompt must be text that is not empty, got {_shown(prompt)}")
        return ({"role": "user", "content": prompt},), ()
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Malformed(f"messages must be a list that is not empty, got {_shown(messages)}")
    last = messages[-1]
    imitated = isinstance(last, dict) and last.get("role") == "assistant"
    roles = (*ROLES, "tool") if imitated else ROLES
    for number, message in enumerate(messages, start=1):
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or message["role"] not in roles
            or not isinstance(message["content"], str)
        ):
            raise _Malformed(
                f'message {number}: each message must be {{"role": one of {", ".join(roles)}, '
                f'"content": text}}, a call of a tool being text like any other; got '
                f"{_shown(message)}"
            )
    if imitated:
        return _conversation(messages)
    if last["role"] != "user" or not last["content"].strip():
        raise _Malformed(
            "the last message must be the user's and not empty, or the assistant's in a "
            f"conversation to imitate, got {_shown(last)}"
        )
    return tuple(messages), ()


def _conversation(messages: list[dict[str, str]]) -> tuple[Messages, Messages]:
    """Question and what follows: turns of the assistant with exactly one message between two."""
    roles = [message["role"] for message in messages]
    first = roles.index("assistant")
    if first == 0 or roles[first - 1] != "user" or "tool" in roles[:first]:
        raise _Malformed(
            f"message {first + 1} (assistant): what comes before the assistant's first turn must "
            f"end with the user's question and have no tool's message, got {roles[:first]}"
        )
    if not messages[first - 1]["content"].strip():
        raise _Malformed(f"message {first} (user): the question is empty")
    for number, message in enumerate(messages[first:], start=first + 1):
        role, before = message["role"], roles[number - 2]
        own = role == "assistant"
        if own and not message["content"].strip():
            raise _Malformed(f"message {number} (assistant): the turn is empty")
        if own and before == "assistant":
            raise _Malformed(
                f"message {number} (assistant): a second turn of the assistant in a row; make them "
                "one, or put between them what answered the first"
            )
        if role == "system":
            raise _Malformed(f"message {number} (system): expected before the assistant's turns")
        if not own and before != "assistant":
            raise _Malformed(
                f"message {number} ({role}): a second message in a row that is not the "
                "assistant's; exactly one stands between two of its turns"
            )
    return tuple(messages[:first]), tuple(messages[first:])


def _answer(record: dict[str, Any]) -> str:
    if "answer" not in record:
        raise _Malformed("missing field 'answer'")
    answer = record["answer"]
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if is_number and math.isfinite(answer):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer
    raise _Malformed(f"answer must be a finite number or text, got {_shown(answer)}")


def _privileged(record: dict[str, Any], imitated: bool) -> bool | None:
    value = record.get("privileged")
    if value and not (record.get("reference_solution") or record.get("answer")):
        raise _Malformed("privileged needs reference_solution or answer, which is the hint")
    if value is None or (imitated and isinstance(value, bool)):
        return value
    raise _Malformed(
        f"privileged must be true or false, and stand beside a conversation, got {_shown(value)}"
    )


def _optional_text(record: dict[str, Any], field: str) -> str | None:
    value = record.get(field)
    if value is None or isinstance(value, str):
        return value or None
    raise _Malformed(f"{field} must be text, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
