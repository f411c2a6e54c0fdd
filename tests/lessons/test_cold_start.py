from __future__ import annotations

import json

import pytest
from lab.demonstrations import Habits, WorkedAttempts

from ogls.lessons.privilege import PrivilegedText, ReflectionTask
from ogls.records import RolloutGroup
from ogls.tasks.chains import Chain, Chains, first_mistake


def test_demonstrations_come_in_their_shares_and_say_what_they_should():
    source, kinds = Chains(size=2000, parentheses=0.5), {"plain": 0, "success": 0, "idea": 0, "reflect": 0}
    read_right = followed = 0
    for i in range(len(source)):
        problem = source[i]
        group = RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=(), policy_version=0)
        (draft,) = WorkedAttempts().drafts(group)
        assert draft.demonstration is not None
        if isinstance(draft.prompt, ReflectionTask):
            kinds["reflect"] += 1
            reflection = json.loads(draft.demonstration)
            if draft.prompt.correct:
                assert draft.prompt.attempt == problem.solution
                assert set(reflection) == {"idea"}
            else:
                mistake = first_mistake(problem, draft.prompt.attempt)
                assert mistake is not None
                assert reflection == {"quote": mistake.quote, "idea": mistake.idea}
                assert reflection["quote"] in draft.prompt.attempt
        elif isinstance(draft.prompt, PrivilegedText) and draft.prompt.role == "idea":
            kinds["idea"] += 1
            assert draft.demonstration == problem.solution
        elif isinstance(draft.prompt, PrivilegedText):
            kinds["success"] += 1
            read_right += draft.prompt.text == problem.solution
            followed += draft.prompt.text == draft.demonstration
        else:
            kinds["plain"] += 1
    shares = {kind: count / 2000 for kind, count in kinds.items()}
    assert shares == pytest.approx({"plain": 0.4, "success": 0.3, "idea": 0.15, "reflect": 0.15}, abs=0.04)
    assert read_right / kinds["success"] == pytest.approx(0.5, abs=0.07)
    assert followed / kinds["success"] == pytest.approx(0.94, abs=0.04)


def test_own_work_ignores_parentheses_at_its_rate():
    source = Chains(size=2000, parentheses=1.0)
    habits = Habits(slip=0.0, wrong_idea=0.4, guesses=0.0, with_attempt=0.0, with_idea=0.0, reflecting=0.0)
    privilege = WorkedAttempts(habits)
    wrong = 0
    for i in range(len(source)):
        group = RolloutGroup(problem=source[i], prompt_ids=(1,), rollouts=(), policy_version=0)
        (draft,) = privilege.drafts(group)
        wrong += draft.demonstration == Chain.parse(source[i].text).work(left_to_right=True)
    assert wrong / 2000 == pytest.approx(0.4, abs=0.04)


def test_shares_beyond_the_whole_are_refused():
    with pytest.raises(ValueError, match="must not exceed 1 together, got"):
        Habits(with_attempt=0.6, with_idea=0.5)
