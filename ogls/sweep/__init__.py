"""Sweeps: a search space and an objective in, a study of training runs out.

    sweeps/NAME.py (space, objective) ── study ──> trial: one process a seed ──> runs/STUDY/STUDY-007-s0/metrics.jsonl
                                          │  │                                                  │
                        Optuna's storage ─┘  └─ MLflow: one parent run a study <── nested ── the trial's own runs

Optuna decides what is tried next and remembers it; a trial's numbers are read from the file that its run writes, so
that a tracking server that is away changes nothing. Optuna's database and MLflow's are never the same file.
"""

from ogls.sweep.definition import Sweep, override
from ogls.sweep.main import main
from ogls.sweep.run_numbers import RunNumbers

__all__ = ["RunNumbers", "Sweep", "main", "override"]
