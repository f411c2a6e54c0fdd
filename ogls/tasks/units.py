"""Words and units follow a value: ``18 eggs``, ``60 km per hour``, ``5 million``. They are peeled off."""

from __future__ import annotations

import re
from typing import NamedTuple

from ogls.tasks.notation import LETTER_UNITS, tokens_of, vocabulary

_UNIT_NAMES = """
mm:millimeter,millimetre cm:centimeter,centimetre dm:decimeter,decimetre m:meter,metre km:kilometer,kilometre
in:inch,inche ft:foot,feet yd:yard mi:mile mg:milligram g:gram,gm kg:kilogram,kilo lb:pound oz:ounce t:ton,tonne
ml:milliliter,millilitre,mL cl:centiliter l:liter,litre,L gal:gallon qt:quart ms:millisecond s:sec,second
min:minute h:hr,hour d:day wk:week mo:month yr:year N:newton J:joule kJ:kilojoule W:watt kW:kilowatt V:volt
A:ampere,amp Hz:hertz Pa:pascal K:kelvin C:celsius F:fahrenheit deg:degree rad:radian
dollar:usd,USD,buck,Dollar cent:cents euro:EUR
"""
_UNITS = {
    alias: name
    for name, _, aliases in (row.partition(":") for row in _UNIT_NAMES.split())
    for alias in (name, *aliases.split(","))
}
_COMPOUND = {"mph": ("mi", "/", "h"), "kmh": ("km", "/", "h"), "kph": ("km", "/", "h"), "fps": ("ft", "/", "s")}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3", "cu": "3"}
_CONNECTING = vocabulary("of per in the a an each by about on")
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that say something of the number itself, so that it is not the answer, or not all of it.
_SAYING = vocabulary("""
not no nor or and but if when where unless except than maybe wrong incorrect false instead is are was isn base mod
modulo choose plus minus divided squared cubed factorial negative repeating recurring remainder half halves through
until versus below thirds fifths sixths sevenths eighths ninths tenths hundredths thousandths
""")
_MOST_WORDS = 6


class Quantity(NamedTuple):
    """A quantity is a value without the words after it, their unit if it is known, and what they multiply it by.

    `doubtful`: what was taken for a unit is a lone letter, which may as well be a variable.
    """

    value: str
    unit: str | None = None
    factor: int = 1
    doubtful: bool = False


def peel(text: str, gold: bool) -> Quantity:
    r"""Returns the value without the words and units after it: ``18 eggs``, ``5\text{ cm}^2``, ``9 (apples)``.

    Letters that may be a product stay with the value: ``5x``, ``10ab``; of a gold answer also ``5 m``.
    """
    tokens = tokens_of(text)
    i = start = len(tokens)
    lone = False
    while i > 0:
        token = tokens[i - 1]
        if token.isspace() or token in ("/", ".", "-", r"\cdot", "'") or (token in _CONNECTING and start < len(tokens)):
            i -= 1
        elif token == ")" and (bracket := _bracketed(tokens, i)) is not None:
            i = start = bracket
        elif (exponent := _exponent(tokens, i)) < i:
            i = exponent
            start = i if r"\circ" in tokens[i : i + 4] else start
        elif (kind := _unit_word(tokens, i, gold)) is not None:
            i -= 1
            start, lone = i, lone or kind == "lone"
        else:
            break
    if all(token.isspace() or token in _CONNECTING for token in tokens[i:start]):
        start = i
    value, phrase = "".join(tokens[:start]).rstrip("- "), tokens[start:]
    words = [
        word for token in phrase for word in re.findall(r"[^\W\d_]+", token.removeprefix(r"\text")) if word != "circ"
    ]
    if not phrase or not value or value[-1] in "^_+*/=,(" or len(words) > _MOST_WORDS:
        return Quantity(text)
    if any(word.casefold() in _SAYING for word in words):
        return Quantity(text)
    factor = 1
    if words and words[0].casefold() in _MULTIPLIERS:
        factor, words = _MULTIPLIERS[words[0].casefold()], words[1:]
    return Quantity(value, _unit(phrase, words), factor, lone and not gold)


def _bracketed(tokens: list[str], end: int) -> int | None:
    """Returns where the bracket begins that ends before `end`, if it holds words or units alone and follows a value."""
    for i in range(end - 2, max(-1, end - 16), -1):
        if tokens[i] == "(":
            inside = [t for t in tokens[i + 1 : end - 1] if not t.isspace()]
            words = all(
                t.startswith(r"\text{") or (t.isalpha() and (len(t) > 2 or t in _UNITS or t in _CONNECTING))
                for t in inside
            )
            return i if inside and words and i > 0 else None
        if tokens[i] == ")":
            return None
    return None


def _exponent(tokens: list[str], end: int) -> int:
    r"""Returns where an exponent of a unit, or ``^\circ``, begins that ends at `end`; `end` for none."""
    for shape in (("^", "{", "#", "}"), ("^", "#"), ("^", "{", "-", "#", "}"), ("^", "{", "-", "1", "}")):
        part = tokens[max(0, end - len(shape)) : end]
        if len(part) == len(shape) and all(
            a == b or (b == "#" and a in ("2", "3", "1", r"\circ")) for a, b in zip(part, shape, strict=True)
        ):
            return end - len(shape)
    return end


def _unit_word(tokens: list[str], end: int, gold: bool) -> str | None:
    """Returns whether the token before `end` can be a word after a value: "word", "lone" for a letter, None for no."""
    token, before = tokens[end - 1], tokens[end - 2] if end > 1 else ""
    if token.startswith(r"\text{"):
        return "word"
    if not token.isalpha():
        return None
    known = token in _UNITS or token.casefold().removesuffix("s") in _UNITS or token.casefold() in _COMPOUND
    if len(token) == 1:
        apart = before.isspace() or before in ("/", "}")
        return "lone" if token in LETTER_UNITS and apart and not gold else None
    if known or token.casefold() in _MULTIPLIERS or token.casefold() in _POWERS:
        return "word"
    spaced = before.isspace() or before in ("/", "-", ".", "(")
    vowel = any(letter in "aeiouy" for letter in token.casefold())
    return "word" if vowel and len(token) >= (3 if spaced else 4) and (spaced or not gold) else None


def _unit(phrase: list[str], words: list[str]) -> str | None:
    """Returns one name for the unit, such as ``km/h``; None where it is not known."""
    names: list[str] = []
    power = ""
    if "-" in phrase:  # m s^{-1}
        return None
    for token in re.findall(r"[^\W\d_]+|/|\d", "".join(phrase)):
        word = token.casefold()
        if token in ("text", "circ"):
            names += ["deg"] if token == "circ" else []
        elif word in _MULTIPLIERS:
            continue
        elif token == "/" or word == "per":
            names.append("/")
        elif token.isdigit() or word in ("squared", "cubed"):
            names.append(_POWERS.get(word) or token)
        elif word in _POWERS:
            power = _POWERS[word]
        elif word in _COMPOUND:
            names += _COMPOUND[word]
        else:
            name = _UNITS.get(token) or _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
            if name is None:
                return None
            names += [name, power]
            power = ""
    return "".join(names) or None
