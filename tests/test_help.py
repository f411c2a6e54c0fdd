"""Help on the command line: every class that a key takes, and nothing that a user cannot choose."""

from __future__ import annotations

import inspect
import re
import sys

import jsonargparse._actions
import jsonargparse._typehints
import pytest

import ogls
from ogls.cli import main


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what a help replaces in jsonargparse, as the end of the process otherwise does."""
    for place, name in (
        (jsonargparse._typehints, "get_all_subclass_paths"),
        (jsonargparse._actions._ActionHelpClassPath, "print_help"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))


def said(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["run.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("asked", "base"),
    [
        ("--data.engine.help", "RolloutEngine"),
        ("--data.verifier.help", "Verifier"),
        ("--data.train.help", "ProblemSource"),
        ("--data.locator.help", "ErrorLocator"),
        ("--method.help", "Method"),
        ("--method.help OPSD --method.selection.help", "TokenSelection"),
        ("--method.help OPSD --method.privilege.help", "Privilege"),
        ("--method.help OPSD --method.steering.help", "Steering"),
    ],
)
def test_each_class_with_its_sentence(
    asked: str, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Expected are the public classes of that kind of which objects can be made."""
    of = getattr(ogls, base)
    public = {name: getattr(ogls, name) for name in ogls.__all__}
    wanted = {
        name: (inspect.getdoc(one) or "").splitlines()[0]
        for name, one in public.items()
        if isinstance(one, type) and issubclass(one, of) and not inspect.isabstract(one)
    }
    first, *lines, last = said(f"fit {asked}", monkeypatch, capsys)
    shown = dict(line.split(maxsplit=1) for line in lines)
    shown = {name: sentence for name, sentence in shown.items() if "." not in name}  # others are of other tests
    assert len(wanted) >= 1
    assert shown == wanted
    assert first == f"{asked.split()[-1].removeprefix('--').removesuffix('.help')} takes one of:"
    assert last == f"{asked.split()[-1]} NAME says what it can be given."


def test_one_class(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    text = "\n".join(said("fit --data.engine.help VllmServers", monkeypatch, capsys))
    assert "--data.engine.urls" in text
    assert "takes one of" not in text


def test_the_whole_help_has_no_class_that_nobody_can_choose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = " ".join(" ".join(said("fit --help", monkeypatch, capsys)).split())
    engines = re.findall(r"ogls\.\w*(?:Vllm|Engine)\w*", text)
    assert {*engines} >= {"ogls.VllmServers", "ogls.TransformersEngine", "ogls.VllmEngine"}
    assert "EngineProcess" not in text
