"""Gold answers before training: what cannot be read or is not the only right answer is named, also for a user."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ogls.records import Problem
from ogls.tasks.by_kind import ByKind
from ogls.tasks.gold import complaint, gold_faults
from ogls.tasks.grading import GradingPool
from ogls.tasks.reasoning_gym import ReasoningGym
from tests.faults.nursery import Nursery
from tests.tasks.careless import Careless

TOOLS = '[{"Action": "go", "Action_Input": "{}"}]'


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(ByKind()) as pool:
        yield pool


def problems(*answers: str, kind: str = "math") -> list[Problem]:
    return [Problem(id=f"p{i}", text="?", answer=answer, kind=kind) for i, answer in enumerate(answers)]


@pytest.mark.fault("gold answer that cannot verify itself")
@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ("3*4=<<3*4=12>>12 pens\n#### 12", "math", "cannot be read"),
        ("The bisectors meet in one point.", "math", "cannot be read"),
        ("7:15a..", "math", "cannot be read"),
        ("2, 4, 6, ...", "math", "cannot be read"),
        ("Answers vary.", "math", "cannot be read"),
        ("NaN", "math", "stands for a missing value"),
        ("nan", "reasoning_gym", "stands for a missing value"),
        ("E", "mcq", "cannot be read"),
        ("12", "tooluse", "expected a JSON list"),
        ("12", "poem", "no verifier for kind 'poem'"),
        ("1 = 2", "math", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(pool: GradingPool, answer: str, kind: str, reason: str) -> None:
    (odd,) = problems(answer, kind=kind)
    sound = [Problem(id=f"fine-{i}", text="?", answer=str(i)) for i in range(3)]
    assert list(gold_faults([*sound, odd], pool)) == ["p0"]
    assert reason in gold_faults([odd], pool)["p0"]
    said = complaint([*sound, odd], gold_faults([*sound, odd], pool))
    assert "1 did not: p0 (" in said
    assert reason in said
    assert "\n" not in said


def test_all_offenders_are_in_one_message(pool: GradingPool) -> None:
    given = problems("5", "nan", "See the figure.", "6", "7:15a..", "1+1=<<1+1=2>>2\n#### 2")
    said = complaint(given, gold_faults(given, pool))
    assert "4 did not: p1, p2, p4, p5 " in said
    assert "'nan' stands for a missing value; 'See the figure.' cannot be read by the verifier" in said
    assert r"columns: {answer_pattern: '####\s*(.+)'}" in said


def test_equal_answers_of_several_problems_are_all_named(pool: GradingPool) -> None:
    given = problems("5", "nan", "5", "nan", "See it.", "See it.")
    assert gold_faults(given, pool).keys() == {"p1", "p3", "p4", "p5"}


@pytest.mark.fault("gold answer that cannot verify itself")
@pytest.mark.parametrize("wrong", ["", "xyzzy", "0", "nan"])
def test_a_verifier_that_takes_a_wrong_answer_for_right_is_found(wrong: str) -> None:
    with GradingPool(Careless(also=(wrong,))) as careless:
        faults = gold_faults(problems("5", "6"), careless)
        assert faults == {f"p{i}": f"beside '{5 + i}', {wrong!r} is graded right" for i in range(2)}
        assert gold_faults(problems(wrong or "7"), careless).keys() <= {"p0"}


@pytest.mark.fault("gold answer that cannot verify itself")
def test_the_gold_answer_of_another_problem_is_wrong() -> None:
    with GradingPool(Careless(digits=4)) as careless:
        assert gold_faults(problems("0.001", "0.002"), careless).keys() == {"p0", "p1"}
        assert gold_faults(problems("0.01", "0.02"), careless) == {}


def test_what_is_equal_in_fact_is_no_fault(pool: GradingPool) -> None:
    equal = ["0", "0.0", r"0 \text{ cm}", r"\frac{1}{2}", "0.5", "50%", r"\sqrt{8}", r"2\sqrt{2}", "1,2", "2, 1"]
    assert gold_faults(problems(*equal), pool) == {}
    assert gold_faults([*problems("A", "B", kind="mcq"), *problems(TOOLS, kind="tooluse")], pool) == {}
    assert gold_faults(list(ReasoningGym("chain_sum", size=5)), pool) == {}


def test_one_problem_and_none(pool: GradingPool) -> None:
    assert gold_faults(problems("5"), pool) == {}
    assert gold_faults([], pool) == {}


def test_thirty_thousand_problems_take_seconds(
    pool: GradingPool, record_property: Callable[[str, object], None]
) -> None:
    """Of one gold answer only one is checked: a data set of whole numbers has hundreds of them."""
    given = problems(*(str(i * i % 997) for i in range(30_000)))
    asked: list[int] = []
    grade = pool.grade
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "grade", lambda pairs: (asked.append(len(pairs)), grade(pairs))[1])
        start = time.monotonic()
        assert gold_faults(given, pool) == {}
        seconds = time.monotonic() - start
    distinct = len({problem.answer for problem in given})
    assert sum(asked) <= 6 * distinct
    assert seconds < 30
    record_property("figure", f"30,000 problems with {distinct} answers in {seconds:.1f} s")


# ---- the same through the command line ----


def settings(tiny_model: Path, train: Path, val: Path) -> list[str]:
    return [
        *("--config", "math.yaml", "--policy.model", str(tiny_model), "--policy.adapter", "null"),
        *("--policy.dtype", "float32", "--data.engine", "TransformersEngine", "--data.locator", "null"),
        *("--method.selection", "AllTokens", "--data.max_tokens", "6", "--data.evaluation.sampling.max_tokens", "6"),
        *("--data.train", "JsonlProblems", "--data.train.path", str(train)),
        *("--data.val", "JsonlProblems", "--data.val.path", str(val)),
        *("--data.problems_per_step", "2", "--data.group_size", "2", "--data.evaluation.samples", "1"),
        *("--data.steps_per_epoch", "1", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.logger.init_args.system_metrics", "false", "--trainer.logger.init_args.traces", "0"),
    ]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(nursery: Nursery, folder: Path, *args: str) -> tuple[int, str]:
    """Returns exit code and output of a run in a process of its own."""
    return nursery.run(folder, {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}, "fit", *args)


def error(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


SOUND = [{"id": f"sound-{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
ODD = [
    {"id": "worked", "problem": "3*4?", "answer": "3*4=<<3*4=12>>12\n#### 12"},
    {"id": "prose", "problem": "Where?", "answer": "The bisectors meet in one point."},
    {"id": "missing", "problem": "What?", "answer": float("nan")},
]
LONG = {"id": "long", "problem": "1+1 " * 300, "answer": "2"}


def test_a_fit_is_refused_in_one_line_that_names_all(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.jsonl", *SOUND, *ODD), write(tmp_path / "val.jsonl", *SOUND)
    code, output = fit(nursery, tmp_path, *settings(tiny_model, train, val))
    assert code == 2, output[-2000:]
    line = error(output)
    assert line.startswith("error: data.train: expected every gold answer to verify against itself and no wrong ")
    assert "3 did not: worked, prose, missing (" in line
    assert line.endswith("data.drop_unverifiable: true leaves them out")


def test_a_prompt_that_does_not_fit_is_refused_with_the_key_that_drops_it(
    nursery: Nursery, tiny_model: Path, tmp_path: Path
) -> None:
    train, val = write(tmp_path / "train.jsonl", *SOUND), write(tmp_path / "val.jsonl", *SOUND, LONG)
    code, output = fit(nursery, tmp_path, *settings(tiny_model, train, val))
    assert code == 2, output[-2000:]
    line = error(output)
    assert line.startswith("error: data.val: the prompt of problem 'long' has ")
    assert line.endswith(
        "context_length 256 leaves 250 beside the rollout; data.drop_long: true leaves out the 1 that are too long"
    )


def test_problems_are_dropped_counted_and_logged(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.jsonl", *SOUND, *ODD, LONG), write(tmp_path / "val.jsonl", *SOUND, LONG)
    drop = ["--data.drop_unverifiable", "true", "--data.drop_long", "true"]
    code, output = fit(nursery, tmp_path, *settings(tiny_model, train, val), *drop)
    assert code == 0, output[-2000:]
    assert "data.train: 4 of 8 problems are left, dropped are 3 unverifiable and 1 long" in output
    assert "data.val: 4 of 5 problems are left, dropped are 1 long" in output
    (file,) = tmp_path.glob("mlartifacts/*/artifacts/data.json")
    logged = json.loads(file.read_text())
    assert {name: (split["problems"], split["dropped"]) for name, split in logged.items()} == {
        "train": (4, {"unverifiable": 3, "long": 1}),
        "val": (4, {"long": 1}),
    }
    assert {split["source"] for split in logged.values()} == {"JsonlProblems"}
    assert [problem["id"] for problem in logged["train"]["first"]] == [row["id"] for row in SOUND]


def test_nothing_left_is_refused(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    train, val = write(tmp_path / "train.jsonl", *ODD), write(tmp_path / "val.jsonl", *SOUND)
    code, output = fit(nursery, tmp_path, *settings(tiny_model, train, val), "--data.drop_unverifiable", "true")
    assert code == 2, output[-2000:]
    assert error(output) == "error: data.train has no problems left: dropped are 3 unverifiable"


@pytest.mark.fault("verifier hangs, dies or eats memory")
def test_nested_columns_are_read_and_time_outs_counted(nursery: Nursery, tiny_model: Path, tmp_path: Path) -> None:
    """The rows are as of verl; every rollout of the step, two of one problem, takes its 3 seconds."""
    rows = [
        {"prompt": [{"role": "user", "content": row["problem"]}], "reward_model": {"ground_truth": [row["answer"]]}}
        for row in SOUND
    ]
    train, val = write(tmp_path / "train.jsonl", *rows), write(tmp_path / "val.jsonl", rows[0])
    columns = [
        arg
        for split in ("train", "val")
        for option, column in (("text", "prompt"), ("answer", "reward_model.ground_truth"))
        for arg in (f"--data.{split}.columns.{option}", column)
    ]
    verifier = ["--data.verifier", "tests.tasks.careless.Sleepy", "--data.problems_per_step", "1"]
    code, output = fit(nursery, tmp_path, *settings(tiny_model, train, val), *columns, *verifier)
    assert code == 0, output[-2000:]
    (file,) = tmp_path.glob("runs/*/metrics.jsonl")
    measured = {name: value for line in file.read_text().splitlines() for name, value in json.loads(line).items()}
    assert (measured["train/timeout_seconds"], measured["train/verdict_faults"]) == (6.0, 2)
    (told,) = tmp_path.glob("mlartifacts/*/artifacts/data.json")
    assert json.loads(told.read_text())["train"]["first"][0] == {"id": "train-1", "text": "0+1?", "answer": "1"}
