"""Problem sources: what rows become, and what a malformed row is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ogls.records import Problem
from ogls.tasks.base import ProblemSets, ProblemSource
from ogls.tasks.columns import Columns
from ogls.tasks.reasoning_gym import EntryId, ReasoningGym
from ogls.tasks.tables import HubProblems, JsonlProblems


class Letters(ProblemSource):
    """Problems a, b, c ..."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Problem:
        if index >= self.length:
            raise IndexError(index)
        return Problem(id="abcdef"[index], text="?", answer="1")


def test_sets_are_one_source_whose_problems_know_their_set() -> None:
    sets = ProblemSets({"math": Letters(2), "science": Letters(3)})
    assert [problem.name for problem in sets] == ["math/a", "math/b", "science/a", "science/b", "science/c"]
    assert [problem.id for problem in sets] == ["a", "b", "a", "b", "c"], "verifiers may read them"
    assert len(sets) == 5
    with pytest.raises(IndexError):
        sets[5]
    assert list(sets.splits("val")) == ["val/math", "val/science"]
    assert Letters(2).splits("val").keys() == {"val"}
    assert Letters(2)[0].name == "a"
    with pytest.raises(ValueError, match=r"a set's name becomes part of metrics: expected .*, got 'a/b'"):
        ProblemSets({"a/b": Letters(1)})


ROWS: list[dict[str, Any]] = [
    {"id": "a", "problem": "What is 1+1?", "answer": "2", "solution": "1+1=2"},
    {"id": "b", "problem": "What is 2+2?", "answer": 4, "kind": "mcq", "system": "Be brief."},
    {"problem": "What is 3+3?", "answer": " 6 ", "system": ""},
]


def write(path: Path, *lines: str | dict[str, Any]) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rows_become_problems(tmp_path: Path) -> None:
    source = JsonlProblems(write(tmp_path / "sums.jsonl", ROWS[0], "", *ROWS[1:]))
    assert [source[i] for i in range(len(source))] == [
        Problem(id="a", text="What is 1+1?", answer="2", solution="1+1=2"),
        Problem(id="b", text="What is 2+2?", answer="4", kind="mcq", system="Be brief."),
        Problem(id="sums-4", text="What is 3+3?", answer="6"),
    ]
    with pytest.raises(IndexError):
        source[3]


def test_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sums.jsonl", *ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(JsonlProblems("sums.jsonl")) == 3


def test_offset_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", *ROWS)
    assert [p.id for p in JsonlProblems(path, offset=1)] == ["b", "sums-3"]
    assert [p.id for p in JsonlProblems(path, offset=1, limit=1)] == ["b"]
    with pytest.raises(ValueError, match="at least one problem, got none"):
        JsonlProblems(path, offset=3)
    for bad in ({"offset": -1}, {"limit": 0}):
        with pytest.raises(ValueError, match="offset >= 0 and limit >= 1"):
            JsonlProblems(path, **bad)


def test_columns(tmp_path: Path) -> None:
    row = {"question": "What is 1+1?", "answer": "First #### 1, so\n#### 2"}
    path = write(tmp_path / "gsm.jsonl", row)
    columns = Columns(text="question", solution="answer", answer_pattern=r"####\s*(.+)", default_kind="mcq")
    assert JsonlProblems(path, columns=columns)[0] == Problem(
        id="gsm-1", text="What is 1+1?", answer="2", solution=row["answer"], kind="mcq"
    )


