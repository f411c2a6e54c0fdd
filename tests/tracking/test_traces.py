"""A sample of rollouts: which are taken, what is kept of them, and what MLflow then shows as traces."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Trace

from ogls.records import (
    Completion,
    Lesson,
    Phase,
    Problem,
    Reflection,
    Rollout,
    RolloutGroup,
    Span,
    Verdict,
    View,
)
from ogls.tasks.base import ErrorLocator
from ogls.tracking import Tracker, tracker
from ogls.tracking.files import ROLLOUTS, read_rows
from ogls.tracking.mlflow_run import MLflowRun
from ogls.tracking.replay import replay
from ogls.tracking.rollouts import drawn_of_step, drawn_of_validation, share, told
from ogls.tracking.traces import write


def rollout(ids: tuple[int, ...], correct: bool, text: str, reflection: Reflection | None = None) -> Rollout:
    completion = Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop")
    verdict = Verdict(correct=correct, status="graded", answer=text[-1])
    return Rollout(completion=completion, text=text, verdict=verdict, reflection=reflection)


def group(name: str = "sum") -> RolloutGroup:
    """One right rollout, and a wrong one whose tokens are 7 8 9."""
    made = (rollout((3, 4), True, "1+1=2"), rollout((7, 8, 9), False, "1+1=3"))
    problem = Problem(id=name, text="What is 1+1?", answer="2")
    return RolloutGroup(problem=problem, prompt_ids=(1, 2), rollouts=made, policy_version=4)


def decode(ids: Any) -> str:
    return " ".join(map(str, ids))


LESSON = Lesson(
    problem_id="sum",
    prompt_ids=(1, 2),
    token_ids=(7, 8, 9),
    token_weights=(0.5, 0.0, 1.0),
    views=(View(role="plain", prefix_ids=(1, 2)), View(role="success", prefix_ids=(1, 5))),
    advantage=-0.5,
)
PHASES = [
    Phase(lane="rollouts", name="generate", step=5, start=10.0, end=12.0),
    Phase(lane="rollouts", name="grade", step=5, start=12.0, end=12.5),
    Phase(lane="training", name="teacher", step=5, start=13.0, end=13.5),
    Phase(lane="training", name="teacher", step=5, start=14.0, end=14.5),
]


class AtThree(ErrorLocator):
    def locate(self, problem: Problem, text: str) -> Span | None:
        return (4, 5)


def wrong() -> dict[str, Any]:
    return told(group(), 1, "train", 5, PHASES, decode, [LESSON], AtThree())


def test_what_is_kept_of_a_rollout_by_hand() -> None:
    row = wrong()
    spans = {span.pop("name"): span for span in row.pop("spans")}
    assert row == {
        **{"key": "train/000005/sum/1", "step": 5, "split": "train", "problem": "sum", "place": 1},
        **{"group": "1 of 2 right", "policy_version": 4, "question": "What is 1+1?", "answer": "2"},
        **{"solution": None, "text": "1+1=3"},
        **{"correct": False, "status": "graded", "extracted": "3", "reward": 0.0, "advantage": -0.5},
        "error": {"span": [4, 5], "text": "3"},
    }
    assert spans == {
        "generate": {
            **{"start": 10.0, "end": 12.0, "inputs": {"prompt": "1 2", "tokens": 2}},
            "outputs": {"text": "1+1=3", "tokens": 3, "ended by": "stop"},
        },
        "grade": {
            **{"start": 12.0, "end": 12.5, "inputs": {"answer": "3", "expected": "2"}},
            "outputs": {"correct": False, "status": "graded"},
        },
        "teach": {
            **{"start": 13.0, "end": 14.5, "inputs": {"views": {"plain": ["1 2"], "success": ["1 5"]}}},
            "outputs": {"learned": ["7", "9"], "tokens": 2, "advantage": -0.5},
        },
    }


def test_a_reflection_says_where_the_error_is_and_a_right_rollout_has_none() -> None:
    quoted = Reflection(idea="count", quote="=3", span=(3, 5))
    made = RolloutGroup(
        problem=group().problem,
        prompt_ids=(1,),
        rollouts=(rollout((3,), True, "2"), rollout((7,), False, "1+1=3", quoted)),
        policy_version=0,
    )
    row = told(made, 1, "train", 1, PHASES, decode, [], AtThree())
    assert row["error"] == {"span": [3, 5], "text": "=3"}
    assert row["spans"][2]["outputs"] == {"idea": "count", "quote": "=3"}
    assert (row["spans"][2]["start"], row["spans"][2]["end"]) == (10.0, 10.0), "a phase that nobody timed"
    right = told(made, 0, "train", 1, PHASES, decode, [LESSON], AtThree())
    assert (right["error"], right["reward"], [span["name"] for span in right["spans"]]) == (
        None,
        1.0,
        ["generate", "grade"],
    )


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_the_steps_of_an_epoch_share_the_number(number: int, steps: int, epoch: int, seed: int) -> None:
    taken = [share(number, steps, epoch * steps + step, seed) for step in range(steps)]
    assert sum(taken) == number
    assert max(taken) - min(taken) <= 1
    assert taken == [share(number, steps, epoch * steps + step, seed) for step in range(steps)]


def test_which_steps_have_one_more_depends_on_epoch_and_seed() -> None:
    def taken(epoch: int, seed: int) -> list[int]:
        return [share(4, 8, epoch * 8 + step, seed) for step in range(8)]

    assert len({tuple(taken(epoch, seed)) for epoch in range(4) for seed in range(4)}) > 8


def test_rollouts_of_a_step_are_drawn_once_each_from_all() -> None:
    groups = [group(str(i)) for i in range(3)]
    names = [(g.problem.id, place) for g, place in drawn_of_step(groups, 4, 7, 0)]
    assert len(set(names)) == 4
    assert names == [(g.problem.id, place) for g, place in drawn_of_step(groups, 4, 7, 0)]
    assert len(drawn_of_step(groups, 100, 7, 0)) == 6
    seen = Counter((g.problem.id, place) for step in range(600) for g, place in drawn_of_step(groups, 1, step, 0))
    assert set(seen.values()) <= set(range(60, 145)), "about 100 each"


def test_validations_take_the_same_problems_whatever_their_order() -> None:
    groups = [group(str(i)) for i in range(20)]
    names = [g.problem.id for g, _ in drawn_of_validation(groups, 5, 1)]
    assert names == [g.problem.id for g, _ in drawn_of_validation(groups[::-1], 5, 1)]
    assert names != [g.problem.id for g, _ in drawn_of_validation(groups, 5, 2)]
    assert {place for _, place in drawn_of_validation(groups, 5, 1)} == {0}


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def begun(store: str, run_id: str | None = None) -> MLflowRun:
    made = MLflowRun(store, "ogls", "OPSD s0", {"folder": "opsd-0", "method": "OPSD", "seed": "0"}, False)
    made.run_id, made.resumed = run_id, run_id is not None
    made.open()
    return made


def traces_of(run: MLflowRun) -> list[Trace]:
    client, run_id = run.open()
    assert run.experiment_id is not None
    asked = f"request_metadata.`mlflow.sourceRun` = '{run_id}'"
    return list(client.search_traces(locations=[run.experiment_id], filter_string=asked))


def test_a_trace_is_what_was_kept(store: str) -> None:
    run, row = begun(store), wrong()
    assert write(run, [row]) == 1
    (trace,) = traces_of(run)
    assert [span.name for span in trace.data.spans] == ["rollout", "generate", "grade", "teach"]
    assert [span.parent_id is None for span in trace.data.spans] == [True, False, False, False]
    for kept, span in zip(row["spans"], trace.data.spans[1:], strict=True):
        assert (span.inputs, span.outputs) == (kept["inputs"], kept["outputs"])
        assert (span.start_time_ns, span.end_time_ns) == (1e9 * kept["start"], 1e9 * kept["end"])
    assert (trace.data.spans[0].inputs, trace.data.spans[0].outputs) == ({"question": "What is 1+1?"}, "1+1=3")
    assessments: list[Any] = trace.info.assessments
    said = {a.name: (a.feedback or a.expectation).value for a in assessments}
    assert said == {"correct": False, "reward": 0.0, "advantage": -0.5, "error_at": 0.8, "answer": "2"}
    assert {"step": "5", "split": "train", "problem": "sum", "group": "1 of 2 right", "method": "OPSD"}.items() <= (
        trace.info.tags.items()
    )
    assert (trace.info.request_time, trace.info.execution_duration) == (10_000, 4_500)
    assert trace.info.trace_metadata["mlflow.trace.session"] == "sum in opsd-0"
    assert trace.info.token_usage == {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}


def test_a_run_that_goes_on_writes_no_trace_twice(store: str) -> None:
    first, row = begun(store), wrong()
    write(first, [row])
    again = begun(store, first.run_id)
    later = {**row, "spans": [{**span, "start": span["start"] + 1, "end": span["end"] + 1} for span in row["spans"]]}
    assert write(again, [row, later]) == 0, "the same, and the same made again later"
    assert write(again, [{**row, "text": "1+1=4"}]) == 1
    (trace,) = traces_of(again)
    assert (trace.info.response_preview, len(trace.data.spans), len(trace.info.assessments)) == ("1+1=4", 4, 5)


def test_a_trace_that_was_cut_short_is_written_anew(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracing.client import TracingClient

    run = begun(store)
    with monkeypatch.context() as patch:
        patch.setattr(TracingClient, "start_trace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(run, [wrong()])
    again = begun(store, run.run_id)
    assert write(again, [wrong()]) == 1
    (trace,) = traces_of(again)
    assert (len(trace.data.spans), len(trace.info.assessments)) == (4, 5)


@pytest.mark.fault("tracking server away or hung")
def test_rollouts_of_a_run_whose_server_was_away_are_replayed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "_PATIENCE_SERVER", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracker(tracking_uri="http://127.0.0.1:9", folder=str(tmp_path), run_name="away", system_metrics=False)
    away.describe("OPSD", 0)
    away.configure("a: 1\n", {"a": 1})
    away.log_config()
    away.log_metrics({"train/loss": 1.0}, 5)
    away.append(ROLLOUTS, json.dumps(wrong()) + "\n")
    away.tell(lambda run: write(run, [wrong()]))
    away.finalize("success")
    for _ in range(2):
        replay(tmp_path / "away", store)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("ogls")
    assert experiment is not None
    (trace,) = client.search_traces(locations=[experiment.experiment_id])
    (row,) = read_rows(tmp_path / "away" / ROLLOUTS)
    assert trace.data.spans[0].outputs == row["text"]


@pytest.mark.parametrize(("key", "value"), [("traces", -1), ("register", "a/b")])
def test_settings_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        Tracker(**{key: value})
