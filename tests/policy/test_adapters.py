"""Adapters as peft makes them: the same logits as peft's own model, or refused by the name of the field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import resolve_model
from tests.faults.nursery import Nursery
from tests.random_models import write_model
from tests.test_cli import run_in, small

IDS = torch.tensor([[5, 9, 20, 33, 41, 7, 12]])
MERGED = {
    "plain": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "layers_to_transform": {"layers_to_transform": [1]},
}
REFUSED = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "target_modules": {"targets": ["q_proj", "lm_head"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("base") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # merged without rounding
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGLS_CACHE", str(tmp_path / "cache"))


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.detach()


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def made(base: Path, folder: Path, targets: Sequence[str] = ("q_proj", "v_proj"), **options: Any) -> Tensor:
    """Writes an adapter of some effect, and returns the logits of peft's model with it."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **options)
    model = get_peft_model(plain(base), config)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            p.data += 0.1 * torch.randn_like(p)
    model.eval().save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("field", MERGED)
def test_an_adapter_is_merged_as_peft_computes_it(field: str, base: Path, tmp_path: Path):
    wanted = made(base, tmp_path / "adapter", **MERGED[field])
    assert float((wanted - logits(plain(base))).abs().max()) > 0.1, "it has an effect"
    torch.testing.assert_close(logits(plain(resolve_model(str(base), str(tmp_path / "adapter")))), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's on tied heads
@pytest.mark.parametrize("field", REFUSED)
def test_an_adapter_that_would_be_merged_wrong_is_refused(field: str, base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **REFUSED[field])
    with pytest.raises(ValueError, match=rf"the adapter in .* has {field}"):
        resolve_model(str(base), str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", [*MERGED, *REFUSED])
def test_an_adapter_is_loaded_as_peft_computes_it_or_refused(field: str, base: Path, tmp_path: Path):
    wanted = made(base, tmp_path / "adapter", **(MERGED | REFUSED)[field])
    policy = Policy(str(base), lora=Lora(rank=4, alpha=8, targets=("q_proj", "v_proj")), dtype="float32").load()
    if field == "plain":
        policy.load_adapter(tmp_path / "adapter")
        torch.testing.assert_close(policy.hidden([[5]], [IDS[0, 1:].tolist()], [0]) @ policy.head[0].T, wanted[0, :-1])
    else:
        with pytest.raises(ValueError, match=rf"the adapter in .* (has {field}|is of another model)"):
            policy.load_adapter(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft's
def test_a_field_of_the_future_is_refused_where_it_is_on(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_something": False, "something_config": None}))
    resolve_model(str(base), str(tmp_path / "adapter"))
    for name, value in (("use_something", True), ("init_lora_weights", "pissa"), ("peft_type", "VERA")):
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"has {name}: {value!r}, which is not read"):
            resolve_model(str(base), str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_from_such_an_adapter_ends_with_2_and_one_line(nursery: Nursery, base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **REFUSED["modules_to_save"])
    code, output = run_in(nursery, "fit", *small(base), "--policy.adapter", str(tmp_path / "adapter"), cwd=tmp_path)
    assert code == 2, output[-3000:]
    assert "has modules_to_save: ['lm_head'], which is not read: train it without, or merge" in output
    assert output.count("error:") == 1
    assert "Traceback" not in output
