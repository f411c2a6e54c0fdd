"""Each verifier on answers worked by hand, on the data where it is at hand, and on hostile text."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogls.records import Problem, Verdict
from ogls.tasks.answers import last_boxed, last_tagged
from ogls.tasks.base import Verifier
from ogls.tasks.by_kind import ByKind
from ogls.tasks.expressions import refused
from ogls.tasks.math import MathVerifier
from ogls.tasks.multiple_choice import ChoiceVerifier
from ogls.tasks.reading import read
from ogls.tasks.reasoning_gym import ReasoningGym, ReasoningGymVerifier
from ogls.tasks.statements import Value
from ogls.tasks.tool_use import ToolUseVerifier

UNPARSABLE = Verdict(correct=False, status="unparsable")


def problem(answer: str, kind: str = "math") -> Problem:
    return Problem(id="p", text="?", answer=answer, kind=kind)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{4} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"{ \boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"} \boxed{} ", ""),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<answer>A</answer> <answer>\nB\n</answer>", "\nB\n"),
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer>A", None),
        ("</answer><answer>", None),
    ],
)
def test_last_tagged(text: str, found: str | None) -> None:
    assert last_tagged(text) == found


@given(st.text(alphabet="\\boxed{}<>/answer 1"))
def test_extraction_takes_any_text(text: str) -> None:
    last_boxed(text)
    last_tagged(text)


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("5", "5", True),
        ("5", "5.0", True),
        ("5", "-5", False),
        ("1080", "1,080", True),
        ("1080", r"\$1{,}080.", True),
        ("1080", "10,80", False),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", ".5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", "1/3", False),
        (r"2\sqrt{2}", r"\sqrt 8", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("5", "x=5", True),
        ("10", r"10\text{ cm}", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("(1,2)", "(2,1)", False),
        (r"\text{Monday}", r"\text{Monday}", True),
        ("90", r"90^\circ", True),
    ],
)
def test_math(gold: str, answer: str, correct: bool) -> None:
    verdict = MathVerifier().grade(problem(gold), f"Hence $\\boxed{{{answer}}}$.")
    assert (verdict.status, verdict.correct) == ("graded", correct)


@pytest.mark.parametrize(
    "text",
    ["", "the answer is 5", r"\boxed{5", r"\boxed{}", r"\boxed{???}", r"\boxed{5" + "\x00}", "\\boxed{5\ud800}"]
    + [
        rf"\boxed{{{answer}}}"
        for answer in ("9^{9^{9^9}}", "100000000!", "(30!)!", "{" * 13 + "5" + "}" * 13, "5" * 401)
    ]
    + [rf"\boxed{{{answer}}}" for answer in ("2^{99999}", "(9^{99})^{999}", r"\binom{100000}{500}")],
)
def test_math_unparsable(text: str) -> None:
    assert MathVerifier().grade(problem("5"), text) == UNPARSABLE


@pytest.mark.parametrize(
    "answer", ["x^{2^n}", "e^{x^2}", r"(1+x^2)^3", "2^{1000}", "10!", r"\binom{20}{3}", "((1+(2)))"]
)
def test_ordinary_answers_are_not_refused(answer: str) -> None:
    assert not refused(answer)


def test_votes_of_equal_numbers_are_equal() -> None:
    answers = {MathVerifier().grade(problem("7"), f"\\boxed{{{a}}}").answer for a in ("1080", "1,080", "1080.0")}
    assert answers == {"1080"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [("12 + 8 = 20. 20 - 9 = 11.", "11"), ("It costs $1,080.50!", "2161/2"), ("a1 is 3/4", "3/4"), ("x2", None)],
)
def test_last_number_is_an_option(text: str, answer: str | None) -> None:
    assert MathVerifier().grade(problem("11"), text) == UNPARSABLE
    verdict = MathVerifier(last_number=True).grade(problem("11"), text)
    assert (verdict.answer, verdict.correct) == (answer, answer == "11")
    assert MathVerifier(last_number=True).grade(problem("11"), rf"\boxed{{11}} or {text}").correct


@given(st.integers(-(10**9), 10**9))
def test_plain_numbers(value: int) -> None:
    for spelt in (str(value), f"{value:,}", f"{value}.00", f" ${value}$ "):
        first, *_ = read(spelt)
        assert isinstance(first, Value)
        assert first.terms[0].number == value


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<reasoning>A?</reasoning>\n<answer>\nB\n</answer>", "B"),
        ("<answer>B: 1.69</answer>", "B"),
        ("<answer> (b) </answer>", "B"),
        ("<answer>**B**</answer>", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        ("So the answer is (B).", "B"),
        ("**Answer: B**", "B"),
        ("Answer: A\nNo. Answer: B", "B"),
        ("<answer>C</answer> Answer: B", "C"),
        ("<answer>A or B</answer>", None),
        ("<answer>Both</answer> Answer: B", None),
        ("<answer>E</answer>", None),
        ("The answer is a matter of taste", None),
        ("Answer: A good question", None),
        ("B", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    verdict = ChoiceVerifier().grade(problem("B", "mcq"), text)
    assert (verdict.answer, verdict.correct) == (letter, letter == "B")
    assert verdict.status == ("graded" if letter else "unparsable")


def test_strict_choice_wants_the_tag() -> None:
    assert ChoiceVerifier(strict=True).grade(problem("B"), r"\boxed{B}") == UNPARSABLE
    assert ChoiceVerifier(strict=True).grade(problem("B"), "<answer>B</answer>").correct


GOLD_CALLS = json.dumps(
    [
        {"Action": "find", "Action_Input": '{"who": "a", "where": {"x": [1, {"y": 2}]}}'},
        {"Action": "tell", "Action_Input": '{"text": "Action: none"}'},
        {"Action": "tell", "Action_Input": '{"text": "Action: none"}'},
        {"Action": "[Optional]wait", "Action_Input": "{}"},
    ]
)
FIND = 'Action: find\nAction Input: {"where": {"x": [1.0, {"y": 2}]}, "who": "a"}\n'
TELL = 'Thought: tell them.\nAction: tell\nAction Input: ```json\n{"text": "Action: none"}\n```\n'
WAIT = "Action: wait\nAction Input: {}\n"


@pytest.mark.parametrize(
    ("text", "status", "correct"),
    [
        (FIND + TELL + TELL, "graded", True),
        (TELL + WAIT + FIND + TELL, "graded", True),
        (FIND + TELL, "graded", False),
        (FIND + TELL + TELL + TELL, "graded", False),
        (FIND + TELL + TELL + WAIT + WAIT, "graded", False),
        (FIND.replace("1.0", '"1"') + TELL + TELL, "graded", False),
        (FIND.replace("1.0", "true") + TELL + TELL, "graded", False),
        (FIND.replace("find", "Find") + TELL + TELL, "graded", False),
        (FIND.replace("}]}, ", ", ") + TELL + TELL, "unparsable", False),
        (FIND + TELL + "Action: tell", "unparsable", False),
        (FIND.replace("1.0", "NaN"), "unparsable", False),
        ("Action: find\nAction Input: " + "[" * 50_000, "unparsable", False),
        ("I would call find.", "unparsable", False),
        ("", "unparsable", False),
    ],
)
def test_tool_use(text: str, status: str, correct: bool) -> None:
    verdict = ToolUseVerifier().grade(problem(GOLD_CALLS, "tooluse"), text)
    assert (verdict.status, verdict.correct) == (status, correct)


@pytest.mark.parametrize("gold", ["", "{}x", "[1]", '[{"Action": "a"}]', '[{"Action": "a", "Action_Input": {}}]'])
def test_malformed_gold_calls(gold: str) -> None:
    with pytest.raises(ValueError, match="problem 'p': expected a JSON list"):
        ToolUseVerifier().canonical(problem(gold, "tooluse"))


def test_reasoning_gym_scores_again_from_the_id() -> None:
    source, verifier = ReasoningGym("countdown", size=20, seed=1), ReasoningGymVerifier()
    for entry in (source[i] for i in range(3)):
        assert verifier.grade(entry, verifier.canonical(entry)).correct
        assert verifier.grade(entry, rf"\boxed{{({entry.answer})}}").correct  # scored by the data set, not by spelling
        assert not verifier.grade(entry, "<answer>1</answer>").correct
        assert verifier.grade(entry, "it is 1") == UNPARSABLE
        for text in (
            "__import__('os').getpid()",
            "exit()",
            "(1).real",
            "lambda: 1",
            "print(1)",
            "f'{1}'",
            "[].append(1)",
        ):
            assert verifier.grade(entry, f"<answer>{text}</answer>") == UNPARSABLE
    other = Problem(id=str(source[0].id), text="another question", answer="1")
    with pytest.raises(ValueError, match="expected 'another question'"):
        verifier.grade(other, "<answer>2</answer>")


def test_partial_scores_are_wrong() -> None:
    entry, verifier = ReasoningGym("letter_counting", size=3)[0], ReasoningGymVerifier()
    assert not verifier.grade(entry, f"<answer>{entry.answer} letters</answer>").correct


def test_by_kind() -> None:
    verifier = ByKind()
    assert verifier.grade(problem("5"), r"\boxed{5}").correct
    assert verifier.grade(problem("B", "mcq"), "<answer>B</answer>").correct
    for call in (lambda p: verifier.grade(p, ""), verifier.canonical):
        with pytest.raises(ValueError, match=r"problem 'p': no verifier for kind 'poem', known: \['math', 'mcq'"):
            call(problem("x", "poem"))


@dataclass(frozen=True)
class Yes(Verifier):
    def grade(self, problem: Problem, text: str) -> Verdict:
        return Verdict(correct=True, status="graded", answer=text)

    def canonical(self, problem: Problem) -> str:
        return problem.answer


def test_by_kind_takes_more_kinds() -> None:
    verifier = ByKind({"poem": Yes(), "math": MathVerifier(last_number=True)})
    assert verifier.grade(problem("x", "poem"), "roses").answer == "roses"
    assert verifier.grade(problem("5"), "it is 5").correct
    assert verifier.grade(problem("B", "mcq"), "<answer>B</answer>").correct


def test_no_verifier_evaluates_text() -> None:
    banned = {"eval", "exec", "compile", "sympify", "parse_expr", "ExprExtractionConfig", "__import__", "S"}
    for file in (Path(__file__).parents[2] / "ogls" / "tasks").glob("*.py"):
        names = {n.id for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Name)}
        imported = {
            a.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) for a in n.names
        }
        assert not banned & (names | imported), file.name


CALLS = json.dumps([{"Action": "Add", "Action_Input": '{"a": 1}'}, {"Action": "Ask", "Action_Input": "{}"}])
BOX = "No final answer was found: it has to stand in \\boxed{}."
UNREAD = "The final answer in \\boxed{} cannot be read as a value, an expression or a list."
CHOICE = "No choice was found: expected one letter of A, B, C, D."
NO_CALL = "No call was found: expected lines `Action: NAME` and `Action Input: {...}` in JSON."


@pytest.mark.parametrize(
    ("kind", "gold", "text", "feedback"),
    [
        ("math", "11", r"so \boxed{12}", "The answer read is 12, which is wrong."),
        ("math", "1/2", r"\boxed{0.5}", "The answer read is 0.5, which is right."),
        ("math", "11", r"\boxed{1}, \boxed{11}", "The answer read is 1, 11, which is wrong."),
        ("math", "11", "<think>\\boxed{11}</think>", BOX),
        ("math", "11", r"\boxed{" + "9" * 500 + "}", UNREAD),
        ("math", "11", "\\boxed{1\x00}", UNREAD),
        ("math", "11", r"\boxed{11 = 10}", UNREAD),
        ("math", "11", r"\boxed{" + "9" * 300 + "}", f"The answer read is {'9' * 200} [...], which is wrong."),
        ("mcq", "B", "<answer>C: 3</answer>", "The answer read is C, which is wrong."),
        ("mcq", "B", r"\boxed{B}", "The answer read is B, which is right."),
        ("mcq", "B", "The answer is E", CHOICE),
        ("tooluse", CALLS, "hello", NO_CALL),
        ("tooluse", CALLS, 'Action: Add\nAction Input: {"a": 1}', "1 of the calls that are needed is missing."),
        (
            "tooluse",
            CALLS,
            'Action: Add\nAction Input: {"a": 2}',
            '2 of the calls that are needed are missing. Not needed as it was made: Add {"a": 2}.',
        ),
        (
            "tooluse",
            CALLS,
            'Action: Ask\nAction Input: {}\nAction: Add\nAction Input: {"a": 1.0}',
            "The calls are right.",
        ),
    ],
)
def test_every_verifier_says_what_it_read_and_not_what_is_right(kind: str, gold: str, text: str, feedback: str) -> None:
    verdict = ByKind().grade(problem(gold, kind), text)
    assert verdict.feedback == feedback
    assert verdict.correct == ("right" in feedback)


def test_reasoning_gym_says_what_it_read() -> None:
    pytest.importorskip("reasoning_gym")
    entry = ReasoningGym("basic_arithmetic", size=3)[0]
    said = [ByKind().grade(entry, text).feedback for text in ("?", "<answer>0.5</answer>")]
    assert said[0] == "No answer was found: it has to stand in <answer></answer> or \\boxed{}."
    assert said[1] == "The answer read is 0.5, which is wrong."
    inert = ReasoningGym("countdown", size=3)[0]
    assert (
        ByKind().grade(inert, "<answer>__import__</answer>").feedback.startswith("The answer cannot be read: expected")
    )
