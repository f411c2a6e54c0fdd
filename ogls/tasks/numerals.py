"""Numbers are read exactly as they are written: decimals, fractions, powers of ten, numerals of other bases."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")
_N = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?:\.\d+)?")
_FRACTION = re.compile(
    rf"(?P<whole>\d+(?=\s*\\frac)|\d+\s+(?=\d))?\s*(?:\\frac\s*(?:\{{\s*(?P<a>[+-]?{_N})\s*\}}|(?P<b>\d))\s*"
    rf"(?:\{{\s*(?P<c>[+-]?{_N})\s*\}}|(?P<d>\d))|(?P<e>{_N})\s*/\s*(?P<f>{_N}))"
)
_SCIENTIFIC = re.compile(
    rf"(?:(?P<m>{_N})\s*(?:[eE](?=[+-]?\d)|(?:\\times|\\cdot|\*|x)\s*10\s*\^)|10\s*\^)\s*"
    r"(?:\{\s*(?P<p>[+-]?\d{1,4})\s*\}|(?P<q>[+-]?\d{1,4}))"
)


_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")


def exact(text: str) -> Fraction | None:
    r"""Returns the value of a number as it is written: 1,080 or 2\frac{1}{2} or 3/4 or 1.2e-8 or 1.2\times 10^{-8}."""
    text = text.strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text.startswith(("-", "+")) else text
    if not text or len(text) >= 1000 or text[0] in "+-":
        return None
    if _NUMBER.fullmatch(text) or _SPACED.fullmatch(text):
        return sign * Fraction(text.replace(",", "").replace(" ", "").removesuffix("."))
    if found := _FRACTION.fullmatch(text):
        above, below = (_decimal(found[k] or found[m] or found[n]) for k, m, n in ("abe", "cdf"))
        return None if below == 0 else sign * (int(found["whole"] or 0) + above / below)
    if found := _SCIENTIFIC.fullmatch(text):
        power = int(found["p"] or found["q"])
        return sign * _decimal(found["m"] or "1") * Fraction(10) ** power if abs(power) <= 1000 else None
    if found := _REPEATING.fullmatch(text):
        fixed, repeated = _decimal(f"{found[1] or 0}.{found[2] or 0}"), Fraction(int(found[3]), 10 ** len(found[3]) - 1)
        return sign * (fixed + repeated / 10 ** len(found[2]))
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removesuffix("."))


_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BASE_NAMES = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
"""
_BASES = {name: base for base, name in enumerate(_BASE_NAMES.split(), start=2)}
_BASES |= {str(base): base for base in range(2, 37)}
_NUMERAL = re.compile(
    r"\(?\s*(?:\\text\{)?([0-9A-Z][0-9A-Z, ]*?)\}?\s*\)?\s*"
    r"(?:_\s*\{?\s*\(?|\(?\s*(?=(?:\\text\{)?\s*(?:in\s+)?base))\s*"
    r"(?:\\text\{)?\s*(?:(?:in\s+)?base[\s-]*)?\}?\s*(\d+|[a-z]+)\s*\)?\s*\}?\s*\}?\)?"
)
_LONE_DIGIT = re.compile(r"\\text\{([A-Z])\}")


def numeral(text: str) -> tuple[Fraction, int] | None:
    """Returns value and base of 43_5, 43_{five}, 1B_{16}, 101 (base 2); None for all else, or a digit too large."""
    found = _NUMERAL.fullmatch(_LONE_DIGIT.sub(r"\1", text))
    if not found or found[2] not in _BASES:
        return None
    base, digits = _BASES[found[2]], found[1].replace(",", "").replace(" ", "")
    if not any(digit.isdigit() for digit in digits) and (base < 11 or len(digits) < 2):
        return None  # a letter with an index
    if any(_DIGITS.index(digit) >= base for digit in digits):
        return None
    return Fraction(int(digits, base)), base
