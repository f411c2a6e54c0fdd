"""The benchmarks' own arithmetic, and the GPU script in small."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "analysis" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpus  # noqa: E402
from fake_gpu import qwen3  # noqa: E402
from gpus import LAYOUTS, Layout, Links  # noqa: E402
from harness import exponent, interval  # noqa: E402
from roofline import Machine, Setup, configured, predicted, recipes, validations  # noqa: E402
from rows import lessons  # noqa: E402
from work import Draw, Pass, Work, step_of  # noqa: E402

from ogls.policy.packing import pack  # noqa: E402
from ogls.system.memory.shapes import Shapes  # noqa: E402
from ogls.system.memory.training import Training  # noqa: E402


def test_exponents_and_intervals() -> None:
    assert exponent([2, 4, 8], [3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)
    median, low, high = interval(np.array([1.0, 1.1, 1.2, 1.3, 5.0]))
    assert 1.0 <= low <= median == 1.2 <= high <= 5.0


def test_the_models_weights_are_counted() -> None:
    """Compares with transformers' own layers, made without memory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape, config = Shapes.of(qwen3("0.6B")), qwen3("0.6B")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"}))
    linear = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sum(linear) == shape.products + shape.head


SMALL = Shapes(
    layers=1, hidden=2, mlp=4, heads=1, kv_heads=1, head_size=2, vocab=10, tied=True, norms_heads=False
)  # 2 x 2 x 4 + 3 x 2 x 4 = 40 weights, a head of 10 x 2


def setup(rank: int = 1, machine: dict[str, Any] | None = None, **changes: Any) -> Setup:
    """100 FLOP/s, 50 of attention, 10 bytes/s."""
    rates: dict[str, Any] = {"flops": 100.0, "attention": 50.0, "bandwidth": 10.0, "layer_token": 0.0}
    student = Training(shapes=SMALL, rank=rank, targets=("q_proj",))
    return Setup(machine=Machine(**(rates | (machine or {}))), training=student, **changes)


def test_passes_by_hand() -> None:
    assert (SMALL.products, SMALL.head, SMALL.kv_bytes) == (40, 20, 8)
    read = Pass(tokens=7, pairs=21)
    products, attention = 2 * 40 * 7 / 100, 4 * 2 * 21 / 50
    assert setup().forward(read) == pytest.approx(products + attention)
    assert setup().gradient(read) == pytest.approx(2 * products + 3.5 * attention)
    assert setup(checkpointing=True).gradient(read) == pytest.approx(3 * products + 4.5 * attention)
    assert setup(rank=0).gradient(read) == pytest.approx(3 * products + 3.5 * attention)
    slow = setup(machine={"layer_token": 0.5, "adapter_token": 0.25})  # once forward, three times with the gradient
    assert slow.forward(read) == pytest.approx(products + attention + 7 * 0.5)
    assert slow.gradient(read) == pytest.approx(2 * products + 3.5 * attention + 7 * (1.5 + 0.25))
    assert setup(machine={"row_value": 0.1}).loss(12, 3) == pytest.approx(12 * (6 * 20 / 100 + 10 * 0.1))


def test_decoding_by_hand() -> None:
    """Two sequences: 2.4 s of arithmetic a step, 12 s of reading weights, 0.8 s for keys and values of a token."""
    prompt = setup().forward(Pass(4, 8))  # read once
    both = Draw([4, 4], [6, 6], 1)
    per_sequence = sum(0.8 * (4 + i + 0.5) for i in range(6))
    assert setup().decode(both) == pytest.approx(6 * 12 + 2 * per_sequence + prompt)
    assert setup(cached_bytes=1).decode(both) == pytest.approx(6 * 12 + per_sequence + prompt)
    one_at_a_time = setup(max_num_seqs=1).decode(both)
    assert one_at_a_time == pytest.approx(2 * (6 * 12 + per_sequence) + prompt)
    assert setup(cache=8 * 10).decode(both) == one_at_a_time  # room for 10 tokens: prompt and rollout of one
    rest = sum(0.8 * (4 + i + 0.5) for i in range(3))
    assert setup().decode(Draw([4, 4], [6, 3], 1)) == pytest.approx(6 * 12 + per_sequence + rest + prompt)
    long, short = (sum(0.8 * (4 + i + 0.5) for i in range(length)) for length in (256, 101))
    many = setup().decode(Draw([4, 4], [256, 101], 1))  # four tokens at a time
    assert many == pytest.approx(256 * 12 + long + short + prompt, rel=1e-4)
    quick = setup(machine={"bandwidth": 1e9, "engine_step": 0.5, "drawn": 0.25})
    assert quick.decode(both) == pytest.approx(6 * (2.4 + 0.5 + 2 * 0.25) + prompt, rel=1e-4)
    beside = {"bandwidth": 1e9, "adapter_step": 0.5}  # six steps, unless the engine takes the weights merged
    assert setup(machine=beside).decode(both) == pytest.approx(6 * (2.4 + 0.5) + prompt, rel=1e-4)
    assert setup(machine=beside, whole=True).decode(both) == pytest.approx(6 * 2.4 + prompt, rel=1e-4)


