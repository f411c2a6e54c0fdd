"""Tables of methods from runs whose numbers are known; nothing is trained."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "analysis"))
import making
import methods
import pandas as pd
from recipes import PROJECT, Recipe, labels, recipes
from stored_rows import read_rows

from ogls.lessons.privilege import PeerOutcomes
from ogls.lessons.selection import FirstTokens, UpToError
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation
from ogls.loss.steering import OutcomeSteering
from ogls.methods import OGLS_SD, OPSD

PLAIN = {"objective": Distillation(), "selection": UpToError(), "temperature": 1.0}
STEERING = OGLS_SD(privilege=PeerOutcomes(max_peers=1), steering=OutcomeSteering(), **PLAIN).name
STUDENT = PROJECT / "experiments" / "lab" / "student"
READING = OPSD().name
ENDS = {"opsd": [0.40, 0.44, 0.48], "ogls_sd": [0.50, 0.56, 0.56]}


def log(client: MlflowClient, experiment: str, recipe: Recipe, seed: int, end: float) -> str:
    tags = {"method": recipe.name, "seed": str(seed), "recipe": recipe.digest}
    run = client.create_run(experiment, tags=tags).info.run_id
    series = {"val/avg_at_100": (0.3, end), "val/pass_at_100": (0.8, 0.9), "val/kl_to_base": (0.0, 0.1)}
    metrics = [Metric(name, value, 0, 10 * i) for name, values in series.items() for i, value in enumerate(values)]
    client.log_batch(run, metrics=metrics, tags=[RunTag(k, v) for k, v in tags.items()])
    client.log_dict(run, {"a": 0.25, "b": 0.35}, "problems/step-000000.json")
    client.log_dict(run, {"a": end - 0.1, "b": end + 0.1}, "problems/step-000010.json")
    client.set_terminated(run, "FINISHED")
    return run


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["methods.py"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a database with three seeds of two recipes, and one run each of two others.

    One of those has other arguments, the other's method was called otherwise when it ran: the code has changed. Another
    experiment has three seeds of two recipes whose methods are called alike.
    """
    place = tmp_path_factory.mktemp("methods")
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.create_experiment("lab", artifact_location=str(place / "artifacts"))
    made = recipes("lab.yaml", list(ENDS), [], [])
    for name, ends in ENDS.items():
        for seed, end in enumerate(ends):
            log(client, experiment, made[name], seed, end)
    log(client, experiment, recipes("lab.yaml", ["opsd"], [], ["--model.learning_rate", "1"])["opsd"], 0, 0.99)
    changed = log(client, experiment, made["opsd"], 0, 0.98)
    client.set_tag(changed, "method", "OPSD[temperature=0.5]")
    experiment = client.create_experiment("terse", artifact_location=str(place / "terse"))
    alike = recipes("lab.yaml", ["opsd", "opsd+lab_terse"], [], []).values()
    for recipe, ends in zip(alike, ENDS.values(), strict=True):
        for seed, end in enumerate(ends):
            log(client, experiment, recipe, seed, end)
    return place


def called(made: Mapping[str, Recipe]) -> dict[str, str]:
    return labels({key: recipe.name for key, recipe in made.items()})


def test_a_recipe_is_its_files_and_arguments():
    made = recipes("lab.yaml", ["opsd", "opsd+lab_terse"], ["alpha_zero"], ["--data.group_size", "2"])
    assert made["opsd+lab_terse"].files[1::2] == ["lab.yaml", "opsd.yaml", "lab_terse.yaml", "alpha_zero.yaml"]
    assert made["opsd+lab_terse"].text == "opsd+lab_terse+alpha_zero"
    command = made["opsd"].command(3, "lab", "sqlite:///x.db")
    assert command[2:7] == ["fit", "--config", "lab.yaml", "--config", "opsd.yaml"]
    assert command[command.index("--seed_everything") + 1] == "3"
    assert command[-2:] == ["--data.group_size", "2"]
    assert len({recipe.digest for recipe in made.values()}) == 2
    assert not any("method" in word for word in command), "no label is typed"
    assert list(recipes("lab.yaml", ["opsd", "opsd.yaml"], [], [])) == ["opsd"]
    assert made["opsd"].digest != recipes("lab.yaml", ["opsd"], ["alpha_zero"], [])["opsd"].digest


