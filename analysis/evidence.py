"""Make a table of the project's evidence, or list all of them with what they cost: `make evidence [TABLE=NAME]`.

    python analysis/evidence.py                           (the list: rows that are there and missing, core hours)
    python analysis/evidence.py lab --jobs 2 --seeds 3    (makes the missing rows of three seeds, and the table)
    python analysis/evidence.py lab --rebuild             (the table from the rows that are there, in seconds)
    python analysis/evidence.py tuning                    (the settings that `lab` applies: see `tuning.py`)
    python analysis/evidence.py bias --seeds 5            (see `planted.py`; forecast: see `forecast.py`)
    python analysis/evidence.py views_legs                (see `views.py`)

Each table is declared once, in `TABLES`. Its runs become lines of analysis/results/NAME_rows.csv (see
`stored_rows.py`), from which NAME.md, NAME.csv, NAME_paired.csv and NAME_accuracy.png are written after every run (of
several train sets NAME.md and NAME.csv, see `matrix.py`), so that the command can be killed at any time; the same
command goes on, on another machine as well. At the end docs/evidence.md is written, too. Rows whose configuration files
have changed since are called stale and made again; trials of the tuning have no digest and are never called so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import forecast
import matrix
import pandas as pd
import planted
import questions
import surface
import tuning
import views
from making import complete, stale
from methods import end
from recipes import Recipe, recipes
from stored_rows import Row, read_rows, rows_file, sound
from tables import write

RESULTS = tuning.RESULTS
SECONDS = 60.0
"""Processor seconds of a run of the lab, 20 steps, until some were measured."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of evidence answers a question by runs of some recipes.

    Args:
        name: name of the table's files, and what the command line calls it
        question: question that it answers
        methods: recipes, as `methods.py` takes them
        seeds: number of seeds, 0 to N - 1
        against: recipe that all others are compared with; None compares every pair
        config: configuration at the bottom of every recipe
        overlays: names of configurations on top of every recipe
        arguments: words that go to every run
        tuned: whether every recipe has the settings of its best trial in `tuning.csv`
        crossed: recipes by train set and method, for a table of `matrix.py`
        axis: option of the command line over which NAME_by_setting.png is drawn, see `surface.py`
        seconds: processor seconds of a run, until some were measured
    """

    name: str
    question: str
    methods: tuple[str, ...]
    seeds: int = 5
    against: str | None = None
    config: str = "lab.yaml"
    overlays: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    tuned: bool = False
    crossed: Mapping[tuple[str, str], str] | None = None
    axis: str = ""
    seconds: float = SECONDS

    def recipes(self, trials: Path = tuning.TRIALS) -> dict[str, Recipe]:
        """Returns the recipes by how they are written, without those that are not tuned yet.

        Args:
            trials: file with the trials of the tuning
        """
        best = tuning.best(trials) if self.tuned else {}
        made = {}
        for method in self.methods:
            if not self.tuned or method in best:
                made |= recipes(self.config, [method], self.overlays, (*self.arguments, *best.get(method, ())))
        return made

    @property
    def heading(self) -> str:
        """Returns the question, and how it was asked."""
        settings = [f"`{self.config}`" + "".join(f" with `{overlay}`" for overlay in self.overlays)]
        settings += [f"`{' '.join(self.arguments)}`"] if self.arguments else []
        if self.tuned:
            settings.append(
                f"each method's rate and own main setting are the most accurate of {tuning.BUDGET} trials on other "
                "held-out problems and another seed (`tuning.csv`), and stand below"
            )
        if self.crossed:
            settings.append("± is half of the 95 % interval for new seeds on new problems, * is p < 0.05 after Holm's")
            return f"{self.question}\n\n{'; '.join(settings)} correction for all changes below.\n"
        how = f"{'; '.join(settings)}. ± is half of the 95 % interval over seeds; sampled and learned are thousands of "
        how += "tokens; seconds are the processor's, validations included, and more where other runs were beside."
        return f"{self.question}\n\n{how}\n"

    def write(self, rows: list[Row], results: Path = RESULTS) -> str:
        """Writes the table's files from its rows alone, and returns the text of NAME.md."""
        if self.crossed:
            return matrix.write(rows, self.crossed, results / self.name, self.heading)
        if self.axis:
            profiles = forecast.profiles_file(RESULTS / "forecast") if self.axis == ALPHA else None
            profile = profiles and pd.read_csv(profiles).query("student == 'own'")
            surface.draw(rows, self.axis, results / f"{self.name}_by_setting.png", profile)
        return write(rows, self.against, results / self.name, 0.02, self.heading)


