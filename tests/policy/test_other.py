"""Another model reads for the student: its logits by transformers' own model, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from random_models import write_model
from transformers import AutoModelForCausalLM

from ogls.lessons.privilege import ProblemAlone, ReferenceSolution, Several, ShortSuccesses
from ogls.lessons.selection import AllTokens
from ogls.loss.divergence import ReverseKL
from ogls.loss.objective import Distillation, Likelihood
from ogls.loss.steering import Plain, Unsteered
from ogls.methods import Method, OnPolicyDistillation
from ogls.module import SelfDistillation
from ogls.policy.lora import Lora
from ogls.policy.other import Other
from ogls.policy.policy import Policy
from ogls.policy.pretrained import weights_sha256
from ogls.policy.teacher import OtherModel
from tests.test_module import SaveAt, fit, pair, trainer, weights

TAUGHT = {"privilege": ProblemAlone(), "steering": Plain(), "selection": AllTokens()}


def test_it_reads_as_its_own_model_does_and_none_of_it_is_trained(tiny_model: Path, wide_model: Path) -> None:
    student = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()
    other = Other(student, str(wide_model)).load()
    assert other.trainable() == {}
    assert not any(p.requires_grad for p in other.parameters())
    assert not any(p is q for p in other.parameters() for q in student.parameters())
    weight, bias = other.head
    assert weight.shape == (320, 96)
    assert bias is None
    states = other.hidden([[5, 6, 7]], [[11, 12, 13], [21, 22]], [0, 0])
    model = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.float32)
    for ids, part in (([11, 12, 13], states[:3]), ([21, 22], states[3:])):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[5, 6, 7, *ids]])).logits[0, 2:-1, :320]
        torch.testing.assert_close(part @ weight.T, expected, atol=1e-4, rtol=1e-4)


def test_it_is_held_in_the_students_dtype(tiny_model: Path, wide_model: Path) -> None:
    student = Policy(str(tiny_model), lora=None, dtype="bfloat16")
    other = Other(student, str(wide_model)).load()
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


def with_tokens(folder: Path, to: Path, **renamed: str) -> Path:
    """A copy of a model whose tokenizer calls some tokens otherwise."""
    shutil.copytree(folder, to)
    file = to / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for before, after in renamed.items():
        vocabulary[after] = vocabulary.pop(before)
    tokenizer["model"]["merges"] = []
    file.write_text(json.dumps(tokenizer))
    return to


def test_a_model_with_other_tokens_or_fewer_logits_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    student = Policy(str(tiny_model))
    renamed = with_tokens(tiny_model, tmp_path / "renamed", a="aQ", b="bQ")
    with pytest.raises(ValueError, match=r"has another tokenizer than policy.model .*: 4 tokens differ, such as 'a'"):
        Other(student, str(renamed)).check()
    narrow = write_model(tmp_path / "narrow", vocab_size=321)
    with pytest.raises(ValueError, match=r"has 320 logits and policy.model .* 321: the student could sample ids"):
        Other(Policy(str(narrow)), str(tiny_model)).check()
    Other(student, str(narrow)).check()


def test_weights_are_not_fetched_for_a_teacher_that_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = with_tokens(tiny_model, tmp_path / "renamed", a="aQ")
    asked: list[str] = []

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(renamed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"method.teacher.model some/large-model has another tokenizer"):
        Other(Policy(str(tiny_model)), "some/large-model").check()
    assert "*.json" in asked
    assert "*.safetensors" not in asked


def test_what_the_teacher_reads_is_a_choice_of_its_own(wide_model: Path) -> None:
    teacher = OtherModel(str(wide_model))
    alone = OnPolicyDistillation(teacher=teacher)
    assert alone.views == {}
    assert [target.steering for target in alone.targets] == [Plain()]
    assert alone.name == f"OnPolicyDistillation[model={wide_model}]"
    both = OnPolicyDistillation(teacher=teacher, privilege=ReferenceSolution(), steering=Unsteered())
    assert list(both.views) == ["success"]
    with pytest.raises(ValueError, match="steering and privilege do not fit, Unsteered and ProblemAlone"):
        OnPolicyDistillation(teacher=teacher, steering=Unsteered())
    with pytest.raises(
        ValueError, match=r"ProblemAlone gives views of role \['plain'\], but Likelihood has no teacher"
    ):
        Method(privilege=ProblemAlone(), objective=Likelihood())
    with pytest.raises(ValueError, match="views of the same roles"):
        Several([ProblemAlone(), ReferenceSolution()])
    assert Several([ProblemAlone(), ShortSuccesses()]).plain


@pytest.mark.parametrize("lora", [Lora(rank=4, alpha=8), None], ids=["adapter", "all weights"])
def test_a_step_is_the_mean_reverse_kl_over_all_tokens(
    lora: Lora | None, tiny_model: Path, wide_model: Path, tmp_path: Path
) -> None:
    """The loss of the first step from full logits of two models, on the rollouts that were sampled."""
    model, data = pair(
        tiny_model, lora=lora, teacher=OtherModel(str(wide_model)), objective=Distillation(ReverseKL()), **TAUGHT
    )
    batches = []
    make_batch = data.make_batch
    data.make_batch = lambda *args: batches.append(make_batch(*args)) or batches[-1]  # pyright: ignore
    before = {name: p.detach().clone() for name, p in model.other.named_parameters()} if model.other else {}
    losses = fit(tmp_path, model, data)
    student, teacher = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_model, wide_model))
    total, count = 0.0, 0
    assert len(batches[0].lessons) == 9, "right rollouts, too"
    for lesson in batches[0].lessons:
        read = torch.tensor([[*lesson.prompt_ids, *lesson.token_ids]])
        with torch.no_grad():
            p, q = (
                m(input_ids=read).logits[0, len(lesson.prompt_ids) - 1 : -1, :320].double().softmax(-1)
                for m in (student, teacher)
            )
        total += float((p * (p / q).log()).sum())
        count += len(lesson.token_ids)
    assert losses[0] == pytest.approx(total / count, rel=1e-5)
    assert losses[1] != losses[0]
    assert before
    assert model.other is not None
    assert all(torch.equal(p, before[name]) for name, p in model.other.named_parameters())


def test_a_run_goes_on_with_its_teacher_alone(tiny_model: Path, wide_model: Path, tmp_path: Path) -> None:
    """Bitwise, and not with other weights under the same name; sampling alone needs no teacher."""
    folder, file = tmp_path / "teacher", tmp_path / "step1.ckpt"
    shutil.copytree(wide_model, folder)
    taught = {"teacher": OtherModel(str(folder)), **TAUGHT}
    whole, data = pair(tiny_model, **taught)
    expected = fit(tmp_path, whole, data, callbacks=[SaveAt(1, file)])
    saved = torch.load(file, weights_only=True)
    assert saved["ogls"]["teacher_sha256"] == weights_sha256(wide_model)
    assert saved["state_dict"].keys() == {f"policy.{name}" for name in weights(whole)}
    resumed, data = pair(tiny_model, **taught)
    assert fit(tmp_path, resumed, data, ckpt_path=file) == expected[1:]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name

    shutil.rmtree(folder)
    write_model(folder, hidden_size=96, num_hidden_layers=3, vocab_size=352, tie_word_embeddings=True)
    other, data = pair(tiny_model, **taught)
    with pytest.raises(ValueError, match="the checkpoint was trained by another teacher: "):
        fit(tmp_path, other, data, ckpt_path=file)


class Late(SelfDistillation):
    """Reads weights when the trainer says so, and not when the test makes it."""

    def configure_model(self) -> None:
        if self._trainer is not None:
            super().configure_model()


def test_sampling_needs_no_teacher(tiny_model: Path, tmp_path: Path) -> None:
    model, data = pair(tiny_model, kind=Late, teacher=OtherModel("no/such-model"), **TAUGHT)
    try:
        trainer(tmp_path).validate(model, data, verbose=False)
    finally:
        data.close()
    assert model.other is not None
    assert "model" not in model.other._modules
