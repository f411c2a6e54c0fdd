"""Statements are what answers say: values with unit, base and left side, and lists of them; they are compared here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ogls.tasks.expressions import equal


@dataclass(frozen=True)
class Term:
    """A term is one way of stating a value: a number if it can be read at once, else a formula, else words.

    Args:
        latex: the value without unit and percent sign
        number: the value of a plain number, a fraction, a numeral
        base: 10, except for a numeral that names another one
        unit: the unit that the words after the value name, where it is known
        percent: whether a percent sign follows
        words: the answer in lower case, where it is words and no mathematics
    """

    latex: str
    number: Fraction | None = None
    base: int = 10
    unit: str | None = None
    percent: bool = False
    words: str | None = None


@dataclass(frozen=True)
class Value:
    """A value is one thing that an answer states.

    Args:
        terms: the ways in which it is stated, at least one: sides of an equation, or readings of a doubtful spelling
        name: the side of an equation that is no number, such as x or f(x)
        relation: the whole equation
        compound: whether the name is a formula itself (x + y = 3), so that the value alone says less than the equation
    """

    terms: tuple[Term, ...]
    name: str | None = None
    relation: str | None = None
    compound: bool = False


@dataclass(frozen=True)
class Listing:
    """A listing is several values: without brackets or in braces in any order, in parentheses in theirs."""

    bracket: Literal["", "(", "{"]
    items: tuple[Value | Listing, ...]
    latex: str


Statement = Value | Listing


def same(gold: Statement, answer: Statement) -> bool:
    """Returns whether the answer says what the gold answer says."""
    if isinstance(gold, Value) and isinstance(answer, Value):
        return _same_value(gold, answer)
    if isinstance(gold, Listing) and isinstance(answer, Listing):
        return _same_listing(gold, answer)
    if isinstance(gold, Listing):
        if len(gold.items) == 1:
            return same(gold.items[0], answer)
        return bool(gold.bracket) and isinstance(answer, Value) and _states(answer, gold.latex)
    assert isinstance(answer, Listing)
    if answer.bracket != "(" and answer.items:
        return all(same(gold, item) for item in answer.items)
    return _states(gold, answer.latex)


def _states(value: Value, latex: str) -> bool:
    """Returns whether a value is a formula equal to this one: a vector that is also written as a tuple."""
    formulas = (term.latex for term in value.terms if term.number is None and term.words is None)
    return any(equal(latex, other) for other in formulas)


def _same_listing(gold: Listing, answer: Listing) -> bool:
    if gold.bracket == "(" and answer.bracket == "{":
        return False
    ordered = gold.bracket == "(" or _is_labelled(gold) != _is_labelled(answer)
    if ordered:
        return len(gold.items) == len(answer.items) and all(map(same, gold.items, answer.items))
    if len(gold.items) == len(answer.items):
        return _matched(gold.items, answer.items)
    return _matched(_distinct(gold.items), _distinct(answer.items))


def _is_labelled(listing: Listing) -> bool:
    """Returns whether each value has a name of its own, so that it matters which is which."""
    names = [item.name for item in listing.items if isinstance(item, Value)]
    return len(set(names)) == len(listing.items) and None not in names


def _matched(gold: Sequence[Statement], answer: Sequence[Statement]) -> bool:
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _distinct(items: Sequence[Statement]) -> list[Statement]:
    kept: list[Statement] = []
    for item in items:
        if not any(same(other, item) for other in kept):
            kept.append(item)
    return kept


def _same_value(gold: Value, answer: Value) -> bool:
    if gold.compound or (gold.name and answer.name and gold.name != answer.name):
        return bool(gold.relation and answer.relation) and equal(gold.relation or "", answer.relation or "")
    return any(same_term(g, a) for g in gold.terms for a in answer.terms)


def same_term(gold: Term, answer: Term) -> bool:
    if gold.words is not None or answer.words is not None:
        return gold.words == answer.words
    if gold.base != answer.base or (gold.unit and answer.unit and gold.unit != answer.unit):
        return False
    if gold.number is not None and answer.number is not None:
        if gold.number == answer.number:
            return True
        hundredths = [term.number / 100 if term.percent else term.number for term in (gold, answer) if term.number]
        return gold.percent != answer.percent and len(hundredths) == 2 and hundredths[0] == hundredths[1]
    return equal(gold.latex, answer.latex)
