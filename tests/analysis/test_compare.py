"""Tables and figures from runs whose numbers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare
import curves
import numpy as np
import pytest
import runs
import seeds
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from scipy.stats import ttest_rel

from ogls.lessons.selection import ErrorSpan
from ogls.methods import OGLS_SD, OPSD
from ogls.tracking import Tracker

STEERS, READS = OGLS_SD().name, OPSD(selection=ErrorSpan(), temperature=1.0).name
AFTER = {READS: [0.40, 0.44, 0.48], STEERS: [0.60]}
PROBLEMS = {READS: [[0.0, 0.5, 1.0], [0.0, 0.5, 0.75], [0.0, 0.25, 1.0]], STEERS: [[0.25, 1.0, 1.0]]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("runs")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("ogls", artifact_location=(folder / "artifacts").as_uri())
    for method, afters in AFTER.items():
        for seed, after in enumerate(afters):
            run = client.create_run(experiment).info.run_id
            params = [Param("method", method), Param("seed", str(seed))]
            rows = {0: 0.3, 10: after - 0.02, 20: after}
            ends = {"": 0.0, "_low": -0.05, "_high": 0.05}
            metrics = [Metric(f"val/avg_at_4{e}", v + d, 0, s) for s, v in rows.items() for e, d in ends.items()]
            metrics += [Metric("train/reflection_markers", float(step % 2), 0, step) for step in range(1, 7)]
            client.log_batch(run, metrics=metrics, params=params, tags=[RunTag("method", method)])
            accuracy = dict(zip("abc", PROBLEMS[method][seed], strict=True))
            client.log_text(run, json.dumps(accuracy), "problems/step-000020.json")
            client.set_terminated(run)
    killed = client.create_run(experiment, tags={"method": READS}).info.run_id
    client.log_metric(killed, "val/avg_at_4", 0.9, step=10)
    client.set_terminated(killed, "KILLED")
    return client


def test_half_width_by_hand() -> None:
    # s = 0.04, t(0.975, 2) = 4.30265: 4.30265 * 0.04 / sqrt(3)
    assert curves.half_width([0.40, 0.44, 0.48]) == pytest.approx(0.0993656, abs=1e-6)
    assert math.isnan(curves.half_width([0.5]))


def test_summary(client: MlflowClient) -> None:
    table = compare.summarise(runs.read(client, "ogls", [], "", "val/avg_at_4")).set_index("method")
    assert list(table.index) == [STEERS, READS]  # the best first
    opsd = table.loc[READS]
    assert (opsd["runs"], opsd["steps"]) == (3, 20)
    assert opsd["before"] == pytest.approx(0.3)
    assert opsd["after"] == pytest.approx(0.44)
    assert opsd["change"] == pytest.approx(0.14)
    assert opsd["after ± seeds"] == pytest.approx(opsd["change ± seeds"])  # all began at 0.3
    assert opsd["after ± problems"] == pytest.approx(0.05)
    assert math.isnan(table.loc[STEERS, "after ± seeds"])


def history(values: dict[tuple[str, int], float]):
    rows = [
        {"method": m, "seed": s, "run": f"{m}{s}", "step": 20, "value": v, "low": v, "high": v}
        for (m, s), v in values.items()
    ]
    return compare.pd.DataFrame(rows)


def test_pairs_are_paired_by_seed_and_by_problem() -> None:
    one, other = {0: 0.5, 1: 0.7, 2: 0.6}, {0: 0.4, 1: 0.5, 2: 0.55, 9: 0.9}
    values = {("a", s): v for s, v in one.items()} | {("b", s): v for s, v in other.items()}
    problems = {
        "a0": {"p": 1.0, "q": 0.5, "r": 0.0, "only a": 1.0},
        "a1": {"p": 1.0, "q": 0.5, "r": 0.5},
        "a2": {"p": 0.5, "q": 0.5, "r": 0.25},
        "b0": {"p": 0.5, "q": 0.5, "r": 0.0},
        "b1": {"p": 0.5, "q": 0.25, "r": 0.0},
        "b2": {"p": 0.5, "q": 0.0, "r": 0.0},
        "b9": {"p": 0.0, "q": 0.0, "r": 1.0},
    }
    table = compare.compare_pairs(history(values), problems, against="b")
    (row,) = table.to_dict("records")
    assert (row["method"], row["against"], row["seeds"], row["problems"]) == ("a", "b", 3, 3)
    by_seed = ttest_rel([0.5, 0.7, 0.6], [0.4, 0.5, 0.55])
    assert row["difference, seeds"] == pytest.approx(0.35 / 3)
    assert row["p, seeds"] == pytest.approx(by_seed.pvalue)
    assert row["± seeds"] == pytest.approx(by_seed.confidence_interval().high - 0.35 / 3)
    by_problem = ttest_rel([2.5 / 3, 0.5, 0.25], [0.5, 0.25, 0.0])  # means over the common seeds 0, 1, 2
    assert row["difference, problems"] == pytest.approx((2.5 / 3 + 0.75 - 0.75) / 3)
    assert row["p, problems"] == pytest.approx(by_problem.pvalue)
    # By seed and problem: rows 0.5, 0, 0; 0.5, 0.25, 0.5; 0, 0.5, 0.25.
    both = seeds.difference(np.array([[0.5, 0, 0], [0.5, 0.25, 0.5], [0, 0.5, 0.25]]))
    assert row["difference, both"] == both.mean == pytest.approx(2.5 / 9)
    assert (row["± both"], row["p, both"], row["p, Holm"]) == (both.half, both.p_value, both.p_value)
    # Over all runs, the odd one included: 0.5 is above 2, 0.7 and 0.6 above 3 of 4.
    assert row["P(better)"] == pytest.approx((1.5 + 3 + 3) / 12)
    assert row["seeds for 0.02"] == "more problems"


def test_comparisons_of_one_table_are_corrected_for_their_number() -> None:
    rng = np.random.default_rng(0)
    values = {(m, s): v for m, v in (("a", 0.6), ("b", 0.5), ("c", 0.4)) for s in range(3)}
    problems = {f"{m}{s}": {str(i): v + 0.2 * rng.normal() for i in range(20)} for (m, s), v in values.items()}
    table = compare.compare_pairs(history(values), problems, wanted=0.1)
    assert list(table["p, Holm"]) == seeds.holm(list(table["p, both"]))
    assert (table["p, Holm"] > table["p, both"]).any()
    assert all(3 <= needed <= 200 for needed in table["seeds for 0.1"])


def test_improvement_is_averaged_over_evaluation_sets() -> None:
    sums, words = ({("a", 0): 0.5, ("b", 0): 0.4}, {("a", 0): 0.5, ("b", 0): 0.5})
    table = compare.compare_pairs(history(sums), {}, sets=[history(sums), history(words)])
    assert table["P(better)"].tolist() == [0.75]


def test_without_common_seeds_or_problems_nothing_is_claimed() -> None:
    (row,) = compare.compare_pairs(history({("a", 0): 0.5, ("b", 1): 0.4}), {}).to_dict("records")
    assert (row["seeds"], row["problems"]) == (0, 0)
    assert all(math.isnan(row[f"{name}, {over}"]) for name in ("difference", "p") for over in ("seeds", "problems"))
    with pytest.raises(ValueError, match="there is no method 'c'; got a, b"):
        compare.compare_pairs(history({("a", 0): 0.5, ("b", 1): 0.4}), {}, against="c")


def test_filter_and_run_ids(client: MlflowClient) -> None:
    found = runs.read(client, "ogls", [], f"tags.method = '{READS}'", "val/avg_at_4")
    assert set(found["method"]) == {READS}
    one = found["run"].iloc[0]
    assert set(runs.read(client, "", [one], "", "val/avg_at_4")["run"]) == {one}


def test_only_trainings_alike_in_all_but_their_seed_are_one_row(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = client.create_experiment("pooled", artifact_location=(tmp_path / "artifacts").as_uri())
    made = [("a.jsonl", 0, 0.9, "fit"), ("a.jsonl", 0, 0.4, "fit"), ("a.jsonl", 1, 0.6, "fit")]
    made += [("b.jsonl", 0, 0.1, "fit"), ("a.jsonl", 2, 0.8, "validate")]
    for begun, (path, seed, value, command) in enumerate(made):
        tags = {"method": "OPSD", "seed": str(seed), "command": command}
        run = client.create_run(experiment, start_time=begun + 1, tags=tags, run_name=f"run {begun}").info.run_id
        params = {"data.train.path": path, "data.seed": str(seed), "method.selection": "AllTokens"}
        client.log_batch(run, [Metric("val/avg_at_4", value, 0, 20)], [Param(*pair) for pair in params.items()])
        client.set_terminated(run)
    table = compare.summarise(runs.read(client, "pooled", [], "", "val/avg_at_4")).set_index("method")
    assert table["runs"].to_dict() == {"OPSD (data.train.path=a.jsonl)": 2, "OPSD (data.train.path=b.jsonl)": 1}
    assert table["after"].to_list() == pytest.approx([0.5, 0.1])
    assert capsys.readouterr().err.splitlines() == ["left out: run 4, validate", "left out: run 0, made again later"]


def test_old_runs_whose_method_was_typed_stand_beside_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("ogls", artifact_location=(tmp_path / "artifacts").as_uri())
    old = client.create_run(experiment, tags={"method": "opsd", "seed": "4"}).info.run_id
    older = client.create_run(experiment).info.run_id
    for run, seed in ((old, 4), (older, 5)):  # the older one has parameters alone
        client.log_batch(
            run,
            metrics=[Metric("val/avg_at_4", value, 0, step) for step, value in ((0, 0.3), (20, 0.4))],
            params=[Param("method", "opsd"), Param("seed", str(seed))],
        )
        client.set_terminated(run)
    changes = ", ".join(f"choice_{number}={number}" for number in range(30))
    names = {4: f"OPSD[{changes}]", 5: OPSD(temperature=1.0).name}
    assert len(names[4]) > 250  # where parameters are cut
    for seed, name in names.items():
        tracker = Tracker(tracking_uri=uri, system_metrics=False)
        tracker.describe(name, seed)
        tracker.configure("lr: 1\n", {})
        tracker.log_config()
        for step, value in ((0, 0.3), (20, 0.5)):
            tracker.log_metrics({"val/avg_at_4": value}, step)
        tracker.finalize("success")

    history = runs.read(client, "ogls", [], "", "val/avg_at_4")
    found = {(row["method"], row["seed"]) for row in history.to_dict("records")}
    assert found == {("opsd", 4), ("opsd", 5), (names[4], 4), (names[5], 5)}
    table = compare.summarise(history).set_index("method")
    assert table["runs"].to_dict() == {"opsd": 2, names[4]: 1, names[5]: 1}
    pairs = compare.compare_pairs(history, {}, against="opsd")
    assert set(pairs["difference, seeds"].round(6)) == {0.1}
    assert set(pairs["seeds"]) == {1}
    with pytest.raises(ValueError, match="'OPSD' is the preset of several methods; say which: OPSD"):
        compare.compare_pairs(history, {}, against="OPSD")
    alone = history[history["method"] != names[4]]
    assert set(compare.compare_pairs(alone, {}, against="OPSD")["against"]) == {names[5]}

    def drawn(*options: str) -> set[str]:
        curves.main([*options, "--tracking-uri", uri, "--out", str(tmp_path / "curves")])
        return set(curves.pd.read_csv(tmp_path / "curves.csv")["method"])

    assert drawn("ablation") == {"opsd", *names.values()}
    assert drawn("accuracy", "--methods", "OPSD") == set(names.values())
    assert drawn("accuracy", "--methods", "opsd", names[5]) == {"opsd", names[5]}


def test_files(client: MlflowClient, tmp_path: Path) -> None:
    out = tmp_path / "figures" / "methods"
    compare.main(["--tracking-uri", client.tracking_uri, "--out", str(out)])
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[2] == f"| {STEERS} | 1 | 20 | 0.300 | 0.600 | 0.600 | - | 0.050 | 0.300 | - |"
    # One common seed: no test over seeds. Over problems 0.25, 0.5, 0: t = 0.25 / (0.25 / sqrt 3), 2 degrees of freedom.
    # Over both at once: the difference alone. A run of the one is better than each run of the other.
    both = "0.250 | - | - | - | 1.000 | - |"
    assert lines[-1] == f"| {STEERS} | {READS} | 1 | 0.200 | - | - | 3 | 0.250 | 0.621 | 0.225 | {both}"
    assert out.with_suffix(".csv").read_text().startswith("method,runs,steps,before,after")
    assert (tmp_path / "figures" / "methods_paired.csv").read_text().startswith("method,against,seeds")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_figure(client: MlflowClient, tmp_path: Path) -> None:
    out = tmp_path / "markers"
    options = ["--tracking-uri", client.tracking_uri, "--published", "--window", "2", "--out", str(out)]
    curves.main(["markers", *options])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = curves.pd.read_csv(out.with_suffix(".csv"))
    assert list(table["mean"].round(3)) == ([1.0] + [0.5] * 5) * 2  # 1, 0, 1, 0 ... by windows of two
    assert table[table["method"] == STEERS]["low"].isna().all()


def test_a_preset_is_asked_for_by_its_name() -> None:
    names = ["OPSD", "OPSD[temperature=0.5]", "OPSD (learning_rate=1e-05)", "OPSD[alpha=(1, 2)] (seed=1)", "OPSD_ECTR"]
    assert [name for name in names if runs.of_preset(name, "OPSD")] == names[:4]
    assert [name for name in names if runs.of_preset(name, names[2])] == [names[2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experiment", "none"], "no experiment 'none'"),
        (["--runs", "abc"], "Run with id=abc not found"),
        (["--filter", "tags.method ~ 'x'"], "Invalid comparator '~'"),
        (["--metric", "val/no"], "has the metric 'val/no'; of accuracy they have val/avg_at_"),
    ],
)
def test_errors(
    client: MlflowClient, capsys: pytest.CaptureFixture[str], options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(["--tracking-uri", client.tracking_uri, "--out", str(tmp_path / "x"), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
