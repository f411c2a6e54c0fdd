"""Every family by hand; the locator against errors that were planted; one family's idea is not another's."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ogls.records import Problem
from ogls.tasks.by_kind import ByKind
from ogls.tasks.families import CARE, FAMILIES, Families, FamilyErrors, Task

BY_HAND = {
    "order": ("What is 14+4*6?", "4*6=24 14+24=38 38", "14+4=18 18*6=108 108", "14+4=18"),
    "sign": ("What is 31-(13-6)?", "31-13=18 18+6=24 24", "31-13=18 18-6=12 12", "18-6=12"),
    "square": ("What is (10+5)^2?", "10+5=15 15*15=225 225", "10*10=100 5*5=25 100+25=125 125", "10*10=100"),
    "carry": ("Add in columns: 38 and 12.", "8+2=10 3+1=4 4+1=5 50", "8+2=10 3+1=4 40", "\\boxed{40}"),
    "units": ("How many minutes are 4 h 41 min?", "4*60=240 240+41=281 281", "4*100=400 400+41=441 441", "4*100=400"),
    "pages": ("How many pages are 17 to 60?", "60-17=43 43+1=44 44", "60-17=43 43", "\\boxed{43}"),
    "cuts": ("How many cuts make 48 m into pieces of 3 m?", "48/3=16 16-1=15 15", "48/3=16 16", "\\boxed{16}"),
    "percent": (
        "Of 400 pupils 40% are girls, and 30% of the girls sing. How many?",
        "40%_of_400=160 30%_of_160=48 48",
        "30%_of_400=120 120",
        "30% of 400=120",
    ),
    "cars": ("How many cars do 59 guests need, 7 in each?", "59/7=8_rest_3 8+1=9 9", "59/7=8_rest_3 8", "\\boxed{8}"),
    "modulo": ("What is -17 mod 6?", "6*3=18 18-17=1 1", "6*2=12 17-12=5 5", "6*2=12"),
    "fraction": ("What is 1/11+1/3?", "11+3=14 11*3=33 14/33", "1+1=2 11+3=14 2/14", "1+1=2"),
    "average": (
        "1 of us have 15 points each, 3 have 3. What is the average?",
        "1*15=15 3*3=9 15+9=24 24/4=6 6",
        "15+3=18 18/2=9 9",
        "15+3=18",
    ),
    "fence": ("How long is a fence around 14 m by 8 m?", "14+8=22 22*2=44 44", "14*8=112 112", "14*8=112"),
    "clock": ("It is 15 o'clock. What is it after 11 hours?", "15+11=26 26-24=2 2", "15+11=26 26", "\\boxed{26}"),
    "undo": ("56 is 19 more than a number. Which?", "56-19=37 37", "56+19=75 75", "56+19=75"),
}
LOCATOR, VERIFIER = FamilyErrors(), ByKind()


def written(text: str) -> str:
    *lines, answer = text.split()
    return "\n".join([*(line.replace("_", " ") for line in lines), f"\\boxed{{{answer}}}"])


def problem_of(task: Task) -> Problem:
    return Problem(id="f", text=str(task), answer=task.answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_by_hand(name: str):
    text, right, wrong, quote = BY_HAND[name]
    task = Task.parse(f"Here: {text}")
    assert (str(task), task.family) == (text, FAMILIES[name])
    assert task.work() == written(right)
    assert task.work(wrong_idea=True) == written(wrong)
    problem = problem_of(task)
    assert VERIFIER.grade(problem, written(right)).correct
    assert not VERIFIER.grade(problem, written(wrong)).correct
    mistake = LOCATOR.mistake(problem, written(wrong))
    assert mistake is not None
    assert (mistake.quote, mistake.idea) == (quote, LOCATOR.idea(problem)) == (quote, FAMILIES[name].idea)
    terse = LOCATOR.mistake(problem, written(wrong).splitlines()[-1])
    assert terse is not None
    assert terse.idea == FAMILIES[name].idea


def located(text: str, attempt: str) -> tuple[str, str] | None:
    problem = problem_of(Task.parse(text))
    mistake = LOCATOR.mistake(problem, attempt)
    assert (mistake and mistake.span) == LOCATOR.locate(problem, attempt)
    if mistake is None:
        return None
    start, end = mistake.span
    return f"{attempt[:start]}[{attempt[start:end]}]{attempt[end:]}".replace("\n", " "), mistake.idea


@pytest.mark.parametrize(
    ("attempt", "shown", "idea"),
    [
        ("4*6=25\n14+25=39\n\\boxed{39}", "4*6=2[5] 14+25=39 \\boxed{39}", CARE),
        ("4*6=24\n14+24=48\n\\boxed{48}", "4*6=24 14+24=[48] \\boxed{48}", CARE),
        ("4*6=24\n14+23=37\n\\boxed{37}", "4*6=24 14+2[3=37] \\boxed{37}", CARE),
        ("4*6=24\n14+24=38\n\\boxed{39}", "4*6=24 14+24=38 \\boxed{3[9}]", CARE),
        ("14+4=19\n19*6=114\n\\boxed{114}", "[14+4=19] 19*6=114 \\boxed{114}", "Multiply first."),
        ("\\boxed{108}", "[\\boxed{108}]", "Multiply first."),
        ("\\boxed{39}", "[\\boxed{39}]", CARE),
    ],
)
def test_the_first_wrong_line_is_located_and_an_idea_named(attempt: str, shown: str, idea: str):
    assert located("What is 14+4*6?", attempt) == (shown, idea)


@pytest.mark.parametrize(
    "attempt", ["", "4*6=24", "4*6=24\n14+24=38\n\\boxed{38}", "\\boxed{38}", "4*6=24\n\\boxed{38}"]
)
def test_nothing_wrong_is_nothing_located(attempt: str):
    assert located("What is 14+4*6?", attempt) is None


@example("fraction", 5603)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 10_000))
def test_a_planted_error_is_found_and_all_before_it_is_right(name: str, seed: int):
    rng = random.Random(seed)
    task = Families(size=40, families=[name]).tasks[seed % 40]
    assert Task.parse(str(task)) == task
    attempt, right, wrong = task.wrong_work(rng), task.work(), task.work(wrong_idea=True)
    assert LOCATOR.mistake(problem_of(task), right) is None
    mistake = LOCATOR.mistake(problem_of(task), attempt)
    assert mistake is not None
    start = attempt.index(mistake.quote)
    assert start <= mistake.span[0]
    assert right.startswith(attempt[:start])
    quoted = f"{attempt}\n"[: start + len(mistake.quote) + 1]  # with its end: 5+6=1 is wrong where 5+6=11 is right
    assert not f"{right}\n".startswith(quoted)
    if attempt == wrong:
        assert mistake.idea == FAMILIES[name].idea
    if mistake.idea == CARE:
        assert not f"{wrong}\n".startswith(quoted)


def test_another_familys_idea_is_another_one():
    ideas = [family.idea for family in FAMILIES.values()]
    assert len({*ideas, CARE}) == len(FAMILIES) + 1 >= 13
    for family in FAMILIES.values():
        others = {other.idea for other in FAMILIES.values() if other is not family}
        for task in family.tasks("heldout"):
            mistake = LOCATOR.mistake(problem_of(task), task.work(wrong_idea=True))
            assert mistake is not None
            assert mistake.idea not in others


def test_families_take_turns_and_the_parts_share_no_problem():
    train, heldout = Families(size=90), Families(size=45, split="heldout")
    names = list(FAMILIES.values())
    assert [Task.parse(p.text).family for p in train] == names * 6
    assert [Task.parse(p.text).family for p in Families(size=5, families=["sign", "cars"])] == [
        FAMILIES[name] for name in ("sign", "cars", "sign", "cars", "sign")
    ]
    assert not {p.id for p in train} & {p.id for p in heldout}
    assert len({p.id for p in train}) == 90
    assert list(train) == list(Families(size=90)) != list(Families(size=90, seed=1))
    assert all(p.solution is not None and VERIFIER.grade(p, p.solution).correct for p in train)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"size": 3, "families": ["order", "odd"]}, r"expected different ones of the families order, sign, .*odd"),
        ({"size": 3, "families": ["order", "order"]}, "expected different ones of the families"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 1500, "split": "heldout"}, r"the family order has 57 problems in heldout, got a size of 100 each"),
    ],
)
def test_what_is_no_selection_is_refused(arguments: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Families(**arguments)


def test_what_is_no_problem_of_a_family_is_refused():
    with pytest.raises(ValueError, match=r"expected a problem of the families order, .* got: 'What is 2\+2"):
        Task.parse("What is 2+2?")
