"""Methods as configurations: what a stack of YAML builds, under which name, and that every preset trains."""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ogls import methods
from ogls.cli import OglsCLI, build, main
from ogls.lessons.privilege import PeerOutcomes, ReferenceSolution, SuccessfulPeer
from ogls.lessons.prompts import Prompts
from ogls.lessons.reflection.exact import ExactReflector
from ogls.lessons.reflection.privilege import CorrectiveIdea
from ogls.lessons.reflection.reflector import ReflectionLimits
from ogls.lessons.selection import AllTokens, ErrorSpan, FirstTokens, FromError, UpToError
from ogls.loss.divergence import ForwardKL, JensenShannon, ReverseKL
from ogls.loss.objective import Distillation
from ogls.loss.steering import OutcomeSteering, PositiveOnly, Unsteered
from ogls.loss.topk import TopK
from ogls.methods import GRPO, OGLS_SD, OPSD, ROSD, SDPO, Method, OGLS_SD_v2, ROSDExact, ROSDIdeaOnly
from ogls.policy.pretrained import load_tokenizer
from ogls.policy.teacher import EMA, Frozen, OtherModel
from ogls.records import Problem, Sampling
from ogls.tasks.chains import Chain, first_mistake
from ogls.tracking import Tracker
from tests.parsed import OneParser
from tests.scripted import ScriptedEngine
from tests.test_module import fit, pair, weights

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
STANDING = ("math", "lab", "families")  # stand alone
STANDING += tuple(f"qwen3_{name}" for name in ("ogls_sd", "opsd", "rosd", "sdpo", "grpo"))
PRESETS = {  # name of the file, and of the method that it names
    file.stem: said["method"]
    for file in sorted(EXPERIMENTS.glob("*.yaml"))
    if isinstance((said := yaml.safe_load(file.read_text())).get("method"), str) and file.stem not in STANDING
}


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])  # and not pytest's arguments
    monkeypatch.chdir(tmp_path)


def built(*stack: str) -> OglsCLI:
    """What configurations (`math`) and options (`--method OPSD`, in one text) make together."""
    words = [word for part in stack for word in (part.split() if "--" in part else ("--config", f"{part}.yaml"))]
    made = build([*words, "--trainer.accelerator", "cpu"], run=False, kind=OneParser)
    made.datamodule.close()
    return made


def method_of(*stack: str) -> Method:
    """Its method, which all that is made has, under one name."""
    made = built(*stack)
    assert made.model.method is made.datamodule.method
    assert made.model.policy is made.datamodule.policy
    assert isinstance(made.trainer.logger, Tracker)
    assert made.trainer.logger.method == made.model.method.name
    return made.model.method


