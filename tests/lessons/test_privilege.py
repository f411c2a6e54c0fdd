from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogls.lessons.privilege import (
    Demonstration,
    PeerOutcomes,
    ReferenceSolution,
    Several,
    ShortSuccesses,
    SuccessfulPeer,
    Unprivileged,
)
from ogls.lessons.prompts import ATTEMPT
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Verdict


def rollout(text: str, correct: bool, finish_reason: str = "stop", length: int = 1) -> Rollout:
    completion = Completion(token_ids=(1,) * length, logprobs=(-1.0,) * length, finish_reason=finish_reason)
    return Rollout(completion=completion, text=text, verdict=Verdict(correct=correct, status="graded", answer=text))


def group(*rollouts: Rollout, solution: str | None = "s") -> RolloutGroup:
    problem = Problem(id="p", text="?", answer="1", solution=solution)
    return RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=rollouts, policy_version=0)


def pools(privilege: PeerOutcomes, of: RolloutGroup) -> dict[str, tuple[list[str], list[str]]]:
    """Of each drafted rollout: texts of P+ and of P-."""
    return {
        d.rollout.text: tuple([t.text for t in d.texts if t.role == role] for role in ("success", "failure"))
        for d in privilege.drafts(of)
    }


MIXED = group(
    rollout("r1", True), rollout("w1", False), rollout("r2", True), rollout("w2", False), rollout("w3", False)
)


def test_published_pools_hold_the_solution_all_right_and_all_wrong_rollouts_with_the_rollout_itself():
    found = pools(PeerOutcomes(), MIXED)
    assert set(found) == {"w1", "w2", "w3"}
    for success, failure in found.values():
        assert sorted(success) == ["r1", "r2", "s"]
        assert sorted(failure) == ["w1", "w2", "w3"]


def test_a_limited_pool_rotates_and_begins_with_the_rollout_itself():
    assert pools(PeerOutcomes(max_peers=2), MIXED) == {
        "w1": (["s", "r1"], ["w1", "w2"]),
        "w2": (["r1", "r2"], ["w2", "w3"]),
        "w3": (["r2", "s"], ["w3", "w1"]),
    }


def test_a_rollout_can_be_kept_out_of_its_own_pool():
    found = pools(PeerOutcomes(max_peers=1, exclude_self=True), MIXED)
    assert {text: failure for text, (_, failure) in found.items()} == {"w1": ["w2"], "w2": ["w3"], "w3": ["w1"]}


def test_an_all_wrong_group_trains_on_the_solution_alone():
    found = pools(PeerOutcomes(), group(rollout("w1", False), rollout("w2", False)))
    assert found == {"w1": (["s"], ["w1", "w2"]), "w2": (["s"], ["w2", "w1"])}


@pytest.mark.parametrize(
    ("privilege", "of"),
    [
        (PeerOutcomes(), group(rollout("r1", True), rollout("r2", True))),
        (PeerOutcomes(), group(rollout("w1", False), rollout("w2", False), solution=None)),
        (PeerOutcomes(use_solution=False), group(rollout("w1", False), rollout("w2", False))),
        (PeerOutcomes(exclude_self=True), group(rollout("r1", True), rollout("w1", False))),
        (PeerOutcomes(truncated_failures=False), group(rollout("r", True), rollout("w", False, "length"))),
        (ReferenceSolution(), group(rollout("w", False), solution=None)),
        (ReferenceSolution(rollouts="wrong"), group(rollout("r", True))),
        (PeerOutcomes(learn_successes=True), group(rollout("r1", True), rollout("r2", True))),
        (Demonstration(), group(solution=None)),
        (SuccessfulPeer(), group(rollout("w1", False), rollout("w2", False))),
        (SuccessfulPeer(solution_as_peer=True), group(rollout("w", False), solution=None)),
        (SuccessfulPeer(), group(rollout("r", True))),
        (Unprivileged(), MIXED),
    ],
)
def test_a_group_without_a_signal_gives_nothing(privilege, of: RolloutGroup):
    assert list(privilege.drafts(of)) == []


def test_an_unfinished_rollout_is_wrong_whatever_its_verdict():
    assert pools(PeerOutcomes(), group(rollout("cut", True, "length"), rollout("r", True))) == {
        "cut": (["s", "r"], ["cut"])
    }


def test_reference_solution_reads_the_solution_for_all_rollouts_or_for_the_wrong_ones():
    assert [d.rollout.text for d in ReferenceSolution().drafts(MIXED)] == ["r1", "w1", "r2", "w2", "w3"]
    assert [d.rollout.text for d in ReferenceSolution(rollouts="wrong").drafts(MIXED)] == ["w1", "w2", "w3"]
    assert all([t.text for t in d.texts] == ["s"] for d in ReferenceSolution().drafts(MIXED))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=12), st.integers(1, 4), st.booleans())
