from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ogls.data import RolloutDataModule
from ogls.lessons.privilege import Demonstration, PeerOutcomes, ReferenceSolution
from ogls.lessons.prompts import Prompts
from ogls.lessons.reflection.model import ModelReflector
from ogls.lessons.reflection.privilege import CorrectiveIdea
from ogls.lessons.selection import UpToError
from ogls.loss.objective import Distillation, Likelihood
from ogls.loss.steering import OutcomeSteering, Unsteered
from ogls.methods import Method
from ogls.methods.u_opsd import Consensus
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Problem, Sampling
from ogls.rollout.accuracy import Evaluation
from ogls.rollout.transformers import TransformersEngine
from ogls.system.process_group import ProcessGroup, combined
from ogls.tasks.base import ProblemSets, ProblemSource
from ogls.tasks.chains import Chain, ChainErrors, Chains
from ogls.tasks.function import FunctionVerifier
from tests.pair import taken
from tests.scripted import ScriptedEngine


class Given(ProblemSource):
    def __init__(self, *problems: Problem) -> None:
        self.problems = problems

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]


@pytest.fixture
def make(tiny_model: Path) -> Iterator[Any]:
    made = []
    tokenizer = load_tokenizer(tiny_model)

    def work(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        chain = Chain.parse(tokenizer.decode(prompt))
        return [*tokenizer(chain.work(rng, 0.3), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def make(**arguments: Any) -> RolloutDataModule:
        settings: dict[str, Any] = {
            "privilege": PeerOutcomes(),
            "steering": OutcomeSteering(),
            "train": Chains(size=40),
            "val": Chains(size=10, split="heldout"),
            "prompts": Prompts(system="", student="{problem}"),
            "engine": ScriptedEngine(work),
            "max_tokens": 60,
            "evaluation": Evaluation(samples=3, sampling=Sampling(max_tokens=60)),
            "group_size": 4,
            "problems_per_step": 6,
            "steps_per_epoch": 3,
            "context_length": 400,
        }
        given = settings | arguments
        method = Method(**taken(Method, given))
        data = RolloutDataModule(Policy(str(tiny_model), dtype="float32"), method, **taken(RolloutDataModule, given))
        made.append(data)
        return data

    yield make
    for data in made:
        data.close()


def train(data: RolloutDataModule, epochs: int = 1) -> list[Any]:
    """What a trainer would be given, one update per batch."""
    batches = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            batches.append(batch)
            data.policy.version += 1
    return batches


def test_every_batch_is_sampled_by_the_weights_that_it_updates(make: Any):
    data = make()
    data.setup("fit")
    batches = train(data, epochs=2)
    assert [batch.policy_version for batch in batches] == [0, 1, 2, 3, 4, 5]
    assert data.engine.loads == [0, 1, 2, 3, 4, 5]
    assert len(data.train_dataloader()) == 3
    assert all(lesson.num_learned for batch in batches for lesson in batch.lessons)


def test_a_resumed_stream_makes_the_same_batches(make: Any):
    whole, resumed = make(), make()
    whole.setup("fit")
    resumed.setup("fit")
    expected = train(whole, epochs=2)[4:]
    resumed.policy.version = 4
    for a, b in zip(train(resumed), expected, strict=True):
        assert a.lessons == b.lessons
        assert [g.problem.id for g in a.groups] == [g.problem.id for g in b.groups]


def test_one_pass_shows_every_problem_once_and_the_next_in_another_order(make: Any):
    data = make(problems_per_step=8, steps_per_epoch=10)
    data.setup("fit")
    seen = [group.problem.id for batch in train(data) for group in batch.groups]
    assert sorted(seen[:40]) == sorted(seen[40:]) == sorted(data.train_problems[i].id for i in range(40))
    assert seen[:40] != seen[40:]


def test_several_updates_share_their_rollouts(make: Any):
    data = make(updates_per_rollout=2, steps_per_epoch=4, objective=Distillation(importance_cap=2.0))
    data.setup("fit")
    batches = train(data)
    assert [batch.policy_version for batch in batches] == [0, 0, 2, 2]
    assert batches[0].lessons is batches[1].lessons
    for name in ("time/generate", "train/lessons"):  # what is there once, and what each update has
        assert [name in batch.metrics for batch in batches] == [True, name == "train/lessons"] * 2
    assert data.engine.loads == [0, 2]


def test_metrics_of_a_batch_are_those_of_its_rollouts(make: Any):
    data = make(selection=UpToError(), locator=ChainErrors(), top_k=20)
    data.setup("fit")
    (batch, *_) = train(data)
    rollouts = [r for g in batch.groups for r in g.rollouts]
    assert len(rollouts) == 24
    assert batch.metrics["train/accuracy"] == pytest.approx(sum(r.correct for r in rollouts) / 24)
    assert batch.metrics["train/lessons"] == sum(not r.correct for r in rollouts)
    assert batch.metrics["train/dropped_unlocated"] == 0
    assert 0 < batch.metrics["train/accuracy"] < 1
    assert data.engine.sampled[0] == Sampling(max_tokens=60, top_k=20), "the method's, and the length is the data's"


def test_validation_samples_every_problem_from_the_same_seed(make: Any):
    data = make(evaluation=Evaluation(samples=3, sampling=Sampling(max_tokens=60), with_solution=True))
    data.setup("validate")
    plain, reading = data.val_dataloader()
    (groups,), (again,), (read,) = list(plain), list(plain), list(reading)
    assert groups == again
    assert [len(group.rollouts) for group in groups] == [3] * 10
    assert all(
        a.problem == b.problem and len(b.prompt_ids) > len(a.prompt_ids) for a, b in zip(groups, read, strict=True)
    )


IDEA = {"privilege": CorrectiveIdea(), "steering": Unsteered()}
SOLUTION = {"privilege": ReferenceSolution(), "steering": Unsteered()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 1}, r"compares rollouts of one group: data.group_size must be at least 2, got 1"),
        ({"selection": UpToError()}, r"\[.*UpToError.*\] needs an error locator: set data.locator"),
        (
            {"privilege": Consensus(), "steering": Unsteered(), "verifier": FunctionVerifier("math.isclose")},
            r"\[.*Consensus.*\] counts answers: set data.verifier to one that says which answer a text gives",
        ),
        (IDEA, "CorrectiveIdea reads reflections: set method.reflector"),
        (SOLUTION | {"engine": None}, r"\[.*ReferenceSolution.*\] learns from rollouts: set data.engine"),
        ({"steps_per_epoch": 0}, r"data.steps_per_epoch must be in \[1, 1e9\], got 0"),
        ({"max_tokens": 0}, r"data.max_tokens must be in \[1, 1e9\], got 0"),
        (
            {"prompts": Prompts(views={"atempt": "{problem} {text}"})},
            r"data.prompts.views: no view is worded by 'atempt', expected one of \['attempt', 'feedback', 'idea'\]",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(make: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.fault("malformed data, over-long prompts and views")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": Given()}, "data.train has no problems"),
        ({"context_length": 70}, "data.train: the prompt of problem 'chain-.*' has .* tokens, but context_length 70"),
        ({"train": Given(Problem(id="odd", text="What is 1+1?", answer=""))}, "odd"),
    ],
)
def test_data_that_cannot_work_is_refused_before_anything_is_sampled(
    make: Any, arguments: dict[str, Any], message: str
):
    data = make(**arguments)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")
    assert data.engine.loads == []


def test_several_train_sets_are_measured_as_what_is_trained_on(make: Any):
    sets = ProblemSets({"short": Chains(size=20, max_steps=2), "long": Chains(size=20, max_steps=4)})
    data = make(train=sets, max_tokens=100)
    data.setup("fit")
    prompts = [data.encoder.student(problem) for problem in sets]
    assert data.longest_prompt == max(map(len, prompts))
    tight = make(train=sets, max_tokens=399)
    with pytest.raises(ValueError, match=r"data.train.(short|long): .* leaves 1 beside the rollout"):
        tight.setup("fit")


def test_a_validation_with_solutions_needs_solutions_that_fit(make: Any):
    reading = Evaluation(samples=3, sampling=Sampling(max_tokens=60), with_solution=True)
    bare = Given(*(replace(problem, solution=None) for problem in Chains(size=4, split="heldout")))
    with pytest.raises(ValueError, match=r"with_solution: none of 4 problems of data\.val has a reference solution"):
        make(val=bare, evaluation=reading).setup("validate")
    make(val=bare, evaluation=reading).setup("predict")
    long = Given(*(replace(problem, solution="1 + 1 = 2. " * 90) for problem in Chains(size=4, split="heldout")))
    make(val=long).setup("validate")
    with pytest.raises(ValueError, match=r"data.val: the prompt of problem .* has \d+ tokens, but context_length 400"):
        make(val=long, evaluation=reading).setup("validate")


@pytest.mark.parametrize("updates", [1, 2])
def test_demonstrations_need_no_engine_and_are_never_stale(make: Any, updates: int):
    data = make(engine=None, privilege=Demonstration(), objective=Likelihood(), updates_per_rollout=updates)
    data.setup("fit")
    (batch, *_) = train(data)
    assert len(batch.lessons) == 6
    assert "time/generate" not in batch.metrics
    assert data.val_dataloader() == []


def test_a_frozen_reflector_takes_the_engine_back_to_the_start_and_the_rollouts_stay_whose_they_are(make: Any):
    data = make(**IDEA, reflector=ModelReflector(weights="frozen", retries=0), context_length=2400)
    data.policy.load()
    data.setup("fit")
    batches = train(data)
    assert [batch.policy_version for batch in batches] == [0, 1, 2]
    assert [{group.policy_version for group in batch.groups} for batch in batches] == [{0}, {1}, {2}]
    assert data.engine.loads == [0, 1, 0, 2, 0]
    assert data.policy.version == 3


def test_no_pool_of_one_gets_by(make: Any):
    data = make(privilege=PeerOutcomes(exclude_self=True), group_size=2)
    data.setup("fit")
    for batch in train(data):
        assert all({view.role for view in lesson.views} == {"plain", "success", "failure"} for lesson in batch.lessons)


def test_tokens_a_second_are_those_of_all_processes(make: Any, monkeypatch: pytest.MonkeyPatch):
    parts = []
    for rank in range(2):
        data = make()
        data.setup("fit")
        monkeypatch.setattr(RolloutDataModule, "group", ProcessGroup(rank, 2))
        batch = data.make_batch(0)
        monkeypatch.undo()
        tokens = sum(len(r.completion.token_ids) for g in batch.groups for r in g.rollouts)
        parts.append((len(batch.groups), batch.metrics, tokens / batch.metrics["time/generate"]))
    whole = combined([(count, metrics) for count, metrics, _ in parts])
    assert whole["speed/generate_tokens_per_s"] == pytest.approx(sum(own for *_, own in parts))


@pytest.mark.parametrize("engine", ["scripted", "transformers"])
def test_two_processes_draw_what_one_draws(make: Any, engine: str, monkeypatch: pytest.MonkeyPatch):
    own = {"engine": TransformersEngine(batch_size=5), "max_tokens": 8} if engine == "transformers" else {}

    def drawn(rank: int, size: int) -> dict[str, list[tuple[int, ...]]]:
        data = make(**own)
        data.setup("fit")
        data.policy.load()
        monkeypatch.setattr(RolloutDataModule, "group", ProcessGroup(rank, size))
        batch = data.make_batch(0)
        monkeypatch.undo()
        return {g.problem.id: [rollout.completion.token_ids for rollout in g.rollouts] for g in batch.groups}

    alone, first, second = drawn(0, 1), drawn(0, 2), drawn(1, 2)
    assert len(first) == len(second) == 3
    assert first | second == alone