def test_every_preset_has_its_configuration():
    assert len(PRESETS) >= 19
    assert {*PRESETS.values()} == {*methods.__all__} - {"Method"}
    assert len({*PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("base", ["math", "lab"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_that_names_a_method_is_that_method_on_either_student(name: str, base: str):
    method = method_of(base, name)
    preset = getattr(methods, PRESETS[name])
    assert type(method) is preset
    if name == "ogls_sd":  # it is there already: named again, it stays as the task has it
        assert method == method_of(base) != preset()
    else:
        assert method == preset()
        assert method.name == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_an_overlay_is_two_lines(name: str):
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    assert text.splitlines()[0].startswith("# ")
    assert len(text.splitlines()) == 2
    assert yaml.safe_load(text).keys() == {"method"}


def test_what_a_task_changes_of_its_method_the_name_shows():
    changes = {"steering": OutcomeSteering(alpha=1.0, ramp_steps=0), "temperature": 1.0}
    method = method_of("math")
    assert method == OGLS_SD(
        privilege=PeerOutcomes(max_peers=2, exclude_self=True, learn_successes=True),
        objective=Distillation(ReverseKL(), clip=None),
        selection=ErrorSpan(),
        **changes,
    )
    assert method.name == (
        "OGLS_SD[max_peers=2, exclude_self=True, learn_successes=True, alpha=1, ramp_steps=0, divergence=ReverseKL, "
        "clip=None, selection=ErrorSpan, temperature=1]"
    )
    method = method_of("lab")
    assert method == OGLS_SD(
        privilege=PeerOutcomes(max_peers=1),
        objective=Distillation(ForwardKL(), clip=None),
        selection=UpToError(),
        **changes,
    )
    assert method.name == "OGLS_SD[max_peers=1, alpha=1, ramp_steps=0, clip=None, selection=UpToError, temperature=1]"


@pytest.mark.parametrize("below", [("math",), ("lab",), ("math", "alpha_2", "plain_kl")], ids=str)
def test_ogls_sd_as_published_takes_every_change_back(below: tuple[str, ...]):
    assert method_of(*below) != OGLS_SD()
    assert method_of(*below, "ogls_sd_published") == OGLS_SD()


@pytest.mark.parametrize(
    "stack", [("math", "sdpo", "opsd"), ("math", "--method OPSD"), ("lab", "rosd", "grpo", "--method OPSD")], ids=str
)
def test_a_method_on_top_of_others_carries_nothing_over(stack: tuple[str, ...]):
    method = method_of(*stack)
    assert method == OPSD()
    assert method.name == "OPSD"
    assert (method.teacher, method.privilege, method.reflector) == (Frozen(), ReferenceSolution(), None)  # no EMA
    assert (method.steering, method.advantage) == (Unsteered(), None)
    assert method.objective == Distillation(ForwardKL(), temperature=1.1, clip=0.05, one_sided=True)
    assert isinstance(method.objective, Distillation)
    assert (method.objective.support, method.objective.importance_cap) == (None, None)  # no top-100, no cap
    assert method.selection == FirstTokens(1024)


@pytest.mark.parametrize(
    ("stack", "expected", "name"),
    [
        (("math", "opsd", "error_span"), OPSD(selection=ErrorSpan()), "OPSD[selection=ErrorSpan]"),
        (
            ("math", "--method OPSD --method.selection ErrorSpan"),
            OPSD(selection=ErrorSpan()),
            "OPSD[selection=ErrorSpan]",
        ),
        (("lab", "opsd", "--method.selection.count 8"), OPSD(selection=FirstTokens(8)), "OPSD[count=8]"),
        (("lab", "sdpo", "--method.teacher.decay 0.5"), SDPO(teacher=EMA(0.5)), "SDPO[decay=0.5]"),
        (("lab", "--method SDPO --method.teacher Frozen"), SDPO(teacher=Frozen()), "SDPO[teacher=Frozen]"),
        (
            ("lab", "ogls_sd_v2", "alpha_2"),
            OGLS_SD_v2(steering=OutcomeSteering(2.0, 0)),
            "OGLS_SD_v2[alpha=2, ramp_steps=0]",
        ),
        (("lab", "grpo", "--method.temperature 1.0"), GRPO(), "GRPO"),
        (("families",), ROSD(), "ROSD"),
        (
            ("families", "rosd_exact", "shuffle_ideas"),
            ROSDExact(reflector=ExactReflector(shuffle_ideas=True)),
            "ROSDExact[shuffle_ideas=True]",
        ),
        (
            ("families", "rosd_idea_only", "exact_reflections", "families_each", "families_four"),
            ROSDIdeaOnly(reflector=ExactReflector()),
            "ROSDIdeaOnly[reflector=ExactReflector]",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_one_choice_is_changed_and_the_name_shows_it(stack: tuple[str, ...], expected: Method, name: str):
    method = method_of(*stack)
    assert method == expected
    assert method.name == name


def test_a_choice_that_replaces_another_takes_nothing_over():
    """PositiveOnly has an alpha and a ramp as well, and takes its own."""
    below = method_of("math", "alpha_2")
    assert below.steering == OutcomeSteering(alpha=2.0, ramp_steps=0)
    for stack in (("math", "alpha_2"), ("math", "--method.steering.ramp_steps 7")):
        method = method_of(*stack, "--method.steering PositiveOnly")
        assert method == replace(below, steering=PositiveOnly())
        assert method.steering == PositiveOnly(alpha=1.0, ramp_steps=0)
        assert "steering=PositiveOnly," in method.name
    method = method_of("math", "--method.privilege.use_solution false --method.privilege PeerOutcomes")
    peers = PeerOutcomes(max_peers=2, exclude_self=True, use_solution=False, learn_successes=True)
    assert method.privilege == peers, "the same class is no other"


@pytest.mark.parametrize(
    ("stack", "complaint"),
    [
        (
            "--config opsd.yaml --method.steering OutcomeSteering",
            "steering and privilege do not fit, OutcomeSteering and ReferenceSolution: the steering needs a view of "
            "role 'failure', got roles ['plain', 'success']",
        ),
        ("--config grpo.yaml --config alpha_2.yaml", "method.steering (Unsteered): Option 'alpha' is not accepted"),
        ("--config rosd.yaml --config one_step_off.yaml", "set method.reflector.weights to student"),
        ("--config sdpo.yaml --method.temperature 1.1", "expected method.temperature to be that, top_p 1 and top_k 0"),
        ("--method.advantage GroupRelative", "makes no use of GroupRelative: set method.advantage to null"),
        ("--method GRPO --method.advantage null", "GRPO needs advantages: set method.advantage"),
        ("--method GRPO --method.privilege ReferenceSolution", "but GRPO has no teacher: change one of them"),
        ("--method ROSD --method.reflector null", "CorrectiveIdea reads reflections: set method.reflector"),
        ("--method OPSD --method.selection.cuont 3", "method.selection (FirstTokens): Option 'cuont' is not accepted"),
        ("--method OPSD --method.selection UpToError --data.locator null", "needs an error locator: set data.locator"),
        ("--method ROSDExact --data.locator null", "ROSDExact needs a locator that knows ideas, such as ChainErrors"),
        ("--method OPDS", "method: there is no class 'OPDS'; did you mean 'OPSD'?"),
        ("--method opsd", "method: there is no class 'opsd'; did you mean 'OPSD'?"),
    ],
)
def test_what_does_not_fit_exits_with_2_and_one_clear_line(
    stack: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    arguments = ["fit", "--config", "math.yaml", *stack.split(), "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("INFO", "Seed set to"))]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert complaint in said[0]


JSD = Distillation(JensenShannon(0.5), support=TopK(100), importance_cap=2.0)
PUBLISHED: dict[str, tuple[Method, dict[str, Any]]] = {
    "ogls_sd": (
        OGLS_SD(),
        {
            "privilege": PeerOutcomes(),
            "steering": OutcomeSteering(3.0, 100),
            "objective": Distillation(clip=0.05),
            "temperature": 1.1,
            "top_p": 1.0,
        },
    ),
    "opsd": (
        OPSD(),
        {
            "privilege": ReferenceSolution(),
            "steering": Unsteered(),
            "objective": Distillation(temperature=1.1, clip=0.05, one_sided=True),
            "temperature": 1.1,
            "top_p": 0.95,
        },
    ),
    "sdpo": (
        SDPO(),
        {
            "privilege": SuccessfulPeer(),
            "steering": Unsteered(),
            "objective": JSD,
            "teacher": EMA(0.95),
            "selection": AllTokens(),
            "temperature": 1.0,
            "top_p": 1.0,
        },
    ),
    "rosd": (
        ROSD(),
        {
            "privilege": CorrectiveIdea(),
            "steering": Unsteered(),
            "objective": JSD,
            "selection": FromError(),
            "temperature": 1.0,
            "top_p": 1.0,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_qwen3_an_overlay_is_the_published_recipe(name: str):
    here = []
    for split in ("train", "val"):  # in place of data sets that have to be fetched
        here += [f"--data.{split} Chains", f"--data.{split}.init_args.size 8"]
    made = built("qwen3_ogls_sd", name, *here)
    preset, choices = PUBLISHED[name]
    assert made.model.method is made.datamodule.method
    assert made.model.method == preset
    assert {key: getattr(made.model.method, key) for key in choices} == choices
    drawn = made.model.method.sampling(made.datamodule.sizes.max_tokens)
    top_k = 20 if name == "opsd" else 0
    assert drawn == Sampling(max_tokens=8192, temperature=choices["temperature"], top_p=choices["top_p"], top_k=top_k)


# ---- every preset trains ----


REFLECTED = Prompts(
    system="",
    student="{problem}",
    views={"attempt": "{problem} Not {text}?", "idea": "{problem} Mind: {text}"},
    reflect_wrong="{problem}\nRight:\n{solution}\nWrong attempt:\n{attempt}\nJSON",
    reflect_right="{problem}\nRight attempt:\n{attempt}\nJSON",
)


def reflecting(folder: Path, slips: float = 0.3) -> ScriptedEngine:
    """Works chains, with a slip in some; asked for a reflection, it quotes the first mistake."""
    tokenizer = load_tokenizer(folder)

    def work(prompt: Sequence[int], rng: random.Random) -> Sequence[int]:
        text = str(tokenizer.decode(prompt))
        said = Chain.parse(text).work(rng, slips)
        asked = re.search(r"(Wrong|Right) attempt:\n(.*?)\nJSON", text, re.S)
        if asked is not None:
            mistake = first_mistake(Problem(id="", text=text, answer=""), asked[2])
            quote = f'"quote": "{mistake.quote if mistake else "none"}", ' if asked[1] == "Wrong" else ""
            said = f'{{{quote}"idea": "About {rng.randrange(10)}."}}'
        return [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    return ScriptedEngine(work)


@pytest.mark.parametrize("name", sorted({*methods.__all__} - {"Method"}))
def test_a_preset_trains(name: str, tiny_model: Path, wide_model: Path, tmp_path: Path):
    own = {"teacher": OtherModel(str(wide_model))} if name == "OnPolicyDistillation" else {}
    model, data = pair(
        tiny_model,
        method=getattr(methods, name)(**own),
        engine=reflecting(tiny_model),
        prompts=REFLECTED,
        reflection=ReflectionLimits(prompt_tokens=600, max_tokens=100),
        group_size=4,
        problems_per_step=4,
    )
    before = weights(model)
    losses = fit(tmp_path, model, data)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert any(losses)
    after = weights(model)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert any(not torch.equal(value, before[part]) for part, value in after.items())
