"""A selection says which tokens of a rollout are learned, and by how much.

A privileged teacher contradicts a prefix that it would not have written, so tokens after the first error can carry a
harmful signal. Which tokens count is therefore a choice of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ogls.records import Need, Rollout, Span
from ogls.system.ranges import check
from ogls.system.seeds import derive


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Returns the tokens [first, last) that contain the characters [start, end) of `span`.

    An empty span stands for the token that begins there. A span past the text stands for the last token, since the
    rollout ended too early.

    Args:
        offsets: characters [start, end) of every token, from decoding the sampled ids
        span: characters to find
    """
    start, end = span[0], max(span[1], span[0] + 1)
    inside = [t for t, (low, high) in enumerate(offsets) if low < end and high > start]
    if not inside:
        return len(offsets) - 1, len(offsets)
    return inside[0], inside[-1] + 1


class TokenSelection(ABC):
    """A selection says how much each token of a rollout counts."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        """Returns one number per token of `rollout`; 0 leaves the token out.

        Args:
            rollout: rollout with its token ids, the sampler's log-probabilities, text and verdict
            error: tokens [first, last) of the first error; None for a right rollout, or where nothing was located
        """

    def last_of(self, num_tokens: int) -> int:
        """Returns the last token, counted from 1, that can count in a rollout of `num_tokens` tokens."""
        return num_tokens


def _window(rollout: Rollout, first: int, last: int) -> tuple[float, ...]:
    return tuple(1.0 if first <= t < last else 0.0 for t in range(_length(rollout)))


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.token_ids)


@dataclass(frozen=True)
class AllTokens(TokenSelection):
    """Every token counts."""

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return _window(rollout, 0, _length(rollout))


@dataclass(frozen=True)
class FirstTokens(TokenSelection):
    """The first tokens of a rollout count; OPSD and OGLS-SD use 1,024 of up to 8,192.

    Args:
        count: number of tokens at the beginning of a rollout that count
    """

    count: int = 1024

    def __post_init__(self) -> None:
        _positive("count", self.count)

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return _window(rollout, 0, self.count)

    def last_of(self, num_tokens: int) -> int:
        return min(self.count, num_tokens)


@dataclass(frozen=True)
class LastTokens(TokenSelection):
    """The last tokens of a rollout count.

    Args:
        count: number of tokens at the end of a rollout that count
    """

    count: int = 128

    def __post_init__(self) -> None:
        _positive("count", self.count)

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return _window(rollout, _length(rollout) - self.count, _length(rollout))


@dataclass(frozen=True)
class UpToError(TokenSelection):
    """The tokens up to the end of the located error count; in a right rollout all tokens do."""

    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return _window(rollout, 0, _length(rollout) if error is None else error[1])


@dataclass(frozen=True)
class FromError(TokenSelection):
    """The tokens from the located error on count, as in the loss of ROSD; in a right rollout all tokens do."""

    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        return _window(rollout, 0 if error is None else error[0], _length(rollout))


@dataclass(frozen=True)
class ErrorSpan(TokenSelection):
    """The tokens of the located error count; in a right rollout all tokens do.

    Args:
        before: number of tokens in front of the error that count, too
        after: number of tokens behind the error that count, too
    """

    before: int = 0
    after: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def __post_init__(self) -> None:
        check(self, {"before": "[0, 1e9]", "after": "[0, 1e9]"})

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        if error is None:
            return _window(rollout, 0, _length(rollout))
        return _window(rollout, error[0] - self.before, error[1] + self.after)


@dataclass(frozen=True)
class DecayFromError(TokenSelection):
    """The tokens from the located error on count less and less; in a right rollout all tokens count in full.

        weight_t = 2 ** (-(t - first) / half_life)        for t >= first, the first token of the error; 0 before it

    Args:
        half_life: number of tokens over which the weight halves
    """

    half_life: float = 32.0
    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def __post_init__(self) -> None:
        _positive("half_life", self.half_life)

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        if error is None:
            return _window(rollout, 0, _length(rollout))
        rate = math.log(2) / self.half_life
        return tuple(math.exp(-rate * (t - error[0])) if t >= error[0] else 0.0 for t in range(_length(rollout)))


@dataclass(frozen=True)
class ShiftedError(TokenSelection):
    """This control moves the located error before another selection is applied; the rollout's ends stop the move.

    Args:
        selection: selection that starts or ends at an error
        tokens: number of tokens by which the error is moved on; a negative number moves it back

    Raises:
        ValueError: the selection does not start or end at an error.
    """

    selection: TokenSelection
    tokens: int
    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def __post_init__(self) -> None:
        _about_errors(self.selection, self)

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        if error is not None:
            first = min(max(0, error[0] + self.tokens), _length(rollout) - 1)
            error = first, min(first + error[1] - error[0], _length(rollout))
        return self.selection.token_weights(rollout, error)


@dataclass(frozen=True)
class RandomPlace(TokenSelection):
    """This control moves the tokens that another selection takes of a wrong rollout to a random place, as one block.

    The tokens are usually a suffix. No other suffix has the same size, so the control is a block of that size. All
    places are equally likely, and the place follows from the rollout's tokens and the seed alone.

    Args:
        selection: selection that starts or ends at an error
        seed: seed of the random place

    Raises:
        ValueError: the selection does not start or end at an error.
    """

    selection: TokenSelection
    seed: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset({"error"})

    def __post_init__(self) -> None:
        _about_errors(self.selection, self)

    def token_weights(self, rollout: Rollout, error: Span | None) -> tuple[float, ...]:
        weights = self.selection.token_weights(rollout, error)
        taken = [t for t, weight in enumerate(weights) if weight]
        if error is None or not taken:
            return weights
        block = weights[taken[0] : taken[-1] + 1]
        before = derive(self.seed, "place", *rollout.completion.token_ids) % (len(weights) - len(block) + 1)
        return (0.0,) * before + block + (0.0,) * (len(weights) - len(block) - before)


def _about_errors(selection: TokenSelection, control: TokenSelection) -> None:
    if "error" not in selection.needs:
        got = type(selection).__name__
        raise ValueError(f"{type(control).__name__} needs a selection that starts or ends at an error, got {got}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}")