def _options(method: str, **values: Sequence[object]) -> tuple[str, ...]:
    """Returns a recipe for every combination of values of some options."""
    names = [name.replace("__", ".") for name in values]
    return tuple(
        " ".join([method, *(f"--{name} {value}" for name, value in zip(names, point, strict=True))])
        for point in product(*values.values())
    )


ALPHA = "method.steering.alpha"
TUNED = "Which rate and main setting suit each method, with the same budget for all?"
STUDENT = questions.STUDENT
DOMAINS = matrix.crossed(("rosd", "opsd", "opsd+plain_kl+up_to_error"), tuple(questions.DOMAINS))
TABLES = (
    Table(
        name="default",
        question="What does the default run reach, and from wrong rollouts alone, and OPSD and ROSD, also at its cost?",
        config="math.yaml",
        methods=(
            *(questions.OWN, questions.WRONG_ONLY, questions.LOCATED, "rosd"),
            *(questions.AS_DEAR_OPSD, questions.AS_DEAR_ROSD),
        ),
        against=questions.OWN,
        arguments=("--policy.dtype", "bfloat16"),  # the engine's follows
        seconds=600.0,
    ),
    Table(
        name="legs",
        question="In natural language: what does each method reach on word problems, from the same start?",
        config="math.yaml",
        overlays=("legs",),
        methods=(
            *(questions.OWN, questions.WRONG_ONLY, questions.LOCATED, "rosd", "grpo", "sft"),
            *(questions.AS_DEAR_GRPO, questions.AS_DEAR_SFT),
        ),
        seeds=3,
        against=questions.OWN,
        arguments=("--policy.dtype", "bfloat16"),
        seconds=600.0,
    ),
    Table(
        name="science",
        question="In natural language: what does each method reach in SciKnowEval's physics, whose answers it guesses?",
        config="math.yaml",
        overlays=("science",),
        methods=(
            *("grpo", "sft", questions.OWN, questions.WRONG_ONLY, questions.LOCATED, "rosd"),
            *(questions.CHOICES_GRPO, questions.CHOICES_SFT, questions.CHOICES_ROSD),
        ),
        seeds=3,
        against=questions.OWN,
        arguments=("--policy.dtype", "bfloat16"),
        seconds=500.0,
    ),
    Table(
        name="lab",
        question="Which method teaches the lab's student best, as published and with a token selection?",
        methods=tuple(tuning.LAB),
        seeds=10,
        against="opsd",
        tuned=True,
    ),
    Table(
        name="rosd",
        question="What of ROSD makes the difference: idea, place, or the reflector's being right?",
        methods=(
            *(f"{name}{STUDENT}" for name in ("rosd", "rosd_idea_only", "rosd_place_only", "rosd_shifted")),
            *(f"{name}{STUDENT}" for name in ("rosd_shuffled", "rosd_random")),
            *("rosd_exact", "rosd_no_reflector"),
        ),
        against=f"rosd{STUDENT}",
    ),
    Table(
        name="families",
        question="Where ideas decide, what of ROSD makes the difference? (reflections are exact: one thing at a time)",
        config="families.yaml",
        methods=(
            *("rosd_exact", "rosd_exact+shuffle_ideas", "rosd_idea_only+exact_reflections"),
            *("rosd_place_only+exact_reflections", "rosd_shifted+exact_reflections", "rosd_random+exact_reflections"),
            *("rosd_no_reflector", "rosd", "opsd", "ogls_sd", "sft", "grpo", "sdpo"),
        ),
        against="rosd_exact",
    ),
    Table(
        name="domains",
        question="What do methods that are trained on four families of problems do on these and on eleven others?",
        config="families.yaml",
        overlays=("families_each",),
        methods=tuple(DOMAINS.values()),
        crossed=DOMAINS,
        seeds=3,
        seconds=100.0,
    ),
    Table(
        name="surface",
        question="How do alpha, clip and divergence of OGLS-SD act together?",
        methods=tuple(
            cell
            for clip in ("ogls_sd", "ogls_sd --method.objective.clip 0.05")  # the lab has none
            for cell in _options(
                clip, method__objective__divergence=("ForwardKL", "ReverseKL"), method__steering__alpha=(0.5, 1, 2, 4)
            )
        ),
        seeds=3,
        axis=ALPHA,
        against="ogls_sd --method.objective.divergence ForwardKL --method.steering.alpha 1",
    ),
    Table(
        name="pools",
        question="How many attempts should a pool of OGLS-SD have, and with the rollout itself or without it?",
        methods=_options(
            "ogls_sd",
            method__privilege__max_peers=(1, 2, 4),  # a group has 4
            method__privilege__exclude_self=("false", "true"),
        ),
        axis="method.privilege.max_peers",
        against="ogls_sd --method.privilege.max_peers 4 --method.privilege.exclude_self false",
    ),
    Table(
        name="thinking",
        question="Should a student that can think do so in training, and its teacher?",
        overlays=("lab_thinking",),
        methods=tuple(
            f"{method}{style}" for method in questions.THOUGHTFUL for style in ("", questions.NEITHER, questions.BOTH)
        ),
        seeds=3,
        seconds=100.0,
    ),
    Table(
        name="staleness",
        question="What do rollouts cost that are up to 1, 2, 4 and 8 updates old, with a cap of 2 on the ratio?",
        methods=_options("ogls_sd --method.objective.importance_cap 2", data__mini_batches=(1, 2, 3, 5, 9)),
        axis="data.mini_batches",
        against="ogls_sd --method.objective.importance_cap 2 --data.mini_batches 1",
    ),
    Table(
        name="groups",
        question="Many problems or large groups, at 128 rollouts a step?",
        methods=tuple(
            f"ogls_sd --data.group_size {size} --data.problems_per_step {128 // size}" for size in (2, 4, 8, 16)
        ),
        against="ogls_sd --data.group_size 4 --data.problems_per_step 32",
    ),
)


