"""Reflection-induced bias: by hand, where it must be nothing, and from a model, one forward pass per view."""

from __future__ import annotations

import math
from pathlib import Path

import bias
import numpy as np
import pytest
import states
import torch
from transformers import AutoModelForCausalLM

from ogls.loss.steering import OutcomeSteering
from tests.test_cli import small

LN3 = math.log(3)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


def sizes(z0: list[float], **shifts: list[float]) -> dict[str, float]:
    rows = {name: torch.tensor([shift], dtype=torch.float64) for name, shift in shifts.items()}
    found = bias.values_of(torch.tensor([z0], dtype=torch.float64), rows, [0])
    return {name: value.item() for name, value in found.items()}


def test_two_tokens_by_hand():
    """p0 = (3/4, 1/4), so a shift of (a, 0) has the standard deviation |a| sqrt(3) / 4."""
    found = sizes([LN3, 0.0], success=[4.0, 0.0], failure=[2.0, 0.0], target=[-LN3, 0.0])
    unit = math.sqrt(3) / 4
    assert found["std_success"] == pytest.approx(4 * unit)
    assert found["std_failure"] == pytest.approx(2 * unit)
    assert found["std_common"] == pytest.approx(3 * unit)
    assert found["std_contrast"] == pytest.approx(2 * unit)
    assert found["var_common"] / found["var_both"] == pytest.approx(9 / 10)
    assert (found["mass_plain"], found["mass_target"]) == (pytest.approx(0.75), pytest.approx(0.5))


def test_views_that_say_what_the_plain_teacher_says_have_no_bias():
    found = sizes([0.3, -1.0, 2.0], success=[0.0] * 3, failure=[0.0] * 3, target=[0.0] * 3)
    assert {value for name, value in found.items() if name.startswith(("std", "var"))} == {0.0}
    assert found["mass_success"] == found["mass_target"] == found["mass_plain"]


@pytest.mark.parametrize(("sign", "removed"), [(1.0, 1.0), (-1.0, 0.0)])
def test_the_contrast_removes_what_views_share_and_no_more(sign: float, removed: float):
    shift = np.array([0.5, -2.0, 1.0])
    found = sizes([0.3, -1.0, 2.0], success=shift.tolist(), failure=(sign * shift).tolist(), target=[0.0] * 3)
    assert found["std_contrast" if sign > 0 else "std_common"] == 0.0
    assert found["var_common"] / found["var_both"] == pytest.approx(removed)


def test_the_share_is_the_commons_by_the_parallelogram():
    rng = np.random.default_rng(0)
    z0, right, wrong = rng.normal(size=(3, 7))
    found = sizes(z0.tolist(), success=right.tolist(), failure=wrong.tolist())
    p0 = np.exp(z0) / np.exp(z0).sum()

    def var(v: np.ndarray) -> float:
        return float(np.cov(v, aweights=p0, ddof=0))

    common, contrast = var((right + wrong) / 2), var(right - wrong)
    assert found["var_common"] / found["var_both"] == pytest.approx(common / (common + contrast / 4))
    assert found["std_contrast"] == pytest.approx(math.sqrt(contrast))


def test_a_table_weighs_tokens_and_leaves_out_what_is_not_there():
    over = {name: np.array([1.0, 5.0]) for name in ("std_success", "std_target", "mass_plain")}
    over |= {"mass_success": np.array([1.0, 2.0]), "mass_target": np.array([2.0, 6.0])}
    table = bias.Measured(over=over, tokens=np.array([1.0, 3.0]), places=np.array([2.0, 2.0])).table()
    found = dict(zip(table["quantity"], table["value"], strict=True))
    assert found["size of v+"] == 6 / 4
    assert found["markers, plain teacher"] == 6 / 4
    assert found[bias.GAINED] == 2 / 4
    assert not {"size of v-", bias.RATIO, bias.REMOVED, "markers, ideas"} & found.keys()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_a_model_has_the_bias_of_its_logits(tiny_model: Path):
    """Compares with full logits in numpy, one forward pass per view."""
    with states.opened(small(tiny_model), None) as (model, data):
        lesson = max(states.of_wrong(data.make_batch(0)), key=lambda lesson: len(lesson.token_ids))
        (one,) = states.score(model, [lesson], pools=True)
        alpha = states.steering_of(model.method).alpha_at(0)
        assert isinstance(states.steering_of(model.method), OutcomeSteering)
        found = bias.token_values(one, alpha, [5, 9], model.policy.head)
        with pytest.raises(ValueError, match="a marker is one token, but"):
            bias.marker_ids(data.encoder, ["the reference solution"])
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids, count = lesson.token_ids, lesson.num_learned

    def logits(role: str) -> np.ndarray:
        prefixes = [view.prefix_ids for view in lesson.views if view.role == role]
        with torch.no_grad():
            rows = [network(torch.tensor([[*p, *ids]])).logits[0, len(p) - 1 :][:count] for p in prefixes]
        return torch.stack(rows).double().mean(0).numpy()

    def chances(z: np.ndarray) -> np.ndarray:
        powers = np.exp(z - z.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    z0, right, wrong = logits("plain"), logits("success"), logits("failure")
    p0 = chances(z0)

    def std(v: np.ndarray) -> np.ndarray:
        return np.sqrt((p0 * v**2).sum(-1) - (p0 * v).sum(-1) ** 2)

    np.testing.assert_allclose(found["std_common"], std((right + wrong) / 2 - z0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["std_contrast"], std(right - wrong), rtol=1e-3, atol=1e-5)
    for name, z in {"plain": z0, "failure": wrong, "target": z0 + alpha * (right - wrong)}.items():
        np.testing.assert_allclose(found[f"mass_{name}"], chances(z)[:, [5, 9]].sum(-1), rtol=1e-3)


def test_from_the_command_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bias.main([*small(tiny_model), "--markers", "1", "--places", "first", "--out", "found/bias"])
    table = bias.pd.read_csv("found/bias.csv").set_index("quantity")["value"]
    assert table["markers, plain teacher"] == pytest.approx(table["markers, student"], rel=1e-5)
    assert table[bias.REMOVED] > 0
    assert Path("found/bias.md").read_text().startswith("| quantity | value | 95 % interval |")
    assert Path("found/bias.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stopped:
        bias.main([*small(tiny_model), "--markers", "as given"])
    assert stopped.value.code == 2
