"""A budget of thoughts: where it ends one, what it leaves alone, and how engines come to know it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ogls.lessons.prompts import thought_ids
from ogls.policy.policy import Policy
from ogls.records import Completion, Sampling
from ogls.rollout.abreast import Abreast
from ogls.rollout.engine import RolloutEngine, thought_length
from ogls.rollout.process import EngineProcess
from ogls.rollout.servers import VllmServers
from ogls.rollout.together import Together
from ogls.rollout.transformers import TransformersEngine
from ogls.rollout.vllm import VllmEngine
from ogls.serve import command
from ogls.system.process_group import ProcessGroup
from tests.faults.nursery import Nursery
from tests.random_models import CHAT_TEMPLATE, write_model
from tests.rollout.fake_server import serving
from tests.test_cli import run_in, small

BEGIN, END = 320, 321
MAX = 40
OPEN = [[5, 6, BEGIN], [40, BEGIN, 41, 42], [7, BEGIN, END, 8, BEGIN]]
SHUT = [[5, 6, 7], [40, BEGIN, 41, END, 42], [100, 101] * 20]
QWEN3 = CHAT_TEMPLATE.replace(  # opens the thought, or closes it where it is told not to think
    "assistant\n", "assistant\n<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model that often begins and ends thoughts, and whose tokenizer has an end token of its own."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = write_model(tmp_path_factory.mktemp("models") / "thinker", vocab_size=352)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template, tokenizer.eos_token = QWEN3, "<|im_start|>"
    tokenizer.save_pretrained(folder)
    assert thought_ids(tokenizer) == (BEGIN, END)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][[BEGIN, END]] *= 2  # likely, or unlikely, after more tokens than others
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def policy(thinker: Path) -> Policy:
    return Policy(str(thinker), lora=None, dtype="float32").load()


@pytest.fixture(
    scope="module",
    params=[
        TransformersEngine,
        pytest.param(
            VllmEngine,
            marks=[
                pytest.mark.vllm,
                pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the extra cpu or cuda"),
                pytest.mark.filterwarnings("default"),  # vLLM's own
            ],
        ),
    ],
    ids=["transformers", "vllm"],
)
def engine(request: pytest.FixtureRequest, thinker: Path, policy: Policy) -> Iterator[RolloutEngine]:
    vllm = request.param is VllmEngine
    engine = VllmEngine(memory_gib=0.25, max_num_seqs=64, dtype="float32") if vllm else TransformersEngine()
    engine.thought_ids = (BEGIN, END)
    engine.start(thinker, context_length=128)
    engine.load(policy, 0)
    yield engine
    engine.close()


def greedy(engine: RolloutEngine, prompt: Sequence[int], max_tokens: int, budget: int | None = None) -> tuple[int, ...]:
    sampling = Sampling(max_tokens=max_tokens, temperature=0, thinking_token_budget=budget)
    ((completion,),) = engine.generate([prompt], sampling, n=1, seed=0)
    return completion.token_ids


def longest_thought(prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]]) -> int:
    """The most tokens that a thought has after its prompt's or its own ``<think>``, counted by cutting texts in two."""
    longest = 0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            marks = "".join({BEGIN: "(", END: ")"}.get(token, ".") for token in (*prompt, *completion.token_ids))
            thoughts = [piece.partition(")")[0] for piece in marks.split("(")[1:]]
            longest = max(longest, *map(len, thoughts), 0)
    return longest


def test_the_length_of_a_thought() -> None:
    ids = (BEGIN, END)
    assert thought_length([5, 6], ids) is None
    assert thought_length([5, BEGIN], ids) == 0
    assert thought_length([5, BEGIN, 6, 7], ids) == 2
    assert thought_length([BEGIN, 6, END, 7], ids) is None
    assert thought_length([BEGIN, 6, END, BEGIN, 7], ids) == 1
    assert thought_length([8, 9], ids, 3) == 5
    assert thought_length([8, END], ids, 3) is None


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_at_its_budget_and_the_answer_follows(engine: RolloutEngine, budget: int) -> None:
    """By hand: what the model thinks up to the budget, the forced token, and what it then says after both."""
    cut = 0
    for i in range(10):
        thought = (10 + i, 20 + i)[: i % 3]  # which the prompt has thought already
        prompt = (30 + i, BEGIN, 40 + i, END, BEGIN, *thought)
        room = max(0, budget - len(thought))
        free = greedy(engine, prompt, MAX)
        if {BEGIN, END, 2} & set(free[: room + 1]):  # another case
            continue
        cut += 1
        before = (*free[:room], END)
        after = greedy(engine, (*prompt, *before), MAX - len(before), budget)
        assert greedy(engine, prompt, MAX, budget) == before + after
    assert cut >= 3


