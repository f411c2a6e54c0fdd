"""Tables and figures from runs whose numbers are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "analysis"))
import compare

AFTER = {"opsd": [0.40, 0.44, 0.48], "ogls_sd": [0.60]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    client = MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('runs')}/mlflow.db")
    experiment = client.create_experiment("ogls")
    for method, afters in AFTER.items():
        for seed, after in enumerate(afters):
            run = client.create_run(experiment).info.run_id
            params = [Param("method", method), Param("seed", str(seed))]
            rows = {0: 0.3, 10: after - 0.02, 20: after}
            ends = {"": 0.0, "_low": -0.05, "_high": 0.05}
            metrics = [Metric(f"val/avg_at_4{e}", v + d, 0, s) for s, v in rows.items() for e, d in ends.items()]
            client.log_batch(run, metrics=metrics, params=params, tags=[RunTag("method", method)])
    return client


def test_half_width_by_hand() -> None:
    # s = 0.04, t(0.975, 2) = 4.30265: 4.30265 * 0.04 / sqrt(3)
    assert compare.half_width([0.40, 0.44, 0.48]) == pytest.approx(0.0993656, abs=1e-6)
    assert math.isnan(compare.half_width([0.5]))


def test_summary(client: MlflowClient) -> None:
    table = compare.summarise(compare.read(client, "ogls", [], "", "val/avg_at_4")).set_index("method")
    assert list(table.index) == ["ogls_sd", "opsd"]  # the best first
    opsd = table.loc["opsd"]
    assert (opsd["runs"], opsd["steps"]) == (3, 20)
    assert opsd["before"] == pytest.approx(0.3)
    assert opsd["after"] == pytest.approx(0.44)
    assert opsd["change"] == pytest.approx(0.14)
    assert opsd["after ± seeds"] == pytest.approx(opsd["change ± seeds"])  # all began at 0.3
    assert opsd["after ± problems"] == pytest.approx(0.05)
    assert math.isnan(table.loc["ogls_sd", "after ± seeds"])


def test_filter_and_run_ids(client: MlflowClient) -> None:
    history = compare.read(client, "ogls", [], "tags.method = 'opsd'", "val/avg_at_4")
    assert set(history["method"]) == {"opsd"}
    one = history["run"].iloc[0]
    assert set(compare.read(client, "", [one], "", "val/avg_at_4")["run"]) == {one}


def test_files(client: MlflowClient, tmp_path: Path) -> None:
    out = tmp_path / "figures" / "methods"
    compare.main(["--tracking-uri", client.tracking_uri, "--out", str(out)])
    assert out.with_suffix(".md").read_text().splitlines()[2] == (
        "| ogls_sd | 1 | 20 | 0.300 | 0.600 | - | 0.050 | 0.300 | - |"
    )
    assert out.with_suffix(".csv").read_text().startswith("method,runs,steps,before,after")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--experiment", "none"], "no experiment 'none'"), (["--metric", "val/no"], "none of 4 runs")],
)
def test_errors(
    client: MlflowClient, capsys: pytest.CaptureFixture[str], options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(["--tracking-uri", client.tracking_uri, "--out", str(tmp_path / "x"), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
