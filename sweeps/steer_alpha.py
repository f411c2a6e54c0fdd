"""How strong, how soon, and from how many peers? Alpha, ramp, pool size and exclude_self of OGLS-SD.

python sweeps/steer_alpha.py --n-trials 24
python sweeps/steer_alpha.py --study ladder --grid --seeds 3
"""

from __future__ import annotations

from optuna import Trial

from ogls.sweep import RunNumbers, Sweep, main, override

PAPER = {"alpha": 3.0, "ramp_steps": 20, "max_peers": 4, "exclude_self": False}  # ramp-up, maximum 3, all peers
CONTROL = PAPER | {"alpha": 0.0}


def space(trial: Trial) -> dict[str, object]:
    alpha = trial.suggest_float("alpha", 0.0, 4.0)
    ramp_steps = trial.suggest_int("ramp_steps", 0, 40)
    max_peers = trial.suggest_int("max_peers", 1, 4)
    exclude_self = trial.suggest_categorical("exclude_self", [False, True])
    return {
        "method.steering": override("OutcomeSteering", alpha=alpha, ramp_steps=ramp_steps),
        "method.privilege": override("PeerOutcomes", max_peers=max_peers, exclude_self=exclude_self),
    }


def objective(run: RunNumbers) -> float:
    return run.final_accuracy


if __name__ == "__main__":
    ladder = {"alpha": [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]}
    fixed = PAPER | {"ramp_steps": 0}
    main(Sweep(name="alpha", space=space, objective=objective, first=[PAPER, CONTROL], ladder=ladder, fixed=fixed))
