"""The memory plan: its bytes against a pass of the policy on meta tensors, its choices against what they are for."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from analysis.benchmarks.fake_gpu import QWEN3, FakeGpu, qwen3
from ogls.loss.tiles import CHUNK_BYTES
from ogls.policy.lora import Lora
from ogls.rollout.process import EngineProcess
from ogls.rollout.vllm import VllmEngine
from ogls.system.memory.plan import CONTEXT, GIB, Asked, Load, Plan, plan
from ogls.system.memory.serving import Serving
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

LORA = Lora(rank=64, alpha=128)


def training(config: dict[str, Any], lora: Lora | None, **more: Any) -> Training:
    rank, targets = (lora.rank, lora.targets) if lora else (0, ())
    return Training(shapes=Shapes.of(config), rank=rank, targets=targets, **more)


@dataclass(frozen=True)
class Measured:
    """Bytes of a policy: its weights, with gradients and optimiser, and at most beside them in a second micro-batch."""

    weights: int
    held: int
    micro_batch: int
    forward: int


def ran(config: dict[str, Any], lora: Lora | None, checkpointing: bool, tokens: int) -> Measured:
    """Measures sequences of a prompt each."""
    return of_sequences(config, lora, checkpointing, [[1] * 100] * 4, [[1] * (tokens // 4 - 99)] * 4, list(range(4)))


def of_sequences(config: dict[str, Any], lora: Lora | None, checkpointing: bool, *sequences: Any) -> Measured:
    """Two passes with their gradients, an update between them, a pass without."""
    with FakeGpu() as gpu:
        policy = gpu.policy(config, lora, checkpointing)
        weights = sum(p.nbytes for p in policy.parameters())
        beside = gpu.live - weights  # what turns the heads
        optimizer = torch.optim.AdamW(policy.trainable().values())

        def passed() -> None:
            states = policy.hidden(*sequences)
            states.backward(torch.empty_like(states))

        passed()
        optimizer.step()
        gpu.reset()
        held = gpu.live
        passed()
        micro_batch = gpu.peak - held
        assert gpu.live == held
        optimizer.zero_grad()
        gpu.reset()
        before = gpu.live
        with torch.no_grad(), nullcontext() if policy.lora is None else policy.without_adapter():
            policy.hidden(*sequences)
        return Measured(weights, held - beside, micro_batch, gpu.peak - before)


def equal(planned: Training, found: Measured, checkpointing: bool, tokens: int) -> None:
    assert planned.weights == found.weights
    assert planned.weights + planned.optimiser == pytest.approx(found.held, rel=1e-6)
    assert planned.student(tokens, checkpointing) == pytest.approx(found.micro_batch, rel=0.03)
    assert planned.forward(tokens) == pytest.approx(found.forward, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("size", ["0.6B", "8B"])
def test_bytes_are_those_of_the_policy(size: str, lora: Lora | None, checkpointing: bool) -> None:
    """Two layers as wide as the model's."""
    few = qwen3(size, num_hidden_layers=2)
    equal(training(few, lora), ran(few, lora, checkpointing, 8192), checkpointing, 8192)


