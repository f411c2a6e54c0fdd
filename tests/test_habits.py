"""What users bring from elsewhere: adapters by one word, prompts to try, a look at the text."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, inject_adapter_in_model
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogls.callbacks import conclusion
from ogls.data import _warn_of_shared
from ogls.generate import _read, divided
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Problem
from ogls.system.library_warnings import LibraryWarnings
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training
from ogls.tasks.base import ProblemSource
from tests.faults.nursery import Nursery
from tests.test_cli import run_in, small

ROOT = Path(__file__).resolve().parents[1]
CHAINS = "{class_path: Chains, init_args: {size: 20, split: train, parentheses: 0.7, seed: 0}}"
NOISY = """
import warnings
from lightning import Callback

class Noisy(Callback):
    def __init__(self):
        warnings.warn("too early to have a folder")

    def on_train_start(self, *_):
        for _ in range(2):
            warnings.warn("careless")
"""
CRASHING = """
import ctypes
from lightning import Callback

class Crashing(Callback):
    def on_train_start(self, *_):
        ctypes.string_at(0)
"""
GREEDY = ("--data.evaluation.sampling.temperature", "0")


@pytest.fixture(scope="module")
def trained(nursery: Nursery, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one run with an adapter beside all linear layers, validated on what it is trained on."""
    place = tmp_path_factory.mktemp("run of habits")
    options = ("--policy.lora.targets", "all-linear", "--data.val", CHAINS, "--data.evaluation.show", "2")
    options += (
        "--trainer.max_epochs",
        "1",
        "--data.evaluation.while_training",
        "null",
        "--model.learning_rate",
        "0.01",
    )
    (place / "noisy.py").write_text(NOISY)
    options += ("--trainer.callbacks+", "noisy.Noisy", "--trainer.logger.init_args.folder", "my runs")
    code, output = run_in(nursery, "fit", *small(tiny_model), *options, cwd=place)
    assert code == 0, output[-3000:]
    (folder,) = (place / "my runs").iterdir()
    return folder, output


