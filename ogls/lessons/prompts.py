"""Text becomes token ids in this module and in no other."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ogls.records import Problem

if TYPE_CHECKING:
    from ogls.policy.pretrained import (
        PreTrainedTokenizerBase,  # jsonargparse runs this block; transformers is slow to import
    )


_SLOTS = {
    "student": ("problem",),
    "reflect_wrong": ("problem", "attempt"),
    "reflect_right": ("problem", "attempt"),
}


@dataclass(frozen=True, slots=True)
class Wording:
    """A wording is the template of the teacher's prompt around a privileged text.

    Args:
        name: key under which `Prompts.views` replaces the template
        template: prompt of the teacher, with the slots ``{problem}`` and ``{text}``
    """

    name: str
    template: str

    def __post_init__(self) -> None:
        _check_slots(f"the wording {self.name!r}", self.template, ("problem", "text"))


def _check_slots(what: str, template: str, slots: Sequence[str]) -> None:
    for slot in slots:
        if template.count(f"{{{slot}}}") != 1:
            raise ValueError(f"{what} needs the slot {{{slot}}} exactly once, got: {template!r}")


ATTEMPT = Wording(
    "attempt",
    "{problem}\n\nFor your information, here is one attempt at this problem:\n{text}\n\n"
    "Now write your own solution. Reason step by step, and put your final answer in \\boxed{}.",
)
"""ATTEMPT shows the teacher one attempt.

Right and wrong attempts share it, so that the effect of its words on the logits cancels in a contrast of the two.
"""

IDEA = Wording(
    "idea",
    "{problem}\n\nKeep this in mind:\n{text}\n\n"
    "Now write your own solution. Reason step by step, and put your final answer in \\boxed{}.",
)
"""IDEA shows the teacher a corrective idea and no solution."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts are templates. A slot is a name in braces; all other braces are plain text.

    Args:
        student: prompt of the student, and of the teacher in its plain view. Slot ``{problem}``.
        views: prompts of the teacher's privileged views by name of their wording: ``attempt``, ``idea``, or one that a
            privilege brings along. They replace the privilege's own words. Slots ``{problem}`` and ``{text}``.
        reflect_wrong: prompt of the reflector about a wrong rollout, which asks for JSON with a ``quote`` and an
            ``idea``. Slots ``{problem}`` and ``{attempt}``; ``{solution}`` and ``{answer}`` where wanted.
        reflect_right: prompt of the reflector about a right rollout, which asks for JSON with an ``idea``. Slots
            ``{problem}`` and ``{attempt}``; ``{answer}`` where wanted.
        system: system message of every prompt; null leaves the chat template's own. A problem's own system message
            comes before it.
        chat: whether the tokenizer's chat template is applied; false sends the bare text, for base models without one.
            Either way, the name of a special token inside a text stays text.
        student_options: further arguments of the chat template for the student's prompts in training, such as
            ``{enable_thinking: false}``
        teacher_options: further arguments of the chat template for the teacher's privileged views
        evaluation_options: further arguments of the chat template for the student's prompts at evaluation; null takes
            `student_options`
        reflection_options: further arguments of the chat template for the reflector's prompts; null takes
            `student_options`
    """

    student: str = "{problem}\n\nReason step by step, and put your final answer in \\boxed{}."
    views: dict[str, str] = field(default_factory=dict)
    reflect_wrong: str = (
        "Problem:\n{problem}\n\nA correct solution:\n{solution}\n\nThe correct answer is {answer}.\n\n"
        "An attempt whose answer is wrong:\n{attempt}\n\n"
        "Find the first place where the attempt goes wrong. Copy that place word for word, a sentence or an equation. "
        "Then give the idea that would have led on from there, in one or two sentences, without telling the answer. "
        'Reply with nothing but JSON: {"quote": "...", "idea": "..."}'
    )
    reflect_right: str = (
        "Problem:\n{problem}\n\nAn attempt whose answer is correct:\n{attempt}\n\n"
        "Give the idea that makes this attempt work, in one or two sentences, without telling the answer. "
        'Reply with nothing but JSON: {"idea": "..."}'
    )
    system: str | None = None
    chat: bool = True
    student_options: dict[str, Any] = field(default_factory=dict)
    teacher_options: dict[str, Any] = field(default_factory=dict)
    evaluation_options: dict[str, Any] | None = None
    reflection_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, slots in _SLOTS.items():
            _check_slots(f"prompts.{name}", getattr(self, name), slots)
        for name, template in self.views.items():
            _check_slots(f"prompts.views.{name}", template, ("problem", "text"))


KEPT = 200
"""Shortening leaves at least this number of characters of a text."""

_GAP = " [...] "
_STAND_IN = "\u241f text \u241f"


def _without_middle(text: str, keep: int) -> str:
    return text if len(text) <= keep else text[: keep - keep // 2] + _GAP + text[len(text) - keep // 2 :]


def _fill(template: str, **slots: str) -> str:
    """Fills all slots in one pass, so that braces inside the filled text stay as they are."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in slots), lambda found: slots[found[0][1:-1]], template)


