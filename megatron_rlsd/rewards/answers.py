"""Finding the final answer in a response, and comparing answers as text or as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:,|;|,?\s*(?:and|or)|\\text\{\s*,?\s*(?:and|or)\s*\}|\\quad)[\s$]*(?:[a-z]\s*=\s*)?"
    r"(?:\\f?box(?:ed)?\s*\{)"
)
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,6})?")


def extract_answer(response: str, pattern: str | None = None) -> str | None:
    """The final answer, stripped; None where the response holds none.

    Without a pattern it is the content of the last ``\\boxed{...}``; with one, group 1 of its last
    match (``re`` flags are written into the pattern, for example ``(?s)``).
    """
    if pattern is None:
        return last_boxed(response)
    answer = None
    for match in re.finditer(pattern, response):
        answer = match[1]
    return None if answer is None else answer.strip()


def first_answer(texts: Iterable[str], pattern: str | None = None) -> str | None:
    """The final answer of the first text that holds one: of a response, or else of its whole turn
    (``RewardInput.texts``), whose beginning the chat template may have written."""
    found = (extract_answer(text, pattern) for text in texts)
    return next((answer for answer in found if answer is not None), None)


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance; of nested ones the inner."""
    boxes = _boxes(text)
    return text[slice(*boxes[-1])].strip() if boxes else None


def boxed_answer(text: str) -> str | None:
    """Content of the last box, or of several side by side: ``\\boxed{1}`` and ``\\boxed{2}``: 1,2.

    Only "and", "or", a comma and marks of formulas may stand between boxes that belong together.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    contents = [text[slice(*boxes[-1])].strip()]
    for (_, stop), (start, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _BETWEEN_BOXES.fullmatch(text[stop + 1 : start]):
            break
        contents.append(text[boxes[-1 - len(contents)][0] : stop].strip())
    return ",".join(dict.fromkeys(reversed(contents)))


def _boxes(text: str) -> list[tuple[int, int]]:
    """Start and stop of the content of every box, in order; of nested ones the innermost.

    One pass over the text: a response may repeat an unclosed ``\\boxed{`` thousands of times.
    """
    open_braces: list[tuple[bool, int]] = []
    found: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != r"\{":
            open_braces.append((token != "{", match.end()))
        elif token == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and (not found or start > found[-1][0]):
                found.append((start, match.start()))
    return found


def check_answer_pattern(pattern: str | None) -> None:
    """Raise ValueError unless the pattern compiles and has the group that holds the answer."""
    if pattern is not None and compile_pattern(pattern).groups < 1:
        raise ValueError(f"pattern {pattern!r} has no group; group 1 is the answer")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def same_text(left: str, right: str) -> bool:
    """Equal up to white space at the ends and the amount of it within."""
    return left.split() == right.split()


def same_number(left: str, right: str) -> bool:
    """Both are plain numbers of one value: 1,000 = 1000.0 = 1e3; no units, no LaTeX."""
    numbers = [parse_number(left), parse_number(right)]
    return None not in numbers and numbers[0] == numbers[1]


def parse_number(text: str) -> Decimal | None:
    """A decimal number, perhaps with thousands separators or an exponent; None otherwise."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))