SCRIPTS = {"bias": planted.main, "forecast": forecast.main, "tuning": tuning.main}
SCRIPTS |= dict.fromkeys(views.KEPT, views.main)
"""Tables whose rows are not runs alone, by the function that makes them."""


def state(table: Table, results: Path = RESULTS, trials: Path = tuning.TRIALS) -> dict[str, object]:
    """Returns how much of a table is there, and what it costs in hours of a core, from measured seconds a run."""
    wanted, rows = table.recipes(trials), read_rows(rows_file(results / table.name))
    there = [row for row in rows if row.recipe in wanted and sound(row, wanted)]
    seconds = pd.Series([row.seconds for row in rows], dtype=float).mean()
    hours = (table.seconds if pd.isna(seconds) else seconds) / 3600
    every = len(table.methods) * table.seeds
    missing = every - sum(row.seed < table.seeds for row in there)
    return {
        "table": table.name,
        "rows": len(there),
        "missing": missing,
        "stale": len(rows) - len(there),
        "not tuned": len(table.methods) - len(wanted),
        "core hours": round(every * hours, 1),
        "to make": round(missing * hours, 1),
        "question": table.question,
    }


def listing(tables: Sequence[Table], results: Path = RESULTS, trials: Path = tuning.TRIALS) -> str:
    """Returns all tables, one line each, and the tuning among them."""
    told = [state(table, results, trials) for table in tables]
    cells, runs = len(planted.ARMS) * len(planted.SHARES), len(forecast.STUDENTS) * len(forecast.ALPHAS)
    styles, alphas = planted.read_rows(rows_file(results / "bias")), read_rows(rows_file(results / "forecast"))
    foretold, tried = forecast.wanted(), sum(tuning.counted(trials).values())
    foreseen = sum(sound(row, foretold) for row in alphas)
    others = (  # name, question, rows, those of them that are not stale, all, seconds of one
        ("bias", planted.QUESTION, len(styles), sum(map(planted.sound, styles)), planted.SEEDS * cells, 90.0),
        ("forecast", forecast.QUESTION, len(alphas), foreseen, forecast.SEEDS * runs, SECONDS),
        ("tuning", TUNED, tried, tried, len(tuning.LAB) * tuning.BUDGET, 0.7 * SECONDS),
    )
    seen = {name: views.sound(results / name) for name in views.KEPT if (results / f"{name}.csv").is_file()}
    others += tuple(
        (name, views.QUESTION, int(name in seen), int(seen.get(name, False)), 1, 900.0) for name in views.KEPT
    )
    for name, question, rows, there, every, seconds in others:
        hours = {"core hours": round(every * seconds / 3600, 1), "to make": round((every - there) * seconds / 3600, 1)}
        row = {"table": name, "rows": there, "missing": every - there, "stale": rows - there, "not tuned": 0}
        told.append(row | hours | {"question": question})
    return pd.DataFrame(told).to_string(index=False, justify="left")


