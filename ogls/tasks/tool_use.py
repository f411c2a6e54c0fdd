"""Tool use is judged by whether a text makes the calls that were asked for."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ogls.records import Problem, Verdict
from ogls.tasks.answers import acceptable, after_thinking, unparsable
from ogls.tasks.base import Verifier

_ACTION = re.compile(r"^[ \t*]*+Action:[ \t*]*+(.*)$", re.MULTILINE)
_INPUT = re.compile(r"\s*[*]*Action[ _]Input:[*]*\s*(?:```(?:json)?\s*)?")
_OPTIONAL = "[Optional]"
_SHOWN, _MOST = 200, 8  # characters of a call that a feedback quotes, and sentences that it has


def _reject(constant: str) -> Any:
    raise ValueError(f"not JSON: {constant}")


_JSON = json.JSONDecoder(parse_constant=_reject)


@dataclass(frozen=True)
class ToolUseVerifier(Verifier):
    """A text is right if it makes the gold calls and no others: each as often, in any order.

    A call is a line ``Action: name`` followed by ``Action Input: {...}`` in JSON. Two inputs are equal if they are
    equal as JSON: the order of keys makes no difference, nor does 1.0 for 1, but "1" or true for 1 does. The gold
    answer is a JSON list of ``{"Action": name, "Action_Input": JSON text}``. A call that it marks ``[Optional]`` may be
    missing. A text is unparsable if it has no call, a call without input, or input that is not JSON.

    Args:
        max_length: largest number of characters of a text; a longer one is unparsable
        after_thinking: whether only what follows the last ``</think>`` counts
    """

    max_length: int = 100_000
    after_thinking: bool = True

    def grade(self, problem: Problem, text: str) -> Verdict:
        text = after_thinking(text) if self.after_thinking else text
        required, optional = gold_calls(problem)
        made = read_calls(text) if acceptable(text, self.max_length) else None
        if not made:
            return unparsable("No call was found: expected lines `Action: NAME` and `Action Input: {...}` in JSON.")
        counts = Counter(made)
        missing, needless = (required - counts).total(), counts - required - optional
        said = [f"{missing} of the calls that are needed {'is' if missing == 1 else 'are'} missing."] if missing else []
        said += [f"Not needed as it was made: {call[:_SHOWN]}." for call in sorted(needless)]
        return Verdict(
            correct=not said,
            status="graded",
            answer="\n".join(sorted(made)),
            feedback=" ".join(said[:_MOST]) or "The calls are right.",
        )

    def canonical(self, problem: Problem) -> str:
        return "\n".join(f"Action: {name}\nAction Input: {given}" for name, given in _gold_rows(problem))

    def gold_key(self, problem: Problem) -> str:
        return problem.answer


def gold_calls(problem: Problem) -> tuple[Counter[str], Counter[str]]:
    """Returns required and optional calls, each as `name {"sorted": "json"}`, with the number of times they are made.

    Raises:
        ValueError: the gold answer is malformed.
    """
    required, optional = Counter(), Counter()
    marked = [row["Action"].startswith(_OPTIONAL) for row in json.loads(problem.answer)]
    for (name, given), may_be_missing in zip(_gold_rows(problem), marked, strict=True):
        (optional if may_be_missing else required)[_call(name, _JSON.decode(given))] += 1
    return required, optional


def read_calls(text: str) -> list[str] | None:
    """Returns the calls of a text in order; None where one of them has no input or an input that is not JSON."""
    calls = []
    for action in _ACTION.finditer(text):
        given = _INPUT.match(text, action.end())
        name = action[1].rstrip(" \t*`")
        if not given or not name:
            return None
        try:
            value, _ = _JSON.raw_decode(text, given.end())
        except (ValueError, RecursionError):
            return None
        calls.append(_call(name, value))
    return calls


def _gold_rows(problem: Problem) -> list[tuple[str, str]]:
    try:
        rows = json.loads(problem.answer)
        return [(row["Action"].removeprefix(_OPTIONAL).strip(), row["Action_Input"].strip()) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = 'a JSON list of {"Action": name, "Action_Input": JSON text}'
        raise ValueError(f"problem {problem.id!r}: expected {expected}, got {problem.answer[:200]!r}") from error


def _call(name: str, given: Any) -> str:
    return f"{name} {json.dumps(_integers(given), sort_keys=True)}"


def _integers(value: Any) -> Any:
    """Returns the value with whole floats such as 2.0 turned into integers, at any depth."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: _integers(item) for key, item in value.items()}
    return value
