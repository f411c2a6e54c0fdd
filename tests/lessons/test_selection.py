from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.lessons import selection
from ogls.lessons.selection import token_span
from ogls.records import Completion, Rollout, Verdict


def of_ids(*token_ids: int) -> Rollout:
    completion = Completion(token_ids=token_ids, logprobs=(-1.0,) * len(token_ids), finish_reason="stop")
    return Rollout(completion=completion, text="", verdict=Verdict(correct=False, status="graded"))


def rollout(length: int) -> Rollout:
    return of_ids(*range(length))


def test_each_selection_on_a_rollout_of_eight_tokens_with_its_error_in_tokens_3_and_4():
    error = (3, 5)
    assert selection.AllTokens().token_weights(rollout(8), error) == (1,) * 8
    assert selection.FirstTokens(2).token_weights(rollout(8), error) == (1, 1, 0, 0, 0, 0, 0, 0)
    assert selection.LastTokens(2).token_weights(rollout(8), error) == (0, 0, 0, 0, 0, 0, 1, 1)
    assert selection.UpToError().token_weights(rollout(8), error) == (1, 1, 1, 1, 1, 0, 0, 0)
    assert selection.FromError().token_weights(rollout(8), error) == (0, 0, 0, 1, 1, 1, 1, 1)
    assert selection.ErrorSpan(before=1, after=1).token_weights(rollout(8), error) == (0, 0, 1, 1, 1, 1, 0, 0)
    decay = selection.DecayFromError(half_life=1.0).token_weights(rollout(8), error)
    assert decay == pytest.approx((0, 0, 0, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16))


@pytest.mark.parametrize(
    "chosen",
    [selection.UpToError(), selection.FromError(), selection.ErrorSpan(), selection.DecayFromError()],
    ids=lambda s: type(s).__name__,
)
def test_a_right_rollout_has_no_error_and_is_learned_whole(chosen: selection.TokenSelection):
    assert chosen.token_weights(rollout(5), None) == (1,) * 5


@given(st.integers(1, 30), st.data())
def test_up_to_and_from_the_error_cover_the_rollout_and_share_the_error(length: int, data: st.DataObject):
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first + 1, length))
    up_to, since = (
        selection.UpToError().token_weights(rollout(length), (first, last)),
        selection.FromError().token_weights(rollout(length), (first, last)),
    )
    assert [a + b for a, b in zip(up_to, since, strict=True)] == [2 if first <= t < last else 1 for t in range(length)]


def test_a_character_span_becomes_the_tokens_that_contain_it():
    offsets = [(0, 3), (3, 4), (4, 8), (8, 8), (8, 10)]  # the fourth token is special and has no text
    assert token_span(offsets, (0, 1)) == (0, 1)
    assert token_span(offsets, (2, 5)) == (0, 3)
    assert token_span(offsets, (9, 9)) == (4, 5)
    assert token_span(offsets, (10, 12)) == (4, 5)  # past the end: the rollout stopped too early


def test_two_tokens_of_one_character_are_both_inside():
    assert token_span([(0, 1), (0, 1), (1, 2)], (0, 1)) == (0, 2)


@pytest.mark.parametrize("make", [selection.FirstTokens, selection.LastTokens, selection.DecayFromError])
def test_a_size_that_selects_nothing_is_refused(make: type):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        make(0)


def test_a_shifted_error_stays_inside_the_rollout():
    shifted = selection.ShiftedError(selection.ErrorSpan(), tokens=2)
    assert shifted.token_weights(rollout(8), (3, 5)) == (0, 0, 0, 0, 0, 1, 1, 0)
    assert shifted.token_weights(rollout(8), (6, 8)) == (0, 0, 0, 0, 0, 0, 0, 1)
    assert selection.ShiftedError(selection.FromError(), tokens=-4).token_weights(rollout(4), (3, 4)) == (1, 1, 1, 1)
    assert shifted.token_weights(rollout(3), None) == (1, 1, 1)


def test_a_random_place_has_as_many_tokens_and_each_place_comes_up():
    control = selection.RandomPlace(selection.FromError())
    places = [control.token_weights(of_ids(5, 6, 7, i), (2, 4)) for i in range(300)]
    counts = {place: places.count(place) for place in places}
    assert set(counts) == {(1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)}
    assert min(counts.values()) > 70  # of 100
    assert places == [control.token_weights(of_ids(5, 6, 7, i), (2, 4)) for i in range(300)]
    assert places != [
        selection.RandomPlace(selection.FromError(), seed=1).token_weights(of_ids(5, 6, 7, i), (2, 4))
        for i in range(300)
    ]
    assert control.token_weights(of_ids(1, 2), None) == (1, 1)


def test_a_control_of_errors_needs_a_selection_that_has_one():
    with pytest.raises(
        ValueError, match="ShiftedError needs a selection that starts or ends at an error, got AllTokens"
    ):
        selection.ShiftedError(selection.AllTokens(), tokens=1)
