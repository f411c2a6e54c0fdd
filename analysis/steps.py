"""Measure what a step of several recipes costs: runs of a few steps each, by turns.

    python analysis/steps.py --config math.yaml --methods ogls_sd opsd+plain_kl+error_span rosd
    python analysis/steps.py --config math.yaml --overlays legs --methods ogls_sd grpo sft --rounds 3

A round makes one run of each recipe, one after the other, without validation. A run's figure is the median of the
seconds between the ends of its steps; the first step warms up and does not count. Ratios are to the first recipe and
within a round, so that what else runs on the machine disturbs both sides alike. An option of --args comes on top of all
recipes. Versions, processor and threads come first. Nothing stays of the runs but their output, in runs/logs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from benchmarks.harness import machine
from making import log_of, make_run, threads
from methods import parser_of_recipes, recipes_of
from mlflow import MlflowClient
from recipes import Recipe

from ogls.tracking.files import METRICS, read_rows


def seconds_between(file: Path) -> float:
    """Returns the median of the seconds between the ends of a run's steps.

    Args:
        file: the run's metrics
    """
    ends = [row["time"] for row in read_rows(file) if "train/loss" in row]
    return float(np.median(np.diff(ends)))


def measure(recipe: Recipe, steps: int, seed: int, log: Path) -> float:
    """Returns seconds of a step of a recipe, by a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        MlflowClient(store).create_experiment("steps", artifact_location=Path(folder).as_uri())
        command = recipe.command(seed, "steps", store)
        words = {"trainer.max_epochs": 1, "data.steps_per_epoch": steps, "trainer.limit_val_batches": 0}
        words |= {"trainer.logger.init_args.folder": folder}
        command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
        code, _ = make_run(command, log)
        if code:
            sys.exit(f"a run ended with {code}; its output: {log}")
        (file,) = Path(folder).glob(f"*/{METRICS}")
        return seconds_between(file)


def table(seconds: pd.DataFrame) -> pd.DataFrame:
    """Returns seconds and ratios to the first recipe, each as median and range over rounds.

    Args:
        seconds: seconds of a step, a row per round and a column per recipe
    """
    ratios = seconds.div(seconds.iloc[:, 0], axis=0)
    told = {
        name: [f"{column.median():.2f} [{column.min():.2f}, {column.max():.2f}]" for _, column in figures.items()]
        for name, figures in (("seconds a step", seconds), ("ratio", ratios))
    }
    return pd.DataFrame(told, index=seconds.columns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_recipes(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="of a run, the first included; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.rounds < 1:
        parser.error(f"expected at least --steps 2 and --rounds 1, got {options.steps} and {options.rounds}")
    wanted = recipes_of(options.methods, options, parser)
    print(machine())
    print(f"threads {threads()} of {os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.1f}", flush=True)
    rounds = []
    for number in range(options.rounds):
        rounds.append({})
        for key, recipe in wanted.items():
            rounds[-1][key] = measure(recipe, options.steps, number, log_of(key, "steps"))
            print(f"round {number + 1}, {key}: {rounds[-1][key]:.2f} s a step", flush=True)
    print(f"load after {os.getloadavg()[0]:.1f}")
    print(table(pd.DataFrame(rounds)).to_string())


if __name__ == "__main__":
    main()
