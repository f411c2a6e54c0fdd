"""Which problems, and how many rollouts of each? Chains, size of groups at equal rollouts, refilling.

python sweeps/data.py --n-trials 24 --pruner halving
python sweeps/data.py --study groups --grid group_size=2,4,8,16 --seeds 3
"""

from __future__ import annotations

from optuna import Trial

from ogls.sweep import RunNumbers, Sweep, main, override

ROLLOUTS = 128  # per step, whatever the size of a group
LAB = {"max_steps": 3, "parentheses": 0.7, "group_size": 4, "refill_draws": 0}


def space(trial: Trial) -> dict[str, object]:
    chains = {
        "max_steps": trial.suggest_int("max_steps", 3, 5),
        "parentheses": trial.suggest_float("parentheses", 0.0, 1.0),
    }
    group_size = trial.suggest_categorical("group_size", [2, 4, 8, 16])
    return {
        "data.train": override("Chains", size=8192, split="train", **chains),  # what is held out stays as it is
        "data.group_size": group_size,
        "data.problems_per_step": ROLLOUTS // group_size,
        "data.refill_draws": trial.suggest_int("refill_draws", 0, 2),
    }


def objective(run: RunNumbers) -> float:
    return run.final_accuracy


if __name__ == "__main__":
    ladder = {"group_size": [2, 4, 8, 16]}
    main(Sweep(name="data", space=space, objective=objective, first=[LAB], ladder=ladder, fixed=LAB))
