"""Which tokens of a rollout are learned from, and how much each of them counts.

A privileged teacher contradicts a prefix that it would not have written, so tokens after the first error can carry a
harmful signal. The choice is therefore independent of everything else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ogls.records import Span
from ogls.system.seeds import derive


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Tokens [first, last) that contain the characters [start, end) of `span`.

    `offsets` come from decoding the sampled ids. An empty span stands for the token that begins there, and
    a span past the text for the last token: the rollout ended too early.
    """
    start, end = span[0], max(span[1], span[0] + 1)
    inside = [t for t, (low, high) in enumerate(offsets) if low < end and high > start]
    if not inside:
        return len(offsets) - 1, len(offsets)
    return inside[0], inside[-1] + 1


class TokenSelection(ABC):
    """Weights of the tokens of one rollout; `error` is its located first error as tokens [first, last)."""

    needs_error: ClassVar[bool] = False

    @abstractmethod
    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        """One number a token; 0 leaves it out. A right rollout has no error: `error` is then None."""


def _window(token_ids: Sequence[int], first: int, last: int) -> tuple[float, ...]:
    return tuple(1.0 if first <= t < last else 0.0 for t in range(len(token_ids)))


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token."""

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        return _window(token_ids, 0, len(token_ids))


@dataclass(frozen=True)
class FirstTokens(TokenSelection):
    """The first `count` tokens; OPSD and OGLS-SD use 1,024 of up to 8,192."""

    count: int = 1024

    def __post_init__(self) -> None:
        _positive("count", self.count)

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        return _window(token_ids, 0, self.count)


@dataclass(frozen=True)
class LastTokens(TokenSelection):
    """The last `count` tokens."""

    count: int = 128

    def __post_init__(self) -> None:
        _positive("count", self.count)

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        return _window(token_ids, len(token_ids) - self.count, len(token_ids))


@dataclass(frozen=True)
class UpToError(TokenSelection):
    """Everything up to and including the located error; all of a right rollout."""

    needs_error: ClassVar[bool] = True

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        return _window(token_ids, 0, len(token_ids) if error is None else error[1])


@dataclass(frozen=True)
class FromError(TokenSelection):
    """Everything from the located error on (ROSD, the mask of its loss); all of a right rollout."""

    needs_error: ClassVar[bool] = True

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        return _window(token_ids, 0 if error is None else error[0], len(token_ids))


@dataclass(frozen=True)
class ErrorSpan(TokenSelection):
    """The located error with `before` tokens before it and `after` tokens after it; all of a right rollout."""

    before: int = 0
    after: int = 0
    needs_error: ClassVar[bool] = True

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        if error is None:
            return _window(token_ids, 0, len(token_ids))
        return _window(token_ids, error[0] - self.before, error[1] + self.after)


@dataclass(frozen=True)
class DecayFromError(TokenSelection):
    """From the located error on, halved every `half_life` tokens; all of a right rollout."""

    half_life: float = 32.0
    needs_error: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("half_life", self.half_life)

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        if error is None:
            return _window(token_ids, 0, len(token_ids))
        rate = math.log(2) / self.half_life
        return tuple(math.exp(-rate * (t - error[0])) if t >= error[0] else 0.0 for t in range(len(token_ids)))


@dataclass(frozen=True)
class ShiftedError(TokenSelection):
    """Control: what `selection` takes of an error that was located `tokens` further on (negative: before it).

    Where the rollout ends, the shift ends.
    """

    selection: TokenSelection
    tokens: int
    needs_error: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _about_errors(self.selection, self)

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        if error is not None:
            first = min(max(0, error[0] + self.tokens), len(token_ids) - 1)
            error = first, min(first + error[1] - error[0], len(token_ids))
        return self.selection.weights(token_ids, error)


@dataclass(frozen=True)
class RandomPlace(TokenSelection):
    """Control: the tokens that `selection` takes of a wrong rollout, as many in a row, at a random place.

    Another suffix of equal size does not exist, so this is a block of equal size. Each place is as likely as any other,
    and a function of the rollout's tokens and `seed`.
    """

    selection: TokenSelection
    seed: int = 0
    needs_error: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _about_errors(self.selection, self)

    def weights(self, token_ids: Sequence[int], error: Span | None) -> tuple[float, ...]:
        weights = self.selection.weights(token_ids, error)
        taken = [t for t, weight in enumerate(weights) if weight]
        if error is None or not taken:
            return weights
        block = weights[taken[0] : taken[-1] + 1]
        before = derive(self.seed, "place", *token_ids) % (len(weights) - len(block) + 1)
        return (0.0,) * before + block + (0.0,) * (len(weights) - len(block) - before)


def _about_errors(selection: TokenSelection, control: TokenSelection) -> None:
    if not selection.needs_error:
        got = type(selection).__name__
        raise ValueError(f"{type(control).__name__} needs a selection that starts or ends at an error, got {got}")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