def write_page() -> None:
    """Writes docs/evidence.md, the answers to referees' questions, from the rows of all tables."""
    rows = {table.name: read_rows(rows_file(RESULTS / table.name)) for table in TABLES}
    questions.PAGE.write_text(questions.page(rows, measured()), encoding="utf-8")


def measured() -> dict[str, dict[str, str]]:
    """Returns the answers that are no differences between runs, by question and by what gives them."""
    return {
        "`make evidence TABLE=bias`": planted.answers(RESULTS / "bias"),
        "`make evidence TABLE=forecast`": forecast.answers(RESULTS / "forecast"),
        **{
            f"`make evidence TABLE={name}`": views.told(RESULTS / name, about)
            for name, (about, _) in views.KEPT.items()
        },
    }


def unused(script: str) -> tuple[str, ...]:
    """Returns the options that one of `SCRIPTS` has no use for: none makes rows side by side, and not all make runs."""
    if script in views.KEPT:
        return "jobs", "seeds", "experiment", "tracking_uri"
    return ("jobs", "seeds", "experiment", "tracking_uri", "results") if script == "tuning" else ("jobs",)


def carry_out(options: argparse.Namespace) -> None:
    """Makes one of `SCRIPTS`, and then docs/evidence.md."""
    out = ["--out", str(options.results / options.table)]
    if options.table in views.KEPT:
        if not options.rebuild:  # their figures are all that they have
            SCRIPTS[options.table]([*views.KEPT[options.table][1].split(), *out])
    elif options.table == "tuning":
        if not options.rebuild:
            SCRIPTS[options.table]([])
    else:
        seeds = 0 if options.rebuild else options.seeds
        words = [*out, "--tracking-uri", options.tracking_uri, "--experiment", options.experiment]
        SCRIPTS[options.table](words + ([] if seeds is None else ["--seeds", str(seeds)]))
    if options.results == RESULTS:
        write_page()


def main(arguments: Sequence[str] | None = None) -> None:
    tables = {table.name: table for table in TABLES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", nargs="?", choices=[*tables, *SCRIPTS], help="default: list them all")
    parser.add_argument("--seeds", type=int, help="0 to N - 1; default: the table's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="run nothing: the table from the rows that are there")
    parser.add_argument("--experiment", default="evidence", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.table is None:
        return print(listing(TABLES, options.results))
    if options.table in SCRIPTS:
        for name in unused(options.table):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"{options.table} has no use for --{name.replace('_', '-')}: leave it out")
        return carry_out(options)
    table = tables[options.table]
    seeds, file = table.seeds if options.seeds is None else options.seeds, rows_file(options.results / table.name)
    if seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {seeds} and {options.jobs}")
    wanted, failed = table.recipes(), 0
    try:
        if waiting := [method for method in table.methods if method not in wanted]:
            print(f"not tuned yet, so not run: {', '.join(waiting)}; first make evidence TABLE=tuning", file=sys.stderr)
        if not options.rebuild:
            where = options.experiment, options.tracking_uri
            update = lambda: table.write(read_rows(file), options.results)  # noqa: E731 - nothing else calls it
            failed = complete(wanted, seeds, file, *where, options.jobs, update)
        rows = read_rows(file)
        if not rows:
            parser.error(f"{file} has no rows: make some without --rebuild" if options.rebuild else "no run finished")
        if old := [row.recipe for row in rows if row.recipe not in wanted or not sound(row, wanted)]:
            print(stale(file, old), file=sys.stderr)
        print(table.write(rows, options.results))
        if options.results == RESULTS:
            write_page()
    except ValueError as error:
        parser.error(str(error))
    print(f"written: the files {options.results / table.name}*, from {len(rows)} rows")
    end(failed)


if __name__ == "__main__":
    main()
