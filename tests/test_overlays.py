"""Methods as configurations: what the merged YAML builds, and that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ogls.cli import build
from ogls.lessons.advantage import GroupRelative
from ogls.lessons.privilege import (
    PeerOutcomes,
    ReferenceSolution,
    Several,
    ShortSuccesses,
    SuccessfulPeer,
    Unprivileged,
)
from ogls.lessons.reflection.privilege import CorrectiveIdea
from ogls.lessons.selection import AllTokens
from ogls.loss.divergence import JensenShannon
from ogls.loss.objective import Distillation, Likelihood, Mixture
from ogls.loss.policy_gradient import GRPO, Shifted
from ogls.loss.steering import BoundedSteering, OutcomeContrast, OutcomeSteering, Unsteered
from ogls.loss.topk import TopK
from ogls.policy.teacher import EMA
from tests.test_module import fit, module

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SDPO = Distillation(JensenShannon(), support=TopK(100), importance_cap=2.0)
PEERS = PeerOutcomes(max_peers=1)
ALL_PEERS = PeerOutcomes()
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sdpo": (
        {"objective": SDPO, "steering": Unsteered()},
        {"privilege": SuccessfulPeer(), "selection": AllTokens(), "advantage": None},
    ),
    "grpo": ({"objective": GRPO()}, {"privilege": Unprivileged(), "advantage": GroupRelative()}),
    "grpo_ogls_sd": (
        {"objective": Mixture((GRPO(), Distillation()), (1.0, 1.0)), "steering": OutcomeSteering()},
        {"privilege": PEERS, "advantage": GroupRelative()},
    ),
    "rlcsd": (
        {"objective": GRPO(shaping=Shifted()), "steering": OutcomeContrast()},
        {"privilege": PeerOutcomes(max_peers=1, exclude_self=True, learn_successes=True), "advantage": GroupRelative()},
    ),
    "srpo": (
        {"objective": Mixture((GRPO(), SDPO), (1.0, 1.0)), "steering": Unsteered()},
        {"privilege": SuccessfulPeer(rollouts="wrong"), "advantage": GroupRelative(routed=True)},
    ),
    "ogls_sd_v2": (
        {"objective": Mixture((Distillation(), Likelihood()), (1.0, 0.1)), "steering": OutcomeSteering()},
        {"privilege": Several((ALL_PEERS, ShortSuccesses()))},
    ),
    "trust_region": ({"steering": BoundedSteering()}, {"privilege": PEERS, "advantage": None}),
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


@pytest.mark.parametrize("base", ["math.yaml", "lab.yaml"])
@pytest.mark.parametrize("name", METHODS)
def test_an_overlay_builds_its_method_on_either_student(
    name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    built = build(["--config", base, "--config", f"{name}.yaml", "--trainer.accelerator", "cpu"], run=False)
    for part, expected in ((built.model, METHODS[name][0]), (built.datamodule, METHODS[name][1])):
        assert {key: getattr(part, key) for key in expected} == expected
    assert isinstance(built.model.teacher, EMA) == (name == "sdpo")
    assert built.trainer.logger.method == name  # pyright: ignore
    built.datamodule.close()


PUBLISHED = {
    "ogls_sd": ({"steering": OutcomeSteering(3.0, 100), "objective": Distillation(clip=0.05)}, ALL_PEERS, 1.1, 1.0),
    "opsd+qwen3_opsd": (
        {"steering": Unsteered(), "objective": Distillation(temperature=1.1, clip=0.05, one_sided=True)},
        *(ReferenceSolution(), 1.1, 0.95),
    ),
    "sdpo": ({"steering": Unsteered(), "objective": SDPO}, SuccessfulPeer(), 1.0, 1.0),
    "rosd": ({"steering": Unsteered(), "objective": SDPO}, CorrectiveIdea(), 1.0, 1.0),
}


@pytest.mark.parametrize("names", PUBLISHED)
def test_on_qwen3_an_overlay_is_the_published_recipe(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    overlays = [word for name in names.split("+") for word in ("--config", f"{name}.yaml")]
    here = ["--trainer.accelerator", "cpu"]
    for name in ("train", "val"):  # in place of data sets that have to be fetched
        here += [f"--data.{name}", "ogls.tasks.chains.Chains", f"--data.{name}.init_args.size", "8"]
    built = build(["--config", "qwen3_1.7b.yaml", *overlays, *here], run=False)
    method, privilege, temperature, top_p = PUBLISHED[names]
    assert {key: getattr(built.model, key) for key in method} == method
    assert built.datamodule.privilege == privilege
    assert (built.datamodule.sampling.temperature, built.datamodule.sampling.top_p) == (temperature, top_p)
    built.datamodule.close()


@pytest.mark.parametrize("name", METHODS)
def test_an_overlay_is_short(name: str):
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 20
    assert yaml.safe_load(text).keys() <= {"trainer", "model", "data"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains(name: str, tiny_model: Path, tmp_path: Path):
    model, data = METHODS[name]
    steering = {"steering": Unsteered()} if name == "grpo" else {}
    learner = module(tiny_model, **steering, **model, teacher=EMA(0.9))
    before = [p.detach().clone() for p in learner.policy.trainable().values()]
    losses = fit(tiny_model, tmp_path, learner, **data)
    assert len(losses) == 2
    assert any(losses)
    assert any((p != old).any() for p, old in zip(learner.policy.trainable().values(), before, strict=True))
