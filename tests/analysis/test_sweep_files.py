"""What the points of the sweep files stand for, as the methods' names say it; nothing is trained."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from optuna.trial import FixedTrial
from recipes import Recipe

from ogls.cli import build
from ogls.lessons.privilege import PeerOutcomes
from ogls.lessons.selection import UpToError
from ogls.loss.divergence import JensenShannon
from ogls.loss.objective import Distillation
from ogls.loss.steering import OutcomeSteering
from ogls.methods import OGLS_SD, OPSD
from ogls.tasks.chains import Chains

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
SELECTED = {"selection": UpToError(), "temperature": 1.0}
STEERED = {"privilege": PeerOutcomes(max_peers=1), "steering": OutcomeSteering()}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


def sweep_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SWEEPS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(options: Mapping[str, object], *overlays: str) -> str:
    """Returns what the method of a trial is called."""
    words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
    return Recipe(config="lab.yaml", overlays=overlays, arguments=tuple(words)).name


@pytest.mark.parametrize("name", sorted(file.stem for file in SWEEPS.glob("*.py")))
def test_every_file_loads(name: str) -> None:
    assert sweep_file(name).__doc__


def test_points_of_kl() -> None:
    kl = sweep_file("kl")
    options = kl.space(FixedTrial(kl.PAPER))
    assert options["model.learning_rate"] == 1e-4
    clipped = Distillation(clip=0.05)
    assert name_of(options) == OGLS_SD(objective=clipped, **STEERED, **SELECTED).name
    plain = ("opsd", "plain_kl", "up_to_error")
    assert name_of(options, *plain) == OPSD(objective=clipped, top_p=1.0, top_k=0, **SELECTED).name
    point = kl.PAPER | {"divergence": "JensenShannon", "beta": 0.25, "clip": 0.0, "temperature": 2.0}
    skewed = Distillation(JensenShannon(0.25), temperature=2.0)
    # The preset's own objective has a one-sided clip: nothing of it is left.
    assert name_of(kl.space(FixedTrial(point)), *plain) == OPSD(objective=skewed, top_p=1.0, top_k=0, **SELECTED).name


def test_points_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    data = sweep_file("data")
    options = data.space(FixedTrial(data.LAB | {"max_steps": 5, "group_size": 16, "refill_draws": 1}))
    words = [word for key, value in options.items() for word in (f"--{key}", json.dumps(value))]
    with pytest.raises(SystemExit):
        build(["fit", "--config", "lab.yaml", *words, "--print_config"])
    given = yaml.safe_load(capsys.readouterr().out)["data"]
    assert given["train"]["init_args"] | {"max_steps": 5, "parentheses": 0.7} == given["train"]["init_args"]
    for max_steps, parentheses in ((3, 0.0), (3, 1.0), (5, 1.0)):
        assert len(Chains(**given["train"]["init_args"] | {"max_steps": max_steps, "parentheses": parentheses})) == 8192
    assert given["val"]["init_args"]["max_steps"] == 3, "what is held out stays as it is"
    assert (given["group_size"], given["problems_per_step"], given["refill_draws"]) == (16, 8, 1)
    for point in ({"group_size": size} for size in (2, 4, 8)):
        options = data.space(FixedTrial(data.LAB | point))
        assert options["data.group_size"] * options["data.problems_per_step"] == 128


def test_points_of_steer_alpha() -> None:
    steer_alpha = sweep_file("steer_alpha")
    for point, alpha in ((steer_alpha.PAPER, 3.0), (steer_alpha.CONTROL, 0.0)):
        expected = OGLS_SD(
            privilege=PeerOutcomes(max_peers=4),
            steering=OutcomeSteering(alpha, 20),
            objective=Distillation(),
            **SELECTED,
        )
        assert name_of(steer_alpha.space(FixedTrial(point))) == expected.name
    found = steer_alpha.space(FixedTrial(steer_alpha.PAPER | {"max_peers": 2, "exclude_self": True}))
    assert "max_peers=2, exclude_self=True, ramp_steps=20, clip=None" in name_of(found)
