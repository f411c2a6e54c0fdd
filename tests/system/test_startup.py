"""What `--help` does not need is not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import sys
from ogls.system.startup import defer_torchmetrics
defer_torchmetrics()
from lightning import LightningModule
import torchmetrics
assert issubclass(torchmetrics.Metric, __import__("torch").nn.Module)
heavy = {"transformers", "sklearn", "scipy", "pandas"} & sys.modules.keys()
assert not heavy, f"imported with lightning: {heavy}"
assert not hasattr(torchmetrics, "__nothing__")
"""
WHOLE = """
core = torchmetrics.Metric
assert issubclass(torchmetrics.Accuracy, core) and torchmetrics.Metric is core
assert torchmetrics.functional.accuracy
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lightning_comes_without_every_metric() -> None:
    run(LIGHT)


@pytest.mark.slow
def test_the_other_metrics_are_there_when_they_are_asked_for() -> None:
    run(LIGHT + WHOLE)


def test_the_command_line_waits_for_transformers() -> None:
    """jsonargparse runs the TYPE_CHECKING blocks of the modules whose classes it reads."""
    run(
        "import sys; sys.argv = ['run.py', 'fit', '--config', 'math.yaml', '--help']\n"
        "from ogls.system.startup import defer_torchmetrics; defer_torchmetrics()\n"
        "from ogls.cli import build\n"
        "try: build()\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'peft', 'vllm', 'mlflow', 'scipy', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, f'imported for --help: {heavy}'"
    )
