"""Which divergence, clipped where, at which temperature and rate?

python sweeps/kl.py --n-trials 24 -- --config opsd.yaml --config plain_kl.yaml --config up_to_error.yaml
python sweeps/kl.py --study clip --grid clip=0,0.02,0.05,0.2 --seeds 3
"""

from __future__ import annotations

from optuna import Trial

from ogls.sweep import RunNumbers, Sweep, main, override

PAPER = {"divergence": "ForwardKL", "clip": 0.05, "temperature": 1.0, "learning_rate": 1e-4}  # the lab's rate
DIVERGENCES = ["ForwardKL", "ReverseKL", "JensenShannon"]


def space(trial: Trial) -> dict[str, object]:
    divergence = trial.suggest_categorical("divergence", DIVERGENCES)
    beta = {"beta": trial.suggest_float("beta", 0.1, 0.9)} if divergence == "JensenShannon" else {}
    clip = trial.suggest_categorical("clip", [0.0, 0.02, 0.05, 0.2])  # 0: none
    temperature = trial.suggest_float("temperature", 0.5, 2.0, log=True)
    return {
        "method.objective": override(
            "Distillation",
            divergence=override(f"{divergence}", **beta),
            clip=clip or None,
            one_sided=False,  # which presets have otherwise, and no clip forbids
            temperature=temperature,
        ),
        "model.learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
    }


def objective(run: RunNumbers) -> float:
    return run.final_accuracy


if __name__ == "__main__":
    ladder = {"divergence": DIVERGENCES, "learning_rate": [3e-5, 1e-4, 3e-4]}
    fixed = PAPER | {"beta": 0.5}
    main(Sweep(name="kl", space=space, objective=objective, first=[PAPER], ladder=ladder, fixed=fixed))
