"""A run's last lines say what it has changed, and what to do next."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

from ogls.system.statistics import paired_difference
from ogls.tracking.files import CONFIG, PROBLEMS


def improvement(run: Path) -> str | None:
    """Returns how the accuracy of the same held-out problems has changed; None where there are no two validations.

    The interval is that of the mean of the problems' differences (`ogls.system.statistics.paired_difference`).

    Args:
        run: folder of the run
    """
    validations = {file: json.loads(file.read_text()) for file in sorted((run / PROBLEMS).glob("step-*.json"))}
    if len(validations) < 2:
        return None
    (_, before), *later = validations.items()
    alike = [(file, after) for file, after in later if after.keys() == before.keys()]
    if not alike:  # the problems were changed on the way
        return None
    file, after = alike[-1]
    found, count = paired_difference(before, after), len(before)
    first, last = sum(before.values()) / count, sum(after.values()) / count
    word = "Improved" if found.low > 0 else "Worse" if found.high < 0 else "No clear change"
    interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    step = int(file.stem.removeprefix("step-"))
    return f"{word}: {interval} on {count} held-out problems, {first:.3f} before and {last:.3f} after step {step}"


def next_commands(program: str, run: Path, checkpoint: Path, experiment: str, metric: str, tracking_uri: str) -> str:
    """Returns the commands that validate, export and compare what was trained, a line each.

    Args:
        program: path of `run.py`
        run: folder of the run
        checkpoint: file with the best weights
        experiment: name of the MLflow experiment
        metric: metric to compare by
        tracking_uri: MLflow's store
    """
    if checkpoint.is_relative_to(Path.cwd()):
        checkpoint = checkpoint.relative_to(Path.cwd())
    compare = str(Path(program).parent.parent / "analysis" / "compare.py")
    where = () if tracking_uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}" else ("--tracking-uri", tracking_uri)
    commands = (
        (program, "validate", "--config", str(run / CONFIG), "--ckpt_path", str(checkpoint)),
        (program, "export", "--ckpt_path", str(checkpoint), "--to", str(run / "model")),
        (compare, "--experiment", experiment, "--metric", metric, *where),
    )
    return "\n".join(f"  {shlex.join([_python(), *command])}" for command in commands)


def _python() -> str:
    """Returns ``python`` where that is the interpreter that runs, else its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
