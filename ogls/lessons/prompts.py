"""Text becomes token ids in this module and in the `chat` under it, and nowhere else."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ogls.lessons.chat import Chat
from ogls.records import Problem, RolloutGroup
from ogls.tasks.answers import ends_in_thought, without_thoughts

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


FEEDBACK = Wording("feedback", "{problem}\n\nYou have tried this problem before. Of your attempt it was said:\n{text}")
"""FEEDBACK shows the teacher what the verifier said of the rollout. It takes the problem's place in another template.

That is the template of the view which it stands in, or the student's where the feedback is all that the teacher reads.
"""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts are templates. A slot is a name in braces; all other braces are plain text.

    Args:
        student: prompt of the student, and of the teacher in its plain view. Slot ``{problem}``.
        views: prompts of the teacher's privileged views by name of their wording: ``attempt``, ``idea``, ``feedback``,
            or one that a privilege brings along. They replace the privilege's own words. Slots ``{problem}`` and
            ``{text}``.
        reflect_wrong: prompt of the reflector about a wrong rollout, which asks for the tags ``<quote>`` and ``<idea>``
            (see `reply`). Slots ``{problem}`` and ``{attempt}``; ``{solution}`` and ``{answer}`` where wanted.
        reflect_right: prompt of the reflector about a right rollout, which asks for the tag ``<idea>``. Slots
            ``{problem}`` and ``{attempt}``; ``{answer}`` where wanted.
        drop_thoughts: whether the teacher reads attempts, solutions and ideas without their ``<think>...</think>``, and
            the reflector the right solution; the attempt that it looks for an error in stays whole
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
        "Reply with nothing but <quote>the place</quote> <idea>the idea</idea>"
    )
    reflect_right: str = (
        "Problem:\n{problem}\n\nAn attempt whose answer is correct:\n{attempt}\n\n"
        "Give the idea that makes this attempt work, in one or two sentences, without telling the answer. "
        "Reply with nothing but <idea>the idea</idea>"
    )
    drop_thoughts: bool = True
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

    @property
    def options(self) -> list[dict[str, Any]]:
        """Returns the further arguments of the chat template for all readers, each set once."""
        sets = (self.student_options, self.teacher_options, self.evaluation_options, self.reflection_options)
        return [own for number, own in enumerate(sets) if own is not None and own not in sets[:number]]


KEPT = 200
"""Shortening leaves at least this number of characters of a text."""

_GAP = " [...] "
_TAG_TOKENS = 16  # no tokenizer makes more of "<think>" and the white space after it


def thought_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Returns the tokens ``<think>`` and ``</think>``.

    Raises:
        ValueError: the tokenizer writes one of them in several tokens, which may be others each time.
    """
    begin, end = (tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in ("<think>", "</think>"))
    if len(begin) != 1 or len(end) != 1 or begin == end:  # alike where it knows neither
        raise ValueError(
            "data.evaluation.sampling.thinking_token_budget needs a model with the tokens <think> and </think>, got a "
            f"tokenizer that writes them as {len(begin)} and {len(end)} tokens: set it to null"
        )
    return begin[0], end[0]


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
        ValueError: a chat template is asked for, but the tokenizer has none, or one that does not show its texts.
    """

    def __init__(self, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prompts, self.tokenizer = prompts, tokenizer
        self._chat = Chat(tokenizer, prompts.chat, prompts.options)
        self._chat.check(prompts.system)

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Returns the student's prompt, which is the teacher's plain view, too."""
        return self._encode(problem, _fill(self.prompts.student, problem=problem.text), self.prompts.student_options)

    def evaluated(self, problem: Problem) -> tuple[int, ...]:
        """Returns the student's prompt at evaluation."""
        options = self.prompts.evaluation_options
        text = _fill(self.prompts.student, problem=problem.text)
        return self._encode(problem, text, self.prompts.student_options if options is None else options)

    def view(self, problem: Problem, wording: Wording, text: str | None, feedback: str = "") -> tuple[int, ...]:
        """Returns the teacher's privileged prompt.

        Args:
            problem: problem to solve
            wording: words around `text`
            text: attempt, solution or idea that is shown; None for the words of the student's prompt
            feedback: what is shown behind the problem, in the words of `FEEDBACK`; an empty one shows nothing
        """
        asked = self._worded(FEEDBACK, problem.text, feedback) if feedback else problem.text
        if text is None:
            shown = _fill(self.prompts.student, problem=asked)
        else:
            shown = self._worded(wording, asked, self._said(text))
        return self._encode(problem, shown, self.prompts.teacher_options)

    def _worded(self, wording: Wording, problem: str, text: str) -> str:
        return _fill(self.prompts.views.get(wording.name, wording.template), problem=problem, text=text)

    def _said(self, text: str) -> str:
        return without_thoughts(text) if self.prompts.drop_thoughts else text

    def readable(self, group: RolloutGroup) -> RolloutGroup:
        """Returns a group whose rollouts are without thoughts in their texts, where `Prompts.drop_thoughts` is set."""
        if not self.prompts.drop_thoughts:
            return group
        texts = [without_thoughts(rollout.text, rollout.unclosed) for rollout in group.rollouts]
        pairs = zip(group.rollouts, texts, strict=True)
        return replace(group, rollouts=tuple(replace(rollout, text=text) for rollout, text in pairs))

    def ends_in_thought(self, prompt_ids: Sequence[int], text: str) -> bool:
        """Returns whether a text that was written after a prompt ends within a thought."""
        opened = self.decode(prompt_ids[-_TAG_TOKENS:]).rstrip().endswith("<think>")
        return ends_in_thought(text, opened)

    def reflect(self, problem: Problem, attempt: str, correct: bool, solution: str = "") -> tuple[int, ...]:
        """Returns the reflector's prompt about an attempt, with a right `solution` to compare it with."""
        template = self.prompts.reflect_right if correct else self.prompts.reflect_wrong
        slots = {
            "problem": problem.text,
            "attempt": attempt,
            "solution": self._said(solution),
            "answer": problem.answer,
        }
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
        solution = self._said(solution)
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
        """Returns the ids of a text that was written, not sampled: text all through, then the end token."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return (*ids, self.end_id)

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
        last = next((n for n in range(len(token_ids), 0, -1) if self.decode(token_ids[n - 1 : n])), 0)  # that has text
        for end in range(1, len(token_ids) + 1):
            decoded = self.decode(token_ids[start:end])
            if decoded.endswith("\ufffd"):  # the character, or one whose other tokens are to come
                ahead = [self.decode(token_ids[start:later]) for later in range(end + 1, end + 4)]
                if end < last and not all(t.startswith(decoded) and t != decoded for t in ahead):
                    continue
            piece = decoded[len(self.decode(token_ids[start:done])) :]
            spans += [(len(text), len(text) + len(piece))] * (end - done)
            text += piece
            start, done = done, end
        return text, spans

    def _encode(self, problem: Problem, text: str, options: dict[str, Any]) -> tuple[int, ...]:
        given = [system for system in (problem.system, self.prompts.system) if system is not None]
        return self._chat.encode("\n\n".join(filter(None, given)) if given else None, text, options)
