"""Run methods over seeds and compare them: one command from configurations to tables and curves.

    python analysis/methods.py --config lab.yaml --methods opsd ogls_sd positive_mean --seeds 5 --jobs 2
    python analysis/methods.py --config lab.yaml --methods opsd ogls_sd --overlays lab_terse --out results/terse
    python analysis/methods.py --config lab.yaml --methods opsd+plain_kl+up_to_error --names

A recipe is the name of an overlay in experiments/, or several joined by "+": ogls_sd+error_span. Every recipe and seed
is a run of its own, `experiments/run.py fit --config CONFIG --config OVERLAY.yaml ...`. Runs that are finished in
MLflow and came from the same configuration files and arguments are not made again, so a command that was interrupted
goes on where it stopped. What the table says is of the last validation.

Tables and figures call a recipe by the name that its method derives from its choices, which is what its runs carry.
Where two recipes have the same name, the overlays that make the difference follow in parentheses. --names prints the
names and runs nothing.

Writes NAME.md and NAME.csv (mean ± half of the 95 % interval over seeds; IQM is the interquartile mean over runs, and
over evaluation sets where there are several), NAME_paired.csv (differences to --against, paired by seed, by problem and
by both, with the number of seeds that a difference of --wanted needs: see `compare.py`), and one NAME_MEASURE.png of
curves for each measure.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import yaml
from compare import compare_pairs, last_rows, markdown, scores_of
from curves import draw, half_width
from jsonargparse import ArgumentParser
from mlflow import MlflowClient
from runs import accuracy_by_problem, comparison, read
from seeds import interquartile_mean

from ogls.cli import build, find_configs
from ogls.methods import Method

PROJECT = Path(__file__).resolve().parents[1]
MEASURES = {"accuracy": "val/avg_at_{k}", "pass@{k}": "val/pass_at_{k}"}
MEASURES |= {"length": "val/length_mean", "KL to base": "val/kl_to_base"}
_OF_SET = "accuracy, "


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe is all that makes a run, but for its seed.

    Args:
        config: configuration at the bottom of the stack
        overlays: names of the configurations on top of it, without ``.yaml``
        arguments: further words of the command line
    """

    config: str
    overlays: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """Returns the options that name the configuration files."""
        names = [self.config, *(f"{overlay}.yaml" for overlay in self.overlays)]
        return [word for name in names for word in ("--config", name)]

    @property
    def text(self) -> str:
        """Returns the overlays in one word, which names log files."""
        return "+".join(self.overlays).replace("/", "-")

    @property
    def digest(self) -> str:
        """Returns a digest of the files' contents and the arguments: the tag by which a run is known again."""
        texts = [Path(file).read_text(encoding="utf-8") for file in find_configs(self.files)[1::2]]
        return hashlib.sha256("\x1f".join([*texts, *self.arguments]).encode()).hexdigest()[:12]

    @cached_property
    def name(self) -> str:
        """Returns the name that the method derives from its choices; its runs carry it as the tag `method`.

        The command line is parsed as a run parses it. Neither data sets nor weights are read.
        """
        sys.argv[1:] = ["fit", *self.files, *self.arguments, "--print_config"]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                build()
        except SystemExit as stopped:
            if stopped.code:
                print(f"in the recipe {self.text}", file=sys.stderr)
                raise
        parser = ArgumentParser()
        parser.add_argument("--method", type=Method)
        return parser.instantiate(
            parser.parse_object({"method": yaml.safe_load(printed.getvalue())["method"]})
        ).method.name

    def command(self, seed: int, experiment: str, tracking_uri: str) -> list[str]:
        """Returns the command of the run with this seed."""
        logger = {"experiment": experiment, "tracking_uri": tracking_uri, "tags": f'{{"recipe": "{self.digest}"}}'}
        return [
            *(sys.executable, str(PROJECT / "experiments" / "run.py"), "fit", *self.files),
            *("--seed_everything", str(seed)),
            *(part for name, value in logger.items() for part in (f"--trainer.logger.init_args.{name}", value)),
            *self.arguments,
        ]


def stack_of(recipe: str) -> tuple[str, ...]:
    """Returns the overlays of a recipe as it is written on the command line."""
    return tuple(name.removesuffix(".yaml") for name in recipe.split("+"))


def recipes(
    config: str, methods: Sequence[str], overlays: Sequence[str], arguments: Sequence[str]
) -> dict[str, Recipe]:
    """Returns the recipes by how they are written; `overlays` come on top of every recipe's own."""
    made = {}
    for method in methods:
        own = stack_of(method)
        stack = (*own, *(name for overlay in overlays for name in stack_of(overlay)))
        made["+".join(own)] = Recipe(config=config, overlays=stack, arguments=tuple(arguments))
    return made