def test_limited_pools_use_all_members_evenly(outcomes: list[bool], most: int, exclude_self: bool):
    of = group(*(rollout(f"{'r' if ok else 'w'}{i}", ok) for i, ok in enumerate(outcomes)))
    found = pools(PeerOutcomes(max_peers=most, exclude_self=exclude_self), of)
    uses = dict.fromkeys((r.text for r in of.failures), 0)
    for own, (success, failure) in found.items():
        assert 1 <= len(success) <= most
        assert 1 <= len(failure) <= most
        assert len(set(failure)) == len(failure)
        assert not (exclude_self and own in failure)
        for text in failure:
            uses[text] += 1
    if found:
        assert max(uses.values()) - min(uses.values()) <= (1 if exclude_self else 0)


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="max_peers must be at least 1, got 0"):
        PeerOutcomes(max_peers=0)


def test_where_right_rollouts_are_learned_too_each_has_pools_too():
    assert pools(PeerOutcomes(max_peers=1, exclude_self=True, use_solution=False, learn_successes=True), MIXED) == {
        "r1": (["r2"], ["w1"]),
        "r2": (["r1"], ["w2"]),
        "w1": (["r1"], ["w2"]),
        "w2": (["r2"], ["w3"]),
        "w3": (["r1"], ["w1"]),
    }
    own = pools(PeerOutcomes(max_peers=1, learn_successes=True), MIXED)
    assert own["r2"] == (["r2"], ["w2"])


def peers(privilege: SuccessfulPeer, of: RolloutGroup) -> dict[str, str]:
    return {d.rollout.text: shown.text for d in privilege.drafts(of) for shown in d.texts}


def test_a_successful_peer_is_another_right_rollout_taken_in_turn():
    assert peers(SuccessfulPeer(), MIXED) == {"r1": "r2", "r2": "r1", "w1": "r1", "w2": "r2", "w3": "r1"}
    assert peers(SuccessfulPeer(rollouts="wrong"), MIXED) == {"w1": "r1", "w2": "r2", "w3": "r1"}


def test_the_only_success_has_no_peer_unless_the_solution_takes_its_place():
    of = group(rollout("r", True), rollout("w", False))
    assert peers(SuccessfulPeer(), of) == {"w": "r"}
    assert peers(SuccessfulPeer(solution_as_peer=True), of) == {"w": "r", "r": "s"}
    assert peers(SuccessfulPeer(solution_as_peer=True), group(rollout("w", False))) == {"w": "s"}


def test_two_rollouts_of_the_same_text_are_two_rollouts():
    of = group(rollout("same", True), rollout("same", True))
    assert [d.texts[0].text for d in SuccessfulPeer().drafts(of)] == ["same", "same"]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_right_rollouts_take_turns_and_nobody_reads_itself(outcomes: list[bool]):
    of = group(*(rollout(f"{i}", ok) for i, ok in enumerate(outcomes)))
    found = peers(SuccessfulPeer(), of)
    right = [r.text for r in of.successes]
    assert all(peer in right and peer != own for own, peer in found.items())
    assert len(found) == (len(outcomes) if len(right) > 1 else len(right) * len(of.failures))
    uses = [list(found.values()).count(text) for text in right]
    if len(right) > 1:
        assert max(uses) - min(uses) <= 1


def test_short_successes_are_learned_at_their_end():
    lengths = {"short": 3, "middle": 5, "long": 9}
    of = group(*(rollout(text, True, length=n) for text, n in lengths.items()), rollout("wrong", False, length=5))
    (draft,) = ShortSuccesses(count=2).drafts(of)
    assert draft.rollout.text == "short"
    assert draft.texts == ()
    assert draft.selection.token_weights(rollout("any", True, length=3), None) == (0, 1, 1)


def test_several_privileges_give_all_their_drafts_and_need_the_same_steering():
    both = Several([PeerOutcomes(), ShortSuccesses()])
    assert both.views == {"success": ATTEMPT, "failure": ATTEMPT}
    assert both.needs == {"rollouts", "peers"}
    of = group(rollout("r", True, length=1), rollout("w", False, length=3), rollout("w2", False, length=3))
    assert [d.rollout.text for d in both.drafts(of)] == ["w", "w2", "r"]
    with pytest.raises(ValueError, match=r"views of the same roles, got \[\('failure', 'success'\), \('success',\)\]"):
        Several([PeerOutcomes(), SuccessfulPeer()])
    with pytest.raises(ValueError, match="at least one privilege"):
        Several([])
