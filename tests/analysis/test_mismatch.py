"""Mixtures of hinted distributions, by hand and from a tiny model."""

from __future__ import annotations

from pathlib import Path

import mismatch
import numpy as np
import pytest


def test_the_nearest_mixture() -> None:
    p0 = np.array([0.5, 0.5])
    hinted = np.array([[0.9, 0.1], [0.8, 0.2]])
    assert mismatch.nearest_mixture(p0, hinted) == pytest.approx([0.0, 1.0])  # 0.3 away, the other 0.4
    mixtures = mismatch.compare(p0, hinted)
    assert mismatch.total_variation(p0, mixtures["nearest mixture"]) == pytest.approx(0.3)
    assert mixtures["mixture, equal weights"] == pytest.approx([0.85, 0.15])


def test_hints_that_are_followed_mix_to_anything() -> None:
    p0 = np.array([0.2, 0.3, 0.5])
    mixtures = mismatch.compare(p0, np.eye(3))
    assert mixtures["nearest mixture"] == pytest.approx(p0)
    assert mixtures["mixture, weights p0"] == pytest.approx(p0)


def test_a_model_is_asked(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy"
    mismatch.main(["--model", str(tiny_model), "--symbols", "012", "--out", str(out)])
    table = mismatch.pd.read_csv(out.with_suffix(".csv"), index_col="symbol")
    assert table.sum().to_numpy() == pytest.approx(1.0)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "total variation from p0, nearest mixture" in capsys.readouterr().out
