"""One spelling for what is written in many ways, before an answer is taken apart.

Sizes, spaces and fonts of LaTeX are dropped, Unicode signs become commands, thousands separators
and exponents become plain digits. No rule changes a value.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/",
    "√": r"\sqrt", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "°": r"^\circ ", "º": r"^\circ ", "′": "'", "’": "'", "∅": r"\emptyset ", "¢": r"\text{cents}",
    "€": r"\text{euros}", "£": r"\text{pounds sterling}", "¥": r"\text{yen}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SAME = [
    (re.compile(r"\\text[a-z]*\s*\{\s*\}"), " "),
    (re.compile(r"\b(sq|cu)\s*\."), r"\1"),
    (re.compile(r"\\(?:d|t|c)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\(?:degree|deg)(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ"),
    (re.compile(r"\\(?:left|right|[bB]ig[lr]?|displaystyle|textstyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:quad|qquad|enspace|thinspace|nobreakspace)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))"), ","),  # the narrow comma of thousands
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\{\}"), " "),
    (re.compile(r"\{,\}"), ","),
]  # fmt: skip
_FONT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathbf|mathit|mathsf"
    r"|mathtt|mbox|hbox|boldsymbol|bm|operatorname|emph|underline)\s*\{([^{}]*)\}"
)
_NOT_A_WORD = re.compile(r"\s*(?:\(?[a-zA-Z]\)?|\\\$|[^a-zA-Z]*)\s*")
"""Content of a font command that is not text: a letter, a choice such as (B), digits, a sign."""
_UPRIGHT_UNITS = frozenset("msghLlNJKWVACFMT")
"""Letters that are a unit where they stand upright behind a value, and a variable elsewhere."""
_KEPT_NAMES = {"lcm", "gcd", "tr", "rank", "arccot", "sgn", "Re", "Im"}
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?P<mark>,|\s)\d{3})(?:(?P=mark)\d{3})*(?![\d,])")
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,4})(?!\w)")
_MIXED = re.compile(r"(?<![\w.)}])(\d+)\s+(\d+)/(\d+)(?![\w.])")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_WIDEST_EXPONENT = 400


def tidy(text: str) -> str:
    r"""The answer in one spelling; the text inside ``\text{}`` keeps its words.

    ``$\dfrac{1}{2}$`` and ``½`` become ``\frac{1}{2}``, ``1{,}000`` and ``1\,000`` become ``1000``,
    ``\mathrm{~cm}`` becomes ``\text{ cm}``; a dollar sign that opens no formula becomes ``\$``.
    """
    text = _without_formula_marks(text.strip())
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run[0].translate(_SUPERSCRIPTS) + "}", text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    text = _one_font(text)
    if not re.search(r"[(\[]|\\\{", text):  # (1,234) is a point
        text = _GROUPED.sub(lambda number: re.sub(r"[,\s]", "", number[0]), text)
    text = _EXPONENT.sub(_written_out, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_as_fraction, text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,; ").strip()


def _without_formula_marks(text: str) -> str:
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    parts = re.split(r"(?<!\\)\$\$?", text)
    # An odd number of them: the first is the sign of a currency.
    return " ".join(parts) if len(parts) % 2 else r"\$".join([parts[0], " ".join(parts[1:])])


def _one_font(text: str) -> str:
    r"""``\text{}`` for every font, unwrapped where no word is in it; inner fonts first."""
    held: list[str] = []

    def replace(match: re.Match[str]) -> str:
        content = match[1]
        behind = text[: match.start()].rstrip()
        is_unit = content.strip() in _UPRIGHT_UNITS and re.search(r"[\d)}]$", behind)
        if (_NOT_A_WORD.fullmatch(content) and not is_unit) or "\ue000" in content:
            # A letter must not become part of the command before it.
            return f" {content}" if content[:1].isalpha() else content
        if content in _KEPT_NAMES and match[0].startswith(r"\operatorname"):
            held.append(match[0])
        else:
            held.append(rf"\text{{{content}}}")
        return f"\ue000{len(held) - 1}\ue001"

    text = text.replace("\ue000", "").replace("\ue001", "")
    before = None
    while before != text:
        before = text
        text = _FONT.sub(replace, text)
    return re.sub("\ue000(\\d+)\ue001", lambda mark: held[int(mark[1])], text)


def _written_out(number: re.Match[str]) -> str:
    value = Decimal(number[1]).scaleb(int(number[2]))
    if abs(value.adjusted()) > _WIDEST_EXPONENT:
        return rf"{number[1]} \times 10^{{{number[2]}}}"
    return format(value, "f")


def _as_fraction(number: re.Match[str]) -> str:
    """0.1(6) = (16 - 1) / 90, in digits that any reader of fractions knows."""
    whole, fixed, repeated = number[1] or "0", number[2], number[3]
    if len(whole + fixed + repeated) > 100:
        return number[0]
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"
