"""Groups made by hand, every character of a rollout a token of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ogls.lessons.prompts import PromptEncoder
from ogls.lessons.reflection.reflector import ReflectionContext, ReflectionLimits
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Sampling, Verdict
from ogls.tasks.base import ErrorLocator

SUM = Problem(id="sum", text="What is 12+8-9?", answer="11")
OTHER = Problem(id="other", text="What is 20-(9-4)+7?", answer="22")
RIGHT = {"sum": "12+8=20\n20-9=11\n\\boxed{11}", "other": "9-4=5\n20-5=15\n15+7=22\n\\boxed{22}"}
WRONG = {"sum": "12+8=20\n20-9=12\n\\boxed{12}", "other": "20-9=11\n11-4=7\n7+7=14\n\\boxed{14}"}


def letters(encoder: PromptEncoder, text: str) -> tuple[int, ...]:
    return (*(i for character in text for i in encoder.completion(character)[:-1]), encoder.end_id)


def rollout(encoder: PromptEncoder, text: str, correct: bool) -> Rollout:
    ids = letters(encoder, text)
    completion = Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason="stop")
    return Rollout(completion=completion, text=text, verdict=Verdict(correct=correct, status="graded"))


def group(encoder: PromptEncoder, problem: Problem, *texts: str) -> RolloutGroup:
    right = RIGHT[problem.id]
    return RolloutGroup(
        problem=problem,
        prompt_ids=encoder.student(problem),
        rollouts=tuple(rollout(encoder, text, text.startswith(right)) for text in texts),
        policy_version=0,
    )


def reply(quote: str | None, idea: str) -> str:
    return f"<idea>{idea}</idea>" if quote is None else f"<quote>{quote}</quote>\n<idea>{idea}</idea>"


class Scripted:
    """Answers every prompt by `script(prompt, how often anything was asked before)`, and keeps what it was asked."""

    def __init__(self, encoder: PromptEncoder, script: Callable[[str, int], str]) -> None:
        self.encoder, self.script = encoder, script
        self.prompts: list[list[str]] = []
        self.seeds: list[int] = []

    def __call__(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seed: int) -> list[Completion]:
        texts = [self.encoder.tokenizer.decode(prompt) for prompt in prompts]
        replies = [letters(self.encoder, self.script(text, len(self.prompts))) for text in texts]
        self.prompts.append(texts)
        self.seeds.append(seed)
        return [
            Completion(
                token_ids=ids[: sampling.max_tokens],
                logprobs=(-1.0,) * len(ids[: sampling.max_tokens]),
                finish_reason="length" if len(ids) > sampling.max_tokens else "stop",
            )
            for ids in replies
        ]


def context(asked: Scripted, truth: ErrorLocator | None = None, **limits: int) -> ReflectionContext:
    return ReflectionContext(encoder=asked.encoder, ask=asked, seed=1, limits=ReflectionLimits(**limits), truth=truth)
