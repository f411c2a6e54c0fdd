"""A sample of a run's rollouts goes to `rollouts.jsonl`, one per line, and from there to MLflow as traces.

Which rollouts are taken depends on the seed alone: an epoch's steps share the number between them, and every validation
takes the same problems, so that its traces show how the answer to a problem changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ogls.records import Lesson, Phase, Rollout, RolloutGroup, Span
from ogls.system.seeds import derive
from ogls.tasks.base import ErrorLocator


def share(number: int, steps: int, step: int, seed: int) -> int:
    """Returns how many of an epoch's `number` rollouts are taken from its step `step`, counted from 0 over all epochs.

    Each step has its equal share; the remainder goes to steps that are drawn for each epoch.
    """
    each, left = divmod(number, steps)
    chosen = random.Random(derive(seed, "traces", step // steps)).sample(range(steps), left)
    return each + (step % steps in chosen)


def drawn_of_step(groups: Sequence[RolloutGroup], number: int, step: int, seed: int) -> list[tuple[RolloutGroup, int]]:
    """Returns `number` rollouts of a step, each as its group and its place there; all of them where there are fewer."""
    every = [(group, place) for group in groups for place in range(len(group.rollouts))]
    return random.Random(derive(seed, "traces of step", step)).sample(every, min(number, len(every)))


def drawn_of_validation(groups: Sequence[RolloutGroup], number: int, seed: int) -> list[tuple[RolloutGroup, int]]:
    """Returns the first rollouts of `number` problems, which are the same ones in every validation of a seed."""
    order = sorted(groups, key=lambda group: derive(seed, "traces of validation", group.problem.name))
    return [(group, 0) for group in order[:number] if group.rollouts]


def told(
    group: RolloutGroup,
    place: int,
    split: str,
    step: int,
    phases: Sequence[Phase],
    decode: Callable[[Sequence[int]], str],
    lessons: Sequence[Lesson] = (),
    locator: ErrorLocator | None = None,
) -> dict[str, Any]:
    """Returns what is kept of a rollout: what it says, what was said of it, and what was learned from it.

    Its spans have the times of the step's phases, which are those of all rollouts that were made together.

    Args:
        group: rollouts of one problem
        place: place of the rollout in its group
        split: what it was made for, ``train`` or ``val``
        step: updates that the weights have after it (``train``) or had when it was made (``val``)
        phases: when each phase of the step ran
        decode: function from token ids to text, special tokens included
        lessons: what the step learned from, some of it perhaps from this rollout
        locator: finder of the first error, where no reflector has looked for it
    """
    rollout, problem = group.rollouts[place], group.problem
    error = _error(rollout, locator, group)
    spans = [
        _span("generate", phases, _asked(group, decode), _generated(rollout)),
        _span("grade", phases, {"answer": rollout.verdict.answer, "expected": problem.answer}, _graded(rollout)),
    ]
    if rollout.reflection is not None:
        said = {"idea": rollout.reflection.idea, "quote": rollout.reflection.quote}
        spans.append(_span("reflect", phases, {"attempt": rollout.text}, said))
    learned = [lesson for lesson in lessons if _is_of(lesson, group, rollout)]
    spans += [_span("teach", phases, *_taught(lesson, decode), of="teacher") for lesson in learned]
    return {
        "key": f"{split}/{step:06d}/{problem.name}/{place}",
        **{"step": step, "split": split, "problem": problem.name, "place": place},
        **{"group": f"{len(group.successes)} of {len(group.rollouts)} right", "policy_version": group.policy_version},
        **{"question": problem.text, "answer": problem.answer, "solution": problem.solution, "text": rollout.text},
        **{"correct": rollout.correct, "status": "truncated" if rollout.truncated else rollout.verdict.status},
        **{"extracted": rollout.verdict.answer, "reward": float(rollout.correct)},
        "advantage": next((lesson.advantage for lesson in learned if lesson.advantage), None),
        "error": None if error is None else {"span": list(error), "text": rollout.text[slice(*error)]},
        "spans": spans,
    }


def _is_of(lesson: Lesson, group: RolloutGroup, rollout: Rollout) -> bool:
    return lesson.problem_id == group.problem.id and lesson.token_ids == rollout.completion.token_ids


def _error(rollout: Rollout, locator: ErrorLocator | None, group: RolloutGroup) -> Span | None:
    if rollout.correct:
        return None
    if rollout.reflection is not None:
        return rollout.reflection.span
    return None if locator is None else locator.locate(group.problem, rollout.text)


def _asked(group: RolloutGroup, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    return {"prompt": decode(group.prompt_ids), "tokens": len(group.prompt_ids)}


def _generated(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    return {"text": rollout.text, "tokens": len(completion.token_ids), "ended by": completion.finish_reason}


def _graded(rollout: Rollout) -> dict[str, Any]:
    return {"correct": rollout.correct, "status": rollout.verdict.status}


def _taught(lesson: Lesson, decode: Callable[[Sequence[int]], str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what teacher and student read, and the tokens that are learned, one text per run of such tokens."""
    runs: list[list[int]] = []
    for place, (token, weight) in enumerate(zip(lesson.token_ids, lesson.token_weights, strict=True)):
        if weight:
            if not place or not lesson.token_weights[place - 1]:
                runs.append([])
            runs[-1].append(token)
    views: Mapping[str, list[str]] = {}
    for view in lesson.views:
        views = {**views, view.role: [*views.get(view.role, []), decode(view.prefix_ids)]}
    learned = {"learned": [decode(run) for run in runs], "tokens": sum(map(len, runs)), "advantage": lesson.advantage}
    return {"views": views}, learned


def _span(
    name: str, phases: Sequence[Phase], inputs: Mapping[str, Any], outputs: Mapping[str, Any], of: str = ""
) -> dict[str, Any]:
    """Returns a span from the beginning of the step's first phase of its name to the end of the last one.

    A step that uses earlier rollouts has no such phase: then the span has no length, and stands where the step begins.
    """
    ran = [phase for phase in phases if phase.name == (of or name)]
    start = min((phase.start for phase in ran), default=min((phase.start for phase in phases), default=0.0))
    end = max((phase.end for phase in ran), default=start)
    return {"name": name, "start": start, "end": end, "inputs": dict(inputs), "outputs": dict(outputs)}
