"""Tables of methods from runs whose numbers are known; nothing is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "analysis"))
import methods

ENDS = {"opsd": [0.40, 0.44, 0.48], "ogls_sd": [0.50, 0.56, 0.56]}


def log(client: MlflowClient, experiment: str, recipe: methods.Recipe, seed: int, end: float) -> str:
    tags = {"method": recipe.name, "seed": str(seed), "recipe": recipe.digest}
    run = client.create_run(experiment, tags=tags).info.run_id
    series = {"val/avg_at_8": (0.3, end), "val/pass_at_8": (0.8, 0.9), "val/kl_to_base": (0.0, 0.1)}
    metrics = [Metric(name, value, 0, 10 * i) for name, values in series.items() for i, value in enumerate(values)]
    client.log_batch(run, metrics=metrics, tags=[RunTag(k, v) for k, v in tags.items()])
    client.log_dict(run, {"a": end - 0.1, "b": end + 0.1}, "problems/step-000010.json")
    client.set_terminated(run, "FINISHED")
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with three seeds of two methods, and one run of another recipe."""
    place = tmp_path_factory.mktemp("methods")
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.create_experiment("lab", artifact_location=str(place / "artifacts"))
    made = methods.recipes("lab.yaml", list(ENDS), [], [])
    for name, ends in ENDS.items():
        for seed, end in enumerate(ends):
            log(client, experiment, made[name], seed, end)
    log(client, experiment, methods.recipes("lab.yaml", ["opsd"], [], ["--model.learning_rate", "1"])["opsd"], 0, 0.99)
    return place


def test_a_recipe_is_its_files_and_arguments():
    made = methods.recipes("lab.yaml", ["opsd", "opsd+lab_terse"], ["alpha_zero"], ["--data.group_size", "2"])
    assert made["opsd-lab_terse"].configs == ("lab.yaml", "opsd.yaml", "lab_terse.yaml", "alpha_zero.yaml")
    command = made["opsd"].command(3, "lab", "sqlite:///x.db")
    assert command[2:7] == ["fit", "--config", "lab.yaml", "--config", "opsd.yaml"]
    assert command[command.index("--seed_everything") + 1] == "3"
    assert command[-2:] == ["--data.group_size", "2"]
    assert len({recipe.digest for recipe in made.values()}) == 2
    assert made["opsd"].digest != methods.recipes("lab.yaml", ["opsd"], ["alpha_zero"], [])["opsd"].digest


def test_only_runs_of_the_same_recipe_count(place: Path):
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    opsd = methods.recipes("lab.yaml", ["opsd"], [], [])["opsd"]
    assert list(methods.finished(client, "lab", opsd)) == [0, 1, 2]
    assert methods.finished(client, "elsewhere", opsd) == {}


def test_a_command_whose_runs_are_there_makes_the_table_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results" / "lab"
    uri = f"sqlite:///{place}/mlflow.db"
    methods.main(["--methods", *ENDS, "--seeds", "3", "--tracking-uri", uri, "--out", str(out)])
    assert "0 runs to make, 6 are there" in capsys.readouterr().out
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0] == "| method | seeds | steps | accuracy | pass@8 | KL to base |"
    # s = 0.04 and 0.034641, t(0.975, 2) = 4.30265: half widths 0.0994 and 0.0861
    assert lines[2] == "| ogls_sd | 3 | 10 | 0.540 ± 0.086 | 0.900 ± 0.000 | 0.100 ± 0.000 |"
    assert lines[3] == "| opsd | 3 | 10 | 0.440 ± 0.099 | 0.900 ± 0.000 | 0.100 ± 0.000 |"
    paired = out.with_name("lab_paired.csv").read_text().splitlines()[1]
    assert paired.startswith("ogls_sd,opsd,3,0.1")
    assert {file.name for file in out.parent.glob("*.png")} == {
        "lab_accuracy.png",
        "lab_pass_8.png",
        "lab_kl_to_base.png",
    }


def test_a_failed_run_is_counted_and_its_output_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "import sys; print('said'); sys.exit(3)"]
    monkeypatch.setattr(methods.Recipe, "command", lambda *_: command)
    recipe = methods.Recipe(method="opsd", configs=("lab.yaml",))
    assert methods.make_runs([(recipe, 1)], "lab", "sqlite:///x.db", 2, tmp_path / "logs") == 1
    assert "opsd, seed 1: failed with 3" in capsys.readouterr().out
    assert (tmp_path / "logs" / "opsd-s1.log").read_text() == "said\n"
