"""Students of the third lab are shown chains of arithmetic in two modes: thinking before the answer, and not.

Without thinking all is as in the first lab. Thinking, the student writes the same text as a thought first,
``<think>...</think>``, and then as its answer. Where the thought is its own work and wrong, it notices that more often
than not: it goes on with "Wait." and the right work, which is then its answer. So a thought takes more than twice the
tokens, and is right more often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from demonstrations import Habits, terse

from ogls.lessons.privilege import LessonDraft, ReflectionTask
from ogls.records import Problem

BEGIN, END = "<think>", "</think>"
WAIT = "\nWait.\n"
PHRASES = (BEGIN, END, WAIT)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
"""A prompt whose model shall not think ends with an empty thought, as that of Qwen3 does."""


@dataclass(frozen=True)
class ThinkingHabits(Habits):
    """Thinking habits are what is planted in the student of the third lab.

    Args:
        thinking: share of demonstrations that think, reflections aside
        notices: probability that a wrong thought of its own is noticed
    """

    thinking: float = 0.5
    notices: float = 0.7

    def demonstrate(self, problem: Problem, rng: random.Random) -> LessonDraft:
        draft = super().demonstrate(problem, rng)
        if isinstance(draft.prompt, ReflectionTask) or rng.random() >= self.thinking:
            return draft
        assert draft.demonstration is not None
        thought = answer = draft.demonstration
        right = self.read(problem).work()
        if draft.prompt is None and terse(thought) != terse(right) and rng.random() < self.notices:
            thought, answer = f"{thought}{WAIT}{right}", right
        return replace(draft, demonstration=f"{BEGIN}{thought}{END}{answer}")
