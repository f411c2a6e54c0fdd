"""Before training, every gold answer has to be read, and nothing else may be right."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ogls.records import Problem, Verdict
from ogls.tasks.base import Verifier
from ogls.tasks.numerals import exact

if TYPE_CHECKING:
    from ogls.tasks.grading import GradingPool

_NAMED, _EXPLAINED, _SHOWN = 20, 3, 60
_WRONG = ("xyzzy", "0", "nan")
_SAID = {
    "graded": "is not graded right as an answer to its own problem",
    "unparsable": "cannot be read by the verifier",
    "timeout": "takes the verifier too long",
    "crash": "makes the verifier fail",
}


def gold_faults(problems: Iterable[Problem], pool: GradingPool) -> dict[str, str]:
    """Returns the reason by id for each problem that no completion, or more than the right one, could solve.

    A gold answer, stated as a completion should state it, has to be graded right, and "", "xyzzy", "0", "nan" and the
    gold answer of another problem have to be graded wrong, unless they are equal to it. Problems that a verifier cannot
    tell apart are checked once.
    """
    faults: dict[str, str] = {}
    alike: dict[Hashable, list[Problem]] = {}
    for problem in problems:
        try:
            alike.setdefault(pool.verifier.gold_key(problem), []).append(problem)
            pool.verifier.canonical(problem)
        except ValueError as error:
            faults[problem.id] = str(error)
    first = [same[0] for same in alike.values() if same[0].id not in faults]
    found = _self_faults(first, pool)
    found |= _wrong_faults([problem for problem in first if problem.id not in found], pool)
    for same in alike.values():
        if same[0].id in found:
            faults |= {problem.id: found[same[0].id] for problem in same}
    return faults


def complaint(problems: Sequence[Problem], faults: dict[str, str]) -> str:
    """Returns ``expected ..., 2 did not: a, b ('7:15a..' cannot be read by the verifier; ...)``."""
    wanted = "expected every gold answer to verify against itself and no wrong answer"
    failed = [problem for problem in problems if problem.id in faults]
    named = ", ".join(problem.id for problem in failed[:_NAMED])
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    examples = list(dict.fromkeys(faults[problem.id] for problem in failed))
    rest = "; ..." if len(examples) > _EXPLAINED else ""
    cure = ""
    if any("####" in problem.answer for problem in failed):
        cure = r"; worked solutions need columns: {answer_pattern: '####\s*(.+)'}"
    return f"{wanted}, {len(failed)} did not: {named}{more} ({'; '.join(examples[:_EXPLAINED])}{rest}{cure})"


def _why(verdict: Verdict) -> str:
    return _SAID[verdict.status] + (f" with {verdict.error}" if verdict.error else "")


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= _SHOWN else answer[:_SHOWN] + "...")


def _self_faults(problems: Sequence[Problem], pool: GradingPool) -> dict[str, str]:
    missing = [problem for problem in problems if problem.answer.strip().casefold() == "nan"]
    asked = [(problem, pool.verifier.canonical(problem)) for problem in problems if problem not in missing]
    said = [(problem, "stands for a missing value") for problem in missing]
    verdicts = zip(asked, pool.grade(asked), strict=True)
    said += [(problem, _why(verdict)) for (problem, _), verdict in verdicts if not verdict.correct]
    return {problem.id: f"{_shown(problem.answer)} {reason}" for problem, reason in said}


def _wrong_faults(problems: Sequence[Problem], pool: GradingPool) -> dict[str, str]:
    asked: list[tuple[Problem, str, Problem | None]] = []  # problem, the wrong answer, whose gold answer it is
    for i, problem in enumerate(problems):
        asked.append((problem, "", None))
        asked += [(problem, wrong, None) for wrong in _WRONG if not _equal(problem.answer, wrong)]
        others = [problems[(i - k) % len(problems)] for k in (1, 2)]
        others = [other for other in others if other.kind == problem.kind]
        other = next((other for other in others if not _equal(problem.answer, other.answer)), None)
        if other is not None:
            asked.append((problem, other.answer, other))
    verdicts = pool.grade([(problem, _stated(pool.verifier, problem, wrong)) for problem, wrong, _ in asked])
    accepted = [case for case, verdict in zip(asked, verdicts, strict=True) if verdict.correct]
    # A verifier knows more equalities than `_equal` does: what holds both ways is one, unless two numbers differ.
    mutual = pool.grade([_swapped(pool.verifier, *case) for case in accepted])
    return {
        problem.id: f"beside {_shown(problem.answer)}, {_shown(wrong)} is graded right"
        for (problem, wrong, _), verdict in zip(accepted, mutual, strict=True)
        if not _is_equality(problem, wrong, verdict)
    }


def _is_equality(problem: Problem, wrong: str, swapped: Verdict) -> bool:
    numbers = exact(problem.answer), exact(wrong)
    return swapped.correct and bool(wrong) and wrong not in ("xyzzy", "nan") and None in numbers


def _swapped(verifier: Verifier, problem: Problem, wrong: str, other: Problem | None) -> tuple[Problem, str]:
    swapped = replace(problem, answer=wrong) if other is None else other
    return swapped, _stated(verifier, swapped, problem.answer)


def _stated(verifier: Verifier, problem: Problem, answer: str) -> str:
    if not answer:
        return ""
    try:
        return verifier.canonical(replace(problem, answer=answer))
    except ValueError:  # no answer at all where calls of tools are asked for
        return answer


def _equal(gold: str, answer: str) -> bool:
    if gold.split() == answer.split():
        return True
    number = exact(gold)
    return number is not None and number == exact(answer)
