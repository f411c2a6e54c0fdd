"""SciKnowEval and tool use, as ROSD's release has them, through their configurations and ours of ROSD."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ogls.cli import build
from ogls.data import RolloutDataModule
from ogls.lessons.prompts import PromptEncoder
from ogls.methods import ROSD
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer
from ogls.tasks.gold import gold_faults
from tests.lessons.reflection.made import letters, reply
from tests.scripted import ScriptedEngine

DATA = Path(os.environ.get("OGLS_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("name", "files", "count"),
    [("sciknoweval", {"train": "chemistry_train", "val": "chemistry_test"}, 2100), ("tool_use", {"train": "test"}, 68)],
)
def test_gold_answers_verify_and_rosd_makes_lessons(
    name: str, files: dict[str, str], count: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = DATA / name.replace("_", "")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; OGLS_DATA names the folder that holds it")
    (tmp_path / "data").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    paths = [arg for key, file in files.items() for arg in (f"--data.{key}.path", f"data/{folder.name}/{file}.jsonl")]
    stack = [arg for c in ("math", name, "rosd") for arg in ("--config", f"{c}.yaml")]
    sizes = [
        "--data.context_length",
        "9000",
        "--data.reflection.prompt_tokens",
        "9000",
        "--data.problems_per_step",
        "2",
    ]
    data = build([*stack, *paths, *sizes, "--trainer.accelerator", "cpu"], run=False).datamodule
    assert isinstance(data, RolloutDataModule)
    assert data.method == ROSD()
    problems = [problem for key in files for problem in getattr(data, f"{key}_problems")]
    assert len(problems) == count
    assert gold_faults(problems, data.pool) == {}

    tokenizer = load_tokenizer(tiny_model)
    encoder = PromptEncoder(data.prompts, tokenizer)
    known = {problem.text: problem for problem in problems}

    def script(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = tokenizer.decode(prompt)
        if "Reply with nothing but" in text:
            return letters(
                encoder, reply("I feel it must be so" if "A wrong attempt" in text else None, "Think twice.")
            )
        problem = next(known[t] for t in known if t in text)
        right = data.pool.verifier.canonical(problem)
        wrong = "I feel it must be so, although I do not know.\n"
        return letters(encoder, rng.choice([right, wrong]))

    data.engine = ScriptedEngine(script)
    data.policy, data.encoder = Policy(str(tiny_model), lora=Lora(rank=2), dtype="float32").load(), encoder
    batch = data.make_batch(0)
    data.close()
    assert batch.metrics["train/mixed_groups"] == 1
    assert batch.metrics["train/reflection_parse_rate"] == batch.metrics["train/reflection_located_rate"] == 1
    assert len(batch.lessons) == 2 * 8
    assert all("Keep in mind: Think twice." in tokenizer.decode(x.views[1].prefix_ids) for x in batch.lessons)
    assert all(group.problem.text in tokenizer.decode(group.prompt_ids) for group in batch.groups)