def test_a_recipe_is_called_as_its_method_is():
    made = recipes("lab.yaml", ["opsd", "ogls_sd", "opsd+plain_kl+up_to_error"], [], [])
    plain = OPSD(top_p=1.0, top_k=0, **PLAIN).name
    assert called(made) == {"opsd": READING, "ogls_sd": STEERING, "opsd+plain_kl+up_to_error": plain}
    (recipe,) = recipes("lab.yaml", ["opsd"], ["up_to_error"], ["--method.temperature", "0.5"]).values()
    assert (
        recipe.name == OPSD(selection=UpToError(), temperature=0.5).name == "OPSD[selection=UpToError, temperature=0.5]"
    )


def test_what_is_called_alike_is_told_apart_by_its_overlays(monkeypatch: pytest.MonkeyPatch):
    def name(recipe: Recipe) -> str:
        return "OGLS_SD" if "ogls_sd" in recipe.overlays else "OPSD"  # all other overlays change no choice

    monkeypatch.setattr(Recipe, "name", property(name))
    texts = ["opsd", "opsd+lab_terse", "ogls_sd", "opsd+lab_terse+qwen3_4b"]
    made = recipes("lab.yaml", texts, ["plain_kl", "up_to_error"], [])
    assert called(made) == {
        "opsd": "OPSD",
        "opsd+lab_terse": "OPSD (lab_terse)",
        "ogls_sd": "OGLS_SD",
        "opsd+lab_terse+qwen3_4b": "OPSD (lab_terse+qwen3_4b)",
    }
    twice = recipes("lab.yaml", ["opsd+lab_terse", "lab_terse+opsd"], [], [])
    assert set(called(twice).values()) == {"OPSD (opsd+lab_terse)", "OPSD (lab_terse+opsd)"}
    either = recipes("lab.yaml", ["opsd --data.seed=1", "opsd --data.seed 2"], [], [])
    assert set(called(either).values()) == {"OPSD (seed=1)", "OPSD (seed=2)"}


