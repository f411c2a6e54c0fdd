from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.records import Problem
from ogls.tasks.chains import PARENTHESES_FIRST, Chain, ChainErrors, Chains, first_mistake

PROBLEM = Problem(id="c", text="What is 12+8-9?", answer="11")


def located(text: str) -> str | None:
    span = ChainErrors().locate(PROBLEM, text)
    return None if span is None else text[: span[0]] + "[" + text[span[0] : span[1]] + "]" + text[span[1] :]


def test_a_chain_works_out_as_by_hand():
    assert Chain.parse("What is 12+8-9?").work() == "12+8=20\n20-9=11\n\\boxed{11}"
    chain = Chain.parse("What is 20-(9-4)+7?")
    assert (chain.start, chain.terms, chain.inner) == (20, (("-", 9), ("-", 4), ("+", 7)), 1)
    assert chain.work() == "9-4=5\n20-5=15\n15+7=22\n\\boxed{22}"
    assert chain.work(left_to_right=True) == "20-9=11\n11-4=7\n7+7=14\n\\boxed{14}"


@given(st.integers(0, 10_000))
def test_a_chain_reads_back_what_it_writes_and_its_answer_is_pythons_own(seed: int):
    chain = Chains(size=50, parentheses=0.5, seed=seed % 5).chains[seed % 50]
    assert Chain.parse(f"What is {chain}?") == chain
    assert chain.answer == eval(str(chain))


@pytest.mark.parametrize("text", ["no chain", "20-(9-4", "20-(9-4-1)", "(20-9)-4"])
def test_what_is_no_chain_is_refused(text: str):
    with pytest.raises(ValueError, match="expected a chain"):
        Chain.parse(text)


@pytest.mark.parametrize(
    ("text", "quote", "idea"),
    [
        ("20-9=11\n11-4=7\n7+7=14\n\\boxed{14}", "20-9=11", PARENTHESES_FIRST),
        ("9-4=5\n20-5=14\n14+7=21\n\\boxed{21}", "20-5=14", "Calculate 20-5 again."),
        ("9-4=5\n20-5=15\n16+7=23\n\\boxed{23}", "16+7=23", "Copy the numbers with care."),
        ("9-4=5\n20-5=15\n15+7=22\n\\boxed{23}", "\\boxed{23}", "The answer is the last result."),
    ],
)
def test_a_mistake_is_quoted_and_an_idea_named(text: str, quote: str, idea: str):
    mistake = first_mistake(Problem(id="c", text="What is 20-(9-4)+7?", answer="22"), text)
    assert mistake is not None
    assert (mistake.quote, mistake.idea) == (quote, idea)


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
    chain = Chains(size=50, parentheses=0.5, seed=seed % 7).chains[seed % 50]
    right, wrong = chain.work(), chain.wrong_work(rng)
    span = ChainErrors().locate(Problem(id="c", text=f"What is {chain}?", answer="0"), wrong)
    assert span is not None
    assert wrong[: span[0]] == right[: span[0]]
    assert wrong[: span[1]] != right[: span[1]]


def test_problems_are_reproducible_and_splits_never_meet():
    train, again, heldout = Chains(size=300), Chains(size=300), Chains(size=300, split="heldout")
    assert [train[i] for i in range(300)] == [again[i] for i in range(300)]
    texts = {train[i].text for i in range(300)} | {heldout[i].text for i in range(300)}
    assert len(texts) == 600
    assert all(step[3] >= 0 for chain in train.chains for step in chain.steps())


def test_parentheses_come_at_their_rate_and_always_matter():
    chains = Chains(size=400, parentheses=0.7).chains
    inner = [chain for chain in chains if chain.inner is not None]
    assert len(inner) / len(chains) == pytest.approx(0.7, abs=0.07)
    assert all(chain.steps() != chain.steps(left_to_right=True) for chain in inner)


def test_slips_come_at_their_rate():
    rng = random.Random(0)
    chain = Chain.parse("5+6+7+8+9")
    answers = [chain.steps(rng, 0.2)[-1][3] for _ in range(4000)]
    right = sum(answer == chain.answer for answer in answers) / len(answers)
    assert right == pytest.approx(0.8**4, abs=0.05)  # slips that cancel out add a little


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be between 1 and"),
        ({"size": 10, "min_steps": 3, "max_steps": 2}, "min_steps <= max_steps, got 3 and 2"),
        ({"size": 10, "low": 5, "high": 5}, "low < high, got 5 and 5"),
        ({"size": 10, "parentheses": 1.5}, "parentheses is a share between 0 and 1"),
        ({"size": 10, "parentheses": 0.5, "min_steps": 1}, "got 0.5 with min_steps 1"),
    ],
)
def test_impossible_chains_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Chains(**arguments)
