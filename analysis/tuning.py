"""Tune each method's rate and its own main setting, with the same budget for all: a study of `ogls.sweep` per recipe.

    python analysis/tuning.py                        (all recipes of LAB; the same command goes on where it was stopped)
    python analysis/tuning.py --recipes opsd grpo --trials 8

A trial is a run of 20 steps on the lab, with seed 1000, on other problems than those of `analysis/evidence.py`: they
are drawn with another seed, and no held-out problem is among those of the tables. The first three trials of a study
have the main setting that was published, at three rates; the others are Optuna's, and two of three end after 10 steps
(successive halving). All trials are kept in `analysis/results/tuning.csv`, a line each, of which `best` takes the most
accurate of each recipe. A recipe whose trials are all there, made here or on another machine, is not tuned again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import pandas as pd
from optuna import Trial

from ogls.sweep import Sweep, attempts, override
from ogls.sweep import main as carry_out
from ogls.sweep.process import written
from ogls.sweep.search_space import OPTIONS
from ogls.sweep.storage import open_storage
from ogls.sweep.worker import SECONDS
from ogls.tracking.files import replace_text

RESULTS = Path(__file__).resolve().parent / "results"
TRIALS = RESULTS / "tuning.csv"
BUDGET, SEED, PROBLEMS = 8, 1000, 346  # trials; seed of the runs; seed of the problems, held out from the tables'
RATES = (1e-5, 1e-3)
FIRST_RATES = (1e-4, 3e-4, 3e-5)
STORAGE = "sqlite:///sweeps.db"

Value = float | str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting is what a method has of its own to tune.

    Args:
        name: what the setting is called in tables
        values: lowest and highest value, between which the logarithm is uniform; or several words to choose from
        published: value that was published
        options: function from a value to the options of `run.py` that set it
    """

    name: str
    values: tuple[float, float] | tuple[str, ...]
    published: Value
    options: Callable[[Value], Mapping[str, object]]

    def space(self, trial: Trial) -> dict[str, object]:
        """Returns the options of `run.py` at a point: the rate, and this setting."""
        low, high = RATES
        rate = _rounded(trial.suggest_float("learning_rate", low, high, log=True))
        first, *_, last = self.values
        if isinstance(first, float) and isinstance(last, float):
            value: Value = _rounded(trial.suggest_float(self.name, first, last, log=True))
        else:
            value = trial.suggest_categorical(self.name, self.values)
        return {"model.learning_rate": rate, **self.options(value)}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _at(*keys: str) -> Callable[[Value], Mapping[str, object]]:
    return lambda value: dict.fromkeys(keys, value)


ALPHA = Setting(
    name="alpha",
    values=(0.25, 8.0),
    published=3.0,
    options=lambda alpha: {"method.steering.alpha": alpha, "method.steering.ramp_steps": 10},  # half of the run
)
CLIP = Setting(name="clip", values=(0.005, 1.0), published=0.05, options=_at("method.objective.clip"))
LAB: dict[str, Setting] = {
    "ogls_sd_published": ALPHA,
    "opsd": CLIP,
    "sdpo": Setting(
        name="EMA's rate",
        values=(0.005, 0.5),
        published=0.05,
        options=lambda rate: {"method.teacher.decay": _rounded(1 - float(rate))},
    ),
    "rosd": Setting(
        name="beta",
        values=(0.1, 0.9),
        published=0.5,
        options=lambda beta: {"method.objective.divergence": override("JensenShannon", beta=beta)},
    ),
    "grpo": Setting(
        name="per", values=("sequence", "token"), published="sequence", options=_at("method.objective.per")
    ),
    "sft": Setting(name="schedule", values=("constant", "linear"), published="constant", options=_at("model.schedule")),
    "positive_mean": CLIP,
    "positive_only": ALPHA,
    "rlcsd": Setting(
        name="strength",
        values=(0.05, 1.0),
        published=0.5,
        options=lambda strength: {
            "method.objective": override(
                "ogls.loss.policy_gradient.GRPO", shaping=override("Shifted", strength=strength)
            )
        },
    ),
    "opsd_ectr": Setting(
        name="alpha",
        values=(0.1, 4.0),
        published=0.5,
        options=lambda alpha: {
            "method.steering.alpha": alpha,
            "method.objective": override(
                "Distillation", clip=0.05, one_sided=True, weighting=override("ContrastWeight", alpha=alpha)
            ),
        },
    ),
    "sd_zero": Setting(
        name="divergence",
        values=("ReverseKL", "ForwardKL", "JensenShannon"),
        published="ReverseKL",
        options=_at("method.objective.divergence"),
    ),
    "sampled_token": Setting(
        name="temperature",
        values=(0.5, 1.5),
        published=1.0,
        options=_at("method.temperature", "method.objective.temperature"),
    ),
}
SELECTING = ("ogls_sd_published", "opsd", "sdpo", "positive_mean", "positive_only", "opsd_ectr", "sd_zero")
SELECTING += ("sampled_token",)
LAB |= {f"{recipe}+up_to_error": LAB[recipe] for recipe in SELECTING}
LAB["ogls_sd"] = Setting(
    name="alpha", values=(0.25, 8.0), published=1.0, options=_at("method.steering.alpha")
)  # the lab's own
"""Recipes, and what is tuned of each beside the rate. GRPO learns on-policy, where its clip does nothing."""


