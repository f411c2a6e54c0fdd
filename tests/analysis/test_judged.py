"""Labels of people: what they are shown, what is refused, and kappa by hand."""

from __future__ import annotations

import json
from pathlib import Path

import judged
import numpy as np
import pandas as pd
import pytest

TEXTS = ["1+1=3\n3+2=5\n\\boxed{5}", "=1+1. So it is 3. Done.", "\\boxed{7}"]
METHODS = {"one": "ROSD", "two": "OGLS_SD[max_peers=1]"}


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Returns the folders of two runs: 30 problems each, with a wrong rollout that is located, one that is not, and a
    right one."""
    for folder, method in METHODS.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps({"tags": {"method": method}}))
        rows = []
        for number in range(30):
            text = TEXTS[number % 3]
            told = {"question": f"{folder} {number}", "answer": "4", "solution": "1+1=2\n2+2=4\n\\boxed{4}"}
            told |= {"problem": f"p{number}", "text": text, "correct": False, "key": f"train/1/p{number}/0"}
            rows.append(told | {"error": {"span": [max(0, text.find("3")), len(text)], "text": "3"}})
            rows.append(told | {"error": None, "text": "lost"})
            rows.append(told | {"error": None, "correct": True, "text": "4"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / "rollouts.jsonl").write_text(text)
    return [str(tmp_path / folder) for folder in METHODS]


def exported(runs: list[str], out: Path, *more: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    judged.main(["export", *runs, "--out", str(out), *more])
    return tuple(
        pd.read_csv(out.with_name(f"{out.name}{end}"), dtype=str, keep_default_na=False, encoding="utf-8-sig")
        for end in (".csv", "_key.csv")
    )


def test_passages_are_lines_and_sentences():
    text = "One is 1.5. Two!\n\n  three = 3\n"
    assert [text[slice(*span)] for span in judged.passages(text)] == ["One is 1.5.", "Two!", "three = 3"]


def test_kappa_by_hand():
    """20 both yes, 15 both no, 5 and 10 one each: agreement 0.7, by chance 0.5, so kappa 0.4."""
    one, other = np.array([(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15).T
    assert judged.kappa(one == 1, other == 1) == pytest.approx(0.4)
    assert judged.kappa(one == 1, one == 1) == 1.0
    assert np.isnan(judged.kappa(np.ones(5, bool), np.ones(5, bool)))
    found = pd.DataFrame({"a": one == 1, "b": other == 1, "problem": np.arange(50)})
    row = judged.agreement(found, "a", "b")
    assert (row["agreement"], row["kappa"]) == (pytest.approx(0.7), pytest.approx(0.4))
    # The standard error of kappa is sqrt(0.7 * 0.3 / 50) / 0.5 = 0.13 by the simple formula.
    assert row["kappa"] - row["kappa_low"] == pytest.approx(1.96 * 0.13, abs=0.06)
    assert row["kappa_high"] - row["kappa"] == pytest.approx(1.96 * 0.13, abs=0.06)


def test_what_judges_see_is_blind_and_true(runs: list[str], tmp_path: Path):
    shown, key = exported(runs, tmp_path / "j", "--count", "50")
    assert list(shown) == [*judged.SHOWN, "judge 1", "judge 2"]
    assert len(shown) == len(set(shown["item"])) == 50
    assert not any(method.partition("[")[0] in (tmp_path / "j.csv").read_text() for method in METHODS.values())
    for (_, row), (_, told) in zip(shown.iterrows(), key.iterrows(), strict=True):
        text = row["rollout"].removeprefix(" ").replace("⟦", "").replace("⟧", "")
        assert text in TEXTS
        assert f"⟦{row['quoted error'].removeprefix(' ')}⟧" in row["rollout"]
        own = {TEXTS[0]: "1+1=3", TEXTS[1]: "So it is 3.", TEXTS[2]: "\\boxed{7}"}[text]
        assert (row["quoted error"] == own) == (told["located"] == "True")
    fair = [told == "True" for text, told in zip(shown["rollout"], key["located"], strict=True) if "7" not in text]
    assert 0.25 < np.mean(fair) < 0.75, "about half of those that have another passage"
    assert not shown.map(lambda cell: cell.startswith("=")).any().any(), "no formulas"
    again, _ = exported(runs, tmp_path / "again", "--count", "50")
    assert again.equals(shown)
    other, _ = exported(runs, tmp_path / "other", "--count", "50", "--seed", "1")
    assert not other.equals(shown)


def test_labels_come_back(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "j.csv"
    shown, key = exported(runs, tmp_path / "j")
    shown["judge 1"] = np.where(key["located"] == "True", " Yes", "n")
    shown.sample(frac=1.0, random_state=0).to_csv(file, index=False)  # a spreadsheet has sorted it
    judged.main(["read", str(file)])
    table = pd.read_csv(tmp_path / "j_agreement.csv").set_index("of")
    assert table.loc["judge 1 and reflector", ["agreement", "kappa", "items"]].tolist() == [1.0, 1.0, 60]
    assert not any("judge 2" in name for name in table.index)
    own = key[key["located"] == "True"].groupby("method").size()
    assert all(table.loc[f"judge 1 confirms {method}", "items"] == count for method, count in own.items())
    assert "| judge 1 and reflector | 60 | 1.000 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t, "judge 1 has 60 of 60 rows without a label: expected yes or no, got an empty cell in row 2"),
        (lambda t: t.assign(**{"judge 1": ["yes"] * 59 + ["perhaps"]}), "got 'perhaps' in row 61"),
        (lambda t: t.assign(**{"judge 1": "no", "judge 2": [""] * 59 + ["no"]}), "judge 2 has 59 of 60 rows without"),
        (lambda t: t.assign(**{"judge 1": "no"})[:-1], "got 59 rows, among them or missing"),
        (lambda t: t.assign(**{"judge 1": "no", "item": t["item"][0]}), "got 60 rows, among them or missing"),
        (lambda t: t.rename(columns={"item": "number"}), "there is no 'item'"),
    ],
)
def test_half_filled_and_foreign_files_are_refused(
    change, complaint: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown, _ = exported(runs, tmp_path / "j")
    change(shown).to_csv(tmp_path / "j.csv", index=False)
    with pytest.raises(SystemExit) as stopped:
        judged.main(["read", str(tmp_path / "j.csv")])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exported(runs, tmp_path / "j")
    (tmp_path / "empty").mkdir()
    cases = {
        "is there already, perhaps filled in": [*runs, "--out", str(tmp_path / "j")],
        "expected a run's folder with stored rollouts, but it has no run.json": [str(tmp_path / "empty")],
        "--count and --judges must be at least 1": [*runs, "--count", "0", "--out", str(tmp_path / "k")],
    }
    for complaint, words in cases.items():
        with pytest.raises(SystemExit) as stopped:
            judged.main(["export", *words])
        assert stopped.value.code == 2
        assert complaint in capsys.readouterr().err
