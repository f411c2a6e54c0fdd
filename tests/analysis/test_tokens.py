"""A page of rollouts: what it holds is true, and what a rollout says stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import alpha_profile
import case_study
import pytest
import reading
import states
import tokens
import torch
from reading import Page, Reading, Token
from transformers import AutoModelForCausalLM

from ogls.data import RolloutDataModule
from ogls.loss.objective import Distillation
from ogls.loss.steering import OutcomeSteering
from ogls.methods import OGLS_SD
from ogls.module import SelfDistillation
from ogls.records import Completion, Problem, Rollout, RolloutGroup, Verdict
from tests.test_cli import small

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}|`]]>&lt;\u2028"


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


def page_of(text: str) -> Page:
    problem = Problem(id=text, text=text, answer=text, solution=text)
    completion = Completion(token_ids=(1,), logprobs=(-1.0,), finish_reason="stop")
    rollout = Rollout(completion=completion, text=text, verdict=Verdict(correct=False, status="graded", answer=text))
    group = RolloutGroup(problem=problem, prompt_ids=(5,), rollouts=(rollout,), policy_version=0)
    words = {"student": [(text, 0.5)], "target": [(text, 0.25)]}
    chances = {"student": 0.5, "target": 0.25}
    token = Token(name=text, piece=text, learned=True, error=True, kl=0.5, chances=chances, tops=words)
    return Page(title=text, groups=((group, (Reading(rollout=rollout, tokens=(token,)),)),))


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_hostile_text_is_data_and_never_markup() -> None:
    html = tokens.render(page_of(HOSTILE))
    assert html.count("<script") == html.count("</script") == 2  # the data and the code
    assert "<img" not in html
    (group,) = data_of(html)["groups"]
    assert group["problem"] == group["rollouts"][0]["tokens"][0]["s"] == HOSTILE
    code = html.rpartition("<script>")[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", code)


def test_hostile_text_stays_in_its_place_in_markdown() -> None:
    ((group, (one,)),) = page_of("```\n# head | <b>\n").groups
    text = case_study.describe(group, one, count=1)
    assert "````text\n" in text
    table = text[text.rindex("| n |") :].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "<b>" not in text.partition("````")[0] + "\n".join(table)


@pytest.fixture(scope="module")
def run(tiny_model: Path) -> Iterator[tuple[SelfDistillation, RolloutDataModule]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["run.py"])
        with states.opened(small(tiny_model), None) as opened:
            yield opened


@pytest.fixture(scope="module")
def step(run: tuple[SelfDistillation, RolloutDataModule]) -> Page:
    return reading.read_step(*run, None, top=3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--config", "sft.yaml"], "SFT has no teacher"),
        (["--ckpt_path", "last.ckpt"], "--ckpt_path last.ckpt: there is no such file"),
    ],
)
def test_what_has_no_states_is_refused_in_a_line(
    options: list[str],
    expected: str,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])
    with pytest.raises(SystemExit):
        tokens.main([*small(tiny_model), *options])
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_page_says_which_method_it_shows(step: Page, run: tuple[SelfDistillation, RolloutDataModule]) -> None:
    method = run[0].method
    assert method.name.startswith("OGLS_SD[max_peers=2, exclude_self=True, learn_successes=True, alpha=1, ")
    assert step.title == f"{method.name} · weights after 0 steps"


def test_the_steering_of_a_term_comes_before_the_methods() -> None:
    own = Distillation(steering=OutcomeSteering(alpha=2.0))
    assert states.steering_of(OGLS_SD(objective=own)) == own.steering
    assert states.steering_of(OGLS_SD()) == OutcomeSteering(alpha=3.0, ramp_steps=100)


def test_every_token_of_the_rollouts_is_there(step: Page) -> None:
    readings = [one for _, all_ in step.groups for one in all_]
    assert len(readings) == 3 * 4
    for one in readings:
        assert len(one.tokens) == len(one.rollout.completion.token_ids)
        assert "".join(token.piece for token in one.tokens) == one.rollout.text
    token = next(token for one in readings for token in one.tokens if token.learned)
    assert token.tops is not None
    assert list(token.tops) == ["student", "plain teacher", "success pool", "failure pool", "target"]
    assert data_of(tokens.render(step))["groups"][0]["rollouts"][0]["tokens"]


def test_the_states_give_the_papers_target(tiny_model: Path, run: tuple[SelfDistillation, RolloutDataModule]) -> None:
    """Compares with full logits, one forward pass per view."""
    model, data = run
    lesson = max(data.make_batch(0).lessons, key=lambda lesson: len(lesson.token_ids))
    (one,) = states.score(model, [states.reaching(lesson, len(lesson.token_ids))], pools=True)
    said = reading.distributions(model, one, data.encoder, top=2)
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def logits(role: str) -> torch.Tensor:
        rows = []
        for view in lesson.views:
            if view.role == role:
                ids = torch.tensor([[*view.prefix_ids, *lesson.token_ids]])
                with torch.no_grad():
                    rows.append(network(ids).logits[0, len(view.prefix_ids) - 1 : -1])
        return torch.stack(rows).mean(0)

    plain, success, failure = map(logits, ("plain", "success", "failure"))
    target = (plain + success - failure).log_softmax(-1)
    own = torch.tensor(lesson.token_ids)[:, None]
    kl = (target.exp() * (target - plain.log_softmax(-1))).sum(-1)  # the student begins as the plain teacher
    torch.testing.assert_close(torch.tensor([token["kl"] for token in said]), kl, rtol=1e-3, atol=1e-5)
    for name, log in {"target": target, "failure pool": failure.log_softmax(-1)}.items():
        expected = log.gather(-1, own)[:, 0].exp()
        torch.testing.assert_close(torch.tensor([t["chances"][name] for t in said]), expected, rtol=1e-3, atol=1e-6)
    assert said[0]["tops"]["target"][0][1] == pytest.approx(float(target[0].exp().max()), rel=1e-3)


def test_a_case_is_told_with_its_largest_divergences(step: Page) -> None:
    group, chosen = case_study.choose(step, None, None)
    assert chosen.kl == max(one.kl for _, all_ in step.groups for one in all_)
    text = case_study.describe(group, chosen, count=3)
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    values = [float(row[3]) for row in rows]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="there is no problem 'none'"):
        case_study.choose(step, "none", None)


def test_an_alpha_profile_of_a_real_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    alpha_profile.main([*small(tiny_model), "--alphas", "0", "2", "5", "--out", "profile"])
    table = alpha_profile.pd.read_csv("profile.csv")
    assert list(table["alpha"]) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert table["kl_target_plain"][0] == pytest.approx(0.0, abs=1e-6)
    assert (table["kl_target_plain"] <= table["hoeffding_bound"] + 1e-6).all()
    assert table["kl_target_plain"].is_monotonic_increasing
    assert Path("profile.png").read_bytes().startswith(b"\x89PNG")
    assert "recommended alpha" in capsys.readouterr().out
