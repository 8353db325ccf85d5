"""An answer taken apart: what can be computed with, its unit, its words, and what it is a value of.

Words are told from products of variables before any algebra sees them: to a computer algebra system
``east`` and ``seat`` are the same product of five letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megatron_rlsd.rewards.answer_spelling import tidy
from megatron_rlsd.rewards.units import KNOWN_UNITS, unit_name

_FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot"),
    *("sec", "csc", "log", "ln", "exp", "lim", "max", "min", "det"),
)
_BARE_FUNCTION = re.compile(rf"({'|'.join(_FUNCTIONS)})(?=[a-z]?$)")
_ALGEBRA = {"sqrt", "frac", "pi", "infinity", "inf", "infty", "theta", "alpha", "beta", "lambda"}
"""Letters in a row that are names or commands of algebra without their backslash."""
_SHORT_WORDS = {
    *("an", "as", "at", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "of"),
    *("on", "or", "so", "to", "up", "us", "we"),
}
_IGNORED = {
    *("a", "about", "an", "answer", "approximately", "are", "choice", "exactly", "final", "is"),
    *("option", "roughly", "the", "total"),
}
_SEPARATING = {"", "and", "or"}
_CURRENCY = re.compile(r"\\\$|(?:USD|US\\\$|EUR|GBP|Rs\.?|INR)(?=\s*[\d\\])")
_TOKEN = re.compile(
    r"\\text\{(?P<text>[^{}]*)\}|(?P<command>\\[a-zA-Z]+)|(?P<letters>[a-zA-Z]+)|(?P<other>.)",
    re.DOTALL,
)
_POWER = re.compile(r"\s*\^\s*(?:\{\s*(-?\d)\s*\}|(-?\d))")
_BASE = re.compile(r"(?<=[\dA-F])\s*_\s*(?:\{\s*(?:\\text\{)?(\w+)\}?\s*\}|(\d))\s*$")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"} | {
    "eight": "8", "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"
}  # fmt: skip
_DEGREE = re.compile(r"\^\\circ\s*(?:\\text\{\s*([CF])\s*\}|([CF])(?![a-zA-Z]))?")
_RATE = re.compile(r"(?<=\d)\s*((?:mi|km|cm|ft|m)\s*/\s*(?:s|sec|h|hr|min)(?:\^2)?)\s*$")
_PERCENT = re.compile(r"\\?%|\\text\{\s*(?:percent|pct)\s*\}|(?<![a-zA-Z])percent(?![a-zA-Z])")
_VALUE_END = re.compile(r"[\w)\]}!]\s*$")
_CHOICE = re.compile(r"\(?([A-J])\)?[.:]?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])\s*\S.*", re.DOTALL)


@dataclass(frozen=True)
class Parts:
    """One value, without what stands around it."""

    text: str
    """As it was given, in one spelling."""
    core: str
    """What algebra may read; empty for an answer that is words alone."""
    units: tuple[str, ...]
    """In order; see ``unit_name``. ``base 8`` of a number in another base is one as well."""
    words: tuple[str, ...]
    """In lower case and in order."""
    percent: bool
    choice: str
    """A to J where the answer is one of several choices, with or without its text."""

    @property
    def is_bare_choice(self) -> bool:
        """The letter alone, in brackets or not."""
        return bool(_CHOICE.fullmatch(self.text))

    @property
    def is_words(self) -> bool:
        """There is nothing to compute with."""
        return not self.core and bool(self.words)


def parts_of(text: str) -> Parts:
    """Take one value apart: no equation, and in the spelling of ``tidy``."""
    choice = _CHOICE.fullmatch(text) or _CHOICE_WITH_TEXT.fullmatch(text)
    rest, percents = _PERCENT.subn("", text)
    units: list[str] = []
    rest = _taken(_CURRENCY, rest, units, lambda mark: unit_name(mark[0].lstrip("\\")))
    rest = _taken(_DEGREE, rest, units, lambda mark: f"degree {mark[1] or mark[2] or ''}".strip())
    rest = _taken(_BASE, rest, units, lambda mark: f"base {_base(mark[1] or mark[2])}")
    rest = _taken(_RATE, rest, units, lambda mark: unit_name(mark[1]))
    core, words = _without_words(rest, units)
    return Parts(
        text=text,
        core=core.strip(" .,;:"),
        units=tuple(units),
        words=_telling(words, alone=not core.strip(" .,;:")),
        percent=percents > 0,
        choice=next((group for group in choice.groups() if group), "") if choice else "",
    )


def _telling(words: list[str], alone: bool) -> tuple[str, ...]:
    """Without words such as "about"; where there is nothing else, they are the answer."""
    telling = tuple(word for word in words if word not in _IGNORED)
    return telling or (tuple(words) if alone else ())


def _taken(
    pattern: re.Pattern[str],
    text: str,
    units: list[str],
    name: Callable[[re.Match[str]], str],
) -> str:
    units.extend(name(match) for match in pattern.finditer(text))
    return pattern.sub(" ", text)


def _base(name: str) -> str:
    return _BASES.get(name.lower(), name.lower())


def _without_words(text: str, units: list[str]) -> tuple[str, list[str]]:
    """What is left when words are gone; those behind a value are its unit."""
    core, words, at = "", [], 0
    unit = ""
    while match := _TOKEN.match(text, at):
        at = match.end()
        run = match["text"] if match["text"] is not None else match["letters"]
        if unit and (run is None or run.lower() in _SEPARATING) and match[0].strip():
            power = _POWER.match(text, match.start())
            at = power.end() if power else at
            units.append(unit_name(unit, next(filter(None, power.groups())) if power else ""))
            unit = ""
            if power:
                continue
        if run is None:
            core += match[0]
        elif run.strip(" ,").lower() in _SEPARATING:
            core += ","
        elif not unit and match["letters"] and not _is_word(run, behind=text[: match.start()]):
            core += _algebra(run)
        elif unit or _VALUE_END.search(core):
            unit += f" {run}"
        else:
            words += re.findall(r"[^\W_]+", run.casefold())
    if unit:
        units.append(unit_name(unit))
    return core, words


def _is_word(run: str, behind: str) -> bool:
    """Are these letters, outside of any command for text, a word and no product of variables?

    After a number directly only a known unit is (5kg; 3xyz is a product), after a number and a
    space any word.
    """
    if run in _ALGEBRA or _BARE_FUNCTION.match(run) or len(run) < 2:
        return False
    if re.search(r"[\d})]$", behind):
        return run in KNOWN_UNITS
    if re.search(r"[\d})]\s+$", behind) and run in KNOWN_UNITS:
        return True
    return run.lower() in _SHORT_WORDS if len(run) == 2 else not _in_alphabetical_order(run)


def _in_alphabetical_order(run: str) -> bool:
    """abc, XYZ, ABCD: points or variables."""
    return all(ord(b) - ord(a) == 1 for a, b in pairwise(run))


def _algebra(run: str) -> str:
    function = _BARE_FUNCTION.match(run)
    return f"\\{function[0]} {run[function.end() :]}" if function else run


_SIDES = re.compile(r"(?<![<>!\\:])=(?!=)|\\approx(?![a-zA-Z])|\\in(?![a-zA-Z])")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])|!=")
_COMMANDS_OF_VALUES = re.compile(
    r"\\(?:frac|sqrt|pi|times|cdot|div|pm|infty|binom|choose|circ|cup|cap|emptyset|begin\{\w*matrix\}"
    rf"|end\{{\w*matrix\}}|overline|{'|'.join(_FUNCTIONS)})(?![a-zA-Z])"
)
_NAME = re.compile(
    r"(?:\\(?:sin|cos|tan|cot|sec|csc|log|ln|angle|triangle|overline|vec|measuredangle)\s*)*"
    r"(?:\\?[a-zA-Z]+|\{[a-zA-Z]+\}|\\text\{[^{}]*\}|\|[A-Z]+\||\[[A-Z]+\]|\([a-z](?:\s*,\s*[a-z])+\))"
    r"'*(?:\s*_\s*(?:\w|\{[^{}]*\}))?\s*(?:\([^()=]*\))?"
)
"""x, S_{10}, f(2), \\tan A, \\angle ABC, (x, y): what an answer may be called."""


_SEPARATOR = re.compile(r"[,;]|\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")


@dataclass(frozen=True)
class Stated:
    """What an answer states: one value, perhaps with the names it is a value of."""

    text: str
    names: tuple[str, ...]
    """Sides that name what the value is of; empty where the answer is the value alone."""
    value: str | None
    """None: a chain of several values, such as 6 = 5, which is not an answer; or a whole
    equation."""
    is_equation: bool = False
    """It is a relation between variables, such as x^2 + y^2 = 1: the answer is the equation."""


def stated(text: str) -> Stated:
    """Tell the value of an answer, in the spelling of ``tidy``, from names: x = 5 states 5."""
    sides = [side.strip() for side in _outside_brackets(_SIDES, text)]
    if len(sides) == 1 or _RELATION.search(text):
        return Stated(text, (), text)
    values = [at for at, side in enumerate(sides) if _is_value(side)]
    if len(values) > 1 or not all(sides):
        return Stated(text, (), None)
    at = values[0] if values else len(sides) - 1
    names = [side for number, side in enumerate(sides) if number != at]
    if all(_NAME.fullmatch(name) for name in names):
        return Stated(text, tuple(re.sub(r"\s", "", name) for name in names), sides[at])
    return Stated(text, (), None, is_equation=True)


def _is_value(side: str) -> bool:
    """Without a variable and without a word that names something: a number, a set, a matrix."""
    parts = parts_of(side)
    return not parts.words and not re.search(r"[a-zA-Z\\]", _COMMANDS_OF_VALUES.sub("", parts.core))


def pieces(text: str) -> list[str]:
    """x = 1, y = 2 in its parts; anything else, a list of plain values too, is one."""
    found = [piece.strip() for piece in _outside_brackets(_SEPARATOR, text)]
    stating = [piece for piece in found if len(_outside_brackets(_SIDES, piece)) > 1]
    return found if len(found) > 1 and len(stating) == len(found) else [text]


def _outside_brackets(separator: re.Pattern[str], text: str) -> list[str]:
    """The text split where the separator stands in no bracket: the = of a sum's limit is none."""
    found, depth, start = [], 0, 0
    for match in re.finditer(rf"(?P<bracket>[(){{}}\[\]])|{separator.pattern}", text):
        if match["bracket"]:
            depth += 1 if match["bracket"] in "({[" else -1
        elif depth == 0:
            found.append(text[start : match.start()])
            start = match.end()
    return [*found, text[start:]]


def read(answer: str) -> list[Stated]:
    """What an answer states: one item, or several for x = 1, y = 2."""
    return [stated(piece) for piece in pieces(tidy(answer))]
