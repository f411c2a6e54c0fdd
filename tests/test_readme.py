"""The README is kept true: its commands parse, its variant trains, its tree is the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ogls.cli import build
from tests.faults.nursery import Nursery
from tests.test_cli import run_in, small

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
VARIANT = re.search(r"```python\n# (\w+)\.py\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python experiments/run.py")])
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert VARIANT is not None
    (tmp_path / f"{VARIANT[1]}.py").write_text(VARIANT[2])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        build([*shlex.split(command)[2:], "--print_config"])
    assert stopped.value.code == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command: str):
    asked = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr


def test_scripts_exist_and_explain_themselves():
    scripts = {shlex.split(c)[1] for c in COMMANDS if c.startswith("python ")}
    assert all((ROOT / script).is_file() for script in scripts)


def test_the_variant_of_ten_lines_trains(nursery: Nursery, tiny_model: Path, tmp_path: Path):
    assert VARIANT is not None
    (tmp_path / f"{VARIANT[1]}.py").write_text(VARIANT[2])
    variant = ("--trainer.max_epochs", "1", "--model.steering", "negative.NegativeOnly")
    code, output = run_in(nursery, "fit", *small(tiny_model), *variant, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert "step 2/2  loss" in output


def test_the_tree_names_every_module_and_nothing_else():
    named = set(re.findall(r"^(?:│   |    )*[├└]── ([\w./]+\.(?:py|yaml))", README, re.M))
    there = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for folder in ("ogls", "experiments", "analysis", "sweeps"):
        files = {Path(f).name for f in there if f.startswith(folder + "/") and f.endswith((".py", ".yaml"))}
        missing = sorted(f for f in files if f not in named and f != "__init__.py")
        assert not missing, f"README's tree lacks {missing}"
    assert named <= {Path(f).name for f in there}
