"""Drafts become lessons: text becomes token ids, errors become token weights.

Whatever is left out on the way is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ogls.lessons.advantage import Advantage
from ogls.lessons.privilege import LessonDraft, Privilege, PrivilegedText, ReflectionTask
from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.selection import TokenSelection, token_span
from ogls.records import Lesson, Problem, Rollout, RolloutGroup, Span, View
from ogls.system.step_metrics import timed
from ogls.tasks.base import ErrorLocator


@dataclass(frozen=True, kw_only=True)
class LessonBuilder:
    """A lesson builder turns rollout groups into the lessons of one batch.

    Args:
        encoder: prompt templates, bound to the tokenizer
        privilege: choice of the rollouts that are learned from and of what the teacher reads
        selection: choice of the tokens that count
        locator: finder of first errors, for selections that start or end at one; None where none is needed
        context_length: largest number of tokens of prompt and rollout together; a longer view is dropped, never cut
        advantage: value of each rollout against its group; None where nothing is reinforced
        reflected: whether the rollout's reflection says where the first error is, instead of the locator
    """

    encoder: PromptEncoder
    privilege: Privilege
    selection: TokenSelection
    locator: ErrorLocator | None
    context_length: int
    advantage: Advantage | None = None
    reflected: bool = False

    @timed("lessons")
    def build(self, groups: Sequence[RolloutGroup]) -> tuple[tuple[Lesson, ...], dict[str, int]]:
        """Returns the lessons, and counts by name: lessons, learned tokens, and what was dropped for each reason."""
        names = ("dropped_unlocated", "dropped_view_too_long", "dropped_prompt_too_long", "views_too_long")
        counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        lessons: list[Lesson] = []
        for group in map(self.encoder.readable, groups):
            made: list[tuple[Rollout | None, Lesson]] = []
            for draft in self.privilege.drafts(group):
                lesson = self._lesson(group, draft, counts)
                if lesson is not None:
                    made.append((draft.rollout, lesson))
            lessons += self._reinforced(group, made)
        return tuple(lessons), {**counts, **counted(lessons)}

    def _lesson(self, group: RolloutGroup, draft: LessonDraft, counts: Counter[str]) -> Lesson | None:
        prompt_ids = group.prompt_ids if draft.prompt is None else self._prompt(group.problem, draft.prompt)
        if draft.rollout is None:
            assert draft.demonstration is not None
            token_ids, logprobs = self.encoder.completion(draft.demonstration), None
            weights = (1.0,) * len(token_ids)
        else:
            error = None
            token_ids, logprobs = draft.rollout.completion.token_ids, draft.rollout.completion.logprobs
            selection = draft.selection or self.selection
            if ("error" in selection.needs or self.reflected) and not draft.rollout.correct:
                error = self._locate(group.problem, draft.rollout)
                if error is None:
                    counts["dropped_unlocated"] += 1
                    return None
            weights = selection.token_weights(draft.rollout, error)
        lesson = Lesson(
            problem_id=group.problem.id,
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            token_weights=tuple(draft.weight * weight for weight in weights),
            logprobs=logprobs,
        )
        return self._with_views(group, draft, lesson, counts)

    def _reinforced(self, group: RolloutGroup, made: Sequence[tuple[Rollout | None, Lesson]]) -> list[Lesson]:
        """Returns the group's lessons with the advantages of their rollouts.

        A rollout that has an advantage but no lesson gets a lesson for it.
        """
        lessons = [lesson for _, lesson in made]
        if self.advantage is None:
            return lessons
        for rollout, value in zip(group.rollouts, self.advantage.of(group), strict=True):
            own = [index for index, (of, _) in enumerate(made) if of is rollout]
            if not value or (self.advantage.routed and any(lessons[index].views for index in own)):
                continue
            if own:
                lessons[own[0]] = replace(lessons[own[0]], advantage=value)
                continue
            completion = rollout.completion
            lessons.append(
                Lesson(
                    problem_id=group.problem.id,
                    prompt_ids=group.prompt_ids,
                    token_ids=completion.token_ids,
                    token_weights=(0.0,) * len(completion.token_ids),
                    logprobs=completion.logprobs,
                    advantage=value,
                )
            )
        return lessons

    def _with_views(
        self, group: RolloutGroup, draft: LessonDraft, lesson: Lesson, counts: Counter[str]
    ) -> Lesson | None:
        room = self.context_length - lesson.num_learned
        views = []
        for text in draft.texts:
            view = View(role=text.role, prefix_ids=self._prompt(group.problem, text))
            if len(view.prefix_ids) <= room:
                views.append(view)
            else:
                counts["views_too_long"] += 1
        too_long = len(lesson.prompt_ids) > room
        counts["dropped_prompt_too_long"] += too_long
        lost = {text.role for text in draft.texts} - {view.role for view in views}
        counts["dropped_view_too_long"] += bool(lost)
        if lost or too_long or not lesson.num_learned:
            return None
        plain = (View(role="plain", prefix_ids=lesson.prompt_ids),) if views or draft.plain else ()
        return replace(lesson, views=(*plain, *views))

    def _prompt(self, problem: Problem, shown: PrivilegedText | ReflectionTask) -> tuple[int, ...]:
        if isinstance(shown, ReflectionTask):
            return self.encoder.reflect(problem, shown.attempt, shown.correct, shown.solution)
        return self.encoder.view(problem, self.privilege.views[shown.role], shown.text, shown.feedback)

    def _locate(self, problem: Problem, rollout: Rollout) -> Span | None:
        text, offsets = self.encoder.decode_offsets(rollout.completion.token_ids)
        if self.reflected:
            span = rollout.reflection.span if rollout.reflection else None
        elif self.locator is not None:
            span = self.locator.locate(problem, text)
        else:
            raise ValueError(f"{type(self.selection).__name__} needs an error locator: set data.locator")
        return None if span is None else token_span(offsets, span)


def counted(lessons: Sequence[Lesson]) -> dict[str, int]:
    """Returns the numbers of lessons, of those that carry an advantage, and of tokens with a weight or an advantage."""
    return {
        "lessons": len(lessons),
        "rollouts_reinforced": sum(lesson.advantage != 0 for lesson in lessons),
        "tokens_learned": sum(lesson.advantage != 0 or w != 0 for lesson in lessons for w in lesson.token_weights),
    }
