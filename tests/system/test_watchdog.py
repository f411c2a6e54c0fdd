from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ogls.system.watchdog import TimeExpired, time_limit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.fault("engine hangs")
def test_a_phase_that_waits_is_interrupted_and_its_stack_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    start = time.monotonic()
    with pytest.raises(TimeExpired, match=r"generating did not end within 0\.2 s"), time_limit("generating", 0.2):
        time.sleep(60)
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGUSR2) == before
    told = capfd.readouterr().err
    assert "generating did not end within 0.2 s" in told
    assert "test_a_phase_that_waits_is_interrupted" in told


@pytest.mark.fault("engine hangs")
def test_a_phase_that_gives_signs_of_life_may_take_long_and_is_missed_soon_after_the_last() -> None:
    signs, start = [0], time.monotonic()

    def work() -> None:
        for _ in range(8):
            time.sleep(0.25)
            signs[0] += 1
        signs.append(round(1e3 * (time.monotonic() - start)))
        time.sleep(60)

    said = r"generating gave no sign of life for 1 s"
    with pytest.raises(TimeExpired, match=said), time_limit("generating", 1.0, signs=lambda: signs[0]):
        work()
    count, last = signs
    assert count == 8
    assert 0.9 < time.monotonic() - start - last / 1e3 < 5.0


def test_a_phase_that_ends_in_time_is_left_alone() -> None:
    for _ in range(100):
        with time_limit("quick", 5.0):
            pass
    with pytest.raises(ZeroDivisionError), time_limit("quick", 5.0):
        _ = 1 / 0


@pytest.mark.fault("engine hangs")
def test_a_phase_that_is_deaf_ends_the_process() -> None:
    code = (
        "import signal\nfrom ogls.system.watchdog import time_limit\n"
        "signal.signal = lambda *_: None  # SIGUSR2 stays ignored\n"
        "with time_limit('deaf', 0.1, grace=0.2):\n    while True: pass\n"
    )
    ignore = [sys.executable, "-c", "import signal; signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n" + code]
    done = subprocess.run(ignore, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "deaf cannot be interrupted" in done.stderr
