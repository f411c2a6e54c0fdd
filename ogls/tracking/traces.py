"""Rollouts are traces in MLflow, so that its pages for language models show what the model writes.

A trace's id follows from the run and the rollout: a run that goes on, or is replayed, writes none twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ogls.tracking.mlflow_run import FOLDER, MLflowRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Assessment, Span, TraceInfo

_KINDS = {"generate": "LLM", "grade": "EVALUATOR", "reflect": "LLM", "teach": "TASK"}
_DIGEST = "ogls.digest"
_PREVIEW = 1000  # characters of question and answer in the list of traces


def write(run: MLflowRun, rows: Sequence[Mapping[str, Any]]) -> int:
    """Writes rollouts, as `ogls.tracking.rollouts.told` has them, as traces; returns how many were written.

    One that is there already is left as it is; one that came out otherwise when its step was made again is replaced.
    """
    from mlflow.tracing.client import TracingClient

    client, run_id = run.open()
    experiment_id = run.experiment_id
    assert experiment_id is not None
    tracing, written = TracingClient(run.uri), 0
    for row in rows:
        number = int(sha256(f"{run_id}/{row['key']}".encode()).hexdigest()[:32], 16)
        trace_id, digest = f"tr-{number:032x}", _digest(row)
        found = _found(client, experiment_id, trace_id) if run.resumed else None
        if found is not None:
            if found.trace_metadata.get(_DIGEST) == digest:
                continue
            client.delete_traces(experiment_id, trace_ids=[trace_id])
        whose = {"mlflow.sourceRun": run_id, _DIGEST: digest}
        tracing.log_spans(experiment_id, _spans(row, number, trace_id))
        tracing.start_trace(_info(row, run, trace_id, whose))  # last: its digest says that the trace is whole
        written += 1
    return written


def _digest(row: Mapping[str, Any]) -> str:
    """Returns a digest of all but the times, which are others each time that a step is made."""
    spans = [(span["name"], span["inputs"], span["outputs"]) for span in row["spans"]]
    return sha256(json.dumps({**row, "spans": spans}).encode()).hexdigest()[:16]


def _found(client: MlflowClient, experiment_id: str, trace_id: str) -> TraceInfo | None:
    """Returns what the store says of a trace; None where it has none of this id."""
    wanted = f"trace.request_id = '{trace_id}'"
    found = client.search_traces(locations=[experiment_id], filter_string=wanted, max_results=1, include_spans=False)
    return found[0].info if found else None


def _info(row: Mapping[str, Any], run: MLflowRun, trace_id: str, metadata: Mapping[str, str]) -> TraceInfo:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState

    assert run.experiment_id is not None
    start, end = _times(row)
    own = {name: str(row[name]) for name in ("step", "split", "problem", "group", "policy_version")}
    own |= {name: run.tags[name] for name in ("method", "seed") if name in run.tags}
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(run.experiment_id),
        request_time=int(1000 * start),
        execution_duration=int(1000 * (end - start)),
        state=TraceState.OK,
        request_preview=row["question"][:_PREVIEW],
        response_preview=row["text"][:_PREVIEW],
        client_request_id=trace_id,
        trace_metadata={
            **metadata,
            "mlflow.trace.session": f"{row['problem']} in {run.tags[FOLDER]}"[:250],
            "mlflow.trace.tokenUsage": json.dumps(_tokens(row["spans"][0])),
        },
        tags={"mlflow.traceName": f"{row['split']} {row['step']}", "run": run.name, **own},
        assessments=_assessments(row, trace_id, end),
    )


def _assessments(row: Mapping[str, Any], trace_id: str, end: float) -> list[Assessment]:
    """Returns what was said of a rollout: verdict, reward, advantage, and where it first goes wrong, from 0 to 1."""
    from mlflow.entities import AssessmentSource, Expectation, Feedback

    at = {"create_time_ms": int(1000 * end), "last_update_time_ms": int(1000 * end), "trace_id": trace_id}
    verifier, locator = (AssessmentSource("CODE", name) for name in ("verifier", "locator"))
    why = f"{row['status']}: the text answers {row['extracted']!r}, expected {row['answer']!r}"
    said: list[Assessment] = [
        Feedback(name="correct", value=row["correct"], source=verifier, rationale=why, **at),
        Feedback(name="reward", value=row["reward"], source=verifier, **at),
        Expectation(name="answer", value=row["answer"], source=AssessmentSource("CODE", "problem"), **at),
    ]
    if row["advantage"] is not None:
        said.append(Feedback(name="advantage", value=row["advantage"], source=verifier, **at))
    if row["error"] is not None:
        place = round(row["error"]["span"][0] / max(1, len(row["text"])), 3)
        said.append(Feedback(name="error_at", value=place, source=locator, rationale=row["error"]["text"], **at))
    return said


def _spans(row: Mapping[str, Any], number: int, trace_id: str) -> list[Span]:
    """Returns the span of the whole rollout, and below it one for each thing that was done."""
    from mlflow.entities import Span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode

    start, end = _times(row)
    root = {"name": "rollout", "start": start, "end": end}
    root |= {"inputs": {"question": row["question"]}, "outputs": row["text"]}
    made = []
    for place, span in enumerate([root, *row["spans"]], start=1):
        attributes = {
            "mlflow.traceRequestId": trace_id,
            "mlflow.spanType": _KINDS.get(span["name"], "CHAIN"),
            "mlflow.spanInputs": span["inputs"],
            "mlflow.spanOutputs": span["outputs"],
            **({"mlflow.chat.tokenUsage": _tokens(span)} if span["name"] == "generate" else {}),
        }
        made.append(
            Span(
                ReadableSpan(
                    span["name"],
                    SpanContext(number, place, is_remote=False),
                    parent=SpanContext(number, 1, is_remote=False) if place > 1 else None,
                    resource=Resource.get_empty(),
                    attributes={name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items()},
                    start_time=int(1e9 * span["start"]),
                    end_time=int(1e9 * span["end"]),
                    status=Status(StatusCode.OK),
                )
            )
        )
    return made


def _tokens(span: Mapping[str, Any]) -> dict[str, int]:
    """Returns the numbers of tokens of a generation, as MLflow calls them."""
    read, wrote = span["inputs"]["tokens"], span["outputs"]["tokens"]
    return {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}


def _times(row: Mapping[str, Any]) -> tuple[float, float]:
    return min(span["start"] for span in row["spans"]), max(span["end"] for span in row["spans"])
