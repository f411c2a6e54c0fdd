"""Where a run's numbers go: `metrics.jsonl` in the run's folder, which is the truth, and MLflow, which is for looking.

    runs/<run name>/metrics.jsonl     one line a call: step, seconds since 1970, metrics
    runs/<run name>/checkpoints/      last.ckpt and the best one
    mlflow.db, mlartifacts/           what `mlflow ui` shows

    Tracker (the training thread) --calls--> Outbox (a queue and a thread) --> MLflowRun

A tracking server that is away costs neither time nor the run.
"""

from ogls.tracking.config import SaveConfig
from ogls.tracking.tracker import Tracker

__all__ = ["SaveConfig", "Tracker"]
