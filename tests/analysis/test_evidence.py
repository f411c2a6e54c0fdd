"""Tables of evidence: rows are kept exactly, tables are what the rows give, what has changed since is told."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import evidence
import forecast
import making
import pandas as pd
import planted
import pytest
import questions
import tuning
import views
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from recipes import PROJECT, Recipe
from stored_rows import Row, add_row, decode, encode, read_rows, rows_file, sound, write_rows

from ogls.tasks.chains import Chains

ROW = Row(
    recipe="ogls_sd --method.steering.alpha 2",
    method="OGLS_SD[alpha=2, clip=None]",
    settings="--method.steering.alpha 2 --method.objective '{\"clip\": null}'",
    digest="0123456789ab",
    seed=3,
    step=20,
    samples=8,
    accuracy=0.1 + 0.2,
    passed=1 / 3,
    length=21.5,
    kl_to_base=math.inf,
    sampled=54321,
    learned=12345,
    seconds=97.3,
    threads=1,
    problems="0123",
    before="048",
    right="008",
    curve="0:0.30000000000000004 20:0.3333333333333333",
)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py"])


# ---- rows ----


def test_rows_are_read_as_they_were_written() -> None:
    """Leading zeros, commas, quotes and the last digit of a number, too."""
    rows = [ROW, replace(ROW, seed=1), replace(ROW, recipe="opsd", seed=1)]
    for row in rows:
        add_row(Path("rows.csv"), row)
    assert read_rows(Path("rows.csv")) == [rows[1], rows[2], rows[0]], "seed by seed"
    add_row(Path("rows.csv"), replace(ROW, accuracy=0.5))
    assert [row.accuracy for row in read_rows(Path("rows.csv"))] == [ROW.accuracy, ROW.accuracy, 0.5], "in its place"
    unknown = replace(ROW, kl_to_base=math.nan, seconds=math.nan, before="", settings="")
    write_rows(Path("rows.csv"), [unknown])
    (read,) = read_rows(Path("rows.csv"))
    assert str(read) == str(unknown)


def test_counts_of_right_rollouts_are_one_word() -> None:
    assert encode({"b": 0.5, "a": 0.0, "c": 1.0}, 8) == "048"
    assert decode("048", 8) == {"": [0, 4, 8]}
    assert encode({"words/x": 0.75, "sums/b": 1.0, "sums/a": 0.1}, 20, sets=True) == "sums=2.20 words=15"
    assert decode("sums=2.20 words=15", 20) == {"sums/": [2, 20], "words/": [15]}
    assert ROW.accuracies("048") == {"0123-0": 0.0, "0123-1": 0.5, "0123-2": 1.0}
    assert list(replace(ROW, samples=20).accuracies("sums=2.20 words=15")) == [
        "sums/0123-0",
        "sums/0123-1",
        "words/0123-0",
    ]
    with pytest.raises(ValueError, match=r"'a' has the accuracy 0\.3, which is no multiple of 1/8"):
        encode({"a": 0.3}, 8)


def test_a_file_of_other_columns_is_refused() -> None:
    Path("rows.csv").write_text("recipe,seed\nopsd,0\n")
    with pytest.raises(ValueError, match=r"rows\.csv has other columns than rows have"):
        read_rows(Path("rows.csv"))


def test_a_row_is_sound_while_its_files_say_the_same() -> None:
    Path("own.yaml").write_text("method: OPSD\nseed_everything: 1\n")

    def recipe() -> Recipe:
        return Recipe(config="own.yaml", overlays=(), arguments=("--a", "1"))

    row = replace(ROW, recipe="own", digest=recipe().digest)
    Path("own.yaml").write_text("# a comment\nseed_everything: 1\nmethod: OPSD\n")
    assert sound(row, {"own": recipe()})
    assert not sound(row, {"own": replace(recipe(), arguments=("--a", "2"))})
    Path("own.yaml").write_text("method: OPSD\nseed_everything: 2\n")
    assert not sound(row, {"own": recipe()})
    assert sound(row, {"other": recipe()}), "of another recipe nothing is known"


# ---- tables ----

STORED = [table for table in evidence.TABLES if rows_file(evidence.RESULTS / table.name).exists()]


@pytest.mark.parametrize("table", STORED, ids=lambda table: table.name)
def test_the_tables_of_the_repository_are_what_its_rows_give(table: evidence.Table, tmp_path: Path) -> None:
    rows = read_rows(rows_file(evidence.RESULTS / table.name))
    assert {row.recipe for row in rows} <= {*table.methods}
    table.write(rows, tmp_path)
    told = f"is not what {table.name}_rows.csv gives: make evidence TABLE={table.name} ARGS=--rebuild"
    made = sorted(file.name for file in tmp_path.iterdir())
    endings = (".md", ".csv") if table.crossed else (".md", ".csv", "_paired.csv", "_accuracy.png")
    assert {table.name + ending for ending in endings} <= {*made}
    for file in made:
        stored, new = evidence.RESULTS / file, tmp_path / file
        if file.endswith(".csv"):  # whose last digits another SciPy may change
            pd.testing.assert_frame_equal(pd.read_csv(stored), pd.read_csv(new), obj=told)
        elif file.endswith(".md"):
            assert stored.read_text() == new.read_text(), f"{file} {told}"
        else:  # whose points are those of the .csv
            assert stored.exists(), f"{file} {told}"


def test_every_table_has_recipes_that_are_told_apart() -> None:
    for table in evidence.TABLES:
        made = replace(table, tuned=False).recipes()
        assert [*made] == [*table.methods], table.name
        assert len({recipe.digest for recipe in made.values()}) == len(made), table.name
        assert table.against is None or table.against in made, table.name


TINY = evidence.Table(
    name="tiny", question="Does it work?", methods=("opsd", "opsd+lab_terse"), seeds=2, against="opsd"
)


def log(command: Sequence[str]) -> None:
    """Logs to MLflow what a run of two problems with this command would."""
    words = [word for word in command[3:] if not word.endswith(".yaml") and word != "--config"]
    given = {name.rpartition(".")[2].lstrip("-"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    client = MlflowClient(given["tracking_uri"])
    found = client.get_experiment_by_name(given["experiment"])
    place = str(Path("artifacts").absolute())
    experiment = found.experiment_id if found else client.create_experiment(given["experiment"], place)
    tags = json.loads(given["tags"]) | {"method": "OPSD", "seed": given["seed_everything"], "folder": "a-run"}
    run = client.create_run(experiment, tags=tags).info.run_id
    series = {"val/avg_at_10": (0.3, 0.45), "val/pass_at_10": (0.5, 1.0), "val/length_mean": (20.0, 21.5)}
    series |= {"speed/generate_tokens_per_s": (50.0, 100.0), "time/generate": (2.0, 3.0)}
    series |= {"train/tokens_learned": (70.0, 80.0)}
    metrics = [Metric(name, value, 0, 10 * i) for name, values in series.items() for i, value in enumerate(values)]
    client.log_batch(run, metrics=metrics)
    client.log_dict(run, {"b": 0.4, "a": 0.2}, "problems/step-000000.json")
    client.log_dict(run, {"b": 0.5, "a": 0.4}, "problems/step-000010.json")
    (Path("runs") / "a-run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    client.set_terminated(run, "FINISHED")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run but what `log` does; in an environment with FAIL, every run fails."""

    def make_run(command: Sequence[str], file: Path) -> tuple[int, float]:
        if "FAIL" in os.environ:
            return 3, 0.1
        log(command)
        return 0, 12.5

    monkeypatch.setattr(making, "make_run", make_run)
    monkeypatch.setattr(evidence, "TABLES", (TINY,))


