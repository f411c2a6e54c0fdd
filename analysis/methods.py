"""Run methods over seeds and compare them: one command from configurations to tables and curves.

    python analysis/methods.py --config lab.yaml --methods opsd ogls_sd positive_mean --seeds 5 --jobs 2
    python analysis/methods.py --config lab.yaml --methods opsd ogls_sd --overlays lab_terse --out results/terse

A method is the name of an overlay in experiments/, or several joined by "+": ogls_sd+error_only. Every method and seed
is a run of its own, `experiments/run.py fit --config CONFIG --config METHOD.yaml --config OVERLAY.yaml`. Runs that are
finished in MLflow and came from the same configuration files and arguments are not made again, so a command that was
interrupted goes on where it stopped. What the table says is of the last validation.

Writes NAME.md and NAME.csv (mean ± half of the 95 % interval over seeds), NAME_paired.csv (differences to --against,
paired by seed and by problem, see `compare.py`), and one NAME_MEASURE.png of curves for each measure.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from compare import compare_pairs, last_rows, markdown
from curves import draw, half_width
from mlflow import MlflowClient
from runs import accuracy_by_problem, read

from ogls.cli import find_configs

PROJECT = Path(__file__).resolve().parents[1]
MEASURES = {"accuracy": "val/avg_at_{k}", "pass@{k}": "val/pass_at_{k}"}
MEASURES |= {"length": "val/length_mean", "KL to base": "val/kl_to_base"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes a run, but for its seed: configuration files and arguments."""

    method: str
    configs: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the tracker takes it."""
        return self.method.replace("+", "-")

    @property
    def digest(self) -> str:
        """Of the files' contents and the arguments; the tag by which a run is known again."""
        files = find_configs([part for config in self.configs for part in ("--config", config)])[1::2]
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
        return hashlib.sha256("\x1f".join([*texts, *self.arguments]).encode()).hexdigest()[:12]

    def command(self, seed: int, experiment: str, tracking_uri: str) -> list[str]:
        logger = {"experiment": experiment, "method": self.name, "tracking_uri": tracking_uri}
        logger |= {"tags": f'{{"recipe": "{self.digest}"}}'}
        return [
            *(sys.executable, str(PROJECT / "experiments" / "run.py"), "fit"),
            *(part for config in self.configs for part in ("--config", config)),
            *("--seed_everything", str(seed)),
            *(part for name, value in logger.items() for part in (f"--trainer.logger.init_args.{name}", value)),
            *self.arguments,
        ]


def recipes(
    config: str, methods: Sequence[str], overlays: Sequence[str], arguments: Sequence[str]
) -> dict[str, Recipe]:
    """By name; `config`, then a method's own overlays, then those of all."""
    made = {}
    for method in methods:
        names = [*method.split("+"), *overlays]
        configs = (config, *(name if name.endswith(".yaml") else f"{name}.yaml" for name in names))
        recipe = Recipe(method=method, configs=configs, arguments=tuple(arguments))
        made[recipe.name] = recipe
    return made


def finished(client: MlflowClient, experiment: str, recipe: Recipe) -> dict[int, str]:
    """Run ids by seed; the newest where a seed was run twice."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    where = f"attributes.status = 'FINISHED' and tags.method = '{recipe.name}' and tags.recipe = '{recipe.digest}'"
    runs = client.search_runs([found.experiment_id], where, order_by=["attributes.start_time ASC"])
    return {int(run.data.tags["seed"]): run.info.run_id for run in runs}


def make_runs(todo: Sequence[tuple[Recipe, int]], experiment: str, tracking_uri: str, jobs: int, logs: Path) -> int:
    """Make them, `jobs` at a time, one thread each; the number of those that failed. Output goes to a file a run."""
    logs.mkdir(parents=True, exist_ok=True)

    def make(job: tuple[Recipe, int]) -> bool:
        recipe, seed = job
        log, began = logs / f"{recipe.name}-s{seed}.log", time.monotonic()
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                recipe.command(seed, experiment, tracking_uri), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        state = "finished" if done.returncode == 0 else f"failed with {done.returncode}, see {log}"
        print(f"{recipe.name}, seed {seed}: {state} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not made for made in pool.map(make, todo))


def histories(client: MlflowClient, runs: Sequence[str]) -> dict[str, pd.DataFrame]:
    """What `read` gives, by measure. k is the runs' own; a measure that none of them has is left out."""
    logged = {name for run in runs for name in client.get_run(run).data.metrics}
    ks = {int(found[1]) for name in logged if (found := re.fullmatch(r"val/avg_at_(\d+)", name))}
    if len(ks) != 1:
        raise ValueError(f"expected runs with the same number of samples a held-out problem, got {sorted(ks)}")
    (k,) = ks
    named = {measure.format(k=k): metric.format(k=k) for measure, metric in MEASURES.items()}
    return {measure: read(client, "", runs, "", metric) for measure, metric in named.items() if metric in logged}


