"""Rows of the forms that real data sets have, and files of the formats: read, or told how, at the command line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ogls.cli import main
from ogls.records import Problem
from ogls.tasks.columns import Columns
from ogls.tasks.tables import HubProblems, JsonlProblems

ROWS = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "2+3?", "answer": "5", "system": "Hm."}]
PROBLEMS = [
    Problem(id="a", text="1+1?", answer="2"),
    Problem(id="b", text="2+3?", answer="5", system="Hm."),
]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, row: dict[str, Any], **columns: str) -> Problem:
    return JsonlProblems(lines(path / "rows.jsonl", row), columns=Columns(**columns))[0]


def test_nested_columns_and_messages(tmp_path: Path) -> None:
    row = {
        "source": "own",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many days has May?"}],
        "reward_model": {"style": "rule", "ground_truth": "31"},
        "extra_info": {"index": 7},
    }
    columns = {"text": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
    expected = Problem(id="7", text="How many days has May?", answer="31", system="Be brief.")
    assert read(tmp_path, row, **columns) == expected
    row["prompt"] = row["prompt"][1:]
    assert read(tmp_path, row, **columns).system is None
    row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "How many days "}, {"text": "has May?"}]}]
    assert read(tmp_path, row, **columns).text == expected.text
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    found = read(tmp_path, row, text="messages.0.content", answer="messages.1.content")
    assert (found.text, found.answer) == ("2+2?", "4")
    dotted = {"the.text": "2+2?", "answer": "4"}
    assert read(tmp_path, dotted, text="the.text").text == "2+2?"


@pytest.mark.parametrize(
    ("answer", "read_as"),
    [(["9"], "9"), ([9], "9"), (["-2", "5"], "-2, 5"), ([1, 2.5], "1, 2.5"), (" 9 ", "9"), (float("nan"), "nan")],
)
def test_answers_in_lists(tmp_path: Path, answer: Any, read_as: str) -> None:
    assert read(tmp_path, {"problem": "?", "answer": answer}).answer == read_as


def test_a_question_in_a_list_of_one(tmp_path: Path) -> None:
    row = {"problem": ["1+1?"], "answer": "2", "solution": ["1+1=2"]}
    assert read(tmp_path, row) == Problem(id="rows-1", text="1+1?", answer="2", solution="1+1=2")


def test_missing_values_of_optional_columns(tmp_path: Path) -> None:
    row = {"problem": "?", "answer": "1", "id": float("nan"), "system": None, "solution": "", "kind": float("nan")}
    assert read(tmp_path, row) == Problem(id="rows-1", text="?", answer="1")


@pytest.mark.fault("malformed data, over-long prompts and views")
@pytest.mark.parametrize(
    ("row", "columns", "complaint"),
    [
        (
            {"question": "?", "answer": "1"},
            {},
            "expected a column 'problem', got ['answer', 'question']; take another with columns: {text: question}",
        ),
        (
            {"problem": "?", "reward_model": {"style": "rule", "ground_truth": "1"}},
            {},
            "got ['problem', 'reward_model']; take another with columns: {answer: reward_model.ground_truth}",
        ),
        (
            {"problem": "?", "reward_model": {"style": "rule", "ground_truth": "1"}},
            {"answer": "reward_model"},
            "text in column 'reward_model', got dict; take another with columns: {answer: reward_model.ground_truth}",
        ),
        ({"problem": "?"}, {}, "a column 'answer', got ['problem']; take another with columns: {answer: NAME}"),
        ({"problem": " ", "answer": "1"}, {}, "column 'problem' is empty; take another with columns: {text: NAME}"),
        (
            {"problem": float("nan"), "prompt": "?", "answer": "1"},
            {},
            "column 'problem' is NaN; take another with columns: {text: prompt}",
        ),
        ({"problem": "?", "answer": []}, {}, "column 'answer', got list; take another with columns: {answer: NAME}"),
        ({"problem": "?", "answer": ["1", {}]}, {}, "column 'answer', got list"),
        ({"problem": ["?", "!"], "answer": "1"}, {}, "column 'problem', got list; take another with columns: {text: "),
        (
            {"problem": [{"role": r, "content": "?"} for r in ("user", "assistant", "user")], "answer": "1"},
            {},
            "got ['user', 'assistant', 'user']; take one with columns: {text: problem.2.content}",
        ),
        (
            {"problem": [{"role": "user", "content": None}], "answer": "1"},
            {},
            "expected text in column 'problem', got NoneType",
        ),
        (
            {
                "system": "Be long.",
                "problem": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}],
                "answer": "1",
            },
            {},
            "different system messages; keep the column's with columns: {text: problem.1.content}",
        ),
        ({"problem": "?", "answer": "1"}, {"answer_pattern": "= (.+)"}, "mend columns: {answer_pattern: ...}"),
        ({"problem": "?", "answer": "1"}, {"solution": "work"}, "'work' (solution), got ['answer', 'problem']; mend"),
    ],
)
def test_every_error_names_row_and_key(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
        read(tmp_path, row, **columns)
    assert complaint in str(caught.value)
    assert "columns: {" in str(caught.value)


def test_an_id_that_stands_there_twice_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 2: id 'a' was already used by row 1; .* columns: \{id: NAME\}"):
        JsonlProblems(lines(tmp_path / "rows.jsonl", ROWS[0], ROWS[0]))


def test_arrays_and_gzip(tmp_path: Path) -> None:
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n\n" + json.dumps(ROWS)):
        (tmp_path / "rows.json").write_text(text)
        assert list(JsonlProblems(str(tmp_path / "rows.json"))) == PROBLEMS
        (tmp_path / "rows.json.gz").write_bytes(gzip.compress(text.encode()))
        assert list(JsonlProblems(str(tmp_path / "rows.json.gz"), offset=1)) == PROBLEMS[1:]
    plain = Path(lines(tmp_path / "rows.jsonl", *ROWS)).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain))
    assert list(JsonlProblems(str(tmp_path / "rows.jsonl.gz"))) == PROBLEMS
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-12])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: damaged gzip"):
        JsonlProblems(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "half.json").write_text(json.dumps(ROWS)[:-5])
    with pytest.raises(ValueError, match=r"half\.json, row 1: not JSON"):
        JsonlProblems(str(tmp_path / "half.json"))
    unnamed = [{"problem": "?", "answer": "1"}]
    (tmp_path / "unnamed.json.gz").write_bytes(gzip.compress(json.dumps(unnamed).encode()))
    assert JsonlProblems(str(tmp_path / "unnamed.json.gz"))[0].id == "unnamed-1"


CSV = 'id,problem,answer,system\na,1+1?,2,\nb,"2+3?",5,Hm.\n'


def test_tables_of_text(tmp_path: Path) -> None:
    for name, text in (("rows.csv", CSV), ("rows.tsv", CSV.replace(",", "\t"))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(HubProblems(str(tmp_path / name), split="train")) == PROBLEMS
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert list(HubProblems(str(tmp_path / f"{name}.gz"), split="train", limit=1)) == PROBLEMS[:1]
    (tmp_path / "zeros.csv").write_text('question,answer\n?,007\n"1,\n2?","1,080"\n')
    source = HubProblems(str(tmp_path / "zeros.csv"), split="train", columns=Columns(text="question"))
    assert [(p.id, p.text, p.answer) for p in source] == [("zeros-1", "?", "007"), ("zeros-2", "1,\n2?", "1,080")]
    for text, reason in [
        ("problem,answer\n1,2,3\n", "row 1: more cells than the first line has names"),
        ("problem,answer\n?\n", r"row 1: expected a column 'answer'"),
        ('problem,answer\n"?,1\n', "no table of text"),
        ("", "expected at least one problem"),
    ]:
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.csv.*{reason}"):
            HubProblems(str(tmp_path / "bad.csv"), split="train")
    (tmp_path / "latin.csv").write_bytes(b"problem,answer\ncaf\xe9,1\n")
    with pytest.raises(ValueError, match=r"latin\.csv: no table of text"):
        HubProblems(str(tmp_path / "latin.csv"), split="train")


def test_files_of_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    nested = [{"prompt": [{"role": "user", "content": p.text}], "gold": {"answer": p.answer}} for p in PROBLEMS]
    Dataset.from_list(nested).to_parquet(str(tmp_path / "rows.parquet"))
    columns = Columns(text="prompt", answer="gold.answer")
    source = HubProblems(str(tmp_path / "rows.parquet"), split="train", columns=columns)
    assert [(p.id, p.text, p.answer) for p in source] == [("rows-0", "1+1?", "2"), ("rows-1", "2+3?", "5")]
    assert len(HubProblems(lines(tmp_path / "rows.jsonl", *ROWS), split="train")) == 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken\.parquet, split 'train': \w+: ") as caught:
        HubProblems(str(tmp_path / "broken.parquet"), split="train")
    assert "\n" not in str(caught.value)


# ---- at the command line ----


@pytest.mark.fault("malformed data, over-long prompts and views")
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.jsonl", b'{"question": "1+1?", "answer": "2"}\n', "take another with columns: {text: question}"),
        ("rows.csv", CSV.encode(), "is no JSON: HubProblems reads it, with class_path: HubProblems, init_args: {"),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0), "HubProblems reads it"),
        ("rows.parquet", b"PAR1....PAR1", "HubProblems reads it"),
        ("named_wrongly.jsonl", b"PAR1....PAR1", "HubProblems reads it"),
        ("rows.txt", b"1+1? 2\n", "row 1: not JSON"),
    ],
    ids=["jsonl", "csv", "gzip", "parquet", "named wrongly", "text"],
)
def test_the_command_line_tells_the_cure_in_one_line(
    name: str,
    content: bytes,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "math.yaml", "--data.train", "JsonlProblems", "--data.train.path", name]
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {name}")
    assert complaint in line
