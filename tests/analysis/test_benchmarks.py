"""The benchmarks' own arithmetic, and the GPU script in small."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "analysis" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import exponent, interval  # noqa: E402
from roofline import MODELS, Machine, Step, decode, forward, predict, trunk  # noqa: E402
from rows import lessons  # noqa: E402

from ogls.system.memory.shapes import Shapes  # noqa: E402


def test_exponents_and_intervals() -> None:
    assert exponent([2, 4, 8], [3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)
    median, low, high = interval(np.array([1.0, 1.1, 1.2, 1.3, 5.0]))
    assert 1.0 <= low <= median == 1.2 <= high <= 5.0


def test_the_models_weights_are_counted() -> None:
    """Compares with transformers' own layers, made without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = MODELS["smollm2"]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linear = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sum(linear) == shape.products + shape.head


def test_a_step_by_hand() -> None:
    """One layer of width 2: 2 x 2 x (1 + 1) x 2 + 3 x 2 x 4 = 40 weights, a head of 10 x 2; 100 FLOP/s, 10 bytes/s."""
    sizes = {"layers": 1, "hidden": 2, "mlp": 4, "heads": 1, "kv_heads": 1, "head_size": 2, "vocab": 10}
    model, machine = Shapes(**sizes, tied=True, norms_heads=False), Machine(flops=100.0, bandwidth=10.0)
    assert (model.products, model.head, model.kv_bytes) == (40, 20, 8)
    assert forward(model, 3) == 2 * 40 + 4 * 2 * 3
    # two sequences: 2 x 2 x 60 / 100 = 2.4 s of arithmetic, (120 + 2 x 8 x (4 + 3)) / 10 = 23.2 s of reading, a step
    assert decode(model, machine, sequences=2, prompt=4, length=6) == pytest.approx(6 * 23.2)
    step = Step(prompts=1, group_size=2, prompt=4, length=6, views=1)
    found = predict(model, machine, step)
    assert found["head and loss"] == pytest.approx(12 * 6 * 20 / 100)
    assert found["teacher, K views"] == pytest.approx((10 + 12) * forward(model, 10) / 100)
    assert found["teacher, K views unshared"] == pytest.approx(2 * (10 + 6) * forward(model, 10) / 100)
    slow = Machine(flops=100.0, bandwidth=10.0, layer_token=0.5)  # elementwise work: once forward, twice backward
    assert trunk(model, slow, tokens=7, context=3, passes=2.0) == pytest.approx(7 * (2 * forward(model, 3) / 100 + 1.5))


def test_made_up_batches_have_what_the_trainer_needs() -> None:
    batch = lessons(groups=2, group_size=3, prompt=9, length=12, views=2, vocab=100)
    assert len(batch) == 6
    assert [view.role for view in batch[0].views] == ["plain", "success", "failure"]
    assert batch[0].views == batch[2].views != batch[3].views
    assert all(10 <= token < 100 for lesson in batch for token in lesson.token_ids)


def test_all_sides_of_the_loss_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_loss", BENCHMARKS / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.assert_agreement(views=4)
    assert "values and gradients to 1e-10" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_predicts_what_it_would_measure(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--fake", "--layers", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(line["section"], line["side"]): line for line in lines if "us_a_token" in line}
    assert found["attention, forward and backward", "grids"]["ratio"] > 5
    for side in ("forward KL", "JSD", "JSD, top 100"):
        assert 1.0 < found["loss, |V| = 151936, hidden 2048, 4096 tokens", side]["ratio"] < 1.3
    planned = {line["section"]: line["planned_gib"] for line in lines if "planned_gib" in line}
    assert len(planned) == 3
    for section, gib in planned.items():  # with 28 layers 0.99 to 1.04; of two, the keys of a shared prompt weigh more
        assert 0.93 < gib / found[section, "student"]["peak_gib"] < 1.1
    assert {line["side"] for line in lines if line["section"].startswith("train phase")} == {
        "OPSD",
        "OGLS-SD, 2 peers",
        "OGLS-SD, 8 peers",
    }
    assert out.read_text().count('"section"') == len(lines)
