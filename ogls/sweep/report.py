"""A report is what a study leaves behind: tables, plots and the best settings.

The files are `trials.csv`, `plots.html`, `curve.png`, and `best.yaml`, which `fit --config` takes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
from optuna import Study
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import (
    plot_intermediate_values,
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_pareto_front,
    plot_rank,
    plot_slice,
    plot_timeline,
)

from ogls.sweep import attempts
from ogls.sweep.curve import draw_curve
from ogls.sweep.definition import Options, Settings, Sweep
from ogls.sweep.process import arguments
from ogls.sweep.search_space import asked
from ogls.sweep.worker import SECONDS, VALUES, WHY, best_trial

_INTERACTING = 4  # most important parameters, of which each pair is plotted
_PLOTS = (plot_optimization_history, plot_slice, plot_parallel_coordinate)


def write_report(sweep: Sweep, settings: Settings, study: Study) -> list[Path]:
    """Writes the report into the study's folder and returns its files, the last two only once a trial is complete."""
    settings.place.mkdir(parents=True, exist_ok=True)
    files = [settings.place / "trials.csv", settings.place / "plots.html"]
    table(study, settings).to_csv(files[0], index=False)
    files[1].write_text(page(study, settings))
    best = best_trial(study)
    if best is not None:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        files.append(settings.place / "curve.png")
        draw_curve(complete, [trial.user_attrs[VALUES][0] for trial in complete], settings.study, files[-1])
        files.append(settings.place / "best.yaml")
        heading = f"# Trial {attempts.original(best)} of the study {settings.study}: accuracy {best.values[0]:.4f}\n"
        if not files[-1].exists() or not files[-1].read_text().startswith(heading):
            files[-1].write_text(heading + resolve(settings, options_of(sweep, best)))
    return files


def table(study: Study, settings: Settings) -> pd.DataFrame:
    """Returns one row per trial: its parameters, its values, those of each seed, its state and why."""
    names = ["accuracy", settings.against] if settings.against else ["accuracy"]
    rows = []
    for trial in attempts.latest(study):
        row = {"trial": attempts.original(trial), "state": trial.state.name, **trial.params}
        row |= dict(zip(names, trial.values or [], strict=False))
        for name, values in zip(names, trial.user_attrs.get(VALUES, []), strict=False):
            row |= {f"{name}_s{seed}": value for seed, value in enumerate(values, settings.first_seed)}
        rows.append(row | {"seconds": trial.user_attrs.get(SECONDS), "why": trial.user_attrs.get(WHY)})
    return pd.DataFrame(rows).sort_values("trial") if rows else pd.DataFrame(columns=["trial", "state"])


def options_of(sweep: Sweep, trial: FrozenTrial) -> Options:
    """Returns the options of `run.py` for a trial that was made."""
    return asked(sweep, trial.params)[1]


def resolve(settings: Settings, options: Options) -> str:
    """Returns the whole configuration of a point, as `run.py` prints it.

    Raises:
        ValueError: `run.py` does not accept the options.
    """
    command = [sys.executable, str(settings.script), "fit", *arguments(settings, options), "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if printed.returncode != 0:
        raise ValueError(f"run.py does not accept a trial's configuration:\n{printed.stderr.strip()}")
    return printed.stdout


def page(study: Study, settings: Settings) -> str:
    """Returns a page of HTML with those of Optuna's plots that the trials so far allow. It needs no network."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    figures = []
    if len(complete) > 1 and settings.against is None:
        figures += [plot(study, target_name="accuracy") for plot in _PLOTS]
        figures.append(plot_intermediate_values(study))
        if len({trial.value for trial in complete}) > 1:  # else there is nothing to attribute
            figures.append(plot_param_importances(study, target_name="accuracy"))
            names = list(get_param_importances(study))[:_INTERACTING]
            if len(names) > 1:
                figures.append(plot_rank(study, params=names, target_name="accuracy"))
    elif len(complete) > 1 and settings.against is not None:
        names = ["accuracy", settings.against]
        figures.append(plot_pareto_front(study, target_names=names))
        for index, name in enumerate(names):
            figures += [plot(study, target=lambda t, i=index: t.values[i], target_name=name) for plot in _PLOTS]
    if study.get_trials(deepcopy=False):
        figures.append(plot_timeline(study))
    parts = [figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures)]
    style = "<style>body {max-width: 1100px; margin: 1em auto; font-family: sans-serif}</style>"
    head = f'<meta charset="utf-8"><title>{settings.study}</title>{style}'
    return f"<!DOCTYPE html><html><head>{head}</head><body><h1>{settings.study}</h1>{''.join(parts)}</body></html>"
