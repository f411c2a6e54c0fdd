"""One engine for several training processes, which are threads here: what one of them gets or fails in, all do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.records import Completion, Sampling
from ogls.rollout.canary import logprobs
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.guard import EngineGuard
from ogls.rollout.sampler import Sampler
from ogls.rollout.servers import VllmServers
from ogls.rollout.together import Together
from ogls.system.exits import EngineFailed
from ogls.system.process_group import ProcessGroup
from ogls.tasks.by_kind import ByKind
from ogls.tasks.grading import GradingPool
from tests.rollout.fake_server import LORA, serving
from tests.scripted import ScriptedEngine, numbers

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45], [100, 101] * 20, [5, 6, 7], [9]]
SAMPLING = Sampling(max_tokens=8)


class Wire:
    """Carries what torch.distributed would."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.said: list[Any] = [None] * size
        self.queues = [Queue[Any]() for _ in range(size)]


class WiredGroup(ProcessGroup):
    """Processes with a wire as their connection."""

    def gathered(self, own: Any) -> list[Any]:
        wire: Wire = self.connection
        wire.said[self.rank] = own
        wire.barrier.wait()
        everyone = list(wire.said)
        wire.barrier.wait()
        return everyone


class Threads(Together):
    """Speaks over a wire."""

    def __init__(self, engine: RolloutEngine, rank: int, wire: Wire) -> None:
        super().__init__(engine, WiredGroup(rank, wire.size, wire))
        self.wire = wire

    def _tell(self, message: tuple[str, Any]) -> None:
        self._last = message
        for queue in self.wire.queues[1:]:
            queue.put(message)

    def _heard(self) -> tuple[str, Any]:
        return self.wire.queues[self._group.rank].get(timeout=60)


def in_all(size: int, engine: Callable[[int], RolloutEngine], run: Callable[[int, EngineGuard], Any]) -> list[Any]:
    """What `run` returns, or the error that it raises, in each process."""
    wire = Wire(size)

    def process(rank: int) -> Any:
        guard = EngineGuard(Threads(engine(rank), rank, wire))
        try:
            return run(rank, guard)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(process, range(size)))


def shared(rank: int, size: int) -> list[list[int]]:
    return PROMPTS[rank::size]


def drawn_by_one(folder: Path, seed: int) -> list[list[Completion]]:
    engine = ScriptedEngine(numbers)
    engine.start(folder, 128)
    engine.load(None, 4)
    return engine.generate(PROMPTS, SAMPLING, 2, seed)


@pytest.mark.parametrize("size", [2, 3])
def test_each_gets_what_one_process_would_have_drawn(size: int, tiny_model: Path) -> None:
    engine = ScriptedEngine(numbers)

    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(Policy(str(tiny_model)), 4)
        drawn = guard.generate(shared(rank, size), SAMPLING, 2, seed=9)
        guard.settle()
        return drawn

    expected = drawn_by_one(tiny_model, 9)
    assert in_all(size, lambda rank: engine, run) == [expected[rank::size] for rank in range(size)]
    assert (engine.starts, engine.loads) == (1, [0])


def test_each_asks_as_often_as_it_likes_and_for_what_it_likes(tiny_model: Path) -> None:
    """As reflections do, whose second tries are not equally many: process r asks r times, each time otherwise."""

    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(Policy(str(tiny_model)), 4)
        drawn = [guard.generate(PROMPTS, Sampling(max_tokens=2 + rank), 1 + i, seed=rank) for i in range(rank)]
        guard.settle()
        return [[len(group) for group in groups] for groups in drawn], {
            len(c.token_ids) for gs in drawn for g in gs for c in g
        }

    engine = ScriptedEngine(numbers)
    answers = in_all(3, lambda rank: engine, run)
    assert answers == [([], set()), ([[1] * 5], {3}), ([[1] * 5, [2] * 5], {4})]


def test_asking_for_different_things_is_an_error_in_all(tiny_model: Path) -> None:
    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(Policy(str(tiny_model)), 4)
        if rank:
            guard.load(Policy(str(tiny_model)), 5)
        else:
            guard.generate(PROMPTS, SAMPLING, 1, seed=0)

    engine = ScriptedEngine(numbers)
    for error in in_all(2, lambda rank: engine, run):
        assert isinstance(error, ValueError)
        assert "ask the engine for different things: ['generate', 'load']" in str(error)


@pytest.mark.fault("engine dies")
@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_fails_is_rebuilt_by_all_or_ends_all(times: int, tiny_model: Path) -> None:
    """Process 0 has nothing left to ask when the engine fails."""
    engine = ScriptedEngine(numbers, dict.fromkeys(range(1, 1 + times), "die"))

    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(Policy(str(tiny_model)), 4)
        guard.generate(shared(rank, 2), SAMPLING, 2, seed=0)
        drawn = guard.generate(PROMPTS, SAMPLING, 2, seed=9) if rank else None
        guard.settle()
        return drawn

    answers = in_all(2, lambda rank: engine, run)
    if times == 1:
        assert answers == [None, drawn_by_one(tiny_model, 9)]
        assert engine.starts == 2
    else:
        assert all(isinstance(answer, EngineFailed) for answer in answers), answers