def sweep_of(recipe: str, setting: Setting) -> Sweep:
    """Returns the study of a recipe."""
    return Sweep(
        name=f"tuning-{recipe.replace('+', '.')}",
        space=setting.space,
        objective=lambda run: run.final_accuracy,
        first=[{"learning_rate": rate, setting.name: setting.published} for rate in FIRST_RATES],
    )


def command_line(recipe: str, trials: int) -> list[str]:
    """Returns the words with which a recipe's study is carried out."""
    configs = ["lab.yaml", *(f"{overlay}.yaml" for overlay in recipe.split("+"))]
    problems = [word for part in ("train", "val") for word in (f"--data.{part}.init_args.seed", str(PROBLEMS))]
    return [
        *(word for config in configs for word in ("--config", config)),
        *("--n-trials", str(trials), "--pruner", "halving", "--first-seed", str(SEED)),
        *("--storage", STORAGE, "--experiment", "tuning"),
        *("--", *problems),
    ]


def trials_of(recipe: str, study: optuna.Study) -> list[dict[str, object]]:
    """Returns one row per trial of a recipe's study that came to an end."""
    rows = []
    for trial in attempts.latest(study):
        if trial.state.is_finished():
            row = {"recipe": recipe, "trial": attempts.original(trial), "state": trial.state.name}
            row |= {"accuracy": trial.value if trial.state.name == "COMPLETE" else math.nan}
            row |= {"seconds": trial.user_attrs.get(SECONDS, math.nan)}
            rows.append(row | {"options": json.dumps(trial.user_attrs.get(OPTIONS, {}))})
    return rows


def keep(rows: Sequence[Mapping[str, object]], file: Path = TRIALS) -> None:
    """Puts a recipe's trials into the file in place of those it has of the recipe."""
    added = pd.DataFrame(rows)
    if file.exists():
        there = pd.read_csv(file)
        added = pd.concat([there[~there["recipe"].isin(added["recipe"])], added])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, added.sort_values(["recipe", "trial"]).to_csv(index=False))


def counted(file: Path = TRIALS) -> dict[str, int]:
    """Returns the number of trials of each recipe that the file has."""
    return dict(pd.read_csv(file)["recipe"].value_counts()) if file.exists() else {}


def best(file: Path = TRIALS, budget: int = BUDGET) -> dict[str, tuple[str, ...]]:
    """Returns the words of the command line that set each recipe as its most accurate trial, by recipe.

    A recipe whose budget is not spent yet has none.
    """
    if not file.exists():
        return {}
    found = {}
    for recipe, trials in pd.read_csv(file).groupby("recipe"):
        if len(trials) >= budget and trials["accuracy"].notna().any():
            options = json.loads(trials.loc[trials["accuracy"].idxmax(), "options"])
            found[recipe] = tuple(word for name, value in options.items() for word in (f"--{name}", written(value)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(LAB), choices=LAB, metavar="RECIPE", help="default: all")
    parser.add_argument("--trials", type=int, default=BUDGET, help="of each recipe; default: %(default)s")
    options = parser.parse_args(arguments)
    there = counted()
    for recipe in options.recipes:
        if there.get(recipe, 0) >= options.trials:  # made here or on another machine
            continue
        sweep = sweep_of(recipe, LAB[recipe])
        try:
            carry_out(sweep, command_line(recipe, options.trials))
        except SystemExit as ended:
            if ended.code == 2:
                raise
            study = optuna.load_study(study_name=sweep.name, storage=open_storage(STORAGE, attempts.requeue_killed))
            if rows := trials_of(recipe, study):
                keep(rows)
            if ended.code:
                raise


if __name__ == "__main__":
    main()
