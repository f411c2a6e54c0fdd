"""A sweep turns a search space and an objective into a study of training runs.

    sweeps/NAME.py (space, objective) ── study ──> trial: one process per seed ──> runs/STUDY/STUDY-007-s0/metrics.jsonl
                                          │  │                                                    │
                        Optuna's storage ─┘  └─ MLflow: one parent run per study <── nested ── the trial's own runs

Optuna decides what is tried next and remembers it. A trial's numbers are read from the file that its run writes, so a
tracking server that cannot be reached changes nothing. Optuna's database and MLflow's are never the same file.
"""

from ogls.sweep.definition import Sweep, override
from ogls.sweep.main import main
from ogls.sweep.run_numbers import RunNumbers

__all__ = ["RunNumbers", "Sweep", "main", "override"]
