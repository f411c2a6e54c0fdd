"""What a run has learned leaves: other programs load it, and count what the run's validation did."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.records import Problem
from ogls.tasks.math import MathVerifier
from ogls.tracking.files import METRICS, read_rows
from tests.faults.nursery import Nursery
from tests.test_cli import run_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[1]
CHAINS = ROOT / "tests" / "lm_eval" / "chains.jsonl"
ROWS = [json.loads(line) for line in CHAINS.read_text().splitlines()]
GREEDY = ("--data.evaluation.samples", "1", "--data.evaluation.sampling.temperature", "0")
SMALL = (
    *("--config", "math.yaml", "--policy.dtype", "float32", "--data.engine", "TransformersEngine", *GREEDY),
    *("--data.val", "JsonlProblems", "--data.val.path", str(CHAINS), "--data.evaluation.while_training", "null"),
    *("--trainer.max_epochs", "1", "--data.steps_per_epoch", "2", "--data.problems_per_step", "2"),
    *("--data.train.size", "64", "--model.warmup_steps", "0", "--trainer.accelerator", "cpu"),
)


@dataclass(frozen=True)
class Left:
    """A run, its accuracy after training, and what was exported of it."""

    run: Path
    accuracy: float
    model: Path
    adapter: Path


def leave(nursery: Nursery, place: Path, *options: str, exported: Sequence[str]) -> Left:
    """Trains, exports the best checkpoint, and validates it."""
    code, output = run_in(nursery, "fit", *SMALL, *options, cwd=place)
    assert code == 0, output[-3000:]
    (run,) = (place / "runs").iterdir()
    best = str(run / "checkpoints" / "best.ckpt")
    for name in exported:
        more = ("--adapter",) if name == "adapter" else ()
        arguments = ("--ckpt_path", best, "--to", name, "--dtype", "float32", *more)
        code, output = run_in(nursery, "export", *arguments, cwd=place)
        assert code == 0, output[-3000:]
    code, output = run_in(nursery, "validate", *SMALL, *options, "--ckpt_path", best, cwd=place)
    assert code == 0, output[-3000:]
    (validation,) = (place / "runs").glob("validate-*")
    accuracy, again = (
        [row["val/avg_at_1"] for row in read_rows(of / METRICS) if "val/avg_at_1" in row][-1]
        for of in (run, validation)
    )
    assert again == accuracy
    assert 0.3 < accuracy < 1.0
    return Left(run, accuracy, place / "model", place / "adapter")


@pytest.fixture(scope="module")
def left(nursery: Nursery, embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Two steps of the default run in float32, from its cold start."""
    return leave(nursery, tmp_path_factory.mktemp("left"), exported=("model", "adapter"))


