from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogls.lessons.advantage import GroupRelative
from ogls.records import RolloutGroup
from tests.lessons.test_privilege import group, rollout


def of(outcomes: list[bool]) -> RolloutGroup:
    return group(*(rollout(f"{i}", ok) for i, ok in enumerate(outcomes)))


def test_one_right_of_four_by_hand():
    found = GroupRelative().of(of([True, False, False, False]))
    assert found == pytest.approx((3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)))
    assert GroupRelative(std=False).of(of([True, False, False, False])) == (0.75, -0.25, -0.25, -0.25)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=16))
def test_advantages_are_the_rewards_made_standard(outcomes: list[bool]):
    found = GroupRelative().of(of(outcomes))
    assert len(found) == len(outcomes)
    if len(set(outcomes)) == 1:
        assert not any(found)
        return
    rewards = [float(ok) for ok in outcomes]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    assert found == pytest.approx([(reward - mean) / std for reward in rewards])


def test_a_rollout_that_was_cut_has_not_earned_anything():
    cut = group(rollout("a", True, "length"), rollout("b", True))
    assert GroupRelative().of(cut) == (-1.0, 1.0)
