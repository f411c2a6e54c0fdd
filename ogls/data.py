"""The DataModule: problems in, fresh rollouts out, one batch an optimiser step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule

from ogls.engine.base import RolloutEngine, Sampling
from ogls.grading import GradingPool
from ogls.lessons import LessonBuilder
from ogls.privilege import PeerOutcomes, Privilege
from ogls.problems import ProblemSource
from ogls.prompts import PromptEncoder, Prompts, count_reflection_markers
from ogls.records import Batch, Problem, Rollout, RolloutGroup
from ogls.seeds import derive
from ogls.selection import AllTokens, ErrorLocator, TokenSelection
from ogls.verifiers import ByKind, Verifier, verify_gold

if TYPE_CHECKING:
    from ogls.module import SelfDistillation


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How held-out problems are judged.

    Args:
        samples: k, rollouts a problem; gives avg@k, pass@1..k and maj@k.
        sampling: how they are drawn.
        with_solution: evaluate a second time with the reference solution in view: does the teacher use what it reads?
    """

    samples: int = 4
    sampling: Sampling = Sampling(max_tokens=1024)
    with_solution: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be at least 1, got {self.samples}")


class _Sized:
    """An iterable with a length: without one, Lightning prefetches a batch, and rollouts are one update stale."""

    def __init__(self, length: int, batches: Iterator[Any] | Any) -> None:
        self._length, self._batches = length, batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._batches()


