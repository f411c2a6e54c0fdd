"""No verifier takes more than linear time to find an answer, whatever is repeated in a text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from ogls.records import Problem
from ogls.tasks.answers import after_thinking, last_boxed, last_boxes, last_tagged
from ogls.tasks.chains import first_mistake
from ogls.tasks.math import MathVerifier
from ogls.tasks.multiple_choice import ChoiceVerifier
from ogls.tasks.reasoning_gym import _INERT
from ogls.tasks.tool_use import ToolUseVerifier, read_calls

SHORT, LONG = 50_000, 500_000
NUMBER = Problem(id="p", text="?", answer="5")
CHAIN = Problem(id="p", text="What is 12+8-9?", answer="11")
CALLS = Problem(id="p", text="?", answer=json.dumps([{"Action": "go", "Action_Input": "{}"}]), kind="tooluse")

FINDERS: dict[str, Callable[[str], object]] = {
    "boxes": lambda text: (last_boxed(text), last_boxes(text), last_tagged(text), after_thinking(text)),
    "math": lambda text: MathVerifier().grade(NUMBER, text),
    "last number": lambda text: MathVerifier(last_number=True).grade(NUMBER, text),
    "gold": lambda text: MathVerifier().grade(Problem(id="p", text="?", answer=text), r"\boxed{5}"),
    "choice": lambda text: ChoiceVerifier().grade(NUMBER, text),
    "stated choice": lambda text: ChoiceVerifier().grade(NUMBER, f"answer{text}"),
    "choice in a box": lambda text: ChoiceVerifier().grade(NUMBER, f"\\boxed{{{text}}}<answer>{text}</answer>"),
    "calls": lambda text: read_calls(f"Action: {text}\nAction Input: {{}}"),
    "tool use": lambda text: ToolUseVerifier(max_length=2 * LONG).grade(CALLS, f"Action: go {text}"),
    "inert": _INERT.fullmatch,
    "chain": lambda text: first_mistake(CHAIN, text),
}
PIECES = ["1", "1,", "1,111,", "1+", "1=", " ", "\n", "a", "a ", "x(", "\\", "\\boxed", "\\boxed{", r"\boxed{1}"]
PIECES += [r"\boxed{1} ", r"\boxed{1}, ", r"\boxed{1} and x = ", "{", "}", "{}", "<answer>", "</answer>", "<think>"]
PIECES += ["</think>", "answer", "answer ", "answer is ", "answer:", "((", "* ", "`", "\t", "Action: a\n", "Action: a "]
PIECES += ["Action Input: ", "[", "\\text{", "**", "√", "½", "1.", "-1 "]


ENDS = ("", "?", r"\boxed{5}", " 1")


def seconds(find: Callable[[str], object], piece: str, end: str, length: int) -> float:
    text = piece * (length // len(piece)) + end
    start = time.process_time()
    find(text)
    return time.process_time() - start


@pytest.mark.fault("verifier hangs, dies or eats memory")
@pytest.mark.parametrize("name", FINDERS)
def test_ten_times_the_text_takes_about_ten_times_as_long(name: str) -> None:
    """100 times would be quadratic. Of all texts of 5e4 characters, the three slowest are tried with 5e5."""
    find = FINDERS[name]
    find("warm up")
    times = {(piece, end): seconds(find, piece, end, SHORT) for piece in PIECES for end in ENDS}
    slowest = sorted(times, key=lambda text: times[text])[-3:]
    assert min(times[slowest[-1]], seconds(find, *slowest[-1], SHORT)) < 1, slowest[-1]
    for text in slowest:
        short = max(0.005, min(times[text], *(seconds(find, *text, SHORT) for _ in range(2))))
        assert any(seconds(find, *text, LONG) < 30 * short for _ in range(2)), text
