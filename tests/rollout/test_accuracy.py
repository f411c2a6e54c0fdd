"""avg@k, pass@k, maj@k against enumeration and cases worked by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ogls.records import Completion, Problem, Rollout, RolloutGroup, Verdict
from ogls.rollout.accuracy import Evaluation, Subset, by_set, evaluate, maj_at_k, pass_at_k
from ogls.system.statistics import mean_interval, paired_difference, share_interval

SAMPLES = st.lists(st.sampled_from(["right", "a", "b", "c", None]), min_size=1, max_size=7)


def group(name: str, *answers: str | None, gold: str = "right", truncated: tuple[int, ...] = ()) -> RolloutGroup:
    rollouts = []
    for index, answer in enumerate(answers):
        completion = Completion(
            token_ids=tuple(range(index + 1)),
            logprobs=(0.0,) * (index + 1),
            finish_reason="length" if index in truncated else "stop",
        )
        status = "unparsable" if answer is None else "graded"
        verdict = Verdict(correct=answer == gold, status=status, answer=answer)
        rollouts.append(Rollout(completion=completion, text=str(answer), verdict=verdict))
    problem = Problem(id=name, text="?", answer=gold)
    return RolloutGroup(problem=problem, prompt_ids=(1,), rollouts=tuple(rollouts), policy_version=0)


def enumerated(samples: list[str | None], k: int) -> tuple[float, float]:
    """pass@k and maj@k by looking at every draw of k samples."""
    passes, wins = [], []
    for draw in combinations(samples, k):
        passes.append("right" in draw)
        votes = Counter(answer for answer in draw if answer is not None)
        leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
        wins.append(1 / len(leaders) if "right" in leaders else 0.0)
    return float(np.mean(passes)), float(np.mean(wins))


@given(SAMPLES, st.data())
def test_pass_and_maj_equal_enumeration(samples: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    wrong = Counter(answer for answer in samples if answer not in ("right", None))
    expected_pass, expected_maj = enumerated(samples, k)
    assert pass_at_k(len(samples), samples.count("right"), k) == pytest.approx(expected_pass)
    assert maj_at_k(len(samples), samples.count("right"), list(wrong.values()), k) == pytest.approx(expected_maj)


def test_where_no_answer_is_told_there_is_no_vote() -> None:
    """A function that says right or wrong: wrong answers would never win against right ones."""
    right, wrong = (Verdict(correct=correct, status="graded") for correct in (True, False))
    told = group("told", "right", "a", "a", "a")
    silent = replace(told, rollouts=tuple(replace(r, verdict=right if r.correct else wrong) for r in told.rollouts))
    assert evaluate([told])["maj_at_4"] == 0.0
    assert {name for name in evaluate([told]) if name not in evaluate([silent])} == {
        f"maj_at_{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")
    }
    assert evaluate([silent])["pass_at_4"] == 1.0


def test_worked_by_hand() -> None:
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of 6 pairs hold the one that is right
    assert pass_at_k(4, 3, 2) == 1.0
    assert maj_at_k(4, 2, [2], 4) == 0.5  # a tie of two
    assert maj_at_k(5, 2, [1, 1], 5) == 1.0  # two votes against one and one, one silent
    assert maj_at_k(3, 0, [], 3) == 0.0  # nobody voted


@given(st.integers(1, 40), st.data())
def test_pass_at_k_bounds(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    values = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(correct / n)
    assert values == sorted(values)
    assert values[-1] == float(correct > 0)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples(k: int) -> None:
    for metric in (
        lambda: pass_at_k(4, 1, k),
        lambda: maj_at_k(4, 1, [1], k),
        lambda: evaluate([group("a", *"wxyz")], [k]),
    ):
        with pytest.raises(ValueError, match=f"from 1 to the number of samples 4, got {k}"):
            metric()


def test_more_votes_than_samples() -> None:
    with pytest.raises(ValueError, match="at most 3 samples"):
        maj_at_k(3, 2, [2], 1)


def test_evaluate_by_hand() -> None:
    groups = [group("a", "right", "right", "x", None), group("b", "right", "x", "x", "y")]
    metrics = evaluate(groups)
    assert metrics["avg_at_4"] == (0.5 + 0.25) / 2
    assert metrics["pass_at_1"] == metrics["maj_at_1"] == metrics["avg_at_4"]
    assert metrics["pass_at_2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert metrics["pass_at_4"] == 1.0
    assert metrics["maj_at_4"] == 0.5
    assert metrics["length_mean"] == 2.5
    assert metrics["truncated_rate"] == 0.0
    assert metrics["unparsable_rate"] == 1 / 8
    assert metrics["unclosed_rate"] == 0
    figures = {f"{name}_at_{k}" for name in ("pass", "maj") for k in (1, 2, 4)} | {"avg_at_4"}
    ends = {f"{name}_{end}" for name in figures for end in ("low", "high")}
    assert set(metrics) == figures | ends | {"length_mean", "truncated_rate", "unparsable_rate", "unclosed_rate"}


def test_truncated_is_wrong_and_has_no_vote() -> None:
    metrics = evaluate([group("a", "right", "right", "x", truncated=(0, 1))])
    assert metrics["avg_at_3"] == metrics["pass_at_3"] == metrics["maj_at_3"] == 0.0
    assert metrics["truncated_rate"] == pytest.approx(2 / 3)
    assert evaluate([group("a", "right", "x", "x", truncated=(1, 2))])["maj_at_3"] == 1.0


def test_groups_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"sizes \[1, 2\]"):
        evaluate([group("a", "x"), group("b", "x", "y")])
    with pytest.raises(ValueError, match=r"sizes \[\]"):
        evaluate([])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_interval_is_students(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    if spread > 1e-12:
        assert (low, high) == pytest.approx(stats.t.interval(0.95, len(values) - 1, mean, spread))


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_interval_of_right_and_wrong_is_clopper_and_pearsons(right: int, wrong: int) -> None:
    if right + wrong > 1:
        found = share_interval([1.0] * right + [0.0] * wrong)
        exact = stats.binomtest(right, right + wrong).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_of_a_share_holds_the_mean_and_has_a_width(values: list[float]) -> None:
    mean, low, high = share_interval(values)
    assert 0 <= low <= mean <= high <= 1
    assert high - low > 0.02
    mirrored = share_interval([1 - value for value in values])
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-6)


def test_the_interval_of_a_share_by_hand() -> None:
    # All 30 right: the truth may be so low that this happens in 2.5 %, p^30 = 0.025.
    assert share_interval([1.0] * 30) == pytest.approx((1.0, 0.025 ** (1 / 30), 1.0))
    # Values 0.5 and 0.5 with a 0: m = 1/3, v = (1/6 - 1/9) / 4 = 1/72, so a + b = (2/9) 72 - 1 = 15.
    assert share_interval([0.5, 0.5]).low == pytest.approx(stats.beta(5, 10).ppf(0.025))
    with pytest.raises(ValueError, match="at least one value"):
        share_interval([])


def test_interval_of_one_problem_is_the_whole_range() -> None:
    metrics = evaluate([group("a", "right", "x")])
    assert (metrics["avg_at_2_low"], metrics["avg_at_2"], metrics["avg_at_2_high"]) == (0.0, 0.5, 1.0)


def test_interval_covers_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(1, 2, size=(400, 60))  # mean 1/3
    scores = rng.binomial(4, p) / 4
    covered = np.mean([low <= 1 / 3 <= high for _, low, high in map(mean_interval, scores.tolist())])
    assert 0.92 <= covered <= 0.98


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=3, max_size=20))
def test_paired_difference_is_the_paired_t_test(counts: list[tuple[int, int]]) -> None:
    before = {str(i): b / 8 for i, (b, _) in enumerate(counts)}
    after = {str(i): a / 8 for i, (_, a) in reversed(list(enumerate(counts)))}  # order does not matter
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(np.mean([a - b for b, a in counts]) / 8)
    back = paired_difference(after, before)
    assert (back.mean, back.p_value) == pytest.approx((-found.mean, found.p_value))
    if len({a - b for b, a in counts}) > 1:
        expected = stats.ttest_rel([after[i] for i in before], [before[i] for i in before])
        assert found.p_value == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval()
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_paired_difference_edges() -> None:
    assert paired_difference({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}).p_value == 1.0
    assert paired_difference({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}).p_value == 0.0
    assert paired_difference({"a": 0.0}, {"a": 1.0}).p_value == 1.0
    with pytest.raises(ValueError, match="same problems before and after, got 2 in one only"):
        paired_difference({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="at least one value"):
        paired_difference({}, {})


def test_a_subset_is_evenly_spaced_and_the_same_in_groups_and_problems() -> None:
    assert Subset(problems=3).of("abcdefgh") == ["a", "c", "f"]  # 0, 8 / 3, 16 / 3
    assert Subset(problems=9).of("abc") == Subset().of("abc") == ["a", "b", "c"]
    assert Subset(problems=1).of("abc") == ["a"]
    assert Subset(problems=2).of([]) == []


def test_a_subset_has_as_many_problems_of_each_set() -> None:
    names = ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert Subset(problems=2).of(names, lambda name: name[0]) == ["a0", "a2", "b0", "b1"]
    groups = [group(name, "right", "x") for name in names]
    groups = [replace(g, problem=replace(g.problem, set=g.problem.id[0])) for g in groups]
    part = Evaluation(samples=2, while_training=Subset(problems=2)).by_name(groups, whole=True)["val_subset"]
    assert [g.problem.id for g in part] == ["a0", "a2", "b0", "b1"]
    assert {name: [g.problem.id for g in some] for name, some in by_set(part).items()} == {
        "a": ["a0", "a2"],
        "b": ["b0", "b1"],
    }
    assert by_set([group("a", "x")]) == {}


def test_figures_of_other_problems_have_another_name() -> None:
    groups = [group(f"p{i}", "right", "x") for i in range(4)]
    alike = Evaluation(samples=2)
    assert alike.by_name(groups, whole=False) == {"val": groups}
    assert alike.watched == ("val", 2)
    fewer = Evaluation(samples=2, while_training=Subset(problems=2, samples=1))
    assert fewer.watched == ("val_subset", 1)
    assert fewer.by_name(groups, whole=False) == {"val_subset": groups}
    whole = fewer.by_name(groups, whole=True)
    assert whole["val"] == groups
    assert [(g.problem.id, g.rollouts) for g in whole["val_subset"]] == [
        (f"p{i}", groups[i].rollouts[:1]) for i in (0, 2)
    ]
    with pytest.raises(ValueError, match=r"while_training.samples must be at most evaluation.samples 2, got 3"):
        Evaluation(samples=2, while_training=Subset(samples=3))
    with pytest.raises(ValueError, match=r"evaluation.while_training.problems must be in \[1, 1e9\], got 0"):
        Subset(problems=0)