def test_an_adapter_is_handed_over_by_its_bytes() -> None:
    handed, free = (setup(machine={"handed": rate}, canary=(1, 4, 1)) for rate in (0.5, 0.0))
    assert handed.load - free.load == pytest.approx(0.5 * 2 * (2 + 2))  # rank 1 of a layer of 2 x 2, two bytes each
    assert setup(machine={"handed": 0.5}, canary=(1, 4, 1), whole=True).load == pytest.approx(
        setup(canary=(1, 4, 1), whole=True).load
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=8))
def test_a_pass_is_what_is_packed(drawn: list[tuple[int, int]]) -> None:
    prefixes = [[1] * 3, [1], [1] * 5]
    owners, suffixes = [owner for owner, _ in drawn], [[1] * length for _, length in drawn]
    row = pack(prefixes, suffixes, owners, share_prefixes=True, device=torch.device("cpu"), dtype=torch.float32)
    real = row.token_ids != 0
    expected = Pass(int(real.sum()), int((row.position_ids[real] + 1).sum()))
    assert Pass.over(prefixes, suffixes, owners) == expected


def test_a_methods_step_is_counted_by_its_own_code() -> None:
    """Eight problems of 100 tokens, four rollouts of 200 each, every second wrong."""
    sizes = ("--data.problems_per_step=8", "--data.group_size=4", "--data.max_tokens=200", "--data.context_length=2000")
    sizes += ("--data.evaluation.sampling.max_tokens=200", "--data.prompts.student={problem}")
    sizes += ('--data.prompts.views={"attempt": "{problem}{text}"}',)
    works = {}
    for name in ("OPSD", "GRPO", "SFT", "OGLS_SD", "ROSD"):
        cli = configured("qwen3_ogls_sd.yaml", *sizes, "--method", name, "--method.selection", "AllTokens")
        works[name] = step_of(cli.model.method, cli.datamodule, 10**6, prompt=100, fill=1.0)
        cli.datamodule.close()
    student = 8 * (100 + 4 * 199)
    assert {name: sum(made.tokens for made in work.student) for name, work in works.items()} == {
        "OPSD": student,
        "GRPO": student,
        "SFT": 8 * (100 + 199),
        "OGLS_SD": 8 * (100 + 2 * 199),  # wrong ones
        "ROSD": student,
    }
    assert {name: (work.loads, len(work.draws)) for name, work in works.items()} == {
        "OPSD": (1, 1),
        "GRPO": (1, 1),
        "SFT": (0, 0),
        "OGLS_SD": (1, 1),
        "ROSD": (3, 2),  # the start's weights reflect
    }
    ((share, drawn),) = works["OPSD"].draws
    assert (share, drawn.num_prompts, len(drawn.lengths), set(drawn.lengths)) == (1, 8, 32, {200})
    assert not works["GRPO"].teacher
    assert not works["SFT"].teacher
    assert works["GRPO"].losses == [(8 * 4 * 200, 2)]
    assert works["OPSD"].losses == [(8 * 4 * 200, 3)]
    assert works["OGLS_SD"].losses == [(8 * 2 * 200, 3)]
    views = 100 + 2 * 199 + 5 * (100 + 200 + 2 * 199)  # plain; four attempts and the solution, two rollouts after each
    assert sum(made.tokens for made in works["OGLS_SD"].teacher) == 8 * views


def test_another_model_that_teaches_reads_with_its_own_weights() -> None:
    wide = replace(SMALL, mlp=8)  # 16 weights of the MLP more, of which there are three
    read, work = Pass(tokens=7, pairs=21), Work(teacher=[Pass(tokens=7, pairs=21)] * 2)
    assert setup(other=wide).step(work)["teacher"] == pytest.approx(2 * (setup().forward(read) + 2 * 24 * 7 / 100))
    (run,) = [predicted("qwen3_opsd.yaml", ["--method", "OnPolicyDistillation"], "1.7B", "h200", 200, 0.1)]
    assert run.setup.other == Shapes.of(qwen3("8B"))


LINKS = Links(inside=100.0, between=10.0, node=2)


def laid(trainers: int, engines: int, sharded: bool, **changes: Any) -> Layout:
    """Six groups of two rollouts; a step has six passes of each kind."""
    read = Pass(tokens=7, pairs=21)
    draw = Draw([4] * 12, [6] * 12, 6)
    work = Work(draws=[(1.0, draw)], teacher=[read] * 6, student=[read] * 6, losses=[], loads=1.0)
    made = setup(rank=0 if sharded else 1, whole=sharded, canary=(1, 1, 1))
    return Layout(
        setup=made, work=work, groups=6, trainers=trainers, engines=engines, sharded=sharded, links=LINKS, **changes
    )