class PromptEncoder:
    """A prompt encoder turns problems into prompt ids, and sampled ids into text.

    Args:
        prompts: templates of all prompts
        tokenizer: tokenizer of the model

    Raises:
        ValueError: a chat template is asked for, but the tokenizer has none.
    """

    def __init__(self, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
        if prompts.chat and tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template; set data.prompts.chat: false to send bare text")
        self.prompts, self.tokenizer = prompts, tokenizer
        self._special = tuple(tokenizer.all_special_tokens)

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Returns the student's prompt, which is the teacher's plain view, too."""
        return self._encode(problem, _fill(self.prompts.student, problem=problem.text), self.prompts.student_options)

    def evaluated(self, problem: Problem) -> tuple[int, ...]:
        """Returns the student's prompt at evaluation."""
        options = self.prompts.evaluation_options
        text = _fill(self.prompts.student, problem=problem.text)
        return self._encode(problem, text, self.prompts.student_options if options is None else options)

    def view(self, problem: Problem, wording: Wording, text: str) -> tuple[int, ...]:
        """Returns the teacher's privileged prompt that shows `text`."""
        template = self.prompts.views.get(wording.name, wording.template)
        return self._encode(problem, _fill(template, problem=problem.text, text=text), self.prompts.teacher_options)

    def reflect(self, problem: Problem, attempt: str, correct: bool, solution: str = "") -> tuple[int, ...]:
        """Returns the reflector's prompt about an attempt, with a right `solution` to compare it with."""
        template = self.prompts.reflect_right if correct else self.prompts.reflect_wrong
        slots = {"problem": problem.text, "attempt": attempt, "solution": solution, "answer": problem.answer}
        options = self.prompts.reflection_options
        return self._encode(
            problem, _fill(template, **slots), self.prompts.student_options if options is None else options
        )

    def reflect_within(
        self, room: int, problem: Problem, attempt: str, correct: bool, solution: str = ""
    ) -> tuple[tuple[int, ...], bool] | None:
        """Returns `reflect` in at most `room` tokens, and whether a text was shortened; None where it cannot fit.

        First the solution loses its middle, then the attempt its end. Each keeps at least `KEPT` characters, and all
        other text stays whole.
        """
        whole = self.reflect(problem, attempt, correct, solution)
        if len(whole) <= room:
            return whole, False

        def less_solution(keep: int) -> tuple[int, ...]:
            return self.reflect(problem, attempt, correct, _without_middle(solution, keep))

        def less_attempt(keep: int) -> tuple[int, ...]:
            return self.reflect(problem, attempt[:keep] + _GAP, correct, _without_middle(solution, KEPT))

        for prompt, text in ((less_solution, solution), (less_attempt, attempt)):
            sizes = range(KEPT, len(text))
            fitting = bisect_right(sizes, False, key=lambda keep, prompt=prompt: len(prompt(keep)) > room)
            if fitting:
                return prompt(sizes[fitting - 1]), True
        return None

    def completion(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a text that was written, not sampled, with the end token at its end."""
        return (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id)

    @property
    def end_id(self) -> int:
        """Returns the id of the end-of-sequence token. Raises ValueError where the tokenizer has none."""
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ValueError("the tokenizer has no end-of-sequence token")
        return end

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of the ids without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_offsets(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and the characters [start, end) of every token in it.

        Tokens that share a character have the same span. The sampled ids are decoded window by window, because encoding
        the text again could give other tokens.
        """
        spans: list[tuple[int, int]] = []
        text, start, done = "", 0, 0  # ids[start:done] is decoded context; spans up to `done` are final
        for end in range(1, len(token_ids) + 1):
            context = self.decode(token_ids[start:done])
            piece = self.decode(token_ids[start:end])[len(context) :]
            if piece.endswith("\ufffd") and end < len(token_ids) and end - done < 8:
                continue  # a character of several tokens is not complete yet
            spans += [(len(text), len(text) + len(piece))] * (end - done)
            text += piece
            start, done = done, end
        return text, spans

    def _encode(self, problem: Problem, text: str, options: dict[str, Any]) -> tuple[int, ...]:
        """Returns the ids of the conversation.

        The name of a special token inside `text` stays text, since models write such names, too.
        """
        system = "\n\n".join(s for s in (problem.system, self.prompts.system) if s is not None)
        has_system = problem.system is not None or self.prompts.system is not None
        plain = any(token in text for token in self._special)
        if not self.prompts.chat:
            return tuple(
                self.tokenizer(f"{system}\n\n{text}" if system else text, split_special_tokens=plain)["input_ids"]
            )
        messages = [{"role": "system", "content": system}] if has_system else []
        messages.append({"role": "user", "content": _STAND_IN if plain else text})
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=not plain, return_dict=not plain, **options
        )
        if not plain:
            return tuple(encoded["input_ids"])
        before, after = encoded.split(_STAND_IN)
        pieces = ((before, False), (text, True), (after, False))
        encoded = [self.tokenizer(p, add_special_tokens=False, split_special_tokens=split) for p, split in pieces]
        return tuple(i for piece in encoded for i in piece["input_ids"])
