"""The command line as a user meets it; the end-to-end run samples from a tiny model with the transformers engine."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from ogls import cli
from ogls.cli import build, ended_well, find_configs, main
from ogls.loss.steering import difference
from ogls.system.exits import DiskFailed, EngineFailed, FolderInUse, RunEnded
from ogls.tracking.files import read_rows
from tests.faults.nursery import Nursery
from tests.parsed import parsed

RUN = Path(__file__).resolve().parents[1] / "experiments" / "run.py"
EXPERIMENTS = RUN.parent


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])


SECRETS = {  # fakes, where programs look for the real ones
    "HF_TOKEN": "hf_plantedplantedplantedplanted0001",
    "WANDB_API_KEY": "planted0002planted0002planted0002",
    "OPENAI_API_KEY": "sk-planted0003planted0003",
    "ANTHROPIC_API_KEY": "sk-ant-planted0004planted0004",
    "AWS_SECRET_ACCESS_KEY": "planted0005/planted0005+planted0005",
    "MLFLOW_TRACKING_PASSWORD": "planted0006planted0006",
    "GITHUB_TOKEN": "ghp_planted0007planted0007planted0007",
    "DATABASE_URL": "postgresql://me:planted0008@db.example/x",
}


def leaks(folder: Path, *texts: str) -> list[tuple[str, str]]:
    """Planted secrets, and where they were found."""
    found = [(file.name, file.read_bytes()) for file in folder.rglob("*") if file.is_file()]
    found += [("output", text.encode()) for text in texts]
    return [(name, secret) for name, data in found for secret in SECRETS.values() if secret.encode() in data]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | SECRETS


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a user does it, imports and all."""
    command = [sys.executable, str(RUN), *args]
    return subprocess.run(command, cwd=cwd, env=os.environ | ENVIRONMENT, capture_output=True, text=True)