def tabulate(by_measure: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a method, the most accurate first: seeds, steps, and of each measure mean and half interval."""
    columns: dict[str, pd.Series] = {}
    for measure, history in by_measure.items():
        values = last_rows(history).groupby("method")["value"]
        if not columns:
            columns |= {"seeds": values.size(), "steps": last_rows(history).groupby("method")["step"].max()}
        columns |= {measure: values.mean(), f"{measure} ±": values.apply(lambda seeds: half_width(list(seeds)))}
    table = pd.DataFrame(columns).sort_values("accuracy", ascending=False)
    return table.reset_index(names="method")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`tabulate` for the eye: mean and interval in one cell."""
    measures = [name.removesuffix(" ±") for name in table.columns if name.endswith(" ±")]
    cells = {
        name: [
            f"{mean:.3f}" if pd.isna(half) else f"{mean:.3f} ± {half:.3f}"
            for mean, half in zip(table[name], table[f"{name} ±"], strict=True)
        ]
        for name in measures
    }
    return pd.concat([table[["method", "seeds", "steps"]], pd.DataFrame(cells)], axis=1)


def write(client: MlflowClient, runs: Sequence[str], against: str | None, out: Path) -> str:
    """All files of these runs; the text of NAME.md."""
    by_measure = histories(client, runs)
    accuracy = by_measure["accuracy"]
    last = last_rows(accuracy)
    problems = {
        run: accuracy_by_problem(client, run, int(step)) for run, step in zip(last["run"], last["step"], strict=True)
    }
    table, pairs = tabulate(by_measure), compare_pairs(accuracy, problems, against)
    text = markdown(shown(table)) + (f"\n{markdown(pairs)}" if len(pairs) else "")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    table.to_csv(out.with_suffix(".csv"), index=False)
    pairs.to_csv(out.with_name(f"{out.name}_paired.csv"), index=False)
    for measure, history in by_measure.items():
        name = re.sub(r"\W+", "_", measure.lower())
        draw(history, f"{measure}, held-out problems", out.with_name(f"{out.name}_{name}.png"))
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="lab.yaml", help="what all methods share; default: %(default)s")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="overlays, several joined by +")
    parser.add_argument("--overlays", nargs="+", default=[], metavar="NAME", help="further ones, on top of each method")
    parser.add_argument("--seeds", type=int, default=5, help="0 to N - 1; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: %(default)s")
    parser.add_argument("--against", default="opsd", metavar="METHOD", help="of the paired tests; default: %(default)s")
    parser.add_argument("--experiment", default="lab", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=PROJECT / "analysis" / "results" / "lab", metavar="NAME")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="the rest goes to every run")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {options.seeds} and {options.jobs}")
    client = MlflowClient(options.tracking_uri)
    wanted = recipes(options.config, options.methods, options.overlays, options.args)
    there = {name: finished(client, options.experiment, recipe) for name, recipe in wanted.items()}
    # Seed by seed, so that a table of all methods is there early.
    todo = [(wanted[name], seed) for seed in range(options.seeds) for name in wanted if seed not in there[name]]
    print(f"{len(todo)} runs to make, {len(wanted) * options.seeds - len(todo)} are there")
    failed = make_runs(todo, options.experiment, options.tracking_uri, options.jobs, Path("runs") / "logs")
    runs = [
        run
        for recipe in wanted.values()
        for seed, run in finished(client, options.experiment, recipe).items()
        if seed < options.seeds
    ]
    if not runs:
        sys.exit("no run finished")
    against = options.against.replace("+", "-")
    print(write(client, runs, against if against in wanted else None, options.out))
    print(f"written: {options.out}.md, .csv, _paired.csv, and a figure of each measure")
    if failed:
        sys.exit(f"{failed} runs failed; the same command makes them again")


if __name__ == "__main__":
    main()