class RolloutDataModule(LightningDataModule):
    """Owns problems, engine and verifier, and streams fresh on-policy rollouts.

    Args:
        train: problems to learn from.
        val: held-out problems for validation.
        test: problems for `test` and `predict`; null takes `val`.
        prompts: templates.
        engine: what samples; null where nothing is sampled and nothing validated (likelihood on demonstrations).
        privilege: what the teacher reads.
        selection: which tokens count.
        locator: finds the first error of a rollout, for selections that need it.
        verifier: says which rollouts are right.
        sampling: of the training rollouts.
        evaluation: of the held-out rollouts.
        group_size: G, rollouts a problem.
        problems_per_step: problems an optimiser step.
        steps_per_epoch: optimiser steps an epoch; validation comes at its end.
        updates_per_rollout: optimiser steps on the same rollouts. Above 1 they are off-policy, and the objective needs
            an importance cap.
        context_length: prompt and rollout together.
        grading_workers: processes that verify answers.
        seed: order of the problems and seeds of the rollouts.
        predict_file: where `predict` writes its rollouts, one JSON object a line.
    """

    def __init__(
        self,
        train: ProblemSource,
        val: ProblemSource,
        test: ProblemSource | None = None,
        prompts: Prompts = Prompts(),
        engine: RolloutEngine | None = None,
        privilege: Privilege = PeerOutcomes(),
        selection: TokenSelection = AllTokens(),
        locator: ErrorLocator | None = None,
        verifier: Verifier = ByKind(),
        sampling: Sampling = Sampling(max_tokens=1024),
        evaluation: Evaluation = Evaluation(),
        group_size: int = 8,
        problems_per_step: int = 32,
        steps_per_epoch: int = 10,
        updates_per_rollout: int = 1,
        context_length: int = 2048,
        grading_workers: int = 1,
        seed: int = 0,
        predict_file: str = "rollouts.jsonl",
    ) -> None:
        super().__init__()
        counts = {
            "group_size": group_size,
            "problems_per_step": problems_per_step,
            "steps_per_epoch": steps_per_epoch,
            "updates_per_rollout": updates_per_rollout,
            "grading_workers": grading_workers,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if group_size < privilege.min_group_size:
            raise ValueError(
                f"{type(privilege).__name__} contrasts rollouts of one group: data.group_size must be at least "
                f"{privilege.min_group_size}, got {group_size}"
            )
        if selection.needs_error and locator is None:
            raise ValueError(f"{type(selection).__name__} needs an error locator: set data.locator")
        if engine is None and privilege.samples_rollouts:
            raise ValueError(f"{type(privilege).__name__} learns from rollouts: set data.engine")
        self.train_problems, self.val_problems, self.test_problems = train, val, test or val
        self.prompts, self.engine, self.privilege, self.selection = prompts, engine, privilege, selection
        self.locator, self.verifier, self.sampling, self.evaluation = locator, verifier, sampling, evaluation
        self.group_size, self.problems_per_step, self.steps_per_epoch = group_size, problems_per_step, steps_per_epoch
        self.updates_per_rollout, self.context_length, self.seed = updates_per_rollout, context_length, seed
        self.predict_file = predict_file
        self.pool = GradingPool(verifier, workers=grading_workers)
        self.fit_follows = False  # a validation that comes before training checks for both
        self._checked: set[str] = set()
        self._last: Batch | None = None
        self._loaded: int | None = None  # version of the weights in the engine; None before it is started

    # ---- set-up: everything that can be wrong is found here, before weights are loaded ----

    def setup(self, stage: str) -> None:
        self.encoder = PromptEncoder(self.prompts, self._module.tokenizer)
        sources = {"train": self.train_problems} if stage == "fit" or self.fit_follows else {}
        if self.engine is not None:
            sources |= {"val": self.val_problems} if stage in ("fit", "validate") else {"test": self.test_problems}
        for name, source in sources.items():
            if name not in self._checked:
                self._check(name, source)
                self._checked.add(name)

    def _check(self, name: str, source: ProblemSource) -> None:
        if len(source) == 0:
            raise ValueError(f"data.{name} has no problems")
        problems = [source[i] for i in range(len(source))]
        verify_gold(problems, self.pool)
        room = self.context_length - (self.sampling if name == "train" else self.evaluation.sampling).max_tokens
        for problem in problems:
            length = len(self.encoder.student(problem) if name == "train" else self.encoder.evaluated(problem))
            if length > room:
                raise ValueError(
                    f"data.{name}: the prompt of problem {problem.id!r} has {length} tokens, but context_length "
                    f"{self.context_length} leaves {room} beside the rollout"
                )

    @property
    def _module(self) -> SelfDistillation:
        assert self.trainer is not None
        return self.trainer.lightning_module  # pyright: ignore[reportReturnType]

    # ---- training ----

    def train_dataloader(self) -> _Sized:
        return _Sized(self.steps_per_epoch, self._training_batches)

    def _training_batches(self) -> Iterator[Batch]:
        # After a stop in mid-epoch Lightning asks for the rest of the epoch only.
        for _ in range(self._module.policy_version % self.steps_per_epoch, self.steps_per_epoch):
            version = self._module.policy_version
            if self._last is None or version - self._last.policy_version >= self.updates_per_rollout:
                self._last = self.make_batch(version - version % self.updates_per_rollout)
            yield self._last

    def make_batch(self, version: int) -> Batch:
        """The batch of optimiser step `version`: a function of (seed, version, weights), whatever was made before."""
        start = time.perf_counter()
        problems = self._problems_of(version // self.updates_per_rollout)
        if self.privilege.samples_rollouts:
            prompts = [self.encoder.student(problem) for problem in problems]
            seed = derive(self.seed, "rollouts", version)
            groups, metrics = self.sample(problems, prompts, self.group_size, self.sampling, seed)
        else:
            groups = [self._unsampled(problem, version) for problem in problems]
            metrics = {}
        began = time.perf_counter()
        builder = LessonBuilder(
            encoder=self.encoder,
            privilege=self.privilege,
            selection=self.selection,
            locator=self.locator,
            context_length=self.context_length,
        )
        lessons, counts = builder.build(groups)
        metrics |= {f"train/{name}": value for name, value in counts.items()}
        metrics |= {f"train/{name}": value for name, value in summarise(groups).items()}
        metrics["time/lessons"] = time.perf_counter() - began
        metrics["time/data"] = time.perf_counter() - start
        return Batch(lessons=lessons, policy_version=version, groups=tuple(groups), metrics=metrics)

    def _problems_of(self, draw: int) -> list[Problem]:
        """Problems draw*n ... draw*n + n-1 of an endless sequence of shuffled passes over the training set."""
        size, first = len(self.train_problems), draw * self.problems_per_step
        orders: dict[int, list[int]] = {}
        for lap in range(first // size, (first + self.problems_per_step - 1) // size + 1):
            orders[lap] = random.Random(derive(self.seed, "order", lap)).sample(range(size), size)
        positions = range(first, first + self.problems_per_step)
        return [self.train_problems[orders[p // size][p % size]] for p in positions]

    def _unsampled(self, problem: Problem, version: int) -> RolloutGroup:
        prompt_ids = self.encoder.student(problem)
        return RolloutGroup(problem=problem, prompt_ids=prompt_ids, rollouts=(), policy_version=version)

    # ---- sampling ----

    def sample(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[tuple[int, ...]],
        n: int,
        sampling: Sampling,
        seed: int,
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """`n` graded rollouts of every prompt from the current weights, and the seconds that each phase took."""
        version = self._module.policy_version
        times = {}
        start = time.perf_counter()
        engine = self._ready_engine(version)
        times["time/sync"] = time.perf_counter() - start
        start = time.perf_counter()
        completions = engine.generate(prompts, sampling, n, seed)
        times["time/generate"] = time.perf_counter() - start
        tokens = sum(len(c.token_ids) for group in completions for c in group)
        times["speed/generate_tokens_per_s"] = tokens / max(times["time/generate"], 1e-9)
        start = time.perf_counter()
        texts = [[self.encoder.decode(c.token_ids) for c in group] for group in completions]
        pairs = [(problem, text) for problem, group in zip(problems, texts, strict=True) for text in group]
        verdicts = iter(self.pool.grade(pairs))
        times["time/grade"] = time.perf_counter() - start
        groups = [
            RolloutGroup(
                problem=problem,
                prompt_ids=tuple(prompt),
                rollouts=tuple(
                    Rollout(completion=completion, text=text, verdict=next(verdicts))
                    for completion, text in zip(group, group_texts, strict=True)
                ),
                policy_version=version,
            )
            for problem, prompt, group, group_texts in zip(problems, prompts, completions, texts, strict=True)
        ]
        return groups, times

    def _ready_engine(self, version: int) -> RolloutEngine:
        if self.engine is None:
            raise ValueError("sampling needs an engine: set data.engine")
        if self._loaded is None:
            self.engine.start(self._module.folder, self.context_length)
        if self._loaded != version:
            self.engine.load(self._module.policy, version)
            self._loaded = version
        return self.engine

    # ---- evaluation: one call of the engine for the whole set ----

    def val_dataloader(self) -> list[_Sized]:
        if self.engine is None:
            return []
        return self._evaluations("val", self.val_problems)

    def test_dataloader(self) -> list[_Sized]:
        return self._evaluations("test", self.test_problems)

    def predict_dataloader(self) -> _Sized:
        return _Sized(1, lambda: self._evaluate("predict", self.test_problems, with_solution=False))

    def _evaluations(self, name: str, source: ProblemSource) -> list[_Sized]:
        kinds = [False, True] if self.evaluation.with_solution else [False]
        return [_Sized(1, lambda kind=kind: self._evaluate(name, source, with_solution=kind)) for kind in kinds]

    def _evaluate(self, name: str, source: ProblemSource, with_solution: bool) -> Iterator[list[RolloutGroup]]:
        problems = [source[i] for i in range(len(source))]
        if with_solution:
            prompts = [self.encoder.attempt(p, p.solution) for p in problems if p.solution is not None]
            problems = [p for p in problems if p.solution is not None]
        else:
            prompts = [self.encoder.evaluated(problem) for problem in problems]
        # The same seed at every validation: what differs between two of them is the policy.
        seed = derive(self.seed, name, int(with_solution))
        groups, _ = self.sample(problems, prompts, self.evaluation.samples, self.evaluation.sampling, seed)
        yield groups

    def close(self) -> None:
        """Stop the engine and the grading processes."""
        self.pool.close()
        if self.engine is not None:
            self.engine.close()
            self._loaded = None


def summarise(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Rates of one step's rollouts: accuracy, mixed groups, length, truncation, unparsable answers, markers."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    count = len(rollouts)
    return {
        "accuracy": sum(r.correct for r in rollouts) / count,
        "mixed_groups": sum(g.mixed for g in groups) / len(groups),
        "length_mean": sum(len(r.completion.token_ids) for r in rollouts) / count,
        "truncated_rate": sum(r.truncated for r in rollouts) / count,
        "unparsable_rate": sum(r.verdict.status == "unparsable" for r in rollouts) / count,
        "verdict_faults": float(sum(r.verdict.status in ("timeout", "crash") for r in rollouts)),
        "reflection_markers": sum(count_reflection_markers(r.text) for r in rollouts) / count,
    }