@pytest.mark.fault("malformed data, over-long prompts and views")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "row 2: not JSON"),
        ("[" * 100_000, "row 2: not JSON"),
        ("\x00", "row 2: not JSON"),
        ('"text"', "row 2: expected an object with columns, got str"),
        ({"id": "x", "problem": "p"}, r"row 2: expected a column 'answer', got \['id', 'problem'\]"),
        ({"id": "x", "problem": "p", "answer": None}, "row 2: expected text in column 'answer', got NoneType"),
        ({"id": "x", "problem": "p", "answer": ["1", {}]}, "row 2: expected text in column 'answer', got list"),
        ({"id": "x", "problem": "p", "answer": True}, "row 2: expected text in column 'answer', got bool"),
        ({"id": "x", "problem": " \n", "answer": "1"}, "row 2: column 'problem' is empty"),
        ({"id": "x", "problem": "p\ud800", "answer": "1"}, "row 2: column 'problem' holds a lone surrogate"),
        ({"id": "a", "problem": "p", "answer": "1"}, "row 2: id 'a' was already used by row 1"),
        ({"id": {}, "problem": "p", "answer": "1"}, "row 2: expected text in column 'id', got dict"),
    ],
)
def test_malformed_row(tmp_path: Path, line: str | dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        JsonlProblems(write(tmp_path / "sums.jsonl", ROWS[0], line))
    assert "sums.jsonl" in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9", "answer": "1"}')
    with pytest.raises(ValueError, match="row 1: not JSON"):
        JsonlProblems(str(tmp_path / "latin.jsonl"))


def test_missing_file_empty_file_missing_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file of problems at 'nowhere.jsonl' \(working directory"):
        JsonlProblems("nowhere.jsonl")
    with pytest.raises(ValueError, match="at least one problem, got none"):
        JsonlProblems(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(ValueError, match=r"no row has the column 'solutoin' \(solution\)"):
        JsonlProblems(write(tmp_path / "sums.jsonl", *ROWS), columns=Columns(solution="solutoin"))
    with pytest.raises(ValueError, match=r"'#### \(.\+\)' matches nothing in '2'"):
        JsonlProblems(write(tmp_path / "sums.jsonl", *ROWS), columns=Columns(answer_pattern="#### (.+)"))


def test_hub_data_set_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i), "solution": None} for i in range(5)]
    folder = tmp_path / "sums"
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    source = HubProblems(str(folder), split="train", columns=Columns(text="question"), offset=1, limit=3)
    assert [source[i] for i in range(len(source))] == [
        Problem(id=f"train-{i}", text=f"What is {i}+{i}?", answer=str(2 * i)) for i in (1, 2, 3)
    ]
    with pytest.raises(ValueError, match="row 0: expected a column 'problem', got"):
        HubProblems(str(folder), split="train")
    with pytest.raises(ValueError, match="Unknown split"):
        HubProblems(str(folder), split="tset", columns=Columns(text="question"))


def test_reasoning_gym_is_deterministic() -> None:
    first, again = (ReasoningGym("chain_sum", size=5, seed=3, options={"max_terms": 4}) for _ in range(2))
    assert [first[i] for i in range(5)] == [again[i] for i in range(5)]
    problem = first[4]
    assert problem.kind == "reasoning_gym"
    assert EntryId.parse(problem.id) == EntryId("chain_sum", 3, 5, 4, '{"max_terms": 4}')
    assert ReasoningGym("chain_sum", size=5, seed=4)[0] != ReasoningGym("chain_sum", size=5, seed=3)[0]
    assert ReasoningGym("chain_sum", size=5)[0].id == "chain_sum-seed0-size5-0"
    with pytest.raises(IndexError, match="from 0 to 4, got 5"):
        first[5]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dataset": "chain_smu"}, "'chain_smu'.*not registered"),
        ({"dataset": "chain_sum", "options": {"max_trems": 4}}, "unexpected keyword argument 'max_trems'"),
        ({"dataset": "chain_sum", "options": {"min_terms": 9, "max_terms": 4}}, "chain_sum"),
        ({"dataset": "chain_sum", "size": 0}, "got size 0"),
        ({"dataset": "graph_color"}, "has no gold answer, got None"),
        ({"dataset": "word_ladder"}, "differs from process to process"),
    ],
)
def test_reasoning_gym_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ReasoningGym(**settings)


def test_entry_id_is_refused_when_it_is_none() -> None:
    with pytest.raises(ValueError, match="got 'chain-7'"):
        EntryId.parse("chain-7")
