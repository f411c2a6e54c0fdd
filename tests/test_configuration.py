"""Configurations that would do something else than they show: each ends with one line and exit code 2."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import ogls
from ogls.cli import OglsCLI, build, main
from ogls.records import Sampling
from ogls.system.ranges import within
from ogls.system.yaml_text import check_yaml
from tests.faults.nursery import Nursery
from tests.test_cli import files, run_in, small


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command line says of words that it has to refuse: one line, exit code 2, and nothing loaded."""

    def refused(*words: str, config: str | bytes | None = None) -> str:
        if config is not None:
            Path("mine.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
            words = ("--config", "mine.yaml", *words)
        command = ["run.py", "fit", "--config", "lab.yaml", "--trainer.accelerator", "cpu", *words]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr("ogls.policy.policy.Policy.load", lambda self: pytest.fail("weights were loaded"))
        with pytest.raises(SystemExit) as stopped:
            main()
        said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("INFO", "Seed set"))]
        assert stopped.value.code == 2, said
        assert len(said) == 1, said
        assert said[0].startswith("error: ")
        assert not Path("runs").exists()
        return said[0]

    return refused


@pytest.mark.fault("bad configuration")
@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("model: {warmup_steps: 1, warmup_steps: 2}", "mine.yaml, line 1: the key 'warmup_steps' is given twice"),
        ("model: {}\ndata: {seed: 1}\nmodel: {}", "mine.yaml, line 3: the key 'model' is given twice"),
        ("trainer: &a\n  callbacks: [*a]", "line 2: *a stands within &a, which would have no end"),
        ("model: " + "[" * 3000 + "]" * 3000, "line 1: more than 50 levels"),
        ("- model\n- data", "mine.yaml: expected keys with their values"),
        ("", "mine.yaml: expected keys with their values"),
        ("model:\n\tlearning_rate: 1", "mine.yaml, line 2: found character that cannot start any token"),
        (b"\xff\xfe\x00\x01", "mine.yaml cannot be read"),
        ("data: {prompts: {system: 'null'}}", "line 1: the text 'null' would be read as nothing"),
        ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
        ("model: {learning_rate: '${nope}'}", "model.learning_rate: Interpolation key"),
        ("policy: {model: '${oc.env:HOME}'}", "policy.model: Unsupported interpolation type oc.env"),
        ("model: null", "model: expected keys with their values, got None"),
        ("policy: [1]", "policy: expected keys with their values, got [1]"),
        ("trainer: {logger: {init_args: {run_name: 123}}}", "trainer.logger.run_name: expected str, got 123"),
        ("trainer: {logger: {init_args: {run_name: ''}}}", "a run's name becomes a folder"),
        ("policy: {adapter: no}", "policy.adapter: expected str, got False"),
        ("1: 2", "Key must be a string, got: 1"),
    ],
)
def test_what_yaml_would_drop_or_blow_up_is_refused(config: str | bytes, complaint: str, refusal: Callable[..., str]):
    assert complaint in refusal(config=config)


def test_aliases_are_counted_in_full():
    letters = "abcdef"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(letters)]
    assert check_yaml("\n".join(lines[:4]))  # 9 ** 4 values
    with pytest.raises(yaml.YAMLError, match="line 5: more than 10000 values once every alias is put in full"):
        check_yaml("\n".join(lines))
    assert check_yaml("base: &b {x: 1}\nmodel: {<<: *b, y: 2}\ndata: *b")


@pytest.mark.fault("bad configuration")
@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model.learning_rate", "1e3", "model.learning_rate must be in (0, 0.1], got 1000.0"),
        ("model.learning_rate", ".nan", "model.learning_rate must be in (0, 0.1], got nan"),
        ("model.max_grad_norm", "0", "model.max_grad_norm must be in (0, 1e6], got 0.0"),
        ("model.max_grad_norm", "-1", "model.max_grad_norm must be in (0, 1e6], got -1.0"),
        ("model.betas", "[0.9, 1.0]", "model.betas must be in [0, 1), got 1.0"),
        ("model.weight_decay", "-0.1", "model.weight_decay must be in [0, 1], got -0.1"),
        ("model.warmup_steps", "-1", "model.warmup_steps must be in"),
        ("method.steering.alpha", "1e38", "steering.alpha must be in [0, 1000], got 1e+38"),
        ("method.temperature", "1e-45", "temperature must be 0 or in [0.01, 100], got 1e-45"),
        ("data.evaluation.sampling.temperature", "1e-45", "temperature must be 0 or in [0.01, 100]"),
        ("data.context_length", "-7", "data.context_length must be in [1, 1e9], got -7"),
        ("seed_everything", "-1", "seed_everything must be in [0, 4294967295], got -1"),
        ("trainer.max_epochs", "-1", "trainer.max_epochs must be in [1, 1e9], got -1"),
        ("policy.lora", "{rank: 4, alpha: 1e38}", "policy.lora.alpha must be in (0, 1e6], got 1e+38"),
        ("data.predict_file", "", "data.predict_file needs the name of a file"),
        (
            "trainer.gradient_clip_val",
            "1.0",
            "trainer.gradient_clip_val has no place here, got 1.0: set model.max_grad",
        ),
        ("trainer.accumulate_grad_batches", "2", "set model.tokens_per_micro_batch for memory"),
        ("trainer.precision", "16-mixed", "trainer.precision has no place here, got '16-mixed': set policy.dtype"),
        ("trainer.limit_train_batches", "2", "trainer.limit_train_batches has no place here, got 2.0: set data"),
        ("trainer.overfit_batches", "1", "set data.train, with few problems"),
        ("trainer.max_steps", "3", "set trainer.max_epochs and data.steps_per_epoch"),
        ("trainer.val_check_interval", "1", "set data.steps_per_epoch, after which a validation comes"),
        (
            "trainer.devices",
            "0",
            "not a valid input using cpu accelerator. Given: trainer.accelerator cpu, trainer.dev",
        ),
        ("trainer.strategy", "dpd", "You selected an invalid strategy name: `strategy='dpd'`"),
        ("trainer.enable_checkpointing", "false", "trainer.enable_checkpointing False"),
        ("trainer.max_epoch", "3", "did you mean 'max_epochs'?"),
    ],
)
def test_numbers_out_of_range_and_flags_of_lightning_name_the_key(
    key: str, value: str, complaint: str, refusal: Callable[..., str]
):
    assert complaint in refusal(f"--{key}", value)


