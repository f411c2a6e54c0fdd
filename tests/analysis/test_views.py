"""What a model answers by what it reads: figures of groups by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import views

from ogls.records import Completion, Problem, Rollout, RolloutGroup, Verdict
from tests.test_cli import small

RESULTS = Path(views.__file__).parent / "results"


def group(name: str, answers: str, gold: str = "A") -> RolloutGroup:
    """Returns a group whose rollouts give these answers, a dash for none, in tokens of probability 1/2."""
    completion = Completion(token_ids=(1, 2), logprobs=(math.log(0.5),) * 2, finish_reason="stop")
    verdicts = [
        Verdict(correct=False, status="unparsable")
        if letter == "-"
        else Verdict(correct=letter == gold, status="graded", answer=letter)
        for letter in answers
    ]
    rollouts = tuple(Rollout(completion=completion, text="", verdict=verdict) for verdict in verdicts)
    problem = Problem(id=name, text="?", answer=gold)
    return RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=rollouts, policy_version=0)


def values(figures) -> dict[str, float]:
    return {figure: value for _, figure, value, _, _, _ in figures}


def test_answers_by_hand():
    found = values(views.answers("nothing", [group("a", "AB-A"), group("b", "BBBB")], ["B", "B"]))
    assert found["right"] == 2 / 8
    assert found["no answer"] == 1 / 8
    assert found["as read"] == 5 / 8
    assert found["entropy, nats a token"] == pytest.approx(math.log(2))


def test_what_a_text_adds_is_over_the_same_problems():
    with_text, without = [group("a", "A"), group("b", "B")], [group("a", "ABBB"), group("b", "AABB")]
    (_, _, before, *_), (_, figure, gain, low, high, count) = views.gained("an idea", with_text, without)
    assert (before, figure, gain, count) == ((0.25 + 0.5) / 2, "gain by it", (0.75 - 0.5) / 2, 2)
    assert (low, high) == (-0.5, 0.75), "one problem or the other"


def test_who_knows_some_problems_and_none_of_the_others_has_all_of_the_variance():
    found = values(views.guessing([group("a", "AAAA"), group("b", "BBBB")]))
    assert found["mixed groups"] == 0
    assert found["mixed groups, the same chance everywhere"] == 1 - 2 / 2**4
    assert found["variance of the chance over problems"] == 0.25
    assert found["that variance if it knew or did not"] == 0.25
    assert found["answers A"] == 0.5


def test_who_guesses_everywhere_has_none():
    rng = np.random.default_rng(0)
    groups = [group(str(i), "".join(rng.choice(list("ABCD"), 4)), gold="ABCD"[i % 4]) for i in range(4000)]
    found = values(views.guessing(groups))
    assert found["variance of the chance over problems"] == pytest.approx(0, abs=0.006)
    assert found["mixed groups"] == pytest.approx(1 - 0.25**4 - 0.75**4, abs=0.02)
    assert found["mixed groups, the same chance everywhere"] == pytest.approx(1 - 0.25**4 - 0.75**4, abs=0.01)
    assert found["answers B"] == pytest.approx(0.25, abs=0.02)
    assert found["would be right: B throughout"] == 0.25


def test_from_the_command_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py"])
    views.main([*small(tiny_model), "--samples", "2", "--out", "found/views"])
    table = views.pd.read_csv("found/views.csv").set_index(["problems", "in view", "figure"]).sort_index()
    shares = table.loc["a step", "shift"]["value"]
    parts = [
        next(v for name, v in shares.items() if name.startswith(f"{p} the fork")) for p in ("before", "at", "after")
    ]
    assert sum(parts) == pytest.approx(1)
    assert (table.loc["a step"]["n"] <= 3).all(), "intervals are over problems, of which a step has three"
    read = table.loc[("all", "the reference solution")]
    assert read.loc["right", "n"] == 5
    assert read.loc["gain by it", "value"] == pytest.approx(
        read.loc["right", "value"] - read.loc["right without it", "value"]
    )
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert Path("found/views.md").read_text().startswith("| problems | in view | figure | value |")
    with pytest.raises(SystemExit) as stopped:
        views.main([*small(tiny_model), "--samples", "1"])
    assert stopped.value.code == 2


def test_the_page_of_evidence_has_the_figures_of_all_problems(tmp_path: Path) -> None:
    rows = ("problems,in view,figure,value,low,high,n", "all,nothing,right,0.25,0.2,0.3,40")
    (tmp_path / "v.csv").write_text("\n".join((*rows, "hard,nothing,right,0.1,0.0,0.2,20\n")))
    assert views.told(tmp_path / "v", "Sums") == {
        "Sums: how often is it right?": "**0.250 [0.200, 0.300]** (40 problems)"
    }
    assert views.told(tmp_path / "absent", "Sums") == {}


@pytest.mark.parametrize("name", views.KEPT)
def test_stored_figures_are_of_the_configurations_as_they_are(name: str, tmp_path: Path) -> None:
    stored = views.pd.read_csv(RESULTS / f"{name}.csv")
    assert views.sound(RESULTS / name)
    stored.assign(digest="of another").to_csv(tmp_path / f"{name}.csv", index=False)
    assert not views.sound(tmp_path / name)
    rows = stored.drop(columns=views.DIGEST)
    found = {
        str(part): list(own.iloc[:, 1:].itertuples(index=False)) for part, own in rows.groupby("problems", sort=False)
    }
    assert views.markdown(found) == (RESULTS / f"{name}.md").read_text()
