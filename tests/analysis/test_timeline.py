"""A timeline whose shares and overlap are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import timeline

from ogls.records import Lane, Phase
from ogls.tracking.files import TRACE, TRACE_HEAD, read_trace, trace_lines


def phase(lane: Lane, name: str, step: int, start: float, end: float) -> Phase:
    return Phase(lane=lane, name=name, step=step, start=1.8e9 + start, end=1.8e9 + end)


# Steps of 10 s and, after a validation of 20 s, of 6 s, in which the rollouts of a third are sampled.
RUN = [
    phase("rollouts", "generate", 1, 0, 4),
    phase("rollouts", "grade", 1, 4, 5),
    phase("training", "teacher", 1, 5, 7),
    phase("training", "student", 1, 7, 10),
    phase("training", "validate", 1, 10, 30),
    phase("rollouts", "generate", 2, 30, 31),
    phase("rollouts", "generate", 3, 31, 35),
    phase("training", "wait", 2, 30, 32),
    phase("training", "student", 2, 32, 36),
]


def test_a_step_begins_where_training_or_validation_has_ended():
    steps = [(step, begin - 1.8e9, end - 1.8e9) for step, begin, end in timeline.steps_of(RUN)]
    assert steps == [(1, 0, 10), (2, 30, 36)]


def test_seconds_and_overlap_by_hand():
    second = timeline.within(RUN, 1.8e9 + 30, 1.8e9 + 36)
    assert timeline.seconds(second, "rollouts") == {"generate": 5}
    assert timeline.seconds(second, "training") == {"wait": 2, "student": 4}
    assert timeline.overlap(second) == 3  # from 32 to 35: who waits does not work
    assert timeline.seconds(timeline.within(RUN, 1.8e9 + 3, 1.8e9 + 6), "rollouts") == {"generate": 1, "grade": 1}


def test_one_command_makes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / TRACE).write_text(TRACE_HEAD + trace_lines(RUN) + '{"ph": "X", "na')  # cut short by a kill
    assert read_trace(tmp_path / TRACE) == RUN
    timeline.main([str(tmp_path), "--steps", "1", "2"])
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    # 16 s of steps: rollouts 10, training 9, both 3
    assert "8.0 s per step, of which rollouts 62%, training 56%, both at once 19%" in capsys.readouterr().out
    timeline.main([str(tmp_path)])  # without steps: those after the last validation
    assert "6.0 s per step" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        timeline.main([str(tmp_path), "--steps", "7", "9"])
    assert "no step from 7 to 9: the trace has 1 to 2" in capsys.readouterr().err
