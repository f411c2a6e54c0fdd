"""The DataModule: problems in, fresh rollouts out, one batch an optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning import LightningDataModule
from torch import Tensor

from ogls.compatibility import check_data
from ogls.lessons.advantage import Advantage
from ogls.lessons.build import LessonBuilder
from ogls.lessons.privilege import PeerOutcomes, Privilege
from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.lessons.reflection.reflector import ReflectionContext, Reflector
from ogls.lessons.selection import AllTokens, TokenSelection
from ogls.records import Batch, RolloutGroup, Sampling
from ogls.rollout.accuracy import Evaluation, summarise
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.one_step_off import OneStepOff
from ogls.rollout.process import EngineProcess
from ogls.rollout.sampler import Sampler
from ogls.system.process_group import ProcessGroup
from ogls.system.seeds import derive
from ogls.system.step_metrics import StepMetrics
from ogls.tasks.base import ErrorLocator, ProblemSource, Verifier, drawn
from ogls.tasks.by_kind import ByKind
from ogls.tasks.gold import verify_gold
from ogls.tasks.grading import GradingPool

if TYPE_CHECKING:
    from ogls.module import SelfDistillation


class _Sized:
    """An iterable with a length: without one, Lightning prefetches a batch, and rollouts are one update stale."""

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
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
        reflector: says where a rollout first goes wrong, and with which idea it would not have (ROSD); the text half of
            the method, so it lives here and not beside the teacher. null: nobody reflects.
        selection: which tokens count.
        advantage: how much better a rollout did than its group, for objectives that reinforce.
        locator: finds the first error of a rollout, for selections that need it. With a reflector the error is where
            that one says, and the locator is the truth that it is measured against.
        verifier: says which rollouts are right.
        sampling: of the training rollouts.
        evaluation: of the held-out rollouts.
        group_size: G, rollouts a problem.
        problems_per_step: problems an optimiser step.
        steps_per_epoch: optimiser steps an epoch; validation comes at its end.
        updates_per_rollout: optimiser steps on the same rollouts. Above 1 they are off-policy, and the objective needs
            an importance cap.
        one_step_off: sample the rollouts of the next step while a step trains, with the weights that it began with, by
            an engine in a process of its own. They are one update stale, and the objective needs an importance cap.
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
        reflector: Reflector | None = None,
        selection: TokenSelection = AllTokens(),
        advantage: Advantage | None = None,
        locator: ErrorLocator | None = None,
        verifier: Verifier = ByKind(),
        sampling: Sampling = Sampling(max_tokens=1024),
        evaluation: Evaluation = Evaluation(),
        group_size: int = 8,
        problems_per_step: int = 32,
        steps_per_epoch: int = 10,
        updates_per_rollout: int = 1,
        one_step_off: bool = False,
        context_length: int = 2048,
        grading_workers: int = 1,
        seed: int = 0,
        predict_file: str = "rollouts.jsonl",
    ) -> None:
        super().__init__()
        if one_step_off and engine is not None:
            engine = EngineProcess(engine)
        self.train_problems, self.val_problems, self.test_problems = train, val, test or val
        self.prompts, self.engine, self.privilege, self.reflector = prompts, engine, privilege, reflector
        self.selection, self.advantage, self.locator, self.verifier = selection, advantage, locator, verifier
        self.sampling, self.evaluation = sampling, evaluation
        self.group_size, self.problems_per_step, self.steps_per_epoch = group_size, problems_per_step, steps_per_epoch
        self.updates_per_rollout, self.context_length, self.seed = updates_per_rollout, context_length, seed
        self.one_step_off, self.predict_file = one_step_off, predict_file
        self.grading_workers = grading_workers
        check_data(self)
        self.pool = GradingPool(verifier, workers=grading_workers)
        self.ranks = ProcessGroup()  # the module says who we are, before anything is sampled
        self.fit_follows = False  # a validation that comes before training checks for both
        self._checked: set[str] = set()
        self._last: Batch | None = None
        self._weights: dict[str, Tensor] | None = None  # of a checkpoint

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
            step = self._module.policy_version
            if self.one_step_off:
                assert self.trainer is not None
                self._last = self._ahead.take(step, step + 1 < self.trainer.estimated_stepping_batches)
            elif self._last is None or step % self.updates_per_rollout == 0:
                self._last = self.make_batch(step - step % self.updates_per_rollout)
            yield self._last

    @property
    def max_staleness(self) -> int:
        """Updates that may lie between the weights that sample rollouts and those that learn from them."""
        return 1 if self.one_step_off else self.updates_per_rollout - 1

    def make_batch(self, step: int, sampler: Sampler | None = None) -> Batch:
        """The batch of optimiser step `step`: a function of (seed, step, weights), whatever was made before.

        The weights are those that `sampler` holds, or else the policy's present ones.
        """
        meter = StepMetrics("rollouts", step + 1)
        if sampler is None and self.privilege.samples_rollouts:
            sampler = self._sampler
            with meter.time("sync"):
                sampler.hold(self._module.policy_version)
        groups = self._groups(step, sampler, meter)
        measured = summarise(groups)
        if self.reflector is not None:
            ask, seed = (sampler or self._sampler).replies, self._seed_of("reflections", step)
            with meter.time("reflect"):
                means = ReflectionContext(encoder=self.encoder, ask=ask, seed=seed)
                groups, rates = self.reflector.reflect(groups, means, self.locator)
            measured |= rates
        with meter.time("lessons"):
            lessons, counts = self._builder.build(groups)
        measured |= counts
        metrics = meter.metrics() | {f"train/{name}": value for name, value in measured.items()}
        if "time/generate" in metrics:
            tokens = sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)
            metrics["speed/generate_tokens_per_s"] = tokens / max(metrics["time/generate"], 1e-9)
        return Batch(
            lessons=lessons,
            policy_version=step if sampler is None else sampler.version,
            groups=tuple(groups),
            metrics=metrics,
            intervals=tuple(meter.intervals),
        )

    def _groups(self, step: int, sampler: Sampler | None, meter: StepMetrics) -> list[RolloutGroup]:
        draw = step // self.updates_per_rollout
        problems = self.ranks.share(drawn(self.train_problems, self.problems_per_step, draw, self.seed))
        prompts = [self.encoder.student(problem) for problem in problems]
        if sampler is not None:
            seed = self._seed_of("rollouts", step)
            return sampler.rollouts(problems, prompts, self.group_size, self.sampling, seed, meter)
        return [
            RolloutGroup(problem=problem, prompt_ids=prompt, rollouts=(), policy_version=step)
            for problem, prompt in zip(problems, prompts, strict=True)
        ]

    def _seed_of(self, purpose: str, step: int) -> int:
        return derive(self.seed, purpose, step, *([self.ranks.rank] if self.ranks.rank else []))

    @property
    def _builder(self) -> LessonBuilder:
        return LessonBuilder(
            encoder=self.encoder,
            privilege=self.privilege,
            selection=self.selection,
            locator=self.locator,
            advantage=self.advantage,
            reflected=self.reflector is not None,
            context_length=self.context_length,
        )

    @cached_property
    def _sampler(self) -> Sampler:
        """Made when something is first sampled: that is when the engine starts."""
        if self.engine is None:
            raise ValueError("sampling needs an engine: set data.engine")
        length = max(self.context_length, 0 if self.reflector is None else self.reflector.context_length)
        return Sampler(self.engine, self._module, self.encoder, self.pool, length)

    @cached_property
    def _ahead(self) -> OneStepOff:
        return OneStepOff(self.make_batch, self._sampler, self._module.policy, self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._ahead.weights} if "_ahead" in self.__dict__ else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._weights = state_dict["weights"]

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
        own, prompts = self.ranks.share(problems), self.ranks.share(prompts)
        meter = StepMetrics("rollouts", self._module.policy_version)  # a validation is timed as a whole
        if "_ahead" in self.__dict__:
            self._ahead.settle()
        self._sampler.hold(self._module.policy_version)
        groups = self._sampler.rollouts(own, prompts, self.evaluation.samples, self.evaluation.sampling, seed, meter)
        yield self.ranks.joined(groups)

    def close(self) -> None:
        """Stop the engine and the grading processes."""
        self.pool.close()
        if self.engine is not None:
            self.engine.close()
            self.__dict__.pop("_sampler", None)
            self.__dict__.pop("_ahead", None)
