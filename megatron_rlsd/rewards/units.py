"""Names of units: one for each, so that 5 hrs is 5 hours and 5 cm is not 5 cm^2."""

from __future__ import annotations

import re

_SPELLINGS = {
    "dollar": "$ dollar usd us$ bucks", "cent": "cent", "euro": "eur euro", "rupee": "rs inr rupee",
    "pound sterling": "gbp", "percent": "percent pct",
    "millimeter": "mm millimeter millimetre", "centimeter": "cm centimeter centimetre",
    "decimeter": "dm decimeter decimetre", "meter": "m meter metre",
    "kilometer": "km kilometer kilometre", "inch": "in inch inches", "foot": "ft foot feet",
    "yard": "yd yard", "mile": "mi mile",
    "gram": "g gram gm", "kilogram": "kg kilogram kgs", "milligram": "mg milligram",
    "pound": "lb lbs pound", "ounce": "oz ounce", "ton": "ton tonne",
    "liter": "l liter litre", "milliliter": "ml milliliter millilitre", "gallon": "gal gallon",
    "second": "s sec second", "minute": "min minute mins", "hour": "h hr hour hrs",
    "day": "day", "week": "wk week", "month": "month", "year": "yr year yrs",
    "degree": "degree deg", "radian": "rad radian", "joule": "j joule", "newton": "n newton",
    "watt": "w watt", "kilowatt": "kw kilowatt", "volt": "v volt", "ohm": "ohm",
    "kelvin": "k kelvin", "mole": "mol mole", "hertz": "hz hertz", "pascal": "pa pascal",
    "kilojoule": "kj kilojoule", "nanometer": "nm nanometer", "electronvolt": "ev electronvolt",
    "mile / hour": "mph", "kilometer / hour": "kph kmh kmph",
    "square unit": "sq", "unit": "unit",
}  # fmt: skip
_NAMES = {
    spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()
}
KNOWN_UNITS = frozenset(
    form
    for spelling in _NAMES
    if len(spelling) > 1 and spelling != "in"
    for form in (spelling, f"{spelling}s", spelling.upper(), spelling.capitalize())
) | {"mL", "kW", "kJ", "Hz", "Pa", "eV"}
"""What is a unit directly after a number, outside of any command for text."""
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


def unit_name(text: str, power: str = "") -> str:
    """The one name of a unit: ``sq. ft`` and ``ft`` with power 2 are both ``foot ^2``.

    power: an exponent that stands behind the text, empty for none. Words that are not a known unit
    are in lower case and without the s of a plural.
    """
    names: list[str] = []
    for token in re.findall(r"[^\W\d_]+|\d|[/$^-]", text):
        word = token.lower()
        if word in _POWERS:
            power = power or _POWERS[word]
        elif word == "per":
            names.append("/")
        elif token.isdigit():
            power = token
        elif token not in "^-":
            names.append(_singular(word))
    return " ".join(names) + (f" ^{power}" if power not in ("", "1") else "")


def _singular(word: str) -> str:
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _NAMES:
            return _NAMES[form]
    return word.removesuffix("s") if len(word) > 3 else word
