"""Multiple choice: what stands for a solution, and where an attempt leaves the right option."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from lab.choices import Choice, ChoiceErrors, ChoiceHabits, Choices, StatedChoices

from ogls.lessons.privilege import PrivilegedText
from ogls.records import Problem, RolloutGroup
from ogls.tasks.multiple_choice import ChoiceVerifier

ASKED = "How fast?\n\nA: 12 m/s\nB: 13 m/s,\nor a little less\n\nC: 21 km/h\nD: it stands\nPlease reason step by step."
STATED = "<reasoning>\n13 m/s,\nor a little less\n</reasoning>\n<answer>\nB\n</answer>"


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "one", "kind": "mcq", "system": "Be brief.", "problem": ASKED, "answer": "B"}))
    return Choices(str(file))[0]


def test_the_right_option_stands_for_the_solution_and_verifies(problem: Problem) -> None:
    assert (problem.solution, problem.system) == (STATED, None)
    assert ChoiceVerifier().grade(problem, STATED).correct


@pytest.mark.parametrize(("letter", "marked"), [("A", "2"), ("C", "21"), ("D", "it")])
def test_the_first_word_that_differs_is_the_error(problem: Problem, letter: str, marked: str) -> None:
    wrong = Choice.read(problem).stated(letter)
    mistake = ChoiceErrors().mistake(problem, wrong)
    assert mistake is not None
    assert wrong[slice(*mistake.span)] == marked
    assert mistake.idea == f"It is not {mistake.quote}"
    assert not ChoiceVerifier().grade(problem, wrong).correct


@pytest.mark.parametrize("text", [STATED, "", "<answer>\nA\n</answer>"])
def test_no_error_in_the_right_option_or_where_none_is_told(problem: Problem, text: str) -> None:
    assert ChoiceErrors().mistake(problem, text) is None


def test_a_row_whose_right_letter_has_no_option_has_no_solution(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"problem": "Which?\nA: this", "answer": "B"}))
    assert Choices(str(file))[0].solution is None
    with pytest.raises(ValueError, match="expected an option B"):
        Choice.read(Choices(str(file))[0])


def test_a_cold_start_shows_right_options_unless_it_follows_an_attempt(problem: Problem) -> None:
    followed = 0
    for version in range(300):
        group = RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=(), policy_version=version)
        (draft,) = StatedChoices().drafts(group)
        if isinstance(draft.prompt, PrivilegedText) and draft.prompt.role == "success":
            followed += draft.demonstration == draft.prompt.text != STATED
        elif draft.prompt is None or isinstance(draft.prompt, PrivilegedText):
            assert draft.demonstration == STATED
    assert 25 <= followed <= 60, "an attempt is in view three times in ten, and is wrong every other time"
    assert ChoiceHabits().wrong_idea == 0
    for seed in range(50):
        assert not ChoiceVerifier().grade(problem, Choice.read(problem).wrong_work(random.Random(seed))).correct
