"""README and the pages in docs are kept true: commands parse, the variant trains, the tree is the tree."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ogls
from ogls import export, generate, methods
from tests.faults.nursery import Nursery
from tests.parsed import parsed
from tests.test_cli import run_in, small

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "docs" / "files.md"
PAGES = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
LINES = [
    line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", PAGES, re.S) for line in block.splitlines()
]
COMMANDS = list(dict.fromkeys(line for line in LINES if not line.endswith("\\")))
VARIANT = re.search(r"```python\n# (negative)\.py\n(.*?)```", PAGES, re.S)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python experiments/run.py")])
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert VARIANT is not None
    (tmp_path / f"{VARIANT[1]}.py").write_text(VARIANT[2])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "runs" / "NAME").mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / "math.yaml", tmp_path / "runs" / "NAME" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    subcommand, *arguments = shlex.split(command)[2:]
    if subcommand == "export":
        export.parser().parse_args(arguments)
        return
    if subcommand == "generate":
        options, arguments = generate.parser().parse_known_args(arguments)
        prompts, arguments = generate.divided(arguments)
        assert prompts
        if options.ckpt_path is not None and not arguments:
            return
        subcommand = "validate"
    parsed([subcommand, *arguments])


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
    variant = ("--trainer.max_epochs", "1", "--method.steering", "negative.NegativeOnly")
    code, output = run_in(nursery, "fit", *small(tiny_model), *variant, cwd=tmp_path)
    assert code == 0, output[-3000:]
    assert "step 2/2  loss" in output


def test_the_tree_is_what_the_files_say_of_themselves():
    assert tree() in FILES.read_text(), "python tests/test_readme.py writes it"


def test_the_package_gives_every_method_and_loads_none_of_it_at_once():
    code = "import sys, ogls; assert 'torch' not in sys.modules; print(*ogls.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(methods.__all__) <= set(done.stdout.split())
    assert all(hasattr(ogls, name) for name in ogls.__all__)
    assert all(f"`{name}`" in PAGES for name in methods.__all__ if name != "Method")


def test_the_example_in_python_trains(tmp_path: Path):
    found = re.search(r"```python\n# (train_lab)\.py\n(.*?)```", PAGES, re.S)
    assert found is not None
    (tmp_path / "train_lab.py").write_text(found[2])
    done = subprocess.run(
        [sys.executable, "train_lab.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 3/3  loss" in done.stdout
    assert done.stdout.splitlines()[-1] == found[2].splitlines()[-1].partition("  # ")[2]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "best.ckpt").is_file()


def tree() -> str:
    """The tree: every file of the product, with the first line that it says of itself."""
    lines = []
    for folder in ("experiments", "sweeps", "analysis", "ogls"):
        lines += [f"├── {folder}/", *_below(ROOT / folder, "│   ")]
    return "\n".join(lines)


def _below(folder: Path, indent: str) -> list[str]:
    lines = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.suffix, path.name)):
        if path.is_dir() and any(path.rglob("*.py")) and path.name != "__pycache__":
            lines += [_line(f"{indent}├── {path.name}/", path / "__init__.py"), *_below(path, indent + "│   ")]
        elif path.suffix in (".py", ".yaml") and path.name != "__init__.py":
            lines.append(_line(f"{indent}├── {path.name}", path))
    return lines


def _line(name: str, path: Path) -> str:
    if not path.is_file():
        return name
    text = path.read_text()
    said = text.removeprefix("# ") if path.suffix == ".yaml" else ast.get_docstring(ast.parse(text)) or ""
    return f"{name:<34} {said.splitlines()[0].rstrip('.')}" if said else name


if __name__ == "__main__":
    start, end = "├── experiments/\n", "└── tests/"
    before, after = FILES.read_text().partition(start)[0], FILES.read_text().partition(end)[2]
    FILES.write_text(f"{before}{tree()}\n{end}{after}")
