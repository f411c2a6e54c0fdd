"""A run's numbers go to a file, which is the truth, and to MLflow for looking.

    runs/<run name>/metrics.jsonl     one line per call: step, seconds since 1970, metrics
    runs/<run name>/rollouts.jsonl    a sample of rollouts, which MLflow shows as traces
    runs/<run name>/problems/         after each validation, the accuracy of each held-out problem
    runs/<run name>/checkpoints/      last.ckpt and best.ckpt
    mlflow.db, mlartifacts/           what `mlflow ui` shows

    Tracker (the training thread) --calls--> Outbox (a queue and a thread) --> MLflowRun

A tracking server that cannot be reached costs a run neither time nor numbers.
"""

from ogls.tracking.tracker import Tracker, tracker_of

__all__ = ["Tracker", "tracker_of"]