def labels(made: Mapping[str, Recipe]) -> dict[str, str]:
    """Returns what tables and figures call each recipe: no two recipes alike.

    That is the name of its method; where several recipes have this name, with those of its overlays in parentheses that
    are not common to all of them.
    """
    sharing: dict[str, list[str]] = defaultdict(list)
    for key, recipe in made.items():
        sharing[recipe.name].append(key)
    found = {}
    for name, keys in sharing.items():
        common = set.intersection(*(set(made[key].overlays) for key in keys))
        stacks = {key: tuple(overlay for overlay in made[key].overlays if overlay not in common) for key in keys}
        if len(set(stacks.values())) < len(keys):  # the same overlays in another order
            stacks = {key: made[key].overlays for key in keys}
        found |= {key: f"{name} ({'+'.join(stack)})" if stack else name for key, stack in stacks.items()}
    return found


def finished(client: MlflowClient, experiment: str, recipe: Recipe) -> dict[int, str]:
    """Returns run ids by seed, the newest where a seed was run twice.

    A run of the same files whose method had another name, because the code gave it other defaults, does not count.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    where = f"attributes.status = 'FINISHED' and tags.recipe = '{recipe.digest}'"
    runs = client.search_runs([found.experiment_id], where, order_by=["attributes.start_time ASC"])
    own = [run for run in runs if run.data.tags.get("method") == recipe.name]
    return {int(run.data.tags["seed"]): run.info.run_id for run in own}


def make_runs(todo: Sequence[tuple[Recipe, int]], experiment: str, tracking_uri: str, jobs: int, logs: Path) -> int:
    """Makes runs, `jobs` at a time, one thread each, and returns how many failed.

    The output of each run goes to a file of its own, named by recipe and seed.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def make(job: tuple[Recipe, int]) -> bool:
        recipe, seed = job
        log, began = logs / f"{recipe.text}-s{seed}.log", time.monotonic()
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                recipe.command(seed, experiment, tracking_uri), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        state = "finished" if done.returncode == 0 else f"failed with {done.returncode}, see {log}"
        print(f"{recipe.text}, seed {seed}: {state} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not made for made in pool.map(make, todo))


def histories(client: MlflowClient, runs: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """Returns what `read` gives, by measure. k is the runs' own; a measure that none of them has is left out.

    Args:
        client: where the runs are
        runs: what tables and figures call the method of each run, by the run's id
    """
    logged = {name for run in runs for name in client.get_run(run).data.metrics}
    ks = {int(found[1]) for name in logged if (found := re.fullmatch(r"val/avg_at_(\d+)", name))}
    if len(ks) != 1:
        raise ValueError(f"expected runs with the same number of samples a held-out problem, got {sorted(ks)}")
    (k,) = ks
    named = {measure.format(k=k): metric.format(k=k) for measure, metric in MEASURES.items()}
    of_sets = re.compile(rf"val/(.+)/avg_at_{k}")
    named |= {f"{_OF_SET}{found[1]}": name for name in sorted(logged) if (found := of_sets.fullmatch(name))}
    there = {measure: metric for measure, metric in named.items() if metric in logged}
    found = {measure: read(client, "", list(runs), "", metric) for measure, metric in there.items()}
    return {measure: history.assign(method=history["run"].map(runs)) for measure, history in found.items()}


def sets_of(by_measure: Mapping[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """Returns the accuracies of each evaluation set, or those of all problems where there is one set alone."""
    return [history for name, history in by_measure.items() if name.startswith(_OF_SET)] or [by_measure["accuracy"]]


def tabulate(by_measure: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Returns one row per method, the most accurate first: seeds, steps, and of each measure mean and half interval.

    After the accuracy comes its interquartile mean over runs and sets.
    """
    columns: dict[str, pd.Series] = {}
    for measure, history in by_measure.items():
        values = last_rows(history).groupby("method")["value"]
        if not columns:
            columns |= {"seeds": values.size(), "steps": last_rows(history).groupby("method")["step"].max()}
        columns |= {measure: values.mean(), f"{measure} ±": values.apply(lambda seeds: half_width(list(seeds)))}
        if measure == "accuracy":
            sets = sets_of(by_measure)
            columns["IQM"] = pd.Series({name: interquartile_mean(scores_of(name, sets)) for name in values.groups})
    table = pd.DataFrame(columns).sort_values("accuracy", ascending=False)
    return table.reset_index(names="method")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `tabulate` for the eye: mean and interval in one cell."""
    cells = {}
    for name in [name for name in table.columns if not name.endswith(" ±")]:
        halves = table.get(f"{name} ±", pd.Series([float("nan")] * len(table)))
        cells[name] = [
            mean if not isinstance(mean, float) else f"{mean:.3f}" if pd.isna(half) else f"{mean:.3f} ± {half:.3f}"
            for mean, half in zip(table[name], halves, strict=True)
        ]
    return pd.DataFrame(cells)


def write(client: MlflowClient, runs: Mapping[str, str], against: str | None, out: Path, wanted: float) -> str:
    """Writes all files about some runs, and returns the text of NAME.md.

    Args:
        client: where the runs are
        runs: what tables and figures call the method of each run, by the run's id
        against: the method that all others are compared with, as it is called in `runs`; None compares every pair
        out: path of the files without their endings
        wanted: true difference for which the number of seeds is told
    """
    by_measure = histories(client, runs)
    accuracy = by_measure["accuracy"]
    last = last_rows(accuracy)
    problems = {
        run: accuracy_by_problem(client, run, int(step)) for run, step in zip(last["run"], last["step"], strict=True)
    }
    pairs = compare_pairs(accuracy, problems, against, wanted, sets_of(by_measure))
    table = tabulate(by_measure)
    text = markdown(shown(table)) + (f"\n{markdown(pairs)}" if len(pairs) else "")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    table.to_csv(out.with_suffix(".csv"), index=False)
    pairs.to_csv(out.with_name(f"{out.name}_paired.csv"), index=False)
    for measure, history in by_measure.items():
        name = re.sub(r"\W+", "_", measure.lower())
        draw(history, f"{measure}, held-out problems", out.with_name(f"{out.name}_{name}.png"))
    return text


def parser_of_runs(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that say which runs of which recipes are wanted."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--config", default="lab.yaml", help="what all recipes share; default: %(default)s")
    parser.add_argument("--methods", nargs="+", required=True, metavar="RECIPE", help="overlays, several joined by +")
    parser.add_argument("--overlays", nargs="+", default=[], metavar="NAME", help="further ones, on top of each recipe")
    parser.add_argument("--names", action="store_true", help="print what each recipe is called, and run nothing")
    parser.add_argument("--seeds", type=int, default=5, help="0 to N - 1; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: %(default)s")
    parser.add_argument("--experiment", default="lab", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="the rest goes to every run")
    return parser


def labelled(
    wanted: Mapping[str, Recipe], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, str]:
    """Returns what each recipe is called, before hours of runs; with --names it prints that and returns nothing."""
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {options.seeds} and {options.jobs}")
    try:
        label = labels(wanted)
    except ValueError as error:
        parser.error(str(error))
    if options.names:
        width = max(map(len, wanted))
        print("\n".join(f"{key:{width}}  {recipe.name}" for key, recipe in wanted.items()))
        return {}
    return label


def made_runs(wanted: Mapping[str, Recipe], options: argparse.Namespace) -> tuple[dict[str, dict[int, str]], int]:
    """Makes the runs that are not there yet; returns their ids by recipe and seed, and how many failed."""
    client = MlflowClient(options.tracking_uri)
    there = {key: finished(client, options.experiment, recipe) for key, recipe in wanted.items()}
    # Seed by seed, so that a table of all recipes is there early.
    todo = [(wanted[key], seed) for seed in range(options.seeds) for key in wanted if seed not in there[key]]
    print(f"{len(todo)} runs to make, {len(wanted) * options.seeds - len(todo)} are there")
    failed = make_runs(todo, options.experiment, options.tracking_uri, options.jobs, Path("runs") / "logs")
    there = {key: finished(client, options.experiment, recipe) for key, recipe in wanted.items()}
    runs = {key: {s: run for s, run in found.items() if s < options.seeds} for key, found in there.items()}
    if not any(runs.values()):
        sys.exit("no run finished")
    return runs, failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument(
        "--against", metavar="RECIPE", help="one of --methods, for paired tests; default: opsd, else all pairs"
    )
    parser.add_argument("--wanted", type=float, default=0.02, help="difference to find by seeds; default: %(default)s")
    parser.add_argument("--out", type=Path, default=PROJECT / "analysis" / "results" / "lab", metavar="NAME")
    options = parser.parse_args(arguments)
    wanted = recipes(options.config, options.methods, options.overlays, options.args)
    against = "+".join(stack_of(options.against or "opsd"))
    if options.against and against not in wanted:
        parser.error(f"--against: expected one of {', '.join(wanted)}, got {options.against}")
    label = labelled(wanted, options, parser)
    if not label:
        return
    found, failed = made_runs(wanted, options)
    client = MlflowClient(options.tracking_uri)
    runs = {run: label[key] for key, by_seed in found.items() for run in by_seed.values()}
    base = label.get(against)
    print(write(client, runs, base if base in runs.values() else None, options.out, options.wanted))
    print(f"written: {options.out}.md, .csv, _paired.csv, and a figure of each measure")
    end(client, options, list(runs), failed)


def end(client: MlflowClient, options: argparse.Namespace, runs: Sequence[str], failed: int) -> None:
    """Tells where MLflow compares the runs; if some failed, the program ends with what to do."""
    print(f"in MLflow: {comparison(client, options.tracking_uri, runs)}")
    if failed:
        sys.exit(f"{failed} runs failed; the same command makes them again")


if __name__ == "__main__":
    main()
