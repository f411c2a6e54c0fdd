"""Word problems of reasoning-gym: their own answers, worked, and where an attempt goes wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from lab.legs import Herd, LegErrors, LegHabits, Legs, WorkedLegs

from ogls.lessons.privilege import PrivilegedText
from ogls.records import RolloutGroup
from ogls.tasks.math import MathVerifier

ASKED = "Your task is to count legs.\n\nNow, how many legs are there in total if you have 3 crabs, 1 praying mantis?"
WORKED = "3 crabs have 3*10=30 legs.\n1 praying mantis has 1*6=6 legs.\n30+6=36\n\\boxed{36}"
PROBLEM = replace(Legs(1)[0], text=ASKED, answer="36", solution=WORKED)


def test_a_worked_answer_by_hand() -> None:
    assert Herd.parse(ASKED).work() == WORKED


def test_answers_are_those_of_the_package_and_verify() -> None:
    from reasoning_gym import create_dataset

    size, options = 300, {"min_animals": 2, "max_animals": 3, "max_instances": 12}
    rows = create_dataset("leg_counting", seed=0, size=size, **options)
    theirs = {rows[i]["question"].strip(): rows[i]["answer"] for i in range(size)}
    known = [problem for problem in Legs(size) if problem.text in theirs]
    assert len(known) > 200
    for problem in known:
        assert problem.answer == theirs[problem.text]
        assert problem.solution is not None
        assert MathVerifier().grade(problem, problem.solution).correct


def test_train_and_held_out_share_no_problem() -> None:
    train, heldout = ({problem.text for problem in Legs(500, split)} for split in ("train", "heldout"))
    assert (len(train), len(heldout), len(train & heldout)) == (500, 500, 0)


@pytest.mark.parametrize(
    ("wrong", "marked", "idea"),
    [
        (WORKED.replace("3*10=30", "3*8=24"), "8", "Each crab has 10 legs."),
        (WORKED.replace("=30 legs", "=35 legs"), "5", "Each crab has 10 legs."),
        (WORKED.replace("1*6=6", "1*8=8"), "8", "Each praying mantis has 6 legs."),
        (WORKED.replace("30+6=36", "30+6=46"), "46", "Calculate 30+6 again."),
        (WORKED.replace("{36}", "{30}"), "0", "The answer is the last result."),
    ],
)
def test_the_first_error_and_what_to_do_instead(wrong: str, marked: str, idea: str) -> None:
    mistake = LegErrors().mistake(PROBLEM, wrong)
    assert mistake is not None
    assert wrong[slice(*mistake.span)] == marked
    assert mistake.idea == idea
    assert mistake.quote in wrong


def test_no_error_in_a_right_answer_or_an_empty_one() -> None:
    assert LegErrors().mistake(PROBLEM, WORKED) is None
    assert LegErrors().mistake(PROBLEM, "") is None


def test_wrong_work_is_wrong_and_its_error_is_found() -> None:
    rng = random.Random(0)
    for problem in Legs(200):
        wrong = Herd.parse(problem.text).wrong_work(rng)
        assert not MathVerifier().grade(problem, wrong).correct
        assert LegErrors().mistake(problem, wrong) is not None


def test_what_a_cold_start_shows_is_right_unless_it_follows_an_attempt() -> None:
    followed = 0
    for problem in Legs(200):
        group = RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=(), policy_version=0)
        (draft,) = WorkedLegs().drafts(group)
        if isinstance(draft.prompt, PrivilegedText) and draft.prompt.role == "success":
            followed += draft.demonstration == draft.prompt.text != problem.solution
        elif draft.prompt is None:
            assert draft.demonstration == problem.solution
    assert 15 <= followed <= 45, "an attempt is in view three times in ten, and is wrong every other time"
    assert LegHabits().slip == LegHabits().wrong_idea == 0


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a problem of reasoning-gym's leg_counting, got 'What is 2'"):
        Herd.parse("What is 2")
