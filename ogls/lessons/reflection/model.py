"""The reflector of ROSD is a language model that is asked about each rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ogls.lessons.reflection.quote import locate
from ogls.lessons.reflection.reflector import ReflectionCase, ReflectionContext, Reflector
from ogls.lessons.reflection.reply import parse_reflection
from ogls.records import Need, Reflection, Sampling
from ogls.system.ranges import check
from ogls.system.seeds import derive


@dataclass(frozen=True, kw_only=True)
class ModelReflector(Reflector):
    """A model reflector asks a language model for a quote and an idea, and believes a reply that `reply` can read.

    The prompts are `prompts.reflect_wrong` and `prompts.reflect_right`. A reply that cannot be read, or whose quote is
    not in the rollout, is asked for again. The best reply counts: one whose quote is in the rollout, else the one whose
    quote is nearest and near enough, else an idea without a place.

    Args:
        right_rollouts: whether right rollouts are reflected on, too; all their tokens are then distilled
        shuffle_ideas: whether, as a control, every rollout gets an idea for another problem's rollout of the same
            outcome
        weights: weights of the reflector: ``frozen`` for those that training began with, as in ROSD's paper;
            ``student`` for the student's present ones
        temperature: temperature at which replies are sampled
        retries: number of times that a bad reply is asked for again
        min_quote: smallest number of characters of a quote, white space and ornaments not counted
        min_similarity: smallest similarity, 1 - edits / length, of a quote that is not in the rollout word for word

    Raises:
        ValueError: a value is out of its range, or replies without randomness are to be asked for again.
    """

    weights: Literal["student", "frozen"] = "frozen"
    temperature: float = 0.7
    retries: int = 1
    min_quote: int = 5
    min_similarity: float = 0.9

    def __post_init__(self) -> None:
        check(self, {"retries": "[0, 100]", "min_quote": "[1, 1e6]", "min_similarity": "(0, 1]"})
        Sampling(max_tokens=1, temperature=self.temperature)
        if self.retries and self.temperature == 0:
            raise ValueError("a reply at temperature 0 is the same again: set retries to 0, or a temperature")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"replies", "start"}) if self.weights == "frozen" else frozenset({"replies"})

    def answer(
        self, cases: Sequence[ReflectionCase], context: ReflectionContext
    ) -> tuple[list[Reflection | None], dict[str, float]]:
        counts: Counter[str] = Counter()
        prompts = {}
        for index, case in enumerate(cases):
            prompt = context.encoder.reflect_within(
                context.limits.prompt_tokens, case.problem, case.rollout.text, case.rollout.correct, case.solution
            )
            if prompt is not None:
                prompts[index], shortened = prompt
                counts["shortened"] += shortened
        sampling = Sampling(max_tokens=context.limits.max_tokens, temperature=self.temperature)
        best: dict[int, tuple[float, Reflection]] = {}
        waiting = list(prompts)
        for turn in range(1 + self.retries):
            if not waiting:
                break
            counts["retried"] += len(waiting) if turn == 1 else 0
            asked = [prompts[index] for index in waiting]
            replies = context.ask(asked, sampling, derive(context.seed, turn))
            for index, reply in zip(waiting, replies, strict=True):
                counts["replies"] += 1
                counts["cut"] += reply.finish_reason == "length"
                quality, reflection = self._read(cases[index], context.encoder.decode(reply.token_ids))
                if reflection is not None and (index not in best or quality > best[index][0]):
                    best[index] = quality, reflection
            waiting = [index for index in waiting if index not in best or best[index][0] < 1]
        rates = {
            "reflection_retry_rate": counts["retried"] / len(cases),
            "reflection_cut_rate": counts["cut"] / max(1, counts["replies"]),
            "reflection_shortened_rate": counts["shortened"] / len(cases),
            "dropped_reflection_too_long": len(cases) - len(prompts),
        }
        return [best[index][1] if index in best else None for index in range(len(cases))], rates

    def _read(self, case: ReflectionCase, reply: str) -> tuple[float, Reflection | None]:
        """Returns the reflection and its quality: 1 needs no further reply, 0 has no place in the rollout."""
        reflection = parse_reflection(reply, case.rollout.correct)
        if reflection is None or reflection.quote is None:
            return 1.0, reflection
        match = locate(case.rollout.text, reflection.quote, self.min_quote, self.min_similarity)
        return (0.0, reflection) if match is None else (match.similarity, replace(reflection, span=match.span))
