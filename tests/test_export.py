"""What a run has learned leaves: other programs load it and compute what the policy does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ogls.callbacks.checkpoint_io import SoundCheckpoints
from ogls.export import export
from ogls.export import main as command
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import weights_sha256

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def randomised(policy: Policy, seed: int) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.load().trainable().values():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return policy


def checkpoint_of(policy: Policy, run: Path) -> Path:
    """A run's folder as training leaves it, as far as an export reads it."""
    lora = None if policy.lora is None else {"rank": policy.lora.rank, "alpha": policy.lora.alpha}
    lora = lora and {**lora, "targets": list(policy.lora.targets)} if policy.lora else None
    settings = {"model": policy.name, "adapter": policy.adapter, "lora": lora, "dtype": policy.dtype}
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"policy": {**settings, "gradient_checkpointing": "auto"}}))
    told = {"experiment": "x", "name": "x", "tags": {}, "params": {"seed": 3}}
    (run / "run.json").write_text(json.dumps(told))
    rows = [(0, 0.25), (4, 0.5), (8, 0.125)]
    lines = [{"step": s, "val/avg_at_4": v, "val/avg_at_4_low": v - 0.1, "val/avg_at_4_high": v + 0.1} for s, v in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "time": 0.0}) + "\n" for line in lines))
    own = {"method": "OPSD", "policy_version": 4, "weights_sha256": weights_sha256(policy.folder)}
    state = {f"policy.{name}": p.data for name, p in policy.trainable().items()}
    (run / "checkpoints").mkdir()
    file = run / "checkpoints" / "best.ckpt"
    SoundCheckpoints().save_checkpoint({"state_dict": state, "ogls": own, "global_step": 4}, file)
    return file


def logits(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def cold_start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    randomised(
        Policy(str(tiny_model), lora=Lora(rank=2, targets=("q_proj", "up_proj")), dtype="float32"), 1
    ).save_adapter(folder)
    return folder


@pytest.mark.parametrize("lora", [Lora(rank=4, alpha=6.0), None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("cold", [False, True], ids=["", "after a cold start"])
def test_transformers_computes_what_the_policy_does(
    lora: Lora | None, cold: bool, tiny_model: Path, cold_start: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = randomised(Policy(str(tiny_model), str(cold_start) if cold else None, lora=lora, dtype="float32"), 0)
    export(checkpoint_of(policy, tmp_path / "OPSD-s3"), tmp_path / "out", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits(policy), atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained by `OPSD`, seed 3" in card
    assert "| held-out problems | step 0 | step 4 |" in card, "later rows are not the checkpoint's"
    assert "| avg_at_4 | 0.250 [0.150, 0.350] | 0.500 [0.400, 0.600] |" in card


def test_bf16_is_what_an_engine_samples_with(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = randomised(Policy(str(tiny_model), lora=Lora(rank=4)), 0)
    export(checkpoint_of(policy, tmp_path / "r"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in policy.merged_weights():
        assert torch.equal(stored[name], weight), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("cold", [False, True], ids=["", "after a cold start"])
def test_peft_finds_the_base_and_computes_what_the_policy_does(
    cold: bool, tiny_model: Path, cold_start: Path, tmp_path: Path
) -> None:
    """After a cold start it is the sum of both adapters, for the model without either; three layers have but one."""
    from peft import AutoPeftModelForCausalLM, PeftConfig

    lora = Lora(rank=4, alpha=6.0, targets=("q_proj", "down_proj"))
    policy = randomised(Policy(str(tiny_model), str(cold_start) if cold else None, lora=lora, dtype="float32"), 0)
    export(checkpoint_of(policy, tmp_path / "r"), tmp_path / "out", "float32", adapter=True)
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert Path(str(config.base_model_name_or_path)) == tiny_model
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if not cold:
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits(policy), atol=1e-4, rtol=1e-4)
    weights = loaded.merge_and_unload().state_dict()
    frozen = dict(Policy(str(tiny_model), str(cold_start) if cold else None, lora=None).load().model.named_parameters())
    original = dict(Policy(str(tiny_model), lora=None).load().model.named_parameters())
    for name, own in policy.merged_weights():
        rounding = frozen[name].abs() * 2.0**-8 if cold else 0.0  # the cold start's sum is rounded to bf16
        assert ((weights[name] - own).abs() <= rounding + 1e-6).all(), name
        adapted = name.split(".")[-2] in ("q_proj", "down_proj", *(["up_proj"] if cold else []))
        assert torch.equal(weights[name], original[name]) != adapted, name


def test_the_best_adapter_of_a_run_names_the_model_that_it_fits(
    tiny_model: Path, cold_start: Path, tmp_path: Path
) -> None:
    for adapter in (None, str(cold_start)):
        policy = Policy(str(tiny_model), adapter, lora=Lora(rank=2)).load()
        policy.save_adapter(tmp_path)
        named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named) == policy.folder


@pytest.mark.parametrize(
    ("spoil", "arguments", "complaint"),
    [
        (
            lambda run: (run / "config.yaml").unlink(),
            [],
            "there is no .*config.yaml; give the file that lies",
        ),
        (lambda run: (run.parent / "out").mkdir() or (run.parent / "out" / "x").touch(), [], "has files already"),
        (lambda run: None, ["--adapter"], "this run trained all weights and has no adapter"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(
    spoil: Callable[[Path], object], arguments: list[str], complaint: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = checkpoint_of(Policy(str(tiny_model), lora=None).load(), tmp_path / "r")
    spoil(tmp_path / "r")
    with pytest.raises(ValueError, match=complaint) as refused:
        command(["--ckpt_path", str(file), "--to", str(tmp_path / "out"), *arguments])
    assert "\n" not in str(refused.value)


def test_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    policy = Policy(str(tmp_path / "base"), lora=Lora(rank=2)).load()
    file = checkpoint_of(policy, tmp_path / "r")
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="was trained on other base weights"):
        export(file, tmp_path / "out")
