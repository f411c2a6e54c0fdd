"""A verifier that is a plain function: its verdicts, its faults, and a run that is judged by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ogls.records import Problem
from ogls.tasks.function import FunctionVerifier
from ogls.tasks.gold import gold_faults
from ogls.tasks.grading import GradingPool
from ogls.tracking.files import METRICS, read_rows
from tests.faults.nursery import Nursery
from tests.faults.test_resume import carried_out, fit, run_in

REWARDS = '''
import re

def is_right(text, answer):
    """The last number of the text."""
    found = re.findall(r"-?\\d+", text)
    return bool(found) and found[-1] == answer

def share(text, answer):
    if "boom" in text:
        raise RuntimeError(text)
    return len(set(text) & set(answer)) / len(set(answer))

def explained(text, answer):
    return {"pair": (text == answer, "Expected\\x00 a pair."), "long": (0, "x" * 9999), "bad": (0, 5)}[text]

word = "no function"
'''


@pytest.fixture(autouse=True)
def _rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def test_verdicts_are_the_functions() -> None:
    problem = Problem(id="p", text="6 * 7 = ?", answer="42")
    for name, texts, wanted in (
        ("is_right", ["is 42", "42 or 43", "<think>42</think> none", ""], [True, False, False, False]),
        ("share", ["24", "4", "boom 42"], [True, False, False]),  # a partial score is wrong, and so is an error
    ):
        with GradingPool(FunctionVerifier(f"rewards_of_test.{name}")) as pool:
            verdicts = pool.grade([(problem, text) for text in texts])
        assert [verdict.correct for verdict in verdicts] == wanted
    assert [verdict.status for verdict in verdicts] == ["graded", "graded", "crash"]
    assert verdicts[-1].error == "RuntimeError: boom 42"
    with GradingPool(FunctionVerifier("rewards_of_test.share")) as pool:
        boom = replace(problem, answer="boom")
        assert gold_faults([boom], pool) == {"p": "'boom' makes the verifier fail with RuntimeError: boom"}
    assert FunctionVerifier("rewards_of_test.share", stated="so: {answer}").canonical(problem) == "so: 42"


def test_it_may_say_why() -> None:
    problem = Problem(id="p", text="?", answer="42")
    with GradingPool(FunctionVerifier("rewards_of_test.explained")) as pool:
        said = pool.grade([(problem, text) for text in ("pair", "long", "bad")])
    assert [verdict.feedback for verdict in said] == ["Expected a pair.", "x" * 2000, "It could not be judged."]
    assert [verdict.status for verdict in said] == ["graded", "graded", "crash"]
    own = FunctionVerifier("rewards_of_test.is_right")
    assert [own.grade(problem, text).feedback for text in ("42", "4")] == [
        "The answer is right.",
        "The answer is wrong.",
    ]


@pytest.mark.parametrize(
    "name", ["rewards_of_test.nothing", "no_such_module.f", "rewards_of_test.word", "rewards_of_test"]
)
def test_what_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"data\.verifier\.function '.*' (cannot be found|is no function)"):
        FunctionVerifier(name)


def test_a_run_is_judged_by_it_as_by_the_verifier_that_says_the_same(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    """Of arithmetic chains, the last number is the answer."""
    accuracies = []
    for name, own in (("own", ["--data.verifier", "FunctionVerifier"]), ("built-in", [])):
        own += ["--data.verifier.function", "rewards_of_test.is_right"] if own else []
        (tmp_path / name).mkdir()
        (tmp_path / name / "rewards_of_test.py").write_text(REWARDS)
        code, output = carried_out(nursery, tmp_path / name, *fit(tiny_model, "--trainer.max_epochs", "1", *own))
        assert code == 0, output[-3000:]
        rows = read_rows(run_in(tmp_path / name) / METRICS)
        assert any("maj_at" in metric for row in rows for metric in row) == (name == "built-in")
        accuracies.append([row["train/accuracy"] for row in rows if "train/accuracy" in row])
    assert accuracies[0] == accuracies[1]
    assert 0 < sum(accuracies[0]) < len(accuracies[0])
