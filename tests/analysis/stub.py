"""Stands in for experiments/run.py: logs a finished run to MLflow, as a run of two problems does, in a second.

Its accuracies are 0.4 and 0.5; in an environment with FAIL it fails.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric


def main() -> None:
    if os.environ.get("FAIL"):
        sys.exit(3)
    words = [word for word in sys.argv[2:] if not word.endswith(".yaml") and word != "--config"]
    given = {name.rpartition(".")[2].lstrip("-"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    client = MlflowClient(given["tracking_uri"])
    found = client.get_experiment_by_name(given["experiment"])
    place = Path("artifacts").absolute()
    experiment = found.experiment_id if found else client.create_experiment(given["experiment"], str(place))
    tags = json.loads(given["tags"]) | {"method": "OPSD", "seed": given["seed_everything"], "folder": "a-run"}
    run = client.create_run(experiment, tags=tags).info.run_id
    x = 0.4
    series = {"val/avg_at_10": (0.3, x + 0.05), "val/pass_at_10": (0.5, 1.0), "val/length_mean": (20.0, 21.5)}
    series |= {"speed/generate_tokens_per_s": (50.0, 100.0), "time/generate": (2.0, 3.0)}
    series |= {"train/tokens_learned": (70.0, 80.0)}
    metrics = [Metric(name, value, 0, 10 * i) for name, values in series.items() for i, value in enumerate(values)]
    client.log_batch(run, metrics=metrics)
    client.log_dict(run, {"b": 0.4, "a": 0.2}, "problems/step-000000.json")
    client.log_dict(run, {"b": x + 0.1, "a": x}, "problems/step-000010.json")
    (Path("runs") / "a-run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    client.set_terminated(run, "FINISHED")


if __name__ == "__main__":
    main()