def test_names_are_printed_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """For data that are not there, too."""
    monkeypatch.chdir(tmp_path)
    methods.main(["--config", "math.yaml", "--methods", "gsm8k", "gsm8k+opsd+up_to_error", "--names"])
    gsm8k, opsd = capsys.readouterr().out.splitlines()
    peers = PeerOutcomes(max_peers=2, exclude_self=True, learn_successes=True)
    kl = Distillation(ReverseKL())
    first_tokens = OGLS_SD(
        privilege=peers, steering=OutcomeSteering(), objective=kl, selection=FirstTokens(128), temperature=1.0
    )
    assert gsm8k == f"gsm8k                   {first_tokens.name}"
    assert opsd == "gsm8k+opsd+up_to_error  OPSD[selection=UpToError]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "opsd", "--against", "ogls_sd"], "--against: expected one of opsd, got ogls_sd"),
        (["--methods", "nowhere"], "--config nowhere.yaml: no such file"),
        (["--methods", "rosd_exact+rosd_student"], "in the recipe rosd_exact+rosd_student"),
        (["--methods", "sdpo", "--args", "--method.temperature", "0.5"], "takes ratios to the sampler's probabilities"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        methods.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_runs_of_the_same_recipe_count(place: Path):
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    opsd = recipes("lab.yaml", ["opsd"], [], [])["opsd"]
    assert list(making.finished(client, "lab", opsd)) == [0, 1, 2]
    assert making.finished(client, "elsewhere", opsd) == {}


def test_a_command_whose_runs_are_there_makes_the_table_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results" / "lab"
    uri = f"sqlite:///{place}/mlflow.db"
    methods.main(["--methods", *ENDS, "--seeds", "3", "--tracking-uri", uri, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "0 runs to make, 6 are there" in printed
    told = printed.splitlines()[-1]  # the page that compares these six runs, and no other
    client = MlflowClient(uri)
    runs = [run for key in ENDS for run in making.finished(client, "lab", recipes("lab.yaml", [key])[key]).values()]
    assert told.startswith("in MLflow: ")
    assert "/#/compare-runs?runs=[" in told
    assert re.findall("%22([0-9a-f]{32})%22", told) == runs
    assert len(runs) == 6
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0].startswith("| method | seeds | steps | before | accuracy | IQM | pass@100 | KL to base |")
    # A quarter of three runs is less than one, so that the interquartile mean is the mean.
    # s = 0.04 and 0.034641, t(0.975, 2) = 4.30265: half widths 0.0994 and 0.0861
    told = "| {} | 3 | 10 | 0.300 ± 0.000 | {} | 0.900 ± 0.000 | 0.100 ± 0.000 |"
    assert lines[2].startswith(told.format(STEERING, "0.540 ± 0.086 | 0.540"))
    assert lines[3].startswith(told.format(READING, "0.440 ± 0.099 | 0.440"))
    (paired,) = pd.read_csv(out.with_name("lab_paired.csv")).to_dict("records")
    assert (paired["method"], paired["against"], paired["seeds"]) == (STEERING, READING, 3)
    assert (paired["difference, seeds"], paired["difference, both"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert paired["p, both"] == pytest.approx(paired["p, seeds"]), "both problems differ alike"
    assert paired["p, Holm"] == paired["p, both"], "there is one comparison"
    assert paired["P(better)"] == 1.0
    # The differences 0.10, 0.12 and 0.08 have a standard deviation of 0.02: that of a t-test for an effect of 1.
    assert paired["seeds for 0.02"] == 10
    assert [file.name for file in out.parent.glob("*.png")] == ["lab_accuracy.png"]
    assert [row.right for row in read_rows(out.with_name("lab_rows.csv"))[:2]] == ["40.60", "30.50"]


def test_recipes_that_are_called_alike_have_rows_of_their_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    where = ["--experiment", "terse", "--tracking-uri", f"sqlite:///{place}/mlflow.db", "--out", "terse"]
    methods.main(["--methods", "opsd", "opsd+lab_terse", "--against", "opsd+lab_terse", "--seeds", "3", *where])
    lines = Path("terse.md").read_text().splitlines()
    assert lines[2].startswith(f"| {READING} (lab_terse) | 3 | 10 | 0.300 ± 0.000 | 0.540 ± 0.086 |")
    assert lines[3].startswith(f"| {READING} | 3 | 10 | 0.300 ± 0.000 | 0.440 ± 0.099 |")
    (paired,) = pd.read_csv("terse_paired.csv").to_dict("records")
    assert (paired["method"], paired["against"]) == (READING, f"{READING} (lab_terse)")
    assert paired["difference, seeds"] == pytest.approx(-0.1)


def test_a_failed_run_is_counted_and_its_output_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("fails.py").write_text("import sys; print('said'); sys.exit(3)")
    monkeypatch.setattr(Recipe, "command", lambda *_: [sys.executable, "fails.py"])
    wanted = {"opsd+plain_kl": Recipe(config="lab.yaml", overlays=("opsd", "plain_kl"))}
    assert making.make_runs([("opsd+plain_kl", 1)], wanted, "lab", "sqlite:///x.db", 2) == 1
    assert "opsd+plain_kl, seed 1: failed with 3" in capsys.readouterr().out
    assert Path("runs/logs/opsd+plain_kl-s1.log").read_text() == "said\n"


def test_a_run_becomes_a_table_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step of two problems, in a process of its own."""
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_epochs", "1", "--data.steps_per_epoch", "1", "--data.problems_per_step", "2"]
    small += ["--data.val.init_args.size", "3", "--data.evaluation.samples", "2", "--policy.model", str(STUDENT)]
    where = ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]  # MLflow keeps connections by address
    methods.main(["--methods", "opsd --data.group_size 2", "--seeds", "1", *where, "--args", *small])
    (row,) = read_rows(Path("methods_rows.csv"))
    assert (row.recipe, row.method, row.step, row.samples) == ("opsd --data.group_size 2", "OPSD", 1, 2)
    assert row.settings == shlex.join(["--data.group_size", "2", *small])
    assert len(row.before) == len(row.right) == 3
    assert sum(map(int, row.right)) / 6 == pytest.approx(row.accuracy)
    assert row.curve == f"0:{sum(map(int, row.before)) / 6} 1:{row.accuracy}"
    (measured,) = Path("runs").glob("OPSD*/metrics.jsonl")
    (step,) = [line for line in map(json.loads, measured.read_text().splitlines()) if "train/length_mean" in line]
    assert row.sampled == 4 * step["train/length_mean"], "two problems, two rollouts each"
    assert row.learned == step["train/tokens_learned"]
    assert (row.threads, row.seconds > 1) == (1, True)
    assert not measured.with_name("checkpoints").exists()
    assert Path("methods.md").read_text().splitlines()[-1] == f"- OPSD: `{row.settings}`"