class Reading(ScriptedEngine):
    """Reads weights, all or the first of them."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(numbers)
        self.fails, self.read = fails, 0

    def _load(self, policy: Any) -> None:
        for _ in policy.merged_weights():
            self.read += 1
            if self.fails:
                raise ValueError("as it was told to")


class Counting(Policy):
    """Says how many of its weights were made, as if each of them needed all processes."""

    made = 0

    def merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            self.made += 1
            yield f"w{i}", torch.zeros(1)


@pytest.mark.parametrize("fails", [False, True])
def test_all_make_all_weights_together_even_if_the_reader_fails(fails: bool, tiny_model: Path) -> None:
    engine = Reading(fails)
    policies = [Counting(str(tiny_model)) for _ in range(2)]

    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(policies[rank], 4)

    answers = in_all(2, lambda rank: engine, run)
    assert [policy.made for policy in policies] == [5, 5]
    assert engine.read == (1 if fails else 5)
    assert [str(answer) for answer in answers] == (["as it was told to"] * 2 if fails else ["None"] * 2)


@pytest.mark.fault("weights in the engine are not the policy's")
def test_a_foreign_server_is_left_out_by_all(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, 2) as fakes, closing(VllmServers([f.url for f in fakes], folder=str(tmp_path))) as engine:
        policies = [Policy(str(tiny_model), lora=LORA, dtype="float32").load() for _ in range(2)]
        policies[1].load_trainable({name: p.detach() for name, p in policies[0].trainable().items()})

        def run(rank: int, guard: EngineGuard) -> Any:
            guard.engine.adapter_rank = LORA.rank
            guard.start(tiny_model, 128)
            guard.load(policies[rank], 0)
            guard.generate(shared(rank, 2), SAMPLING, 1, seed=0)
            first = guard.engine.metrics
            fakes[1].foreign = True
            for p in policies[rank].trainable().values():
                p.data += 0.05
            guard.load(policies[rank], 1)
            drawn = guard.generate(shared(rank, 2), SAMPLING, 1, seed=0)
            guard.settle()
            return first, guard.engine.metrics, len(drawn), guard.gaps[fakes[0].url] < 1e-3

        answers = in_all(2, lambda rank: engine, run)
    assert answers == [({"train/servers": 2.0}, {"train/servers": 1.0}, count, True) for count in (3, 2)]


def test_all_go_to_the_start_if_one_asks_there(tiny_model: Path, tmp_path: Path) -> None:
    """As for reflections by the weights that training began with, which only some processes have to ask for."""
    with serving(tiny_model, 1, LORA) as fakes, closing(VllmServers([fakes[0].url], folder=str(tmp_path))) as engine:
        policies = [Policy(str(tiny_model), lora=LORA, dtype="float32").load() for _ in range(2)]
        for policy in policies:
            policy.version = 3
            for p in policy.trainable().values():
                p.data.fill_(0.05)
        wire, encoder = Wire(2), PromptEncoder(Prompts(system=""), load_tokenizer(tiny_model))

        def process(rank: int) -> Any:
            sampler = Sampler(Threads(engine, rank, wire), policies[rank], encoder, GradingPool(ByKind()), 128)
            drawn, versions = [], []
            for asks in ((False, True), (False, False), (True, True)):
                sampler.hold()
                drawn.append(sampler.replies([*map(tuple, shared(rank, 2))], SAMPLING, seed=0))
                with sampler.at_start(asks[rank]):
                    drawn.append(sampler.replies([*map(tuple, PROMPTS)], SAMPLING, seed=0) if asks[rank] else [])
                    versions.append(policies[rank].version)
            return drawn, versions

        with ThreadPoolExecutor(2) as threads:
            (first, versions), (second, others) = threads.map(process, range(2))
    assert versions == others == [0, 3, 0]
    for drawn, asks in ((first, (False, False, True)), (second, (True, False, True))):
        present, start = drawn[::2], drawn[1::2]
        assert present[0] == present[1] == present[2]
        assert [len(replies) for replies in start] == [len(PROMPTS) * asked for asked in asks]
    assert second[1] != second[5], "in the first turn nobody else had these prompts"
    policy = Policy(str(tiny_model), lora=LORA, dtype="float32").load()
    said = [torch.tensor(reply.logprobs) for reply in first[5]]
    expected = logprobs(policy, PROMPTS, [reply.token_ids for reply in first[5]])
    torch.testing.assert_close(torch.cat(said), torch.cat(expected), rtol=0, atol=1e-3)


def test_prompts_and_seeds_reach_the_engine_once(tiny_model: Path) -> None:
    seen: list[Sequence[Sequence[int]]] = []

    class Noting(ScriptedEngine):
        def _generate(self, prompts: Any, sampling: Any, n: int, seed: int) -> Any:
            seen.append(prompts)
            return super()._generate(prompts, sampling, n, seed)

    engine = Noting(numbers)

    def run(rank: int, guard: EngineGuard) -> Any:
        guard.start(tiny_model, 128)
        guard.load(Policy(str(tiny_model)), 4)
        guard.generate(shared(rank, 2), SAMPLING, 1, seed=0)

    in_all(2, lambda rank: engine, run)
    assert [[list(prompt) for prompt in prompts] for prompts in seen] == [PROMPTS]