def test_what_is_forced_is_certain_and_all_else_is_drawn(engine: RolloutEngine) -> None:
    free = engine.generate(OPEN, Sampling(max_tokens=MAX), n=32, seed=1)
    groups = engine.generate(OPEN, Sampling(max_tokens=MAX, thinking_token_budget=5), n=32, seed=1)
    forced = 0
    for prompt, group in zip(OPEN, groups, strict=True):
        for completion in group:
            length = thought_length(prompt, (BEGIN, END))
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
                if length == 5:
                    assert (token, logprob) == (END, 0.0)
                    forced += 1
                length = thought_length([token], (BEGIN, END), length)
    assert forced > 32
    assert longest_thought(OPEN, groups) == 5 < longest_thought(OPEN, free)
    others = {c.token_ids[6:12] for c in groups[0] if c.token_ids[5:6] == (END,)}
    assert len(others) > 10, "answers are drawn as ever"


def test_a_budget_above_every_thought_changes_nothing(engine: RolloutEngine) -> None:
    free = engine.generate(SHUT, Sampling(max_tokens=MAX), n=32, seed=2)
    longest = longest_thought(SHUT, free)
    assert 5 < longest < MAX
    same, other = (
        engine.generate(SHUT, Sampling(max_tokens=MAX, thinking_token_budget=budget), n=32, seed=2)
        for budget in (longest, longest - 1)
    )
    assert [[c.token_ids for c in group] for group in same] == [[c.token_ids for c in group] for group in free]
    assert [[c.token_ids for c in group] for group in other] != [[c.token_ids for c in group] for group in free]


def test_only_the_models_own_end_ends_a_completion(engine: RolloutEngine) -> None:
    """vLLM reads the tokenizer where there is a budget, and the tokenizer has another end token."""
    groups = engine.generate(SHUT, Sampling(max_tokens=MAX), n=64, seed=3)
    completions = [c for group in groups for c in group]
    assert any(1 in c.token_ids[:-1] for c in completions)
    assert all((c.finish_reason == "stop") == (c.token_ids[-1] == 2) for c in completions)


class Deaf(TransformersEngine):
    """Takes no account of a budget."""

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Completion]]:
        return super()._generate(prompts, replace(sampling, thinking_token_budget=None), n, seed)


def test_an_engine_that_does_not_do_it_is_found_out(thinker: Path, policy: Policy) -> None:
    engine, sampling = Deaf(), Sampling(max_tokens=MAX, thinking_token_budget=5)
    engine.start(thinker, 128)
    engine.load(policy, 0)
    with pytest.raises(ValueError, match="needs the engine's thought_ids"):
        engine.generate(OPEN, sampling, n=8, seed=0)
    engine.thought_ids = (BEGIN, END)
    with pytest.raises(RuntimeError, match="a thought of 6 tokens at a thinking_token_budget of 5"):
        engine.generate(OPEN, sampling, n=8, seed=0)


def test_servers_are_asked_for_it(thinker: Path, policy: Policy, tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=MAX, thinking_token_budget=5)
    here = TransformersEngine()
    here.thought_ids = (BEGIN, END)
    here.start(thinker, 128)
    here.load(policy, 0)
    with serving(thinker, lora=None) as servers:
        engine = VllmServers([servers[0].url], folder=str(tmp_path), start_within=5.0)
        engine.adapter_rank, engine.thought_ids = 0, (BEGIN, END)
        engine.start(thinker, 128)
        engine.load(policy, 0)
        with pytest.raises(ValueError, match=r"was started without data.evaluation.sampling.thinking_token_budget"):
            engine.generate(OPEN, sampling, n=2, seed=0)
        servers[0].thought_ids = (BEGIN, END)
        groups = engine.generate(OPEN, sampling, n=8, seed=0)
        assert longest_thought(OPEN, groups) == 5
        engine.close()


