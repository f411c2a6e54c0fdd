"""The LightningDataModule turns problems into a batch of rollouts per step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningDataModule, Trainer
from torch import Tensor

from ogls.algorithm import Sizes, collect
from ogls.lessons.prompts import ATTEMPT, FEEDBACK, IDEA, PromptEncoder, Prompts, thought_ids
from ogls.lessons.reflection.reflector import ReflectionLimits
from ogls.methods.base import Method
from ogls.policy.policy import Policy
from ogls.policy.pretrained import longest_context
from ogls.policy.sharding import on_first
from ogls.records import Batch, Need, Problem, RolloutGroup
from ogls.rollout.abreast import Abreast
from ogls.rollout.accuracy import Evaluation
from ogls.rollout.engine import RolloutEngine, end_token_ids
from ogls.rollout.mini_batches import divided
from ogls.rollout.one_step_off import OneStepOff
from ogls.rollout.process import EngineProcess
from ogls.rollout.refill import Refilling
from ogls.rollout.sampler import Sampler
from ogls.rollout.together import Together
from ogls.system.process_group import ProcessGroup
from ogls.system.ranges import check
from ogls.system.seeds import derive
from ogls.system.step_metrics import StepMetrics
from ogls.tasks.base import ErrorLocator, Kept, MistakeLocator, ProblemSets, ProblemSource, Verifier, drawn
from ogls.tasks.by_kind import ByKind
from ogls.tasks.gold import complaint, gold_faults
from ogls.tasks.grading import GradingPool

_CURES: dict[Need, str] = {
    "rollouts": "learns from rollouts: set data.engine",
    "peers": "compares rollouts of one group: data.group_size must be at least 2, got {group_size}",
    "error": "needs an error locator: set data.locator",
    "answers": "counts answers: set data.verifier to one that says which answer a text gives",
    "ideas": "needs a locator that knows ideas, such as ChainErrors: set data.locator",
}


def at_end(trainer: Trainer) -> bool:
    """Returns whether training ends with the epoch under way, or with a stop that was asked for."""
    return trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs


def _joined(key: str, problems: ProblemSource | dict[str, ProblemSource]) -> ProblemSource:
    if isinstance(problems, ProblemSource):
        return problems
    if not problems:
        raise ValueError(f"data.{key} has no problems: it is an empty mapping")
    try:
        return ProblemSets(problems)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error


def _warn_of_shared(train: ProblemSource, val: ProblemSource) -> None:
    """Says in one line of the terminal how many held-out problems are trained on, too."""
    trained = {" ".join(problem.text.split()) for problem in train}
    shared = [problem for problem in val if " ".join(problem.text.split()) in trained]
    if shared:
        example = f"such as {shared[0].name!r}, {shared[0].text[:80]!r}"
        print(
            f"warning: {len(shared)} of {len(val)} problems of data.val are in data.train, too, {example}: their "
            "accuracy says little of new problems",
            file=sys.stderr,
            flush=True,
        )


class _Sized:
    """This iterable has a length: without one, Lightning fetches a batch too early, and rollouts are stale."""

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self._length, self._batches = length, batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._batches()


class RolloutDataModule(LightningDataModule):
    """This data module has problems, engine and verifier, and streams fresh rollouts of the student.

    Args:
        policy: student, shared with the module that trains it
        method: choice of what is learned from the rollouts, shared with the module that trains
        train: problems to learn from
        val: held-out problems for validation; several sets by name, such as ``{math: ..., science: ...}``, are measured
            together as ``val/*`` and each as ``val/math/*``
        test: problems for the commands `test` and `predict`, or several sets of them; null takes `val`
        prompts: templates of what student, teacher and reflector read
        engine: engine that samples rollouts; null samples and validates nothing (likelihood of reference solutions).
            With several devices, each has an engine of its own, for its share of the prompts.
        locator: finder of the first error in a rollout, for token selections that need it. If there is a reflector, it
            says where the error is, and the locator is the truth that it is measured against.
        verifier: judge of whether a rollout's answer is right
        max_tokens: largest number of tokens per training rollout
        evaluation: number and sampling of rollouts of held-out problems
        reflection: largest numbers of tokens per prompt and per reply of the reflector
        group_size: rollouts per problem in training
        problems_per_step: problems per optimiser step
        steps_per_epoch: optimiser steps per epoch; a validation follows each epoch, or each
            `trainer.check_val_every_n_epoch`-th one, and the last
        mini_batches: equal parts of `problems_per_step` problems each into which what is sampled at once is divided;
            each part makes an optimiser step. Above 1 all parts but the first are off-policy.
        updates_per_rollout: number of times that a rollout is learned from; above 1 it is off-policy, and the objective
            needs an importance ratio or cap
        refill_draws: largest number of times per step that groups which teach nothing are replaced by groups of other
            problems (DAPO's dynamic sampling); 0 keeps them
        one_step_off: whether the rollouts of the next step are sampled while a step trains, by an engine in a process
            of its own. They are one update stale, and the objective needs an importance cap.
        context_length: largest number of tokens of a prompt and its rollout together
        grading_workers: number of processes that verify answers
        drop_unverifiable: whether problems are left out whose gold answer cannot be read or is not the only right one;
            otherwise they end the run before it begins
        drop_long: whether problems are left out whose prompt does not fit into the context, with the solution where it
            is read; otherwise they end the run before it begins
        seed: random seed of the order of the problems and of the rollouts
        predict_file: file to which `predict` writes its rollouts, one JSON object per line
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        train: ProblemSource,
        val: ProblemSource | dict[str, ProblemSource],
        test: ProblemSource | dict[str, ProblemSource] | None = None,
        prompts: Prompts = Prompts(),
        engine: RolloutEngine | None = None,
        locator: ErrorLocator | None = None,
        verifier: Verifier = ByKind(),
        max_tokens: int = 1024,
        evaluation: Evaluation = Evaluation(),
        reflection: ReflectionLimits = ReflectionLimits(),
        group_size: int = 8,
        problems_per_step: int = 32,
        steps_per_epoch: int = 10,
        mini_batches: int = 1,
        updates_per_rollout: int = 1,
        refill_draws: int = 0,
        one_step_off: bool = False,
        context_length: int = 2048,
        grading_workers: int = 1,
        drop_unverifiable: bool = False,
        drop_long: bool = False,
        seed: int = 0,
        predict_file: str = "rollouts.jsonl",
    ) -> None:
        super().__init__()
        if one_step_off and engine is not None and not engine.remote:
            engine = EngineProcess(engine)
        self.policy, self.method = policy, method
        val = _joined("val", val)
        self.train_problems, self.val_problems = train, val
        self.test_problems = val if test is None else _joined("test", test)
        self.prompts, self.engine, self.locator, self.verifier = prompts, engine, locator, verifier
        self.evaluation, self.problems_per_step, self.steps_per_epoch = evaluation, problems_per_step, steps_per_epoch
        self.mini_batches, self.updates_per_rollout, self.refill_draws = mini_batches, updates_per_rollout, refill_draws
        self.one_step_off, self.seed = one_step_off, seed
        self.grading_workers, self.predict_file = grading_workers, predict_file
        self.drop_unverifiable, self.drop_long = drop_unverifiable, drop_long
        self.sizes = Sizes(
            group_size=group_size, max_tokens=max_tokens, context_length=context_length, reflection=reflection
        )
        self._check_settings()
        self.pool = GradingPool(verifier, workers=grading_workers)
        self.fit_follows = False  # True for a validation before training, which checks the settings of both
        self.longest_prompt = 0  # tokens of the longest prompt to learn from, once `setup` has looked at them
        self._checked: set[str] = set()
        self._reads = False  # whether held-out problems are sampled with their solutions, too
        self._latest: list[Batch] = []  # parts of what was sampled last
        self._sampler: Sampler | None = None  # made at the first sampling, because that starts the engine
        self._ahead: OneStepOff | None = None
        self._sampled_from: dict[str, Tensor] = {}  # weights that made `_latest`, where it lasts for several steps
        self._saved_weights: dict[str, Tensor] | None = None  # weights of a checkpoint that make its batch again

    @property
    def group(self) -> ProcessGroup:
        """Returns the processes that make a step together."""
        return (
            ProcessGroup() if self.trainer is None else ProcessGroup(self.trainer.global_rank, self.trainer.world_size)
        )

    @property
    def trains(self) -> bool:
        """Returns whether this is a run of training, or the validation before one."""
        return self.fit_follows or (self.trainer is not None and self.trainer.state.fn == "fit")

    @property
    def validates_all(self) -> bool:
        """Returns whether a validation now is a whole one, not one amid training."""
        return self.trainer is None or self.trainer.state.fn != "fit" or at_end(self.trainer)

    @property
    def max_staleness(self) -> int:
        """Returns how many updates may lie between the weights that sample a rollout and those that learn from it."""
        return 1 if self.one_step_off else self.period - 1

    @property
    def period(self) -> int:
        """Returns how many optimiser steps learn from what was sampled at once."""
        return self.mini_batches * self.updates_per_rollout

    # ---- set-up: settings and problems are checked here, before weights are loaded ----

    def _check_settings(self) -> None:
        counts = ("problems_per_step", "steps_per_epoch", "mini_batches", "updates_per_rollout", "grading_workers")
        check(self, {"refill_draws": "[0, 100]"}, "data")
        check(self, dict.fromkeys(counts, "[1, 1e9]") | {"seed": "[0, 4294967295]"}, "data")
        check(self.sizes, dict.fromkeys(("group_size", "max_tokens", "context_length"), "[1, 1e9]"), "data")
        if not self.predict_file:
            raise ValueError("data.predict_file needs the name of a file, got ''")
        given = {"rollouts": self.engine, "peers": self.sizes.group_size > 1, "error": self.locator}
        given |= {"ideas": isinstance(self.locator, MistakeLocator), "answers": self.verifier.tells_answers}
        for need, cure in _CURES.items():
            if need in self.method.needs and not given[need]:
                raise ValueError(f"{self.method.name} {cure.format(group_size=self.sizes.group_size)}")
        known = {wording.name for wording in (ATTEMPT, FEEDBACK, IDEA, *self.method.privilege.views.values())}
        if unknown := sorted(self.prompts.views.keys() - known):
            raise ValueError(
                f"data.prompts.views: no view is worded by {unknown[0]!r}, expected one of {sorted(known)}"
            )
        if self.one_step_off:
            self._check_one_step_off()
        if self.max_staleness and self.method.uncorrected and "rollouts" in self.method.needs:
            causes = ("one_step_off", "mini_batches", "updates_per_rollout")
            cause = next(name for name in causes if int(getattr(self, name)) > (name != "one_step_off"))
            raise ValueError(
                f"data.{cause} is {getattr(self, cause)}, so rollouts are off-policy for "
                f"{' and '.join(self.method.uncorrected)}: give each such term of method.objective an importance_cap, "
                f"or set data.{cause} to {'false' if cause == 'one_step_off' else 1}"
            )

    def _check_one_step_off(self) -> None:
        for name in ("mini_batches", "updates_per_rollout"):
            if getattr(self, name) > 1:
                raise ValueError(f"data.one_step_off makes every batch anew: data.{name} is {getattr(self, name)}")
        if "rollouts" not in self.method.needs:
            raise ValueError(f"{self.method.name} samples nothing ahead: set data.one_step_off to false")
        if "start" in self.method.needs:
            raise ValueError(
                "data.one_step_off samples from one version at a time: set method.reflector.weights to student"
            )

    def setup(self, stage: str) -> None:
        """Checks the problems that the command `stage` needs.

        Raises:
            ValueError: there are no problems, a prompt is too long, a gold answer is not graded as right, a
                demonstration would end with a token at which engines do not stop, or thoughts have a budget and the
                tokenizer no tokens that begin and end them.
        """
        self.thought_ids()
        if self.one_step_off and self.group.size > 1:
            raise ValueError(f"data.one_step_off is for one device, got {self.group.size}")
        if self.engine is not None and self.engine.takes_process and self.group.size > 1:
            self.engine = EngineProcess(self.engine)
        if self.problems_per_step < self.group.size:
            raise ValueError(f"data.problems_per_step is {self.problems_per_step} for {self.group.size} devices")
        self.encoder = PromptEncoder(self.prompts, self.policy.tokenizer)
        longest = longest_context(self.policy.folder)
        if longest is not None and self.sizes.context_length > longest:
            raise ValueError(
                f"data.context_length is {self.sizes.context_length}, but {self.policy.name} was made for {longest} "
                "tokens, prompt and rollout together"
            )
        if "demonstrations" in self.method.needs:
            self._check_end()
        sources = {"train": self.train_problems} if stage == "fit" or self.fit_follows else {}
        if self.engine is not None:
            sources |= {"val": self.val_problems} if stage in ("fit", "validate") else {"test": self.test_problems}
        self._reads = self.evaluation.with_solution and stage != "predict"
        for name, source in sources.items():
            if name not in self._checked:
                if name != "train" and self._reads and len(source):
                    self._check_with_solution(name, source)
                usable = {part: self._usable(f"{name}.{part}", some) for part, some in source.sets.items()}
                setattr(self, f"{name}_problems", ProblemSets(usable) if usable else self._usable(name, source))
                self._checked.add(name)
                if name == "val" and "train" in self._checked and self.group.rank == 0:
                    _warn_of_shared(self.train_problems, self.val_problems)

    def _check_end(self) -> None:
        """Refuses demonstrations whose end no engine stops at, since their student would learn to go on for ever."""
        folder = self.policy.folder
        end, stops = self.encoder.end_id, end_token_ids(folder)
        if end not in stops:
            tokens = self.policy.tokenizer.convert_ids_to_tokens([end, *stops])
            raise ValueError(
                f"a demonstration ends with {tokens[0]!r}, the tokenizer's eos_token, but an engine stops at "
                f"{tokens[1:]}: make eos_token (tokenizer_config.json) and eos_token_id (generation_config.json) agree "
                f"in {folder}"
            )

    def _usable(self, name: str, source: ProblemSource) -> ProblemSource:
        """Returns the problems without those that may be dropped; raises a ValueError that says what is wrong."""
        if len(source) == 0:
            raise ValueError(f"data.{name} has no problems")
        problems = list(source)
        if name.startswith("train") and "solutions" in self.method.needs:
            self._check_solutions(name, problems)
        faults: dict[str, str] = {}
        for share in self.group.gathered(gold_faults(self.group.share(problems), self.pool)):
            faults |= share
        if faults and not self.drop_unverifiable:
            cure = "data.drop_unverifiable: true leaves them out"
            raise ValueError(f"data.{name}: {complaint(problems, faults)}; {cure}")
        sound = [i for i, problem in enumerate(problems) if problem.id not in faults]
        fitting = self._fitting(name, problems, sound)
        counts = {"unverifiable": len(problems) - len(sound), "long": len(sound) - len(fitting)}
        counts = {reason: count for reason, count in counts.items() if count}
        if not counts:
            return source
        said = "dropped are " + " and ".join(f"{count} {reason}" for reason, count in counts.items())
        if not fitting:
            raise ValueError(f"data.{name} has no problems left: {said}")
        if self.group.rank == 0:
            print(f"data.{name}: {len(fitting)} of {len(problems)} problems are left, {said}")
        return Kept(source, tuple(fitting), counts)

    def _check_solutions(self, name: str, problems: Sequence[Problem]) -> None:
        without = sum(problem.solution is None for problem in problems)
        if without == len(problems):
            raise ValueError(
                f"data.{name}: {self.method.name} learns from reference solutions, and none of {len(problems)} "
                "problems has one; name their column by columns: {solution: NAME}, or take a method that does without, "
                "such as GRPO, SDPO or OGLS_SD"
            )
        if without and self.group.rank == 0:
            print(f"data.{name}: {without} of {len(problems)} problems teach nothing, for want of a reference solution")

    @staticmethod
    def _check_with_solution(name: str, source: ProblemSource) -> None:
        if all(problem.solution is None for problem in source):
            raise ValueError(
                f"data.evaluation.with_solution: none of {len(source)} problems of data.{name} has a reference "
                "solution; name their column by columns: {solution: NAME}, or leave with_solution out"
            )

    def _fitting(self, name: str, problems: Sequence[Problem], places: Sequence[int]) -> list[int]:
        """Returns the places of the problems whose prompts leave room for a rollout."""
        training = name.startswith("train")
        longest = self.sizes.max_tokens if training else self.evaluation.sampling.max_tokens
        room = self.sizes.context_length - longest

        def length(problem: Problem) -> int:
            if training:
                return len(self.encoder.student(problem))
            prompts = [self.encoder.evaluated(problem)]
            if self._reads and problem.solution is not None:
                prompts.append(self.encoder.view(problem, ATTEMPT, problem.solution))
            return max(map(len, prompts))

        lengths = {place: length(problems[place]) for place in places}
        long = [place for place in places if lengths[place] > room]
        if long and not self.drop_long:
            raise ValueError(
                f"data.{name}: the prompt of problem {problems[long[0]].id!r} has {lengths[long[0]]} tokens, but "
                f"context_length {self.sizes.context_length} leaves {room} beside the rollout; data.drop_long: true "
                f"leaves out the {len(long)} that are too long"
            )
        fitting = [place for place in places if lengths[place] <= room]
        if training:
            self.longest_prompt = max(self.longest_prompt, *(lengths[place] for place in fitting), 0)
        return fitting

    # ---- training ----

    def train_dataloader(self) -> _Sized:
        """Returns the batches of an epoch, each of which is made when it is asked for."""
        return _Sized(self.steps_per_epoch, self._training_batches)

    def _training_batches(self) -> Iterator[Batch]:
        # After a stop in mid-epoch Lightning asks for the rest of the epoch only.
        for _ in range(self.policy.version % self.steps_per_epoch, self.steps_per_epoch):
            step = self.policy.version
            if self.one_step_off:
                assert self.trainer is not None
                yield self._one_step_ahead().take(step + 1 < self.trainer.estimated_stepping_batches)
                continue
            if not self._latest or step % self.period == 0:
                sampled = self._sampled(step - step % self.period)
                self._latest = divided(sampled, self.mini_batches, self.updates_per_rollout)
            yield self._latest[step % self.period]

    def _sampled(self, step: int) -> Batch:
        """Returns what is sampled before `step`; a run that goes on amid its parts has the weights of then saved."""
        if step < self.policy.version and self._saved_weights is not None:
            self._sampled_from, self._saved_weights = self._saved_weights, None
            with self.policy.swapped(self._sampled_from, version=step):
                return self.make_batch(step)
        # A checkpoint may be written amid the parts; demonstrations do not depend on weights.
        if self.period > 1 and self.trainer is not None and "rollouts" in self.method.needs:
            trained = self.policy.trainable().items()
            self._sampled_from = {name: p.detach().to("cpu", copy=True) for name, p in trained}
        return self.make_batch(step)

    def make_batch(self, step: int, sampler: Sampler | None = None) -> Batch:
        """Returns the batch of an optimiser step, a function of seed, step and weights alone.

        Args:
            step: number of updates before this step
            sampler: source of graded rollouts; None samples from the policy's present weights
        """
        metrics = StepMetrics("rollouts", step + 1)
        with metrics.recording():
            if sampler is None and "rollouts" in self.method.needs:
                sampler = self.sampler()
                sampler.hold()
            at_once = self.problems_per_step * self.mini_batches
            own = self.group.share(drawn(self.train_problems, at_once, step // self.period, self.seed))
            refilling = self._refilling(sampler, at_once, step) if self.refill_draws and sampler is not None else None
            batch = collect(
                self.method,
                own,
                self.encoder,
                refilling or sampler,
                self.locator,
                self.sizes,
                step=step,
                seed_of=lambda purpose: derive(self.seed, purpose, step),
            )
            if sampler is not None:
                sampler.settle()
        measured = metrics.metrics() | batch.metrics | ({} if sampler is None else sampler.metrics)
        tokens = sum(len(rollout.completion.token_ids) for group in batch.groups for rollout in group.rollouts)
        if refilling is not None:
            measured |= {f"train/{name}": value for name, value in refilling.metrics.items()}
            tokens = refilling.num_tokens
        if "time/generate" in measured:  # as if all processes were as quick: their mean is taken, and it is of all
            measured["speed/generate_tokens_per_s"] = tokens * self.group.size / max(measured["time/generate"], 1e-9)
            measured["train/timeout_seconds"] = self.pool.timeout_seconds
        return replace(batch, metrics=measured, phases=tuple(metrics.phases))

    def _refilling(self, sampler: Sampler, at_once: int, step: int) -> Refilling:
        def more(places: Sequence[int], draw: int) -> tuple[list[Problem], list[tuple[int, ...]]]:
            number = step // self.period * self.refill_draws + draw
            others = self.group.share(drawn(self.train_problems, at_once, number, derive(self.seed, "refill")))
            return [others[i] for i in places], [self.encoder.student(others[i]) for i in places]

        return Refilling(sampler, self.method.teaches, more, self.refill_draws)

    def sampler(self) -> Sampler:
        """Returns the source of graded rollouts; the first call starts the engine.

        Raises:
            ValueError: there is no engine.
        """
        if self._sampler is None:
            if self.engine is None:
                raise ValueError("sampling needs an engine: set data.engine")
            engine = self.engine
            if engine.remote and self.group.size > 1:
                engine = Together(engine, self.group)
            elif self.policy.parts is not None and self.group.size > 1:
                engine = Abreast(engine, self.group)
            engine.thought_ids = self.thought_ids()
            self._sampler = Sampler(engine, self.policy, self.encoder, self.pool, self.longest_sequence)
        return self._sampler

    def thought_ids(self) -> tuple[int, int] | None:
        """Returns the tokens that begin and end a thought where evaluation has a budget of thoughts, otherwise None.

        Raises:
            ValueError: the tokenizer has no such tokens.
        """
        budget = self.evaluation.sampling.thinking_token_budget
        return None if budget is None else thought_ids(self.policy.tokenizer)

    @property
    def longest_sequence(self) -> int:
        """Returns the largest number of tokens of a prompt and its completion, a reflector's included."""
        limits = self.sizes.reflection
        replies = limits.prompt_tokens + limits.max_tokens if "replies" in self.method.needs else 0
        return max(self.sizes.context_length, replies)

    def _one_step_ahead(self) -> OneStepOff:
        if self._ahead is None:
            self._ahead = OneStepOff(self.make_batch, self.sampler(), self.policy, self._saved_weights)
        return self._ahead

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights that made a batch which the next step goes on with, if there is one."""
        if self._ahead is not None:
            return {"weights": self._ahead.weights and on_first(self._ahead.weights)}
        if self._saved_weights is not None and (self.one_step_off or self.policy.version % self.period):  # to be made
            return {"weights": on_first(self._saved_weights)}
        amid = self._sampled_from and self.policy.version % self.period
        return {"weights": on_first(self._sampled_from)} if amid else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._saved_weights = state_dict["weights"]

    # ---- evaluation: one call of the engine for the whole set ----

    def val_dataloader(self) -> list[_Sized]:
        """Returns one batch with rollouts of held-out problems, and a second one with solutions if asked for."""
        if self.engine is None:
            return []
        return self._evaluations("val", self.val_problems)

    def test_dataloader(self) -> list[_Sized]:
        """Returns one batch with rollouts of all test problems, and a second one with solutions if asked for."""
        return self._evaluations("test", self.test_problems)

    def predict_dataloader(self) -> _Sized:
        """Returns one batch with rollouts of all test problems."""
        return _Sized(1, lambda: self._evaluate("predict", self.test_problems, with_solution=False))

    def _evaluations(self, name: str, source: ProblemSource) -> list[_Sized]:
        kinds = [False, True] if self.evaluation.with_solution else [False]
        return [_Sized(1, lambda kind=kind: self._evaluate(name, source, with_solution=kind)) for kind in kinds]

    def _evaluate(self, name: str, source: ProblemSource, with_solution: bool) -> Iterator[Sequence[RolloutGroup]]:
        problems, samples = [p for p in source if not with_solution or p.solution is not None], self.evaluation.samples
        subset = self.evaluation.while_training
        if subset is not None and not self.validates_all:
            problems, samples = subset.of(problems, lambda p: p.set), self.evaluation.subset_samples
        if with_solution:
            prompts = [self.encoder.view(p, ATTEMPT, p.solution) for p in problems if p.solution is not None]
        else:
            prompts = [self.encoder.evaluated(problem) for problem in problems]
        # Every validation has the same seed, so that two of them differ by the policy alone.
        seed = derive(self.seed, name, int(with_solution))
        own, prompts = self.group.share(problems), self.group.share(prompts)
        if self._ahead is not None:
            self._ahead.settle()
        sampler = self.sampler()
        sampler.hold()
        groups = sampler.rollouts(own, prompts, samples, self.evaluation.sampling, seed)
        sampler.settle()
        yield self.group.joined(groups)

    def close(self) -> None:
        """Stops the engine and the grading processes."""
        self.pool.close()
        self._sampler = self._ahead = None
        if self.engine is not None:
            self.engine.close()
