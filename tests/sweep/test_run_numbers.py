"""What is read of a run's file, also while it is being written and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from ogls.sweep.run_numbers import RunNumbers


def test_a_file_that_grows(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    numbers = RunNumbers(file)
    assert numbers.update().accuracy == {}
    file.write_text('{"step": 0, "time": 1.5, "val/avg_at_8": 0.25}\n{"step": 1, "train/lo')
    assert numbers.update().accuracy == {0: 0.25}
    with file.open("a") as more:
        more.write(
            'ss": 2.0}\n{"step": 1, "val/avg_at_8": 0.5, "val/avg_at_8_low": 0.4, "val_with_solution/avg_at_8": 1}\n'
        )
    numbers.update()
    assert numbers.accuracy == {0: 0.25, 1: 0.5}
    assert (numbers.final_accuracy, numbers.last("train/loss")) == (0.5, 2.0)
    assert not numbers.finished
    with file.open("a") as more:
        more.write('{"step": 1, "final/avg_at_8": 0.5}\n')
    assert numbers.update().finished


def test_after_a_kill_the_later_line_holds_and_half_a_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "train/loss": %s}\n'
    file.write_text(whole % 1.0 + '{"step": 2, "train/lo' + whole % 3.0 + whole % 5.0)
    assert RunNumbers(file).update().last("train/loss") == 5.0


def test_mean_of_the_latest_rows(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}, "train/kl_target_student": {i}}}\n' for i in range(20)))
    assert RunNumbers(file).update().recent("train/kl_target_student") == sum(range(10, 20)) / 10


def test_a_file_that_is_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}, "val/avg_at_4": 0.{i}}}\n' for i in range(5)))
    numbers = RunNumbers(file).update()
    draft = tmp_path / "draft"
    draft.write_text('{"step": 0, "val/avg_at_4": 0.0}\n{"step": 1, "val/avg_at_4": 0.1}\n' + '{"step": 2}\n' * 20)
    draft.replace(file)
    assert numbers.update().accuracy == {0: 0.0, 1: 0.1}


def test_an_accuracy_that_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "val/avg_at_4": 1.0}\n{"step": 2, "val/avg_at_4": NaN, "train/loss": NaN}\n')
    assert RunNumbers(file).update().not_finite() == "accuracy is nan at step 2"


def test_a_metric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no val/avg_at_k"):
        RunNumbers(tmp_path / "metrics.jsonl").final_accuracy  # noqa: B018


def test_a_curve_of_the_subset_and_an_end_of_all(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 0, "val/avg_at_4": 0.1, "val_subset/avg_at_2": 0.2}\n{"step": 6, "val_subset/avg_at_2": 0.4}\n'
        '{"step": 9, "val/avg_at_4": 0.7, "val_subset/avg_at_2": 0.6}\n'
    )
    numbers = RunNumbers(file).update()
    assert numbers.accuracy == {0: 0.2, 6: 0.4, 9: 0.6}
    assert numbers.final_accuracy == 0.7