def test_servers_are_started_for_it(thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serve.py"])
    settings = [word for word in small(thinker) if word not in ("--data.engine", "TransformersEngine")]
    assert "--reasoning-config" not in command(settings, "127.0.0.1", 8001).arguments
    settings += ["--data.evaluation.sampling.thinking_token_budget", "6"]
    words = command(settings, "127.0.0.1", 8001).arguments
    told = json.loads(words[words.index("--reasoning-config") + 1])
    assert told == {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    assert "--skip-tokenizer-init" not in words, "vLLM makes tokens of the two"


class Hearing(TransformersEngine):
    """Says what it was told before its start."""

    copies_policy = True

    def _start(self, folder: Path, context_length: int) -> None:
        raise ValueError(f"told {self.thought_ids}")


class Alone(Together):
    """Has no other process to tell."""

    def _tell(self, message: tuple[str, object]) -> None:
        pass


def test_engines_within_engines_are_told(thinker: Path) -> None:
    for outer in (EngineProcess(Hearing()), Abreast(Hearing(), ProcessGroup()), Alone(Hearing(), ProcessGroup())):
        outer.thought_ids = (BEGIN, END)
        with pytest.raises(ValueError, match=r"told \(320, 321\)"):
            outer.start(thinker, 128)
        outer.close()


def test_tokenizers_without_the_tokens_are_refused() -> None:
    for ids in ({"<think>": [1, 2], "</think>": [3]}, {"<think>": [0], "</think>": [0]}):
        tokenizer = lambda tag, add_special_tokens, ids=ids: {"input_ids": ids[tag]}  # noqa: E731
        with pytest.raises(ValueError, match="needs a model with the tokens <think> and </think>"):
            thought_ids(tokenizer)  # pyright: ignore[reportArgumentType]


def test_a_budget_leaves_room_for_the_answer() -> None:
    for budget in (-1, 8):
        with pytest.raises(ValueError, match=f"below max_tokens 8, which has to hold the answer, too; got {budget}"):
            Sampling(max_tokens=8, thinking_token_budget=budget)
    assert Sampling(max_tokens=8).is_softmax_at(1.0)
    assert not Sampling(max_tokens=8, thinking_token_budget=7).is_softmax_at(1.0)


def test_a_validation_at_a_budget(nursery: Nursery, thinker: Path, tmp_path: Path) -> None:
    """From the command line to MLflow. The chat template opens the thought, of which one token is the line's end."""
    settings = [*small(thinker), "--data.evaluation.sampling.max_tokens", "30"]

    def ran(*words: str, budget: int | None) -> str:
        own = [] if budget is None else ["--data.evaluation.sampling.thinking_token_budget", str(budget)]
        code, output = run_in(nursery, *words, *settings, *own, cwd=tmp_path)
        assert code == 0, output[-3000:]
        return output

    unclosed = []
    for budget in (None, 6):
        ran("validate", budget=budget)
        (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"], max_results=1)  # the latest
        assert run.data.params["data.evaluation.sampling.thinking_token_budget"] == str(budget)
        unclosed.append(run.data.metrics["val/unclosed_rate"])
    assert unclosed[0] > 0.5 > 0.3 > unclosed[1]
    ran("predict", budget=0)
    said = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert all(line["prompt_ids"].index(BEGIN) == len(line["prompt_ids"]) - 2 for line in said)
    assert all(line["completion"]["token_ids"][0] == END and not line["text"].index("</think>") for line in said)
    off = ("--data.prompts.student_options", "{enable_thinking: false}")
    free, same = (ran("generate", "What is 12 + 8?", *off, budget=budget) for budget in (None, 29))
    assert free.partition("\n> ")[2] == same.partition("\n> ")[2] != ""


def test_a_model_without_thoughts_is_refused_before_anything_is_read(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    own = ("--data.evaluation.sampling.thinking_token_budget", "6")
    code, output = run_in(nursery, "validate", *small(tiny_model), *own, cwd=tmp_path)
    assert code == 2
    assert "error: data.evaluation.sampling.thinking_token_budget needs a model with the tokens <think>" in output
