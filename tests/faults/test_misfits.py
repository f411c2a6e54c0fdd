"""Model, tokenizer and checkpoint that do not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ogls.lessons.prompts import PromptEncoder, Prompts
from ogls.policy.pretrained import load_tokenizer, tokenizer_sha256
from ogls.tracking import tracker
from tests.faults import small

pytestmark = pytest.mark.fault("tokenizer or template of another model")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model: Path) -> None:
    change(model / "config.json", vocab_size=100)
    with pytest.raises(ValueError, match=r"ids up to \d+, but the model a vocabulary of 100"):
        load_tokenizer(model)


def test_a_tokenizer_without_a_chat_template_is_refused(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(model)
    with pytest.raises(ValueError, match="no chat template"):
        PromptEncoder(Prompts(), tokenizer)
    PromptEncoder(Prompts(chat=False), tokenizer)


def test_a_run_does_not_go_on_with_another_template(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "_PATIENCE_SERVER", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    small.fit(model, tmp_path, epochs=1)
    before, template = tokenizer_sha256(model), model / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    assert tokenizer_sha256(model) != before
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        small.fit(model, tmp_path, epochs=2, goes_on=True)
