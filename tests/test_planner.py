"""A run on a device whose free memory is made up: what it decides, prints and refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import run

import pytest
import torch

from analysis.benchmarks.fake_gpu import qwen3
from ogls import module
from ogls.cli import build
from ogls.lessons.selection import FirstTokens
from ogls.module import SelfDistillation
from ogls.planner import planned
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.teacher import EMA, Frozen, Live, OtherModel, TrustRegion
from ogls.rollout.process import EngineProcess
from ogls.rollout.vllm import VllmEngine
from ogls.system.memory.plan import GIB
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training
from tests.faults import small
from tests.test_cli import small as arguments

ROOT = Path(__file__).resolve().parents[1]

ON_A_DEVICE = """
import sys
from ogls import module
from ogls.cli import build
free = int(float(sys.argv.pop(1)) * 2**30)
module._free_bytes = lambda device: free
module.Policy.load = lambda policy: sys.exit("weights were read")
from ogls.cli import main
main()
"""


def test_what_cannot_fit_is_refused_before_weights_are_read(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_A_DEVICE, "0.9", "fit", *arguments(tiny_model)]
    done = run(
        [*command, "--model.tokens_per_micro_batch", "900000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: this run does not fit on the device: it needs")
    assert line.endswith("what fits: model.tokens_per_micro_batch null")
    assert not list(tmp_path.glob("runs/*/checkpoints"))


class Late(SelfDistillation):
    """Reads its weights when the trainer says so, and not when the test makes it."""

    def configure_model(self) -> None:
        if self._trainer is not None:
            torch.manual_seed(0)
            super().configure_model()


def test_a_run_takes_over_what_is_planned_and_learns_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = small.fit(tiny_model, tmp_path / "cpu", epochs=1, kind=Late, steps_per_epoch=2)
    assert (expected.tokens_per_micro_batch, expected.policy.gradient_checkpointing) == (4096, "auto")
    assert "Memory of" not in capsys.readouterr().out
    room = 0.75  # GiB: all activations would not fit
    monkeypatch.setattr(module, "_free_bytes", lambda device: int(room * GIB))
    large = {"tokens_per_micro_batch": 8192}
    student = small.fit(tiny_model, tmp_path / "gpu", epochs=1, kind=Late, steps_per_epoch=2, **large)
    assert capsys.readouterr().out.count("Memory of 0.8 GiB, planned") == 1
    assert student.policy.gradient_checkpointing is True
    for name, value in small.weights(expected).items():
        torch.testing.assert_close(small.weights(student)[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beside", [False, True], ids=["in this process", "in one of its own"])
def test_the_engine_is_told_its_share_and_whether_there_is_an_adapter(tiny_model: Path, beside: bool) -> None:
    inner = VllmEngine()
    engine = EngineProcess(inner) if beside else inner
    student, data = small.pair(tiny_model, engine=engine, lora=None, teacher=Live())
    made = planned(student, data, 8 * GIB)
    assert engine.cache_bytes == made.cache > 0
    assert engine.adapter_rank == 0
    assert inner.adapter_rank == 0
    options = inner.options(tiny_model, 300, (7 * GIB, 8 * GIB))
    assert "enable_lora" not in options  # all weights are trained: they are merged ones on a GPU, too


def test_what_teachers_keep_is_counted(tiny_model: Path) -> None:
    for lora in (None, Lora(rank=4)):
        policy = Policy(str(tiny_model), lora=lora, dtype="float32").load()
        for teacher in (Frozen(), Live(), EMA(), TrustRegion()):
            kept = sum(weight.nbytes for weight in teacher.start(policy).values())
            assert teacher.kept_bytes(policy) * sum(p.numel() for p in policy.trainable().values()) == kept


def test_another_model_that_teaches_is_counted(tiny_model: Path, wide_model: Path) -> None:
    """Its weights are counted as they are held, and its pass."""
    alone, data = small.pair(tiny_model, teacher=Live())
    taught, _ = small.pair(tiny_model, teacher=OtherModel(str(wide_model)))
    assert taught.other is not None
    data.longest_prompt = 20
    before, after = (planned(module, data, 8 * GIB).rows for module in (alone, taught))
    held = "weights of the teacher"
    assert after[held] - before[held] == sum(p.nbytes for p in taught.other.parameters())
    wide = Shapes.of(json.loads((wide_model / "config.json").read_text()))
    own = Training(shapes=wide, rank=4, targets=())  # a pass of such a student, whose bytes are measured elsewhere
    student = Training(shapes=Shapes.of(qwen3("0.6B")), rank=4, targets=(), other=wide)
    assert student.teacher_pass(1000, 100) == own.forward(1000) + 100 * 2 * 4 * 96


def test_what_is_cut_among_devices_is_divided(tiny_model: Path) -> None:
    student, data = small.pair(tiny_model, lora=None, teacher=Frozen())
    one, four = planned(student, data, 8 * GIB), planned(student, data, 8 * GIB, 4, sharded=True)
    each = planned(student, data, 8 * GIB, 4)
    for name in ("policy: weights", "policy: gradients and AdamW", "weights of the teacher"):
        assert four.rows[name] == -(-one.rows[name] // 4)
        assert each.rows[name] == one.rows[name]
    layer = sum(p.numel() for name, p in student.policy.trainable().items() if ".layers.0." in name)
    embeddings = student.policy.head[0].numel()
    gathered = four.rows["weights that are gathered"]
    assert gathered == pytest.approx(4 * (embeddings + 2 * layer + layer), rel=0.01)
    assert not one.rows["weights that are gathered"]
    assert "Memory of 8.0 GiB on each of 4 devices, planned" in four.table()
    assert "Memory of 8.0 GiB, planned" in one.table()


@pytest.mark.parametrize(("size", "devices"), [("4B", 4), ("8B", 8)])
def test_all_weights_of_a_recipe_fit_where_they_are_cut(size: str, devices: int, tmp_path: Path, monkeypatch) -> None:
    """On 79 GiB each, with rollouts of 8,192 tokens, and the engine elsewhere."""
    monkeypatch.setattr("sys.argv", ["run.py"])
    few = ["--data.train=Chains", "--data.train.size=8", "--data.val=Chains", "--data.val.size=8", "--data.test=null"]
    cli = build(["--config", "qwen3_sdpo.yaml", *few], run=False)
    (tmp_path / "config.json").write_text(json.dumps(qwen3(size)))
    cli.model.policy.__dict__["folder"] = tmp_path
    cli.datamodule.longest_prompt, cli.datamodule.engine = 800, None
    h100 = int(79.1 * GIB)
    cut, held = (
        planned(cli.model, cli.datamodule, h100, devices, sharded=True),
        planned(cli.model, cli.datamodule, 4 * h100, devices),
    )
    assert cut.total < h100 < held.total


def test_only_what_is_learned_has_activations(tiny_model: Path) -> None:
    def lesson(**changes: object) -> int:
        student, data = small.pair(tiny_model, **changes)
        data.longest_prompt = 20
        rows = planned(student, data, 8 * GIB).rows
        (row,) = (name for name in rows if name.startswith("a micro-batch"))
        return int(row.split()[3])

    assert lesson(tokens_per_micro_batch=1) == 20 + 60
    assert lesson(tokens_per_micro_batch=1, selection=FirstTokens(10)) == 20 + 10


def test_a_model_without_a_plan_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    student, data = small.pair(tiny_model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    student.policy.__dict__["folder"] = tmp_path
    with pytest.raises(ValueError, match="no memory plan for mamba"):
        planned(student, data, 8 * GIB)


ADAPTERS = [("qwen3_ogls_sd", "1.7B"), ("qwen3_opsd", "1.7B"), ("qwen3_ogls_sd", "4B"), ("qwen3_ogls_sd", "8B")]
ALL_WEIGHTS = [("qwen3_rosd", "4B"), ("qwen3_sdpo", "4B"), ("qwen3_grpo", "4B")]


@pytest.mark.parametrize(("preset", "size"), ADAPTERS + ALL_WEIGHTS)
def test_presets_are_for_one_gpu(preset: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 79 GiB with an adapter, on 140 with all weights, as the file itself says."""
    monkeypatch.setattr("sys.argv", ["run.py"])
    few = ["--data.train=Chains", "--data.train.size=8", "--data.val=Chains", "--data.val.size=8", "--data.test=null"]
    cli = build(["--config", f"{preset}.yaml", *few], run=False)
    assert cli.trainer.num_devices == 1
    (tmp_path / "config.json").write_text(json.dumps(qwen3(size)))
    cli.model.policy.__dict__["folder"] = tmp_path
    cli.datamodule.longest_prompt = 800
    if (preset, size) in ADAPTERS:
        plan = planned(cli.model, cli.datamodule, int(79.1 * GIB))
        assert plan.tokens >= 2048
        if (preset, size) == ADAPTERS[0]:
            assert plan.table() in (ROOT / "docs" / "gpu.md").read_text()
        return
    assert planned(cli.model, cli.datamodule, int(139.8 * GIB)).tokens >= 8192
    said = re.search(r"needs (\d+) GiB", (ROOT / "experiments" / f"{preset}.yaml").read_text())
    assert said is not None
    with pytest.raises(ValueError, match=rf"it needs {said[1]}\.\d GiB"):
        planned(cli.model, cli.datamodule, int(79.1 * GIB))