def run_in(nursery: Nursery, *args: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of the same in a process that has everything imported: seconds less."""
    return nursery.run(cwd, ENVIRONMENT, *args)


def small(tiny_model: Path) -> list[str]:
    """math.yaml cut down to seconds."""
    return [
        *("--config", "math.yaml", "--policy.model", str(tiny_model), "--policy.adapter", "null"),
        *("--policy.dtype", "float32", "--data.engine", "TransformersEngine"),
        *("--data.train.size", "20", "--data.val.size", "5", "--data.problems_per_step", "3"),
        *("--data.steps_per_epoch", "2", "--trainer.max_epochs", "2", "--data.max_tokens", "12"),
        *("--data.evaluation.sampling.max_tokens", "12", "--method.selection", "AllTokens"),
        *("--trainer.accelerator", "cpu", "--trainer.logger.init_args.system_metrics", "false"),
        *("--trainer.logger.init_args.traces", "0"),  # which would be a third of the run
    ]


@pytest.mark.fault("secrets leak")
def test_a_run_from_the_first_step_to_its_record_and_on_from_a_checkpoint(
    nursery: Nursery, tiny_model: Path, tmp_path: Path, record_property: Callable[[str, object], None]
):
    traced = ("--trainer.logger.init_args.traces", "8")
    first = run("fit", *small(tiny_model), *traced, "--trainer.max_epochs", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "after step 0: val/avg_at_4" in first.stdout
    assert "after step 2: val/avg_at_4" in first.stdout
    assert "mlflow ui --backend-store-uri sqlite:///" in first.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "best_adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "best_adapter" / "tokenizer.json").is_file()

    code, second = run_in(nursery, "fit", *small(tiny_model), *traced, "--ckpt_path", "last", cwd=tmp_path)
    assert code == 0, second[-3000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name], "the same run goes on"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [1, 2, 3, 4]
    assert all("train/engine_logprob_gap" in row for row in rows if "train/loss" in row)
    assert max(row["train/engine_logprob_gap"] for row in rows if "train/loss" in row) < 1e-4
    _shown_in_mlflow(tmp_path, folder)

    best, last = (str(folder / "checkpoints" / name) for name in ("best.ckpt", "last.ckpt"))
    code, third = run_in(nursery, "predict", *small(tiny_model), "--ckpt_path", best, cwd=tmp_path)
    assert code == 0, third[-3000:]
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 5 * 4
    assert {"problem", "prompt_ids", "completion", "text", "verdict", "correct"} <= rollouts[0].keys()
    assert len(rollouts[0]["completion"]["token_ids"]) == len(rollouts[0]["completion"]["logprobs"]) <= 12
    others = ("--method", "SDPO", "--ckpt_path", last)  # whose averages a checkpoint of another method lacks
    code, fourth = run_in(nursery, "validate", *small(tiny_model), *others, cwd=tmp_path)
    assert code == 0, fourth[-3000:]
    runs = {run.data.tags["command"]: run for run in MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])}
    assert runs["validate"].data.tags["method"] == runs["fit"].data.tags["method"]
    assert str(runs["validate"].info.run_name).startswith("validate OGLS_SD[...] s0")
    assert f"{last}, after step 4: val/avg_at_4" in fourth.replace("\n", "")
    named = runs["validate"].data.tags["folder"]
    rows = read_rows(tmp_path / "runs" / named / "metrics.jsonl")
    assert {row["step"] for row in rows} == {4}, "updates that the weights have had"
    assert [file.name for file in (tmp_path / "runs" / named / "problems").iterdir()] == ["step-000004.json"]
    assert "before training" not in runs["validate"].data.tags["mlflow.note.content"]
    assert "before training" in runs["fit"].data.tags["mlflow.note.content"]
    assert f"{last} was trained by {runs['fit'].data.tags['method']}, by which validate is named\n" in fourth
    assert re.search(r"\n  val/pass_at_2 \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]\n", fourth), (
        "all figures, with their intervals"
    )
    assert "val/avg_at_4_low" not in fourth, "once"
    assert leaks(tmp_path, first.stdout, first.stderr, second, third, fourth) == []
    record_property("tried", len(SECRETS))


def _shown_in_mlflow(place: Path, folder: Path) -> None:
    """Two epochs in two processes: no trace twice, one best model, the templates that were used."""
    kept = read_rows(folder / "rollouts.jsonl")
    taken = Counter((row["split"], row["step"]) for row in kept)
    assert {step: taken["val", step] for step in (0, 2, 4)} == {0: 5, 2: 5, 4: 5}, "all five problems"
    assert taken["train", 1] + taken["train", 2] == taken["train", 3] + taken["train", 4] == 8
    assert len({row["key"] for row in kept}) == len(kept) == 31
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    (run,) = client.search_runs(["1"])
    traces = client.search_traces(locations=["1"], max_results=100)
    assert sorted(trace.info.response_preview or "" for trace in traces) == sorted(row["text"] for row in kept)
    assert {span.name for trace in traces for span in trace.data.spans} >= {"rollout", "generate", "grade"}
    (model,) = client.search_logged_models(["1"])
    best = json.loads((folder / "best.json").read_text())
    assert (model.source_run_id, model.tags["step"]) == (run.info.run_id, str(best["step"]))
    names = [prompt["name"] for prompt in json.loads(run.data.tags["mlflow.linkedPrompts"])]
    assert names == [f"ogls.{name}" for name in json.loads((folder / "prompts.json").read_text())]


FEW = ("--data.train.init_args.size", "32", "--data.val.init_args.size", "2")  # problems whose answers are verified
SETS = "{easy: {class_path: Chains, init_args: {size: 2, split: heldout}}, "
SETS += "hard: {class_path: Chains, init_args: {size: 3, split: heldout, max_steps: 4}}}"


def test_several_evaluation_sets(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    sets = ("--data.val", SETS, "--data.evaluation.while_training", "{problems: 1, samples: 1}")
    best = ("--trainer.callbacks.init_args.monitor", "val_subset/hard/avg_at_1")
    code, output = run_in(nursery, "fit", *small(tiny_model), *sets, *best, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert "\n  val/hard/avg_at_4 " in output
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = [row for row in rows if "val/avg_at_4" in row]
    assert [row["step"] for row in whole] == [0, 4]
    assert [row["step"] for row in rows if "val_subset/hard/avg_at_1" in row] == [0, 2, 4], "one problem of each"
    for row in whole:
        assert row["val/avg_at_4"] == pytest.approx((2 * row["val/easy/avg_at_4"] + 3 * row["val/hard/avg_at_4"]) / 5)
        assert {"val/easy/pass_at_2_low", "val/hard/maj_at_4_high"} <= row.keys()
    assert "final/hard/avg_at_4" in rows[-1]
    accuracy = json.loads((folder / "problems" / "step-000004.json").read_text())
    assert sorted(name.partition("/")[0] for name in accuracy) == ["easy"] * 2 + ["hard"] * 3
    checkpoint = ("--ckpt_path", str(folder / "checkpoints" / "best.ckpt"))
    code, output = run_in(nursery, "validate", *small(tiny_model), *sets, *checkpoint, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert "\n  val/easy/avg_at_4 " in output
    code, output = run_in(nursery, "test", *small(tiny_model), *sets, *checkpoint, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert re.search(r"after step \d: test/avg_at_4 \d", output.replace("\n", ""))
    assert "\n  test/easy/avg_at_4 " in output
    assert "\n  test/hard/pass_at_2 " in output


def files(folder: Path) -> set[str]:
    """Names of what a run wrote, but for the output that the test keeps."""
    return {path.name for path in folder.iterdir()} - {"output.txt"}


def test_a_run_without_any_logger_and_one_that_goes_on_with_lightnings_own(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
):
    bare = (*small(tiny_model), "--trainer.max_epochs", "1", "--trainer.logger", "false")
    code, output = run_in(nursery, "fit", *bare, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert files(tmp_path) == {"runs"}, "nothing is written into the working directory"
    (folder,) = (tmp_path / "runs").iterdir()
    assert files(folder) == {"checkpoints", "best_adapter"}
    assert f"Checkpoints: runs/{folder.name}/checkpoints" in output

    code, output = run_in(nursery, "fit", *bare, "--ckpt_path", "last", cwd=tmp_path)
    assert code == 2
    assert "error: --ckpt_path last finds the runs of ogls.Tracker alone: name the file" in output
    own = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--ckpt_path")
    last = str(folder / "checkpoints" / "last.ckpt")
    code, output = run_in(nursery, "fit", *small(tiny_model), *own, last, cwd=tmp_path)
    assert code == 0, output[-3000:]
    again = tmp_path / "again"
    shutil.copytree(folder, again / "runs" / folder.name)
    there = str(again / "runs" / folder.name / "checkpoints" / "last.ckpt")
    inline = ("--config", "{data: {predict_file: its.jsonl}}")  # YAML, and not JSON
    code, output = run_in(nursery, "fit", *small(tiny_model), *inline, "--ckpt_path", there, cwd=again)
    assert code == 0, output[-3000:]
    assert f"Going on with {there} at step 2" in output.replace("\n", "")
    steps = [row["step"] for row in read_rows(again / "runs" / folder.name / "metrics.jsonl") if "train/loss" in row]
    assert steps == [2, 3, 4]

    version = tmp_path / "logs" / "lightning_logs" / "version_0"
    assert files(version) == {"checkpoints", "best_adapter", "metrics.csv", "hparams.yaml"}
    with (version / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train/loss"]) for row in rows) == 2, "steps 3 and 4"
    assert sum(bool(row["val/avg_at_4"]) for row in rows) == 1
    name = "OGLS_SD[max_peers=2, exclude_self=True, learn_successes=True, alpha=1"
    assert f"method: {name}" in (version / "hparams.yaml").read_text()


def test_other_loggers_beside_the_tracker(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    (tmp_path / "two.yaml").write_text(
        "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: logs}}, "
        "{class_path: ogls.Tracker, init_args: {system_metrics: false}}]}"
    )
    options = (*small(tiny_model), "--trainer.max_epochs", "1", "--config", "two.yaml")
    code, output = run_in(nursery, "fit", *options, cwd=tmp_path)
    assert code == 0, output[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"checkpoints", "best_adapter", "metrics.jsonl", "config.yaml", "problems"} <= files(folder)
    (table,) = (tmp_path / "logs").rglob("metrics.csv")
    assert not list((tmp_path / "logs").rglob("*.ckpt"))
    with table.open() as file:
        theirs = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    ours = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert theirs == pytest.approx([row["train/loss"] for row in ours if "train/loss" in row])
    code, output = run_in(nursery, "fit", *options, "--trainer.max_epochs", "2", "--ckpt_path", "last", cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name], "the same run goes on"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--model.learning_rat", "1"], "learning_rat"),
        (["--data.max_token", "5"], "max_token"),
        (["--data.evaluation.sampling.max_token", "5"], "max_token"),
        (["--policy.lora.rnk", "5"], "rnk"),
        (["--method.steering.alpa", "1"], "alpa"),
        (["--method.steering.init_args.alpa", "1"], "alpa"),
        (["--data.group_size", "many"], "group_size"),
        (["--method.steering", "NoSuch"], "NoSuch"),
        (["--method.steering", "ogls.loss.steering.NoSuch"], "NoSuch"),
    ],
)
def test_a_typo_exits_with_2_and_names_the_field(args: list[str], complaint: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        build(["fit", "--config", "math.yaml", *args])
    assert stopped.value.code == 2
    assert complaint in capfd.readouterr().err


QUESTIONS = ("--data.train", "{class_path: JsonlProblems, init_args: {path: questions.jsonl}}")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--config", "nowhere.yaml"], "error: --config nowhere.yaml: no such file; looked for nowhere.yaml and "),
        (["--config", "math.yaml", "--data.group_size", "1"], "data.group_size must be at least 2, got 1"),
        (["--config", "math.yaml", "--data.prompts.student", "Solve."], "prompts.student needs the slot {problem}"),
        (["--config", "math.yaml", "--config", "gsm8k.yaml"], "data/gsm8k/train.jsonl"),
        (
            [
                *("--config", "math.yaml", *FEW, "--trainer.accelerator", "cpu"),
                *("--data.engine.kv_cache_dtype", "fp8"),
            ],
            "data.engine.kv_cache_dtype is fp8, but a cpu keeps no keys and values in it: set auto",
        ),
        (["--config", "math.yaml", "--policy.model", "no such model"], "unknown model 'no such model'"),
        (
            ["--config", "math.yaml", "--data.engine", "VllmServers", "--data.engine.urls", "[localhost:8001]"],
            "data.engine.urls: expected addresses such as http://127.0.0.1:8001, got 'localhost:8001'",
        ),
        (["--config", "math.yaml", "--policy.adapter", "nowhere"], "policy.adapter: no folder 'nowhere'"),
        (
            [
                *("--config", "math.yaml", *FEW),
                *("--trainer.callbacks.init_args.monitor", "val_subset/avg_at_9"),
            ],
            "a checkpoint waits for val_subset/avg_at_9, but every validation has 4 samples as val_subset/*",
        ),
        (
            [
                *("--config", "math.yaml", *FEW),
                *("--trainer.callbacks.init_args.monitor", "val/avg_at_4"),
            ],
            "expected val_subset/avg_at_4",
        ),
        (
            [
                *("--config", "lab.yaml", "--data.train.init_args.size", "32", "--data.val", SETS),
                *("--trainer.callbacks.init_args.monitor", "val/odd/avg_at_8"),
            ],
            "a checkpoint waits for val/odd/avg_at_8, but data.val has the sets easy, hard",
        ),
        (
            ["--config", "lab.yaml", "--data.val", SETS.replace("hard", "so/hard")],
            "data.val: a set's name becomes part of metrics: expected [A-Za-z0-9_.-]+, got 'so/hard'",
        ),
        (
            ["--config", "lab.yaml", "--data.val", SETS.replace("size: 3", "siz: 3")],
            "error: data.val (Chains): Option 'siz' is not accepted; did you mean 'size'?",
        ),
        (
            ["--config", "math.yaml", "--ckpt_path", "nowhere.ckpt"],
            "error: --ckpt_path nowhere.ckpt: there is no such file; a run's are in runs/NAME/checkpoints",
        ),
        (["--config", "math.yaml", "--ckpt_path", "."], "error: --ckpt_path .: it is a folder; give a file, as "),
        (
            ["--config", "lab.yaml", "--data.context_length", "9000"],
            "error: data.context_length is 9000, but experiments/lab/student was made for 4096 tokens, prompt and ",
        ),
        (
            [*("--config", "lab.yaml", "--method", "OPSD"), *QUESTIONS],
            "error: data.train: OPSD learns from reference solutions, and none of 2 problems has one; name their ",
        ),
        (
            ["--config", "lab.yaml", "--trainer.logger.init_args.folder", "a_file"],
            "error: a_file is a file: expected a folder, which holds one folder per run",
        ),
        (
            ["--config", "math.yaml", "--data.evaluation.while_training.samples", "5"],
            "evaluation.while_training.samples must be at most evaluation.samples 4, got 5",
        ),
        (["--config", "math.yaml", "--method.privilege", "ReferenceSolution"], "OutcomeSteering and ReferenceSolution"),
        (
            ["--config", "math.yaml", "--method", "OPSDD"],
            "error: method: there is no class 'OPSDD'; did you mean 'OPSD'?",
        ),
    ],
)
def test_bad_input_exits_with_2_and_one_clear_line(
    args: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "questions.jsonl").write_text(
        '{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?", "answer": "3"}\n'
    )
    monkeypatch.setattr(sys, "argv", ["run.py", "fit", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir()), "it leaves no folder"
    said = capfd.readouterr().err
    assert complaint in said
    assert said.count("error:") == 1
    assert "usage" not in said
    assert "Traceback" not in said


def test_what_the_program_does_not_say_itself_keeps_its_traceback():
    """A method of a user's own gives lists of a wrong length: the line in which they meet tells where to look."""
    with pytest.raises(ValueError, match="zip"), ended_well():
        difference((1.0,), (1.0, -1.0))


def test_a_module_that_cannot_be_read_says_where(nursery: Nursery, tmp_path: Path):
    (tmp_path / "mine.py").write_text("from ogls.methods import OPSD\n\n\nclass Mine(OPSD):\n    def lessons(self\n")
    code, said = run_in(nursery, "fit", "--config", "lab.yaml", "--method", "mine.Mine", cwd=tmp_path)
    assert code == 2
    assert said.splitlines()[-1] == f"error: {tmp_path}/mine.py, line 5: '(' was never closed: def lessons(self"
    assert "Traceback" not in said


def test_another_model_teaches_from_the_command_line_and_leaves_nothing_behind(
    nursery: Nursery, tiny_model: Path, wide_model: Path, tmp_path: Path
):
    """Trained, gone on with, exported; a teacher with other tokens ends the run before it begins."""
    taught = [*small(tiny_model), "--config", "on_policy_distillation.yaml", "--trainer.max_epochs", "1"]
    taught[taught.index("--method.selection") : taught.index("--method.selection") + 2] = []
    code, said = run_in(nursery, "fit", *taught, "--method.teacher.model", str(wide_model), cwd=tmp_path)
    assert code == 0, said[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert [row["train/lessons"] for row in trained] == [3 * 4] * 2
    assert all(row["train/loss"] == pytest.approx(row["train/divergence"], rel=1.2e-7) for row in trained)
    assert all(row["train/loss"] > 0 for row in trained)
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"]["class_path"].endswith("OnPolicyDistillation")
    best = str(folder / "checkpoints" / "best.ckpt")
    code, said = run_in(nursery, "export", "--ckpt_path", best, "--to", "out", cwd=tmp_path)
    assert code == 0, said[-3000:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == json.loads((tiny_model / "config.json").read_text())["hidden_size"] == 64

    code, said = run_in(
        nursery, "fit", *taught, "--method.teacher.model", str(EXPERIMENTS / "lab" / "student"), cwd=tmp_path
    )
    assert code == 2, said[-3000:]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "has another tokenizer than policy.model" in lines[0]
    assert {file.parents[1] for file in (tmp_path / "runs").glob("*/checkpoints/*.ckpt")} == {folder}, "none trained"


def test_configurations_are_found_here_first_then_beside_run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_configs(["fit", "--config", "math.yaml"]) == ["fit", "--config", str(EXPERIMENTS / "math.yaml")]
    (tmp_path / "math.yaml").write_text("model: {}")
    assert find_configs(["fit", "--config=math.yaml"]) == ["fit", "--config=math.yaml"]


@pytest.mark.parametrize(
    "overlay", sorted(p.name for p in EXPERIMENTS.glob("*.yaml") if yaml.safe_load(p.read_text()).keys() != {"method"})
)
def test_every_configuration_parses(overlay: str):
    """Values only: data sets and models of the Hub are not loaded. Those of a method alone are built elsewhere."""
    recipes = (f"qwen3_{name}.yaml" for name in ("ogls_sd", "opsd", "rosd", "sdpo", "grpo"))
    below = {name: [] for name in ("math.yaml", "lab.yaml", "families.yaml", *recipes)}  # stand alone
    below |= {"qwen3_4b.yaml": ["qwen3_ogls_sd.yaml"], "rosd_student.yaml": ["math.yaml", "rosd.yaml"]}
    below["legs_start.yaml"] = ["math.yaml", "legs.yaml"]
    below |= {f"science_{name}.yaml": ["math.yaml", "science.yaml"] for name in ("start", "domains")}
    below |= {f"families_{name}.yaml": ["families.yaml"] for name in ("each", "four", "other_four")}
    own = [word for file in (*below.get(overlay, ["math.yaml"]), overlay) for word in ("--config", file)]
    assert parsed(["fit", *own, "--data.seed", "7"]).data.seed == 7


def test_interpolation_follows_the_command_line():
    config = parsed(["fit", "--config", "math.yaml", "--seed_everything", "5"])
    assert config.data.seed == 5  # which is ${seed_everything}


@pytest.mark.parametrize(("quickest", "flags"), [("bfloat16", []), ("float32", []), ("bfloat16", ["float32"])])
def test_the_default_run_computes_as_its_machine_does_best(
    quickest: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The dump, which is recorded, has the dtype and not the question; the engine follows the policy."""
    monkeypatch.setattr(cli, "quickest_dtype", lambda: quickest)
    with pytest.raises(SystemExit):
        build(["fit", "--config", "math.yaml", *(f"--policy.dtype={flag}" for flag in flags), "--print_config"])
    shown = yaml.safe_load(capfd.readouterr().out)
    expected = [*flags, quickest][0]
    assert (shown["policy"]["dtype"], shown["data"]["engine"]["init_args"]["dtype"]) == (expected, expected)


@pytest.mark.parametrize(("error", "code"), [(RunEnded, 1), (FolderInUse, 73), (DiskFailed, 74), (EngineFailed, 75)])
def test_exit_codes(
    error: type[RunEnded], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def end() -> None:
        raise error("the reason")

    monkeypatch.setattr(cli, "build", end)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert capsys.readouterr().err == "error: the reason\n"
