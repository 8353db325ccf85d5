"""From a row of a user's data to a problem, whatever kind of file it stands in.

prompt              str; or messages, a list of {"role", "content"} that ends with the user's,
                    or with the assistant's: a conversation to imitate (megatron_rlsd.sft)
answer              str or number; optional for a conversation
privileged          true or false, optional, of a conversation: imitate it under the privileged
                    prompt? Default: sft.privileged_share decides
reference_solution  str, optional
metadata            object, optional
id                  str, optional; default FILE:LINE
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from megatron_rlsd.types import Problem

FIELDS = ("prompt", "messages", "answer", "reference_solution", "metadata", "id", "privileged")
ROLES = ("system", "user", "assistant")
MAX_DIGITS = 4300
"""The most digits of a numeric answer: Python makes no int of longer text, and neither do the
verifiers."""


class Malformed(ValueError):
    """What is wrong with one row and what was expected."""


def problem_of(record: dict[str, Any], default_id: str, source: str) -> Problem:
    """The problem in one row; Malformed where it is none.

    A numeric ``answer`` is an int, a float or, to keep all digits of the row's own literal, a
    Decimal.
    """
    unknown = sorted(record.keys() - set(FIELDS))
    if unknown:
        raise Malformed(
            f"unknown field {unknown[0]!r}; known fields are {', '.join(FIELDS)}, and anything "
            "else belongs inside metadata"
        )
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise Malformed(f"metadata must be an object, got {shown(metadata)}")
    messages, demonstration = _messages(record)
    return Problem(
        id=_optional_text(record, "id") or default_id,
        messages=messages,
        demonstration=demonstration,
        privileged=_privileged(record, bool(demonstration)),
        answer="" if demonstration and "answer" not in record else _answer(record),
        reference_solution=_optional_text(record, "reference_solution"),
        metadata=metadata or {},
        source=source,
    )


Messages = tuple[dict[str, str], ...]


def _messages(record: dict[str, Any]) -> tuple[Messages, Messages]:
    """The question's messages, and those of a conversation that follow it."""
    if ("prompt" in record) == ("messages" in record):
        raise Malformed("expected either prompt or messages, got both or neither")
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise Malformed(f"prompt must be text that is not empty, got {shown(prompt)}")
        return ({"role": "user", "content": prompt},), ()
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise Malformed(f"messages must be a list that is not empty, got {shown(messages)}")
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
            raise Malformed(
                f'message {number}: each message must be {{"role": one of {", ".join(roles)}, '
                f'"content": text}}, a call of a tool being text like any other; got '
                f"{shown(message)}"
            )
    if imitated:
        return _conversation(messages)
    if last["role"] != "user" or not last["content"].strip():
        raise Malformed(
            "the last message must be the user's and not empty, or the assistant's in a "
            f"conversation to imitate, got {shown(last)}"
        )
    return tuple(messages), ()


def _conversation(messages: list[dict[str, str]]) -> tuple[Messages, Messages]:
    """Question and what follows: turns of the assistant with exactly one message between two."""
    roles = [message["role"] for message in messages]
    first = roles.index("assistant")
    if first == 0 or roles[first - 1] != "user" or "tool" in roles[:first]:
        raise Malformed(
            f"message {first + 1} (assistant): what comes before the assistant's first turn must "
            f"end with the user's question and have no tool's message, got {roles[:first]}"
        )
    if not messages[first - 1]["content"].strip():
        raise Malformed(f"message {first} (user): the question is empty")
    for number, message in enumerate(messages[first:], start=first + 1):
        role, before = message["role"], roles[number - 2]
        own = role == "assistant"
        if own and not message["content"].strip():
            raise Malformed(f"message {number} (assistant): the turn is empty")
        if own and before == "assistant":
            raise Malformed(
                f"message {number} (assistant): a second turn of the assistant in a row; make them "
                "one, or put between them what answered the first"
            )
        if role == "system":
            raise Malformed(f"message {number} (system): expected before the assistant's turns")
        if not own and before != "assistant":
            raise Malformed(
                f"message {number} ({role}): a second message in a row that is not the "
                "assistant's; exactly one stands between two of its turns"
            )
    return tuple(messages[:first]), tuple(messages[first:])


def _answer(record: dict[str, Any]) -> str:
    if "answer" not in record:
        raise Malformed("missing field 'answer'")
    answer = record["answer"]
    if isinstance(answer, str) and answer.strip():
        return answer
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        number = Decimal(str(answer))
        if number.is_finite():
            return decimal_text(number)
    raise Malformed(f"answer must be a finite number or text, got {shown(answer)}")


def decimal_text(number: Decimal) -> str:
    """The number's digits, written out: verifiers read an e as a letter, or not at all."""
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    if max(number.adjusted() + 1, 1) + max(-exponent, 0) > MAX_DIGITS:
        raise Malformed(f"answer {number:.20g} has more than {MAX_DIGITS} digits when written out")
    return format(number, "f")


def _privileged(record: dict[str, Any], imitated: bool) -> bool | None:
    value = record.get("privileged")
    if value and not record.get("reference_solution") and record.get("answer") is None:
        raise Malformed("privileged needs reference_solution or answer, which is the hint")
    if value is None or (imitated and isinstance(value, bool)):
        return value
    raise Malformed(
        f"privileged must be true or false, and stand beside a conversation, got {shown(value)}"
    )


def _optional_text(record: dict[str, Any], field: str) -> str | None:
    value = record.get(field)
    if value is None or isinstance(value, str):
        return value or None
    raise Malformed(f"{field} must be text, got {shown(value)}")


def shown(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
