"""Every key of the default run, misspelt."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from lightning import Trainer

from ogls.cli import build
from ogls.system.suggestions import suggestion

STRUCTURE = {"class_path", "init_args"}
OF_TRAINER = (("max_epochs",), ("logger",), ("callbacks",))  # the rest is Lightning's own


def keys(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if isinstance(key, str) and key not in STRUCTURE:
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from keys(value, (*path, key))


def misspelt(word: str) -> str:
    """Two letters in the middle change places, or one is added."""
    middle = len(word) // 2
    if len(word) < 5 or word[middle] == word[middle - 1]:
        return word + "e"
    return word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]


@pytest.mark.fault("configuration misspelt")
def test_every_misspelt_key_exits_with_2_and_is_named(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        build(["fit", "--config", "math.yaml", "--print_config"])
    config = yaml.safe_load(printed.getvalue())
    for of_fit in ("ckpt_path", "weights_only"):
        del config[of_fit]
    parser = build(["--config", "math.yaml"], run=False).parser
    ours = [path for path in keys(config) if path[0] != "trainer" or path[1:2] in OF_TRAINER]
    assert len(ours) > 90
    suggested = 0
    for path in ours:
        changed = copy.deepcopy(config)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        value, wrong = owner.pop(path[-1]), misspelt(path[-1])
        owner[wrong] = {"a": 1} if value == {} else value  # a key of nothing says nothing
        told = io.StringIO()
        if path[:-1] == ("data", "prompts", "views"):  # names of wordings, which the data alone knows
            with pytest.raises(ValueError, match=f"data.prompts.views: .* {wrong!r}, expected one of .*{path[-1]!r}"):
                parser.instantiate_classes(parser.parse_object(changed))
            continue
        with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as stopped:
            parser.parse_object(changed)
        assert stopped.value.code == 2, path
        assert wrong in told.getvalue(), (path, told.getvalue()[-300:])
        suggested += f"did you mean {path[-1]!r}?" in told.getvalue()
    assert suggested > 0.8 * len(ours)
    record_property("tried", len(ours))


def test_suggestions() -> None:
    assert suggestion("unrecognized arguments: --model.learning_rat 1", ["learning_rate"]).endswith("'learning_rate'?")
    told = "Problem with given class_path 'ogls.loss.steering.OutcomeSteering':\n    Option 'alpa' is not accepted"
    assert suggestion(told, []) == "; did you mean 'alpha'?"
    assert suggestion("Group 'trainer' does not accept option 'max_epoch'", dir(Trainer)) != ""
    assert suggestion("Option 'zzz' is not accepted", ["alpha"]) == ""
    for told in (
        "unrecognized arguments: --data.sampling.thinking_token_budget 5",
        "Subcommand 'fit' does not accept option 'data.sampling.thinking_token_budget'",
        "Option 'thinking_token_budget' is not accepted",
    ):
        assert suggestion(told, ["thinking_token_budget"]).startswith("; a budget of thoughts is for evaluation alone")
    below = "Group 'data' does not accept option 'loactor.init_args.size'"
    assert suggestion(below, ["locator", "size"]) == "; did you mean 'locator'?"
    assert suggestion("Option 'init_args.size' is not accepted", ["size", "inits"]) == ""
