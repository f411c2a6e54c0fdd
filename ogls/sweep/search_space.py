"""A study has one search space: a worker whose sweep file says another may not join it."""

from __future__ import annotations

import json
import warnings

import optuna
from optuna import Study
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from ogls.sweep.definition import Options, Point, Sweep

OPTIONS = "options"  # attribute of a trial: what its point stands for
_FIRST = "search_space"  # attribute of a study, for as long as no trial is finished: a point and what it stands for


def asked(sweep: Sweep, point: Point) -> tuple[optuna.Trial, Options]:
    """Returns a trial of no study at a point, and the options of `run.py` for it.

    Raises:
        ValueError: the space does not have the point.
    """
    apart = optuna.create_study()
    apart.enqueue_trial(dict(point))
    trial = apart.ask()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fixed parameter")  # beyond what may be suggested now
        return trial, sweep.space(trial)


def keep_space(study: Study, trial: optuna.Trial, options: Options) -> None:
    """Writes into a new study what its space says at the point of a trial."""
    study.set_user_attr(_FIRST, {"point": trial.params, "says": _said(trial, options)})


def check_space(sweep: Sweep, study: Study) -> None:
    """Raises ValueError where the space says something else than it did at a point of the study."""
    first = study.user_attrs.get(_FIRST)
    recorded = [] if first is None else [(first["point"], first["says"])]
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if OPTIONS in trial.user_attrs:
            recorded.append((trial.params, _said(trial, trial.user_attrs[OPTIONS])))
    for point, there in recorded:
        try:
            here = _said(*asked(sweep, point))
        except ValueError as error:
            here, changed = {}, [str(error)]
        else:
            names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            changed = [f"{n}: {there.get(n, 'nothing')} there, {here.get(n, 'nothing')} here" for n in names]
        if changed:
            raise ValueError(
                f"the study {study.study_name!r} has another search space ({'; '.join(changed)}): its trials would not "
                "be comparable. Say --study NAME for a new study, or take the change of the space back"
            )


def _said(trial: optuna.Trial | optuna.trial.FrozenTrial, options: Options) -> dict[str, str]:
    """Returns what a space says at a point as text: the range of each parameter and the value of each option."""
    ranges = {name: _range(distribution_to_json(kind)) for name, kind in trial.distributions.items()}
    return ranges | {f"--{name}": json.dumps(value, sort_keys=True) for name, value in options.items()}


def _range(text: str) -> str:
    """Returns a distribution as text, such as ``Float low=0.0 high=4.0 log=False``."""
    told = json.loads(text)
    kept = [f"{name}={value}" for name, value in told["attributes"].items() if value is not None]
    return " ".join([told["name"].removesuffix("Distribution"), *kept])