@pytest.mark.parametrize(("prompt", "learned"), [(16, 1008), (512, 512)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_keys_that_are_copied_for_a_shared_prompt_have_room(prompt: int, learned: int, checkpointing: bool) -> None:
    """A budget counts the prompt of each of 8 lessons, the row holds it once, and its keys are copied for each."""
    few = qwen3("8B", num_hidden_layers=2)
    found = of_sequences(few, LORA, checkpointing, [[1] * prompt], [[1] * learned] * 8, [0] * 8)
    assert training(few, LORA).student(8 * (prompt + learned), checkpointing) >= found.micro_batch
    assert training(few, LORA).forward(prompt + 8 * learned) == pytest.approx(found.forward, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 16384])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("size", QWEN3)
def test_bytes_are_those_of_the_whole_policy(size: str, lora: Lora | None, checkpointing: bool, tokens: int) -> None:
    whole = qwen3(size)
    equal(training(whole, lora), ran(whole, lora, checkpointing, tokens), checkpointing, tokens)


def test_weights_are_those_of_a_file() -> None:
    folder = Path(__file__).resolve().parents[2] / "experiments" / "lab" / "student"
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        counted = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 - not a dict
    assert Shapes.of(json.loads((folder / "config.json").read_text())).weights == counted


def test_a_model_that_is_not_counted_is_named() -> None:
    with pytest.raises(ValueError, match=r"no memory plan for qwen3_moe: only dense models"):
        Shapes.of(qwen3("8B", model_type="qwen3_moe", num_experts=128))
    with pytest.raises(ValueError, match=r"no memory plan for mamba: its config.json has no num_attention_heads"):
        Shapes.of({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8})


# ---- what is decided ----

H100 = int(79.1 * GIB)
RECIPE = Load(lesson=1500, learned=1024, view=47000, context=40960, rollouts=32, rollout=8700)  # qwen3_ogls_sd.yaml
LONG = replace(RECIPE, lesson=8700, learned=8192)  # all tokens of its rollouts learned


def engine_for(lora: Lora | None, **settings: Any) -> VllmEngine:
    engine = VllmEngine(**settings)
    engine.adapter_rank = lora.rank if lora else 0
    return engine


def planned(
    size: str, lora: Lora | None, load: Load, device: int = H100, **asked: Any
) -> tuple[Plan, Training, Serving]:
    student = training(qwen3(size), lora, kept_bytes=0 if lora else 2, chunk_bytes=CHUNK_BYTES["cuda"])
    serving = engine_for(lora).serving(student.shapes)
    return plan(student, serving, load, Asked(**asked), device), student, serving


RUNS = [(size, lora) for size in QWEN3 for lora in (LORA, None) if lora or size not in ("4B", "8B")]


@pytest.mark.parametrize("load", [RECIPE, LONG], ids=["1,024 learned", "8,192 learned"])
@pytest.mark.parametrize(("size", "lora"), RUNS)
def test_a_plan_fits_and_leaves_little(size: str, lora: Lora | None, load: Load) -> None:
    made, student, serving = planned(size, lora, load)
    assert 0.96 * H100 < made.total <= 0.97 * H100
    assert made.cache >= load.context * serving.shapes.kv_bytes  # vLLM refuses less than one sequence
    assert made.tokens >= load.lesson
    beside = CONTEXT + student.held + serving.share(made.cache)
    assert beside + student.micro_batch(made.tokens, made.checkpointing) <= 0.97 * H100
    assert beside + student.teacher_pass(2 * made.tokens, load.lesson) <= 0.97 * H100


def test_nothing_is_computed_twice_without_need() -> None:
    assert not planned("1.7B", LORA, RECIPE)[0].checkpointing
    assert planned("8B", LORA, LONG)[0].checkpointing
    assert not planned("8B", LORA, LONG, device=2 * H100)[0].checkpointing


def test_what_is_asked_for_stays() -> None:
    made, *_ = planned("1.7B", LORA, RECIPE, tokens=4096, checkpointing=True, cache=8 * GIB)
    assert (made.tokens, made.checkpointing, made.cache) == (4096, True, 8 * GIB)


@pytest.mark.parametrize(
    ("size", "lora", "asked", "nearest"),
    [
        ("8B", LORA, {"checkpointing": False}, "policy.gradient_checkpointing true"),
        (
            "1.7B",
            LORA,
            {"tokens": 65536, "checkpointing": False, "cache": 8 * GIB},
            "policy.gradient_checkpointing true",
        ),
        ("8B", LORA, {"tokens": 65536, "checkpointing": True}, "model.tokens_per_micro_batch 57344"),
        ("4B", LORA, {"cache": 70 * GIB}, "data.engine.memory_gib null"),
        ("8B", None, {}, "policy.lora {rank: 64, alpha: 128}"),
    ],
)
def test_the_nearest_setting_that_fits_is_named(
    size: str, lora: Lora | None, asked: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(ValueError, match=r"this run does not fit on the device: it needs \d+\.\d GiB") as refused:
        planned(size, lora, LONG, **asked)
    assert f"what fits: {nearest}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shorter_texts_are_named_where_they_help() -> None:
    longer = replace(LONG, lesson=33000, learned=32768, rollout=33000)
    for load, device, nearest in ((longer, 36, "data.max_tokens 20480"), (LONG, 28, "data.context_length 25600")):
        with pytest.raises(ValueError, match=f"what fits: {nearest}, "):
            planned("4B", LORA, load, device=device * GIB)
    with pytest.raises(ValueError, match="no setting of it fits: take a smaller model or a larger device"):
        planned("4B", LORA, LONG, device=20 * GIB)


def test_an_engine_in_a_process_of_its_own_has_a_context_of_its_own() -> None:
    student, engine = training(qwen3("1.7B"), LORA), engine_for(LORA)
    apart = EngineProcess(engine)
    apart.adapter_rank = LORA.rank
    inside, beside = engine.serving(student.shapes), apart.serving(student.shapes)
    fixed = Asked(tokens=8192, checkpointing=False, cache=8 * GIB)
    one, two = (plan(student, serving, RECIPE, fixed, H100) for serving in (inside, beside))
    assert two.total - one.total == CONTEXT


# ---- what vLLM is told ----


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # vLLM's own
@pytest.mark.parametrize("rebuilt", [False, True], ids=["first start", "rebuilt while it trains"])
@pytest.mark.parametrize(
    ("size", "lora"), [("1.7B", LORA), ("1.7B", None), ("4B", LORA), ("4B", None), ("8B", LORA), ("8B", None)]
)
def test_vllm_starts_beside_the_trainer(size: str, lora: Lora | None, rebuilt: bool, tmp_path: Path) -> None:
    """vLLM's own check, with what is free once the policy is loaded, or with gradients and optimiser as well."""
    utils = pytest.importorskip("vllm.v1.worker.utils", reason="needs the extra cpu or cuda")
    device = H100 * (1 if lora or size == "1.7B" else 2 if size == "4B" else 3)
    made, student, serving = planned(size, lora, RECIPE, device)
    held = CONTEXT + (student.held if rebuilt else student.weights)
    (tmp_path / "config.json").write_text(json.dumps(qwen3(size)))
    engine = engine_for(lora)
    engine.cache_bytes = made.cache
    options = engine.options(tmp_path, RECIPE.context, (device - held, device))
    assert options["kv_cache_memory_bytes"] == made.cache
    assert ("enable_lora" in options) == (lora is not None)
    assert not options["enforce_eager"]
    snapshot = SimpleNamespace(total_memory=device, free_memory=device - held, device_="cuda:0")
    settings = SimpleNamespace(gpu_memory_utilization=options["gpu_memory_utilization"])
    assert utils.request_memory(snapshot, settings) == pytest.approx(serving.share(made.cache), rel=1e-9)
    with pytest.raises(ValueError, match="less than"):  # the check is alive
        utils.request_memory(replace_free(snapshot, serving.share(made.cache) - GIB), settings)


def replace_free(snapshot: SimpleNamespace, free: int) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(snapshot), "free_memory": free})