def test_an_accelerator_that_is_not_there(refusal: Callable[..., str]):
    assert "Given: trainer.accelerator tpu" in refusal("--trainer.accelerator", "tpu")


CHOICES = [c for name in ogls.__all__ if isinstance(c := getattr(ogls, name), type) and is_dataclass(c)]
GIVEN: dict[str, dict[str, Any]] = {
    "Method": {"privilege": ogls.ReferenceSolution()},
    "Mixture": {"objectives": [ogls.Distillation()], "factors": [1.0]},
    "Sampling": {"max_tokens": 1},
    "Chains": {"size": 8},
    "ShiftedError": {"selection": ogls.FromError(), "tokens": 1},
    "RandomPlace": {"selection": ogls.FromError()},
}


def test_no_class_takes_nan_or_an_infinity():
    tried = 0
    for choice in CHOICES:
        numbers = [f.name for f in fields(choice) if f.init and "float" in str(get_type_hints(choice).get(f.name))]
        if choice is ogls.LessonDraft:  # no setting
            continue
        try:
            made: Any = choice(**GIVEN.get(choice.__name__, {}))
        except TypeError:  # a source of problems, a record, or something abstract
            continue
        for name in numbers:
            for wrong in (math.nan, math.inf, -math.inf):
                value = [wrong] if isinstance(getattr(made, name), list) else wrong
                with pytest.raises(ValueError, match=r"nan|inf|factor"):
                    replace(made, **{name: value})
                tried += 1
    assert tried > 200


@pytest.mark.parametrize(
    ("value", "interval", "fits"),
    [(0, "[0, 1)", True), (0, "(0, 1)", False), (1, "(0, 1)", False), (1, "(0, 1]", True), (None, "(0, 1)", True)],
)
def test_intervals(value: float | None, interval: str, fits: bool):
    if fits:
        within("x", value, interval)
    else:
        with pytest.raises(ValueError, match="x must be in"):
            within("x", value, interval)
    with pytest.raises(ValueError, match="nan"):
        within("x", math.nan, interval)


def made(*words: str) -> OglsCLI:
    cli = build(["--config", "lab.yaml", "--trainer.accelerator", "cpu", *words], run=False)
    cli.datamodule.close()
    return cli


def test_texts_stay_what_they_are():
    for text in ("# Be brief", "~", "Null", "12e4", "Note: be brief", "{problem}", "- x"):
        assert made("--data.prompts.system", text).datamodule.prompts.system == text
        Path("mine.yaml").write_text(f"data: {{prompts: {{system: {json.dumps(text)}}}}}\n")
        assert made("--config", "mine.yaml").datamodule.prompts.system == text
    assert made("--data.prompts.system", "null").datamodule.prompts.system is None


def test_null_is_null_however_deep_its_key():
    assert made("--method.objective.clip", "0.05").model.method.objective.clip == 0.05
    deep = ("--method.objective.clip", "0.05", "--method.objective.clip", "null")
    assert (
        made(*deep, "--method.privilege.max_peers", "null").model.method.name
        == made("--method.privilege", "{class_path: PeerOutcomes, init_args: {max_peers: null}}").model.method.name
    )


@pytest.mark.fault("secrets leak")
@pytest.mark.parametrize(
    "address",
    [
        *(
            "https://s3cret@mlflow.example/",
            "https://me:s3cret@mlflow.example/",
            "https://mlflow.example/?token=s3cret",
        ),
        *("postgresql://me:s3cret@db.example/x", "mlflow.example/?token=s3cret", "htps://s3cret@mlflow.example"),
        "https://me:s3cret@[db/x",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_printed(address: str, refusal: Callable[..., str]):
    said = refusal("--trainer.logger.init_args.tracking_uri", address)
    assert "tracking_uri" in said
    assert "s3cret" not in said


def test_what_a_class_inherits_does_not_leave_its_fields_unchecked(refusal: Callable[..., str]):
    """The file of `Feedback` lacks a name by which its base declares a field."""
    said = refusal("--method", "SDPOWithFeedback", "--method.privilege.alone", "perhaps")
    assert said == "error: method.privilege.alone: expected bool, got perhaps"


SILENT = "--trainer.enable_progress_bar"


@pytest.mark.parametrize("flags", [["--trainer.fast_dev_run", "true"], ["--trainer.logger", "false", SILENT, "false"]])
def test_lightnings_own_shortcuts_work(flags: list[str], nursery: Nursery, tiny_model: Path, tmp_path: Path):
    words = small(tiny_model)
    at = words.index("--trainer.logger.init_args.system_metrics")
    code, said = run_in(nursery, "fit", *words[:at], *flags, cwd=tmp_path)
    assert code == 0, said[-3000:]
    steps = 1 if "fast_dev_run" in flags[0] else 4
    assert (f"step {steps}/{steps} " in said) == (SILENT not in flags)
    assert files(tmp_path) == ({"runs"} if steps == 4 else set())


def test_sampling_takes_the_likeliest_token_at_temperature_0():
    assert Sampling(max_tokens=1, temperature=0).temperature == 0
