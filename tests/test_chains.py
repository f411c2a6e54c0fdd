from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.chains import Chain, ChainErrors, Chains, WorkedAttempts
from ogls.records import Problem, RolloutGroup

PROBLEM = Problem(id="c", text="What is 12+8-9?", answer="11")


def located(text: str) -> str | None:
    span = ChainErrors().locate(PROBLEM, text)
    return None if span is None else text[: span[0]] + "[" + text[span[0] : span[1]] + "]" + text[span[1] :]


def test_a_chain_works_out_as_by_hand():
    assert Chain.parse("What is 12+8-9?").work() == ("12+8=20\n20-9=11\n\\boxed{11}", 11)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12+8=20\n20-9=11\n\\boxed{11}", None),
        ("12+8=21\n21-9=12\n\\boxed{12}", "12+8=2[1]\n21-9=12\n\\boxed{12}"),
        ("12+8=20\n20-9=12\n\\boxed{12}", "12+8=20\n20-9=1[2]\n\\boxed{12}"),
        ("12+8=30\n30-9=21\n\\boxed{21}", "12+8=[30]\n30-9=21\n\\boxed{21}"),
        ("12+7=19\n19-9=10\n\\boxed{10}", "12+[7]=19\n19-9=10\n\\boxed{10}"),
        ("12-8=4\n", "12[-]8=4\n"),
        ("12+8=20\n20-9=11\n\\boxed{12}", "12+8=20\n20-9=11\n\\boxed{1[2]}"),
        ("12+8=2", "12+8=2[]"),  # it ended too early: the end token is the error
        ("no chain at all", None),
    ],
)
def test_the_first_wrong_number_is_located(text: str, expected: str | None):
    assert located(text) == expected


@given(st.integers(0, 10_000))
def test_a_slip_is_always_located_and_everything_before_it_is_right(seed: int):
    rng = random.Random(seed)
    chain = Chains(size=50, seed=seed % 7).chains[seed % 50]
    right, wrong = chain.work()[0], chain.wrong_work(rng)
    span = ChainErrors().locate(Problem(id="c", text=f"What is {chain}?", answer="0"), wrong)
    assert span is not None
    assert wrong[: span[0]] == right[: span[0]]
    assert wrong[: span[1]] != right[: span[1]]


def test_problems_are_reproducible_and_splits_never_meet():
    train, heldout = Chains(size=300), Chains(size=300, split="heldout")
    assert [train[i] for i in range(300)] == [Chains(size=300)[i] for i in range(300)]
    texts = {train[i].text for i in range(300)} | {heldout[i].text for i in range(300)}
    assert len(texts) == 600
    assert all(min(chain.values) >= 0 for chain in train.chains)


def test_slips_come_at_their_rate():
    rng = random.Random(0)
    chain = Chain.parse("5+6+7+8+9")
    works = [chain.work(rng, 0.2)[1] for _ in range(4000)]
    right = sum(value == chain.values[-1] for value in works) / len(works)
    assert right == pytest.approx(0.8**4, abs=0.05)  # slips that cancel out add a little


def test_demonstrations_are_half_plain_and_mostly_follow_what_they_read():
    source = Chains(size=2000)
    drafts = []
    for i in range(len(source)):
        group = RolloutGroup(problem=source[i], prompt_ids=(1,), rollouts=(), policy_version=0)
        drafts += [(source[i], draft) for draft in WorkedAttempts().drafts(group)]
    reading = [(p, d) for p, d in drafts if d.prompt is not None]
    assert len(drafts) == 2000
    assert len(reading) / 2000 == pytest.approx(0.5, abs=0.05)
    assert sum(d.prompt.text == p.solution for p, d in reading) / len(reading) == pytest.approx(0.5, abs=0.05)
    assert sum(d.prompt.text == d.demonstration for _, d in reading) / len(reading) == pytest.approx(0.93, abs=0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be between 1 and"),
        ({"size": 10, "min_steps": 3, "max_steps": 2}, "min_steps <= max_steps, got 3 and 2"),
        ({"size": 10, "low": 5, "high": 5}, "low < high, got 5 and 5"),
    ],
)
def test_impossible_chains_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Chains(**arguments)