def test_all_linear_layers_but_the_head_have_an_adapter(trained: tuple[Path, str], tiny_model: Path):
    own = Policy(str(tiny_model), lora=Lora(rank=2, targets="all-linear")).load()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model)
    inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"), theirs)
    names = {name for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in two blocks
    assert own.trainable().keys() == names
    shapes = Shapes.of(json.loads((tiny_model / "config.json").read_text()))
    counted = Training(shapes=shapes, rank=2, targets=Lora(targets="all-linear").among(shapes.projections))
    assert counted.trainable == sum(weight.numel() for weight in own.trainable().values())

    folder, _ = trained
    config = json.loads((folder / "best_adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(shapes.projections), "exported by name"
    assert yaml.safe_load((folder / "config.yaml").read_text())["policy"]["lora"]["targets"] == "all-linear"


def test_a_crash_in_native_code_says_where(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    (tmp_path / "crashing.py").write_text(CRASHING)
    code, output = run_in(nursery, "fit", *small(tiny_model), "--trainer.callbacks+", "crashing.Crashing", cwd=tmp_path)
    assert code == -signal.SIGSEGV, output[-3000:]
    assert "Fatal Python error: Segmentation fault" in output
    assert f'File "{tmp_path}/crashing.py", line 7 in on_train_start' in output


def test_another_word_than_all_linear_is_refused(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    code, output = run_in(nursery, "fit", *small(tiny_model), "--policy.lora.targets", "all_linear", cwd=tmp_path)
    assert code == 2, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "policy.lora.targets" in line
    assert "all-linear" in line


def test_generate_prints_what_the_checkpoint_says(nursery: Nursery, tiny_model: Path, trained: tuple[Path, str]):
    folder, _ = trained
    place, prompts = folder.parents[1], ["What is 12 + 8 - 9?", "user system"]
    checkpoint = ("--ckpt_path", str(folder / "checkpoints" / "best.ckpt"))
    code, output = run_in(nursery, "generate", prompts[0], *checkpoint, *GREEDY, prompts[1], "--n", "2", cwd=place)
    assert code == 0, output[-3000:]
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "best_adapter", dtype=torch.float32)
    said = [greedy(model, tiny_model, prompt) for prompt in prompts]
    for prompt, text in zip(prompts, said, strict=True):
        assert (
            f"\n> {prompt}\n--- 1 of 2, 12 tokens, cut off\n{text}\n--- 2 of 2, 12 tokens, cut off\n{text}\n" in output
        )

    own = (f"--config={folder / 'config.yaml'}",)
    code, again = run_in(nursery, "generate", prompts[0], *own, *checkpoint, *GREEDY, cwd=place)
    assert code == 0, again[-3000:]
    assert f"\n> {prompts[0]}\n--- 1 of 1, 12 tokens, cut off\n{said[0]}\n" in again

    (place / "prompts.txt").write_text("\n".join(["", prompts[0], prompts[1], ""]))
    bare = [word for word in small(tiny_model) if word != "fit"]
    code, output = run_in(nursery, "generate", *bare, *GREEDY, "--file", "prompts.txt", cwd=place)
    assert code == 0, output[-3000:]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    at_first = [greedy(base, tiny_model, prompt) for prompt in prompts]
    assert at_first != said, "or the checkpoint may have been left out"
    for prompt, text in zip(prompts, at_first, strict=True):
        assert f"\n> {prompt}\n--- 1 of 1, 12 tokens, cut off\n{text}\n" in output
    assert [path.name for path in (place / "my runs").iterdir()] == [folder.name], "no run is made"


def test_generate_refuses_weights_of_another_base(
    nursery: Nursery, tiny_model: Path, trained: tuple[Path, str], tmp_path: Path
):
    folder, _ = trained
    other = Path(shutil.copytree(tiny_model, tmp_path / "other")) / "model.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + bytes([other.read_bytes()[-1] ^ 1]))
    words = ("--ckpt_path", str(folder / "checkpoints" / "best.ckpt"), "--policy.model", str(other.parent))
    code, output = run_in(nursery, "generate", "What is 1 + 1?", *words, cwd=folder.parents[1])
    assert code == 2, output[-3000:]
    assert "best.ckpt was trained on other base weights: " in output


def greedy(model, tokenizer_of: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--ckpt_path", "nowhere.ckpt", "x"], "error: --ckpt_path nowhere.ckpt: there is no "),
        (["--file", "nowhere.txt", "--config", "lab.yaml"], "error: --file nowhere.txt: No such file"),
        (["--file", "nowhere.txt", "x"], "error: --file nowhere.txt and the prompt 'x': give one of them"),
        (
            ["--file", "latin.txt", "--config", "lab.yaml"],
            "error: --file latin.txt: it is not UTF-8 at byte 10; expected",
        ),
        (["--n", "0", "x"], "error: --n must be at least 1, got 0"),
    ],
)
def test_what_generate_refuses(words: list[str], complaint: str, nursery: Nursery, tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("Was ist 1 ÷ 1?".encode("latin-1"))
    code, output = run_in(nursery, "generate", *words, cwd=tmp_path)
    assert code == 2, output[-3000:]
    assert complaint in output
    assert output.count("error:") == 1


def test_words_that_are_no_option_and_no_value_are_prompts():
    words = ["--config", "lab.yaml", "first", "--data.seed=3", "second", "--data.max_tokens", "5", "-1 + 2"]
    assert divided(words) == (
        ["first", "second", "-1 + 2"],
        ["--config", "lab.yaml", "--data.seed=3", "--data.max_tokens", "5"],
    )


def test_lines_of_the_input_are_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n"))
    assert list(_read(None)) == [["one", "two"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="there is no prompt"):
        list(_read("-"))


def test_completions_of_a_few_problems_are_shown(trained: tuple[Path, str]):
    folder, output = trained
    shown = [block.splitlines() for block in output.split("\n> ")[1:]]
    assert len(shown) == 2 * 2, "at both validations"
    first = json.loads((folder / "problems" / "step-000000.json").read_text())
    ids = list(first)
    assert [block[0].partition(": ")[0] for block in shown] == [ids[0], ids[10]] * 2, "evenly spaced"
    for block in shown[:2]:
        (verdict,) = [line for line in block if line.startswith("--- ")]
        number = round(4 * first[block[0].partition(": ")[0]])
        assert verdict.endswith(f"; {number} of 4 right")
        assert verdict.startswith(("--- right: answer ", "--- wrong"))


class Texts(ProblemSource):
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Problem:
        return Problem(id=f"p{index}", text=self.texts[index], answer="1")


def test_rows_that_train_and_val_share_are_counted(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]):
    _, output = trained
    assert output.count("warning: 20 of 20 problems of data.val are in data.train, too, such as 'chain-") == 1
    _warn_of_shared(Texts("a b", "c"), Texts("a  b\n", "d", "C"))
    assert "warning: 1 of 3 problems of data.val are in data.train, too, such as 'p0', " in capsys.readouterr().err
    _warn_of_shared(Texts("a", "b"), Texts("c"))
    assert capsys.readouterr().err == ""


def test_the_first_lines_say_what_begins_and_where(trained: tuple[Path, str]):
    folder, output = trained
    place, lines = folder.parents[1], output.splitlines()
    assert lines[0] == f"fit in {place}: reading the configuration"
    (begun,) = [number for number, line in enumerate(lines) if line.startswith(f"Run {folder.name}; ")]
    assert f"; folder: my runs/{folder.name}; MLflow: " in lines[begun]
    assert shlex.split(lines[begun])[-3:] == [f"sqlite:///{place}/mlflow.db", "--host", "127.0.0.1"]
    assert begun < min(number for number, line in enumerate(lines) if "after step 0" in line)
    steps = [line for line in lines if "  left 0:" in line]
    assert ["step 1/2" in steps[0], "step 2/2" in steps[1]] == [True, True], "the time left, from the first step on"


def test_warnings_of_libraries_are_in_a_file_of_the_run(trained: tuple[Path, str]):
    folder, output = trained
    kept = (folder / "warnings.log").read_text()
    assert "UserWarning: too early to have a folder" in kept
    assert kept.count("UserWarning: careless") == 1, "once per place, as Python counts"
    count = kept.count("Warning: ")
    assert f"{count} warnings of libraries: see my runs/{folder.name}/warnings.log" in output
    assert "careless" not in output


def test_warnings_without_a_run_are_shown(capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with LibraryWarnings():
            warnings.warn_explicit("of a library", UserWarning, "/elsewhere/library.py", 3)
            assert capsys.readouterr().err == ""
        assert "/elsewhere/library.py:3: UserWarning: of a library" in capsys.readouterr().err
        with LibraryWarnings(), pytest.warns(UserWarning, match="of our own"):  # which shows nothing, and sees all
            warnings.warn_explicit("of our own", UserWarning, str(Path(conclusion.__file__)), 3)


def test_the_last_lines_say_what_has_changed_and_what_to_do_next(nursery: Nursery, trained: tuple[Path, str]):
    folder, output = trained
    before, after = (json.loads((folder / "problems" / f"step-00000{step}.json").read_text()) for step in (0, 2))
    changes = [after[name] - before[name] for name in before]
    low, high = stats.ttest_1samp(changes, 0).confidence_interval() if any(changes) else (0.0, 0.0)
    lines = output.splitlines()
    begun = lines.index("Next:")
    word = "Improved" if low > 0 else "Worse" if high < 0 else "No clear change"
    first, last = (sum(some.values()) / 20 for some in (before, after))
    assert lines[begun - 1] == (
        f"{word}: {last - first:+.3f} [{low:+.3f}, {high:+.3f}] on 20 held-out problems, {first:.3f} before and "
        f"{last:.3f} after step 2"
    )
    words = [shlex.split(command) for command in lines[begun + 1 : begun + 4]]
    assert all(program in ("python", sys.executable) and Path(script).is_file() for program, script, *_ in words)
    assert words[2][2:] == ["--experiment", "ogls", "--metric", "val/avg_at_4"]
    code, told = run_in(nursery, *words[0][2:], cwd=folder.parents[1])
    assert code == 0, told[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (trained_to,) = [row["val/avg_at_4"] for row in rows if row["step"] == 2 and "val/avg_at_4" in row]
    assert f"best.ckpt, after step 2: val/avg_at_4 {trained_to:.3f} [" in told
    code, told = run_in(nursery, *words[1][2:], cwd=folder.parents[1])
    assert code == 0, told[-3000:]
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("after", "word"),
    [
        ({"a": 1.0, "b": 0.5, "c": 0.75}, "Improved: +0.500 [+0.500, +0.500]"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "No clear change: -0.250 [-0.871, +0.371]"),  # 0.25 -+ 4.303 * 0.25 / sqrt(3)
    ],
)
def test_a_change_by_hand(after: dict[str, float], word: str, tmp_path: Path):
    (tmp_path / "problems").mkdir()
    for step, values in ((0, {"a": 0.5, "b": 0.0, "c": 0.25}), (5, {"a": 0.0}), (10, after)):  # 5 has a subset alone
        (tmp_path / "problems" / f"step-{step:06d}.json").write_text(json.dumps(values))
        if step < 10:
            assert conclusion.improvement(tmp_path) is None
    said = conclusion.improvement(tmp_path)
    assert said is not None
    assert said.startswith(f"{word} on 3 held-out problems, 0.250 before and ")
    assert said.endswith(" after step 10")


def test_make_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # which `make test` would have it print
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in listed} == {*targets.split()}
    assert all(len(line.split()) > 3 for line in listed), "and say what it does"


def test_a_stage_without_a_configuration_asks_for_one(nursery: Nursery, tmp_path: Path):
    code, output = run_in(nursery, "fit", "--data.seed", "3", cwd=tmp_path)
    assert code == 2, output[-3000:]
    assert "error: no configuration: expected --config FILE, such as math.yaml" in output
