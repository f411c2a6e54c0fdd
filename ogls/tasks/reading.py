"""A mathematical answer says one value or a list of values, each with its unit, base and left side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from ogls.tasks.expressions import formula, is_closed
from ogls.tasks.notation import FUNCTIONS, LIST_SEPARATORS, clean, enclosed, split, tokens_of, vocabulary
from ogls.tasks.numerals import exact, numeral
from ogls.tasks.statements import Listing, Statement, Term, Value, same_term
from ogls.tasks.units import peel

_MAX_ITEMS, _MAX_NESTING = 100, 4
_RELATIONS = vocabulary(
    r"< > \le \ge \ne \equiv \notin \subset \subseteq \to \mapsto \cup \cap \setminus \mid \sim \cong \iff"
)
_CLOCK = re.compile(r"(\d{1,2}:\d\d)\s*(?:\\text\{)?\s*([ap])\.?\s?m\.?\s*\}?", re.IGNORECASE)
_LONE_LETTER = re.compile(r"^\\text\{(.)\}$")
_INVERSE = re.compile(r"\^\{?-1\}?")
_PLACES = re.compile(r"-?\d+\.(\d{2,})")
_VERBS = vocabulary("is are was were has have form forms see prove proof proved omitted vary")  # of prose
_MISSING = frozenset(("nan", "null", "n/a", "notfound", "not found", "inf", "-inf"))
_MOST_WORDS = 4


def read_gold(answer: str) -> tuple[Statement, ...]:
    """`read` for gold answers: prose is none, nor is what stands for a missing value."""
    return () if answer.strip().casefold() in _MISSING else read(answer, gold=True)


@lru_cache(maxsize=4096)
def read(answer: str, gold: bool = False) -> tuple[Statement, ...]:
    """Returns what the answer may say: two readings for 1,234, a number or a list; none where it cannot be read.

    An answer that contradicts itself, such as 11 = 10, cannot be read either.
    """
    if answer.isdecimal():
        return (Value((Term(answer, number=Fraction(answer)),)),)
    text = clean(answer)
    ambiguous = re.search(r"\d,\d{3}", text) is not None
    readings = [_list(text, gold, thousands) for thousands in ((True, False) if ambiguous else (False,))]
    return tuple(dict.fromkeys(reading for reading in readings if reading is not None))


def _list(text: str, gold: bool, thousands: bool, depth: int = 0) -> Statement | None:
    parts = split(text, LIST_SEPARATORS, thousands)
    if len(parts) > 1 and (not parts[-1] or " and " in text or " or " in text):  # "1, 2, and 3"
        parts = [part for part in parts if part]
    parts = [sign for part in parts for sign in _both_signs(part)]
    if not parts or len(parts) > _MAX_ITEMS or depth > _MAX_NESTING:
        return None
    items = []
    for part in parts:
        item = _item(part, gold, thousands, depth)
        if item is None:
            return None
        items.append(item)
    return items[0] if len(items) == 1 else Listing("", tuple(items), text)


def _both_signs(part: str) -> list[str]:
    r"""Returns both values of 1 \pm \sqrt{2}; what stands in braces is a list of its own."""
    if r"\pm" not in part or enclosed(part)[0] == r"\{":
        return [part]
    found = []
    for sign, opposite in ("+-", "-+"):
        other = part.replace(r"\pm", sign).replace(r"\mp", opposite)
        found.append(re.sub(r"(^|[=({,])\s*\+", r"\1", other))
    return found


def _item(text: str, gold: bool, thousands: bool, depth: int) -> Statement | None:
    text = clean(text)
    bracket, inside = enclosed(text)
    if bracket and numeral(text) is None:
        if bracket == r"\{" and not inside:
            return Listing("{", (), text)
        within = _list(inside, gold, thousands, depth + 1)
        if bracket == "{" or within is None or (bracket == "(" and not _is_bare(within)):
            return within  # braces that group, parentheses around one value
        items = within.items if isinstance(within, Listing) and _is_bare(within) else (within,)
        return Listing("(" if bracket == "(" else "{", items, text)
    if any(token in _RELATIONS for token in tokens_of(text)):
        return Value((Term(text),)) if _is_formula(text) else None
    return _equation(text, gold, thousands, depth)


def _is_bare(reading: Statement) -> bool:
    return isinstance(reading, Listing) and reading.bracket == ""


def _equation(text: str, gold: bool, thousands: bool, depth: int) -> Statement | None:
    sides = split(text, frozenset(("=", r"\approx", r"\in")))
    if len(sides) == 1:
        terms = _terms(text, gold)
        return Value(tuple(terms)) if terms else None
    if any(not side for side in sides):
        return None
    for side in sides[1:]:
        if enclosed(side)[0] in ("(", r"\{") and isinstance(within := _item(side, gold, thousands, depth + 1), Listing):
            return within
    read = [(side, _terms(side, gold)) for side in sides]
    closed = [terms for _, terms in read if terms and _is_number(terms[0])]
    name = next((re.sub(r"\s+", "", side) for side, terms in read if terms not in closed), None)
    terms = [term for found in (closed or [read[-1][1]]) for term in found]
    if not terms or not _agree(closed, r"\approx" in text):
        return None
    compound = name is not None and len(split(_INVERSE.sub("", name), frozenset("+-*/^"))) > 1
    return Value(tuple(terms), name, text, compound)


def _is_number(term: Term) -> bool:
    return term.number is not None or (term.words is None and is_closed(term.latex))


def _agree(closed: Sequence[Sequence[Term]], approximately: bool) -> bool:
    """Returns whether all sides of a chain of equations are one number, written out or rounded."""
    first = closed[0][0] if closed else None
    for term, *_ in closed[1:]:
        if first and not (same_term(replace(first, base=term.base), term) or _rounded(first, term, approximately)):
            return False
    return True


def _rounded(first: Term, second: Term, approximately: bool) -> bool:
    """Returns whether the second is the first, rounded to its decimals: two at least, any after an approx sign."""
    if not approximately and not _PLACES.fullmatch(second.latex):
        return False
    if second.number is None or first.percent != second.percent:
        return False
    places = len(second.latex.partition(".")[2])
    if first.number is not None:
        return abs(first.number - second.number) * 2 * 10**places <= 1
    made = formula(first.latex)
    value = None if made is None else made.evalf(40 + places)
    if value is None or not value.is_Float:
        return False
    return abs(Fraction(str(value)) - second.number) * 2 * 10**places <= 1


def _terms(text: str, gold: bool) -> list[Term]:
    """Returns the readings of one value; none where it is no formula, and no words that could be an answer."""
    if (based := numeral(text)) is not None:
        return [Term(text, number=based[0], base=based[1])]
    if (number := exact(text)) is not None:
        return [Term(text, number=number)]
    if clock := _CLOCK.fullmatch(text):
        return [Term(text, words=f"{clock[1]}{clock[2]}m".casefold())]
    text = _LONE_LETTER.sub(r"\1", text)
    quantity = peel(text, gold)
    value, percent = clean(quantity.value.removesuffix("%")), quantity.value.endswith("%")
    bracket, inside = enclosed(value)
    value = inside if bracket in ("(", "{") else value
    number = exact(value)
    if number is not None:
        found = [Term(value, number=number * quantity.factor, unit=quantity.unit, percent=percent)]
    elif (words := _words(text, gold)) is not None:
        return [Term(text, words=words)] if words else []
    elif quantity.factor == 1 and _is_formula(value):
        found = [Term(value, unit=quantity.unit, percent=percent)]
        found += [Term(text, words=text.casefold())] if text.isalpha() and len(text) > 1 else []
    else:
        found = []
    if quantity.doubtful and _is_formula(text):
        found.append(Term(text))
    return found


def _is_formula(latex: str) -> bool:
    return formula(latex) is not None


def _words(text: str, gold: bool) -> str | None:
    """Returns the words of a text that is nothing but words and numbers; "" for prose, None for a formula."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text)
    tokens = re.findall(r"[^\W\d_]+|\d+|\S", plain)
    letters = [token for token in tokens if token[0].isalpha()]
    if any(not token.isalnum() and token not in ".,'-:()?&/" for token in tokens) or not letters:
        return None
    if not any(len(word) > 2 or r"\text" in text for word in letters) or letters[0] in FUNCTIONS:
        return None
    if len(letters) == len(tokens) == 1 and len(letters[0]) < 4 and r"\text" not in text:
        return None  # abc may be a product
    said = {word.casefold() for word in letters}
    if gold and (len(letters) > _MOST_WORDS or said & _VERBS):
        return ""
    return " ".join(token.casefold() for token in tokens if token.isalnum())
