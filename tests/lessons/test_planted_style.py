"""A planted style is in the share of the texts that is asked for, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from ogls.lessons.planted import AnswersAlone
from ogls.lessons.privilege import LessonDraft, PeerOutcomes, Privilege, PrivilegedText
from ogls.lessons.prompts import IDEA, Wording
from ogls.methods import OGLS_SD
from ogls.records import Completion, Problem, Role, Rollout, RolloutGroup, Verdict

PROBLEM = Problem(id="p", text="What is 1+1?", answer="2", solution="1+1=2\n\\boxed{2}")


def rollout(text: str, correct: bool) -> Rollout:
    completion = Completion(token_ids=(1,), logprobs=(-1.0,), finish_reason="stop")
    return Rollout(completion=completion, text=text, verdict=Verdict(correct=correct, status="graded"))


WRONG = tuple(rollout(f"1+1={i}\n\\boxed{{{i}}}", False) for i in range(3, 103))
GROUP = RolloutGroup(problem=PROBLEM, prompt_ids=(1,), rollouts=WRONG, policy_version=0)
PEERS = PeerOutcomes(max_peers=1)


def texts(privilege: Privilege, group: RolloutGroup = GROUP) -> list[tuple[Role, str | None]]:
    return [(text.role, text.text) for draft in privilege.drafts(group) for text in draft.texts]


def test_none_some_and_all_of_the_texts():
    assert texts(AnswersAlone(PEERS, 0.0)) == texts(PEERS)
    cut = [(role, (text or "").splitlines()[-1]) for role, text in texts(PEERS)]
    assert texts(AnswersAlone(PEERS, 1.0)) == cut
    some, more = (texts(AnswersAlone(PEERS, share)) for share in (0.25, 0.5))
    assert texts(AnswersAlone(PEERS, 0.25)) == some, "drawn by problem and step alone"
    planted, also = ([a == b for a, b in zip(found, cut, strict=True)] for found in (some, more))
    assert 0.15 < sum(planted) / 200 < 0.35
    assert 0.4 < sum(also) / 200 < 0.6
    assert all(later for first, later in zip(planted, also, strict=True) if first), "a larger share has those, too"
    assert texts(AnswersAlone(PEERS, 0.5), replace(GROUP, policy_version=1)) != more


def test_one_role_alone():
    found = texts(AnswersAlone(PEERS, 1.0, roles=["success"]))
    assert {text for role, text in found if role == "success"} == {"\\boxed{2}"}
    assert [pair for pair in found if pair[0] == "failure"] == [pair for pair in texts(PEERS) if pair[0] == "failure"]


def test_an_attempt_without_an_answer_stays():
    group = replace(GROUP, rollouts=(rollout("1+1=", False),))
    assert texts(AnswersAlone(PEERS, 1.0), group) == [("success", "\\boxed{2}"), ("failure", "1+1=")]


@dataclass(frozen=True)
class Idea(Privilege):
    views: ClassVar[Mapping[Role, Wording]] = {"idea": IDEA}

    def drafts(self, group: RolloutGroup) -> Iterator[LessonDraft]:
        yield LessonDraft(rollout=group.rollouts[0], texts=(PrivilegedText(role="idea", text="Count."),))


def test_an_idea_tells_the_answer():
    assert texts(AnswersAlone(Idea(), 1.0)) == [("idea", "\\boxed{2}")]
    assert texts(AnswersAlone(Idea(), 0.0)) == [("idea", "Count.")]


def test_it_fits_where_the_privilege_fits_and_shows_in_the_name():
    planted = AnswersAlone(PEERS, 0.5)
    assert (planted.views, planted.needs, planted.plain, planted.selects) == (PEERS.views, PEERS.needs, False, False)
    assert OGLS_SD(privilege=planted).name == (
        "OGLS_SD[privilege=AnswersAlone(privilege=PeerOutcomes(max_peers=1), share=0.5)]"
    )


@pytest.mark.parametrize("options", [{"share": 1.5}, {"share": 0.5, "roles": ["idea"]}])
def test_what_is_not_a_share_or_a_role_is_refused(options: dict):
    with pytest.raises(ValueError, match=r"AnswersAlone.*(must be in|expected)"):
        AnswersAlone(PEERS, **options)