@pytest.fixture(scope="module")
def left_whole(nursery: Nursery, embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The same where all weights are trained."""
    whole = ("--policy.lora", "null", "--model.learning_rate", "5e-5")
    return leave(nursery, tmp_path_factory.mktemp("whole"), *whole, exported=("model",))


def prompts(folder: Path) -> list[list[int]]:
    """What the exported template makes of the problems."""
    encoder = PromptEncoder(Prompts(system="", student="{problem}"), AutoTokenizer.from_pretrained(folder))
    chats = [[{"role": "system", "content": ""}, {"role": "user", "content": row["problem"]}] for row in ROWS]
    made = [encoder.tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
    assert [tuple(ids) for ids in made] == [encoder.student(Problem(id="", text=r["problem"], answer="")) for r in ROWS]
    return made


def accuracy(folder: Path, completions: Sequence[Sequence[int]]) -> float:
    tokenizer, verifier = AutoTokenizer.from_pretrained(folder), MathVerifier()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    pairs = zip(ROWS, texts, strict=True)
    right = [verifier.grade(Problem(id="", text="", answer=row["answer"]), text).correct for row, text in pairs]
    return sum(right) / len(right)


def greedy(model: Any, folder: Path) -> list[list[int]]:
    """Each prompt by itself, so that there is no padding."""
    end, found = AutoTokenizer.from_pretrained(folder).eos_token_id, []
    for ids in prompts(folder):
        asked = torch.tensor([ids])
        made = model.generate(input_ids=asked, do_sample=False, max_new_tokens=48, eos_token_id=end, pad_token_id=end)
        found.append(made[0, len(ids) :].tolist())
    return found


@pytest.fixture(scope="module")
def by_transformers(left: Left) -> list[list[int]]:
    return greedy(AutoModelForCausalLM.from_pretrained(left.model), left.model)


def test_transformers_counts_what_the_run_did(left: Left, by_transformers: list[list[int]]) -> None:
    assert accuracy(left.model, by_transformers) == pytest.approx(left.accuracy)


def test_peft_writes_the_same_tokens(left: Left, by_transformers: list[list[int]]) -> None:
    """The best adapter on the base that the run merged; the exported one on the model without an adapter."""
    from peft import AutoPeftModelForCausalLM

    for adapter in (left.run / "best_adapter", left.adapter):
        loaded = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
        assert greedy(loaded, adapter) == by_transformers, adapter.name


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, prompts, to = sys.argv[1:]
lora = {"enable_lora": True, "max_lora_rank": 32} if adapter else {}
llm = LLM(model=model, dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=2**28, **lora)
request = LoRARequest("exported", 1, adapter) if adapter else None
asked = [{"prompt_token_ids": ids} for ids in json.load(open(prompts))]
found = []
for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 5}):
    import torch
    torch.manual_seed(5)
    made = llm.generate(asked, SamplingParams(max_tokens=48, **settings), lora_request=request, use_tqdm=False)
    found.append([list(one.outputs[0].token_ids) for one in made])
json.dump(found, open(to, "w"))
"""


def by_vllm(model: Path, adapter: Path | None, folder: Path, place: Path) -> list[list[list[int]]]:
    """Greedy completions, and two draws from one seed."""
    (place / "prompts.json").write_text(json.dumps(prompts(folder)))
    words = [str(model), str(adapter or ""), str(place / "prompts.json"), str(place / "completions.json")]
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", VLLM, *words], env={**os.environ, **quiet}, capture_output=True, text=True, cwd=place
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((place / "completions.json").read_text())


def test_vllm_writes_the_same_tokens(left: Left, by_transformers: list[list[int]], tmp_path: Path) -> None:
    """A seed draws the same from the exported model and from the model with the exported adapter, but for rounding."""
    base = Path(json.loads((left.adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    whole = by_vllm(left.model, None, left.model, tmp_path)
    added = by_vllm(base, left.adapter, left.adapter, tmp_path)
    assert whole[0] == by_transformers
    assert whole[1] == whole[2] != whole[0]
    assert accuracy(left.adapter, added[0]) == pytest.approx(left.accuracy)
    same = sum(one == other for one, other in zip(whole[1], added[1], strict=True))
    assert same >= len(ROWS) - 2, "the two round at different places"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm_eval")
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_lm_eval_counts_what_the_run_did(left: Left, kind: str, tmp_path: Path) -> None:
    base = json.loads((left.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    given = f"pretrained={left.model}" if kind == "model" else f"pretrained={base},peft={left.adapter}"
    task = ["--include_path", "tests/lm_eval", "--tasks", "ogls_chains", "--output_path", str(tmp_path / "out")]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"{given},dtype=float32", *task]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [*command, "--device", "cpu", "--batch_size", "1"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["ogls_chains"]["exact_match,boxed"] == pytest.approx(left.accuracy)


def test_all_weights_leave_as_a_whole(left_whole: Left, tmp_path: Path) -> None:
    """The exported model and the run's own `best_model` write the same; transformers and vLLM count as the run."""
    written = greedy(AutoModelForCausalLM.from_pretrained(left_whole.model), left_whole.model)
    assert accuracy(left_whole.model, written) == pytest.approx(left_whole.accuracy)
    assert greedy(AutoModelForCausalLM.from_pretrained(left_whole.run / "best_model"), left_whole.model) == written
    assert by_vllm(left_whole.model, None, left_whole.model, tmp_path)[0] == written
