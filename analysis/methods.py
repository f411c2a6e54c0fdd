"""Run methods over seeds and compare them: one command from configurations to tables and curves.

    python analysis/methods.py --config lab.yaml --methods opsd ogls_sd positive_mean --seeds 5 --jobs 2
    python analysis/methods.py --methods ogls_sd "ogls_sd --method.steering.alpha 2" --overlays lab_terse --out terse
    python analysis/methods.py --config lab.yaml --methods opsd+plain_kl+up_to_error --names

A recipe is the name of an overlay in experiments/, or several joined by "+", with arguments of its own behind them:
ogls_sd+error_span. Every recipe and seed is a run of its own, `experiments/run.py fit --config CONFIG --config
OVERLAY.yaml ...`, and becomes a line of NAME_rows.csv (see `stored_rows.py`). Tables and figures are made of that file
alone, so they can be completed over days: only runs that it lacks are made, and of those only what is not finished in
MLflow. A row whose configuration files or arguments have changed since is told, and made again. Of a run's checkpoints
none stays but the best model.

Tables and figures call a recipe by the name that its method derives from its choices, which is what its runs carry.
Where two recipes have the same name, what makes the difference follows in parentheses. --names prints the names and
runs nothing.

Writes NAME.md and NAME.csv (mean ± half of the 95 % interval over seeds; IQM is the interquartile mean over runs, and
over evaluation sets where there are several), NAME_paired.csv (differences to --against, paired by seed, by problem and
by both, with the number of seeds that a difference of --wanted needs: see `compare.py`), and NAME_accuracy.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from making import complete, finished
from mlflow import MlflowClient
from recipes import Recipe, recipes
from runs import comparison
from stored_rows import Row, read_rows, rows_file
from tables import write


def parser_of_recipes(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that say which recipes are wanted."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--config", default="lab.yaml", help="what all recipes share; default: %(default)s")
    parser.add_argument("--methods", nargs="+", required=True, metavar="RECIPE", help="overlays, several joined by +")
    parser.add_argument("--overlays", nargs="+", default=[], metavar="NAME", help="further ones, on top of each recipe")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="the rest goes to every run")
    return parser


def parser_of_runs(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that say which runs of which recipes are wanted."""
    parser = parser_of_recipes(doc)
    parser.add_argument("--names", action="store_true", help="print what each recipe is called, and run nothing")
    parser.add_argument("--seeds", type=int, default=5, help="0 to N - 1; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: %(default)s")
    parser.add_argument("--experiment", default="lab", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    return parser


def recipes_of(
    methods: Sequence[str], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, Recipe]:
    """Returns the recipes that a command line asks for. Each is parsed, as a run parses it, before hours of runs."""
    try:
        wanted = recipes(options.config, methods, options.overlays, options.args)
        for recipe in wanted.values():
            _ = recipe.name
    except ValueError as error:
        parser.error(str(error))
    return wanted


def named(wanted: Mapping[str, Recipe], options: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Returns whether runs are wanted. --names prints what each recipe is called, and wants none."""
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {options.seeds} and {options.jobs}")
    if options.names:
        width = max(map(len, wanted))
        print("\n".join(f"{key:{width}}  {recipe.name}" for key, recipe in wanted.items()))
    return not options.names


def rows_of(wanted: Mapping[str, Recipe], options: argparse.Namespace, out: Path) -> tuple[list[Row], int]:
    """Returns the rows of recipes after those that are missing were made, and how many runs failed."""
    file = rows_file(out)
    failed = complete(wanted, options.seeds, file, options.experiment, options.tracking_uri, options.jobs)
    rows = [row for row in read_rows(file) if row.recipe in wanted]
    if not rows:
        sys.exit("no run finished")
    return rows, failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument(
        "--against", metavar="RECIPE", help="one of --methods, for paired tests; default: opsd, else all pairs"
    )
    parser.add_argument("--wanted", type=float, default=0.02, help="difference to find by seeds; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("methods"), metavar="NAME", help="default: %(default)s")
    options = parser.parse_args(arguments)
    wanted = recipes_of(options.methods, options, parser)
    (against,) = recipes(options.config, [options.against or "opsd"])
    if options.against and against not in wanted:
        parser.error(f"--against: expected one of {', '.join(wanted)}, got {options.against}")
    if not named(wanted, options, parser):
        return
    rows, failed = rows_of(wanted, options, options.out)
    print(write(rows, against, options.out, options.wanted))
    print(f"written: {options.out}.md, .csv, _rows.csv, _paired.csv and _accuracy.png")
    client = MlflowClient(options.tracking_uri)
    if runs := [run for recipe in wanted.values() for run in finished(client, options.experiment, recipe).values()]:
        print(f"in MLflow: {comparison(client, options.tracking_uri, runs)}")
    end(failed)


def end(failed: int) -> None:
    """Ends the program with what to do, if runs failed."""
    if failed:
        sys.exit(f"{failed} runs failed; the same command makes them again")


if __name__ == "__main__":
    main()
