"""The prompts' templates are versions in MLflow's registry of prompts; equal templates make no new version."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ogls.tracking.mlflow_run import MLflowRun

_SLOTS = re.compile(r"\{(problem|text|attempt|solution|answer)\}")
_IS_PROMPT = "mlflow.prompt.is_prompt"
_EXPERIMENTS = "_mlflow_experiment_ids"  # tag of a prompt: where its page is linked from
_LINKED = "mlflow.linkedPrompts"  # tag of a run
_SOURCE = "dummy-source"  # what MLflow's own client says; its server refuses anything else


def used(prompts: Any, method: Any) -> dict[str, str]:
    """Returns the templates that a run uses, by name.

    Args:
        prompts: the configuration's `ogls.lessons.prompts.Prompts`
        method: the method, which has its own wordings of what the teacher reads
    """
    found = {"student": prompts.student} | ({} if prompts.system is None else {"system": prompts.system})
    for wording in method.privilege.views.values():
        found[f"view.{wording.name}"] = prompts.views.get(wording.name, wording.template)
    if method.reflector is not None:
        found |= {name: getattr(prompts, name) for name in ("reflect_wrong", "reflect_right")}
    return found


def write(run: MLflowRun, templates: Mapping[str, str]) -> None:
    """Registers templates as `ogls.NAME`, each as the version that has this text, and links the run to them.

    A slot `{problem}` is `{{problem}}` there, as MLflow writes variables.
    """
    from mlflow.tracking._model_registry.client import (
        ModelRegistryClient,
    )  # the public one asks for a global experiment

    client, run_id = run.open()
    registry = ModelRegistryClient(run.uri, run.uri)
    linked = []
    for name, template in templates.items():
        text = _SLOTS.sub(r"{{\1}}", template)
        with run.alone():
            linked.append({"name": f"ogls.{name}", "version": _version(registry, f"ogls.{name}", text, run)})
    client.set_tag(run_id, _LINKED, json.dumps(linked))


def _version(registry: Any, name: str, text: str, run: MLflowRun) -> str:
    """Returns the version of a prompt that has this text, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        known = registry.get_registered_model(name)._tags.get(_EXPERIMENTS, "")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        registry.create_registered_model(name, {_IS_PROMPT: "true"}, "A template of ogls")
        known = ""
    if f",{run.experiment_id}," not in known:
        registry.set_registered_model_tag(name, _EXPERIMENTS, f"{known or ','}{run.experiment_id},")
    asked = f"name = '{name}' and tag.`{_IS_PROMPT}` = 'true'"
    for version in registry.search_model_versions(asked, max_results=1000):
        if version.tags.get("mlflow.prompt.text") == text:
            return str(version.version)
    tags = {_IS_PROMPT: "true", "_mlflow_prompt_type": "text", "mlflow.prompt.text": text}
    made = registry.create_model_version(name, _SOURCE, tags=tags, description=f"First used by {run.name}")
    return str(made.version)
