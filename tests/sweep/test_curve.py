"""The interval beside a mean over seeds."""

from __future__ import annotations

import pytest

from ogls.sweep.curve import half_width


def test_interval_by_hand() -> None:
    # Standard deviation of 1, 2, 3 is 1; t(0.975, 2 degrees of freedom) is 4.3027; divided by the root of 3.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert half_width([0.5]) == 0.0
