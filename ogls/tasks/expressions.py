"""Formulas become sympy expressions by a grammar, never by evaluating text, and are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ogls.tasks.notation import FUNCTIONS

_MAX_DEPTH = 12
_REFUSED = (
    re.compile(r"\^\s*[{(]*\s*[+-]?\d{5,}"),  # 2^{100000}
    re.compile(r"\^\s*[{(]*\s*\d+\s*\^\s*[{(]*\s*\d"),  # 9^{9^9}
    re.compile(r"\d\s*\^\s*\{?\d+\}?\s*[)}]+\s*\^\s*\{?\d\d"),  # (9^{99})^{99}
    re.compile(r"\d{4,}\s*!|[)}!\]]\s*!"),  # 10000!, (10!)!
    re.compile(r"binom\s*\{?\s*\d{5,}|\d{5,}\s*\\choose"),  # \binom{100000}{5}
)
_NO_FORMULA = re.compile(
    r"(?<![_\d])\d+\s+\d|\d\s*_|#|\\ldots|\\dots|\.\.|\d\s*:\s*\d+\s*[A-Za-z]|<<|>>"  # 5 7; 43_6; a clock
)
_LONE_WRAPPER = re.compile(r"\\text\{([^{}])\}")
_NO_WORDS = re.compile(r"\\(?:text|begin|end|math[a-z]+|overline|vec)\s*\{[^{}]*\}")
_LETTERS = re.compile(r"\\?[A-Za-z]+")
_POINTS = ((7, 3), (-11, 5), (13, 29))  # values of the variables start at these fractions
_DIGITS, _CANCELLED = 15, 500


def refused(answer: str) -> bool:
    """Returns whether evaluating this would take unreasonable time or memory, as far as its spelling tells."""
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > _MAX_DEPTH or any(pattern.search(answer) for pattern in _REFUSED)


@lru_cache(maxsize=4096)
def formula(latex: str) -> Any | None:
    """Returns the sympy object; None for what the grammar does not know, for prose, and for what `refused` refuses."""
    text = _LONE_WRAPPER.sub(r"\1", latex)
    words = (word for word in _LETTERS.findall(_NO_WORDS.sub("", text)) if word[0] != "\\")
    if not text or refused(text) or _NO_FORMULA.search(text):
        return None
    if any(len(word) > 3 and word not in FUNCTIONS for word in words):
        return None
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex

    try:
        plain = normalize_latex(
            text, NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
        )
        made = latex2sympy(
            plain,
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return _exactly(made)
    except MemoryError:
        raise
    except Exception:  # whatever a grammar says of untrusted text: it is no formula
        return None


def _exactly(made: Any) -> Any:
    """Decimals become the fractions that they stand for, the letter i the imaginary unit."""
    from sympy import Float, I, Rational, Symbol

    if not hasattr(made, "xreplace"):
        return made
    exact = {number: Rational(str(number)) for number in made.atoms(Float)}
    return made.xreplace(exact | {Symbol("i", real=True): I})


def is_closed(latex: str) -> bool:
    """Returns whether it is one number: a formula without variables."""
    from sympy import Expr

    made = formula(latex)
    return isinstance(made, Expr) and not made.free_symbols and made.is_number


def equal(gold: str, answer: str) -> bool:
    """Returns whether two formulas say the same. Numbers are compared exactly, not to some digits."""
    first, second = formula(gold), formula(answer)
    if first is None or second is None:
        return False
    found = _same_number(first, second)
    if found is None:
        from math_verify import verify

        found = verify([first], [second], float_rounding=60, numeric_precision=300, timeout_seconds=None)
    return bool(found)


def _same_number(first: Any, second: Any) -> bool | None:
    """Returns whether two terms are equal, variables at three points; None where that cannot be said."""
    from sympy import Expr, Rational, nan, oo, zoo

    if not all(isinstance(side, Expr) for side in (first, second)):
        return None
    if first == second:
        return None if first in (nan, zoo) else True
    names = sorted(first.free_symbols | second.free_symbols, key=str)
    verdicts = []
    for top, bottom in _POINTS if names else _POINTS[:1]:
        point = {name: Rational(top + 2 * k, bottom) for k, name in enumerate(names)}
        a, b = (side.doit().xreplace(point).doit() for side in (first, second))
        if (a.is_Rational and b.is_Rational) or oo in (abs(a), abs(b)):
            verdicts.append(a == b)
        elif a.is_number and b.is_number and nan not in (a, b) and zoo not in (a, b):
            verdicts.append(_vanishes(a - b))
        if verdicts and not verdicts[-1]:
            return False
    return all(verdicts) if verdicts else None


def _vanishes(difference: Any) -> bool:
    """Returns whether no digit of a number is certain, however many are calculated."""
    if difference.is_zero:
        return True
    value = difference.evalf(_DIGITS, maxn=_CANCELLED)
    parts: Sequence[Any] = value.as_real_imag()
    return all(part == 0 or getattr(part, "_prec", 53) == 1 for part in parts)