@pytest.mark.usefixtures("tiny")
def test_a_table_from_its_first_run_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--results", "results", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    with pytest.raises(SystemExit):
        evidence.main(["tiny", "--rebuild", "--results", "results"])
    assert "tiny_rows.csv has no rows: make some without --rebuild" in capsys.readouterr().err

    evidence.main(["tiny", "--seeds", "1", *where])
    assert "2 runs to make, 0 are there" in capsys.readouterr().out
    told = evidence.state(TINY, Path("results"))
    assert (told["rows"], told["missing"], told["stale"]) == (2, 2, 0)

    evidence.main(["tiny", *where])
    assert "2 runs to make, 2 are there" in capsys.readouterr().out
    rows = read_rows(Path("results/tiny_rows.csv"))
    assert [(row.recipe, row.seed) for row in rows] == [(m, seed) for seed in (0, 1) for m in TINY.methods]
    row = rows[0]
    assert (row.right, row.before, row.curve) == ("4.5", "2.4", "0:0.3 10:0.45")
    assert (row.sampled, row.learned, row.threads) == (400, 150, 1), "50 tokens a second for 2 s, 100 for 3 s"
    assert row.seconds == 12.5
    text = Path("results/tiny.md").read_text()
    assert text.startswith("Does it work?\n\n`lab.yaml`.")
    assert "| OPSD (lab_terse) | 2 | 10 |" in text
    assert "| OPSD (lab_terse) | OPSD | 2 |" in text
    assert not Path("runs/a-run/checkpoints").exists()

    files = [Path("results") / f"tiny{end}" for end in (".md", ".csv", "_paired.csv")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    evidence.main(["tiny", "--rebuild", "--results", "results"])
    assert [file.read_bytes() for file in files] == before, "without MLflow"

    old = [replace(row, digest="other") if row.recipe == "opsd" else row for row in rows]
    write_rows(Path("results/tiny_rows.csv"), old)
    evidence.main(["tiny", "--rebuild", "--results", "results"])
    assert "2 rows are stale, since configurations have changed since they were made: opsd" in capsys.readouterr().err
    assert evidence.state(TINY, Path("results"))["stale"] == 2
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(SystemExit, match="2 runs failed; the same command makes them again"):
        evidence.main(["tiny", *where, "--experiment", "another"])
    assert {row.recipe for row in read_rows(Path("results/tiny_rows.csv"))} == {"opsd+lab_terse"}


@pytest.mark.usefixtures("tiny")
def test_the_list_tells_questions_rows_and_hours(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("tiny_rows.csv"), [replace(ROW, recipe="opsd", seed=seed, seconds=1800.0) for seed in (0, 1)])
    evidence.main(["--results", "."])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["tiny", "0", "4", "2", "0", "2.0", "2.0"], "half an hour each, none of them sound"
    assert lines[1].endswith("Does it work?")
    # Nothing of these is there: as many rows are missing as there are cells, or trials.
    assert [line.split()[:3] for line in lines[2:]] == [
        ["bias", "0", str(5 * len(planted.ARMS) * len(planted.SHARES))],
        ["forecast", "0", str(3 * len(forecast.STUDENTS) * len(forecast.ALPHAS))],
        ["tuning", str(sum(tuning.counted().values())), str(8 * len(tuning.LAB) - sum(tuning.counted().values()))],
        *([name, "0", "1"] for name in views.KEPT),
    ]

    ((key, recipe),) = list(forecast.wanted().items())[:1]
    write_rows(Path("forecast_rows.csv"), [replace(ROW, recipe=key, seed=s, digest=recipe.digest * s) for s in (0, 1)])
    styles = planted.read_rows(evidence.RESULTS / "bias_rows.csv")[:3]
    pd.DataFrame([styles[0] | {"digest": "of another"}, *styles[1:]]).to_csv("bias_rows.csv", index=False)
    pd.DataFrame([{views.DIGEST: "of another"}]).to_csv("views_legs.csv", index=False)
    evidence.main(["--results", "."])
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    stale = {line[0]: (line[1], line[3]) for line in told if line[3] != "0"}
    assert stale.keys() - {"table"} == {"tiny", "bias", "forecast", "views_legs"}
    assert (stale["bias"], stale["forecast"], stale["views_legs"]) == (("2", "1"), ("1", "1"), ("0", "1"))


def test_what_views_say_is_made_by_the_command_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setitem(evidence.SCRIPTS, "views_legs", made.append)
    evidence.main(["views_legs", "--rebuild", "--results", str(tmp_path)])
    assert made == [], "there is nothing to make it from"
    evidence.main(["views_legs", "--results", str(tmp_path)])
    assert made == [[*views.KEPT["views_legs"][1].split(), "--out", str(tmp_path / "views_legs")]]


def test_tuning_is_not_rebuilt_by_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setitem(evidence.SCRIPTS, "tuning", made.append)
    evidence.main(["tuning", "--rebuild"])
    assert made == []
    evidence.main(["tuning"])
    assert made == [[]]


@pytest.mark.parametrize(
    ("table", "option", "value"),
    [
        ("bias", "--jobs", "2"),
        ("tuning", "--tracking-uri", "x"),
        ("tuning", "--results", "x"),
        ("views_legs", "--seeds", "2"),
    ],
)
def test_an_option_without_effect_is_refused(
    table: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evidence.main([table, option, value])
    assert f"{table} has no use for {option}: leave it out" in capsys.readouterr().err


# ---- questions ----


def test_an_answer_is_the_difference_over_common_seeds() -> None:
    rows = [
        replace(ROW, recipe=recipe, seed=seed, right=right, samples=8, seconds=seconds)
        for recipe, seed, right, seconds in (
            ("a", 0, "480", 10.0),
            ("a", 1, "488", 12.0),
            ("a", 2, "484", 14.0),
            ("b", 2, "444", 9.0),
            ("b", 1, "448", 10.0),
            ("b", 0, "440", 11.0),
            ("c", 0, "000", 0.0),
        )
    ]
    ask = questions.Question(text="?", table="t", ours="a", theirs="b")
    # Problem 2 has half more in every seed, the others are alike: 0.167, whatever the problem's standard error.
    assert ask.answer(rows).startswith("**+0.167 ± ")
    assert ask.answer(rows).endswith("; 3 seeds x 3 problems)")
    assert replace(ask, theirs="c").answer(rows) == "+0.500, no interval: 1 seed x 3 problems"
    assert replace(ask, theirs="d").answer(rows) == "not run yet"
    # Before it was 0, 4 and 8 of 8: by problem +0.5, +0.5 and (-1 + 0 - 0.5) / 3.
    assert replace(ask, theirs="").answer(rows).startswith("**+0.167 ± ")
    # Of the set "y" the one problem alone: 1 - 0 in each seed.
    rows = [replace(row, right=f"x=00 y={8 if row.recipe == 'a' else 0}") for row in rows]
    assert replace(ask, sets=("y",)).answer(rows).startswith("**+1.000 ± ")
    assert replace(ask, sets=("y",)).answer(rows).endswith("; 3 seeds x 1 problems)")
    # -1, 2 and 5: mean 2, standard deviation 3, t(0.975, 2) = 4.30265
    assert replace(ask, measure="seconds", unit="s").answer(rows) == "**+2.0 ± 7.5** s (3 seeds)"


def test_the_page_is_what_the_rows_say() -> None:
    stored = {table.name: read_rows(rows_file(evidence.RESULTS / table.name)) for table in evidence.TABLES}
    page = questions.page(stored, evidence.measured())
    assert questions.PAGE.read_text() == page, "any `make evidence TABLE=NAME ARGS=--rebuild` writes it"
    methods = {table.name: table.methods for table in evidence.TABLES}
    for asked in (question for several in questions.QUESTIONS.values() for question in several):
        if asked.ours:
            assert {asked.ours, asked.theirs} - {""} <= {*methods[asked.table]}, asked.text
    each = yaml.safe_load((PROJECT / "experiments" / "families_each.yaml").read_text())["data"]["val"]
    assert {*each} == {*questions.FAMILIES}
    for overlay, trained in questions.DOMAINS.items():
        train = yaml.safe_load((PROJECT / "experiments" / f"{overlay}.yaml").read_text())["data"]["train"]
        assert train["init_args"]["families"] == [*trained], "the questions name what is trained on"


# ---- tuning ----


def test_a_tuned_table_runs_every_recipe_at_its_best(tmp_path: Path) -> None:
    trials = tmp_path / "tuning.csv"
    row = {"recipe": "opsd", "state": "COMPLETE", "seconds": 60.0}
    made = [
        row | {"trial": n, "accuracy": 0.4 + n % 7 / 10, "options": f'{{"model.learning_rate": {n}e-5, "a": "b"}}'}
        for n in range(tuning.BUDGET - 1)
    ]
    tuning.keep(made, trials)
    table = evidence.Table(name="t", question="", methods=("opsd", "grpo"), tuned=True)
    assert table.recipes(trials) == {}, "the budget is not spent"
    pruned = row | {"trial": 7, "state": "PRUNED", "accuracy": math.nan, "options": "{}"}
    tuning.keep([*made, pruned], trials)
    assert len(pd.read_csv(trials)) == tuning.BUDGET
    (recipe,) = table.recipes(trials).values()
    assert recipe.arguments == ("--model.learning_rate", "6e-05", "--a", "b")
    assert evidence.state(table, tmp_path, trials)["not tuned"] == 1


@pytest.mark.parametrize("recipe", tuning.LAB)
def test_every_recipe_can_be_tuned(recipe: str) -> None:
    setting = tuning.LAB[recipe]
    sweep = tuning.sweep_of(recipe, setting)
    assert [point[setting.name] for point in sweep.first] == [setting.published] * 3
    if len(setting.values) == 2 and not isinstance(setting.values[0], str):
        low, high = setting.values
        assert low < setting.published < high
    else:
        assert setting.published in setting.values
    assert all(
        (evidence.tuning.RESULTS.parents[1] / "experiments" / f"{name}.yaml").exists() for name in recipe.split("+")
    )


def test_tuning_judges_by_problems_that_no_table_holds_out() -> None:
    def held_out(seed: int) -> set[str]:
        return {problem.id for problem in Chains(128, "heldout", parentheses=0.7, seed=seed)}

    assert not held_out(0) & held_out(tuning.PROBLEMS)
    words = tuning.command_line("opsd+up_to_error", 8)
    assert shlex.join(words[words.index("--") + 1 :]).count(f"init_args.seed {tuning.PROBLEMS}") == 2
    assert int(words[words.index("--first-seed") + 1]) >= max(table.seeds for table in evidence.TABLES)