def test_without_a_plan_an_engine_takes_half_of_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen3("1.7B")))
    options = engine_for(LORA).options(tmp_path, 40960, (70 * GIB, H100))
    assert options["kv_cache_memory_bytes"] == pytest.approx(32.3 * GIB, rel=0.01)
    assert options["gpu_memory_utilization"] * H100 < 70 * GIB


def test_on_a_cpu_nothing_is_left_open(tmp_path: Path) -> None:
    options = engine_for(LORA).options(tmp_path, 256, None)
    assert (options["kv_cache_memory_bytes"], options["enforce_eager"]) == (2 * GIB, True)
    assert not options.keys() & {"gpu_memory_utilization", "enable_lora"}


def test_keys_and_values_of_a_byte_take_half(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(qwen3("1.7B")))
    device = 70 * GIB, H100
    whole, half = (engine_for(LORA, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    shapes = Shapes.of(qwen3("1.7B"))
    assert whole.serving(shapes).cache(40960) == 40960 * 2 * 28 * 8 * 128 * 2  # keys and values, layers, heads, width
    assert half.serving(shapes).cache(40960) * 2 == whole.serving(shapes).cache(40960)
    assert half.options(tmp_path, 40960, device)["kv_cache_dtype"] == "fp8"
    student = training(qwen3("1.7B"), LORA)
    made = plan(student, half.serving(shapes), RECIPE, Asked(), H100)
    assert made.cache == pytest.approx(plan(student, whole.serving(shapes), RECIPE, Asked(), H100).cache, rel=0.01)
    few = replace(RECIPE, context=2048, rollout=2048)  # all that 256 sequences can fill is less than what is left
    caches = [plan(student, engine.serving(shapes), few, Asked(), 2 * H100).cache for engine in (half, whole)]
    assert 2 * caches[0] == caches[1]


def test_keys_and_values_of_a_byte_are_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.engine.kv_cache_dtype is fp8, but a cpu .*: set auto"):
        engine_for(LORA, kv_cache_dtype="fp8").options(tmp_path, 256, None)
    with pytest.raises(ValueError, match=r"data.engine.kv_cache_dtype is fp8"):
        EngineProcess(engine_for(LORA, kv_cache_dtype="fp8")).check_device("cpu")


def test_an_adapter_that_cannot_be_served_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter: set data.engine.sync"):
        engine_for(None, sync="adapter").options(tmp_path, 256, None)
    with pytest.raises(ValueError, match=r"rank 128, the engine takes up to 64"):
        engine_for(Lora(rank=128), sync="adapter").options(tmp_path, 256, None)


def test_a_trained_head_is_counted_as_every_other_weight() -> None:
    """Values in fp32, a gradient and two means: 16 bytes per weight instead of 2."""
    frozen, trained = (training(qwen3("4B"), None, embeddings=asked) for asked in (False, True))
    more = frozen.shapes.embeddings
    assert more > 0
    assert trained.trainable - frozen.trainable == more
    assert trained.held - frozen.held == 14 * more
    assert trained.micro_batch(100, False) > frozen.micro_batch(100, False)