def test_a_step_is_shared_out_by_hand() -> None:
    read = Pass(tokens=7, pairs=21)
    one, four = laid(1, 1, False), laid(4, 4, False)
    assert one.seconds["teacher"] == pytest.approx(6 * one.setup.forward(read))
    assert four.share == 2 / 6  # two processes have two groups, the others one
    assert four.seconds["teacher"] == pytest.approx(2 * one.setup.forward(read))
    assert four.seconds["student"] == pytest.approx(2 * one.setup.gradient(read))
    reduced = 2 * 4 * one.setup.training.trainable * 3 / 4 / 10  # four GPUs are two nodes
    assert four.seconds["update"] == pytest.approx(one.seconds["update"] + reduced)
    busiest = four.drawn(four.work.draws[0][1])
    assert (busiest.lengths, busiest.num_prompts) == ([3, 6, 9, 12], 2)  # all quantiles up to the limit
    assert four.seconds["rollouts"] == pytest.approx(one.setup.decode(busiest))


def test_what_is_gathered_can_take_longer_than_what_is_computed() -> None:
    near, far = laid(2, 2, True), laid(4, 4, True)
    weights = near.setup.shapes.weights
    assert near.links.seconds(weights, 2) == weights / 2 / 100
    assert far.links.seconds(weights, 4) == weights * 3 / 4 / 10
    gathered = laid(
        4,
        4,
        True,
    )
    slow = replace(gathered, links=replace(LINKS, between=0.1))
    gather = 2 * weights * 3 / 4 / 0.1
    assert slow.seconds["teacher"] == pytest.approx(2 * gather)
    assert slow.seconds["student"] == pytest.approx(2 * (2 * gather + 2 * gather))  # gradients are twice as wide
    assert slow.gathers("student")
    assert not near.gathers("student")
    assert slow.longest() == "all-gathers of the student"
    before = slow.work.loads * slow.setup.load
    assert slow.seconds["sync"] == pytest.approx(before + 4 * weights * 3 / 4 / 0.1 + 2 * weights / 0.1)


def test_the_table_says_where_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    args = SimpleNamespace(prompt=200, machine="h100", most=64)
    title = next(title for title, (_, training, _) in LAYOUTS.items() if training == 1)
    gpus.table("4B", title, args, Links())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "1",
        "2",
        "4",
        "8",
        "16",
        "32",
        "64",
    ]
    assert lines[-3].startswith("| 64 | more processes that train than the 32 groups of a step: refused")
    assert lines[-1].startswith("It stops scaling at 8 GPUs")
    assert all(line in (BENCHMARKS.parents[1] / "docs" / "scale.md").read_text() for line in lines if line)


def test_validations_by_occasion() -> None:
    cli = configured("math.yaml")
    drawn = [(len(draw.lengths), draw.num_prompts) for draw in validations(cli, 256, prompt=50, fill=1.0)]
    cli.datamodule.close()
    assert drawn == [(1024, 256), (1024, 256), (256, 64)]  # twelve steps in two epochs


def test_a_recipes_validation_is_a_quarter_of_its_time_at_most() -> None:
    shares = {run.name: run.share for run in recipes(prompt=200, fill=1.0)}
    assert len(shares) == 7
    assert all(0 < share <= 0.25 for share in shares.values()), shares
    published = ["--data.evaluation.samples", "8", "--trainer.check_val_every_n_epoch", "1"]
    assert predicted("qwen3_ogls_sd.yaml", published, "1.7B", "h100", prompt=200, fill=1.0).share > 0.5


@pytest.mark.slow
@pytest.mark.vllm
def test_the_cost_model_holds_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), "--check", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all within a factor of 1.3" in done.stdout


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
    for side, most in (("forward KL", 1.23), ("JSD", 1.31), ("JSD, top 100", 1.31)):  # by traffic and arithmetic
        assert 1.0 < found["loss, |V| = 151936, hidden 2048, 4096 tokens", side]["ratio"] < most
    planned = {line["section"]: line["planned_gib"] for line in lines if "planned_gib" in line}
    assert len(planned) == 3
    for section, gib in planned.items():  # with 28 layers 0.99 to 1.04; of two, the keys of a shared prompt weigh more
        assert 0.93 < gib / found[section, "student"]["peak_gib"] < 1.1
    assert {line["side"] for line in lines if line["section"].startswith("train phase")} == {
        "OPSD, micro-batches of 8,192",
        "OPSD",
        "OGLS-SD, 2 peers",
        "OGLS-SD, 8 peers",
    }
    assert out.read_text().count('"section"') == len(lines)
