"""The commands on the page about several GPUs are read as the programs read them; nothing is started."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ogls.cli import build
from ogls.rollout.servers import VllmServers
from ogls.serve import command

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text()
STANDS_FOR = {  # what a shell would put in, or a user
    '"[${urls%,}]"': "[http://10.0.0.2:8000]",
    "http://10.0.0.2:8001,...": "http://10.0.0.2:8001",
    "'\"$host\"'": "10.0.0.2",
    "$((8000 + SLURM_LOCALID))": "8000",
    "$((8000 + i))": "8000",
    "X.yaml": "math.yaml",
    "qwen3_opsd.yaml": "math.yaml",  # whose problems are on the Hub
}


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of a program on the page."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    for shown, meant in STANDS_FOR.items():
        blocks = blocks.replace(shown, meant)
    lines = (line.partition("  #")[0] for line in blocks.splitlines() if not line.startswith("#"))
    calls = [line.partition(f"experiments/{program} ")[2] for line in lines if f"experiments/{program} " in line]
    return [shlex.split(re.sub(r"'? &.*", "", call)) for call in calls]


FITS = [words[1:] for words in commands("run.py") if words[0] == "fit"]
SERVERS = commands("serve.py")


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.chdir(tmp_path)


def test_all_are_found() -> None:
    assert len(FITS) == len(re.findall(r"run\.py fit", PAGE)) >= 9
    assert len(SERVERS) == PAGE.count("experiments/serve.py") >= 5


@pytest.mark.parametrize("words", FITS, ids=" ".join)
def test_a_run_is_made(words: list[str]) -> None:
    going_on = [i for i, word in enumerate(words) if word == "--ckpt_path"]
    own = [word for i, word in enumerate(words) if not any(i in (at, at + 1) for at in going_on)]  # of `fit` alone
    made = build([*own, "--trainer.accelerator", "cpu"], run=False)
    made.datamodule.close()
    told = dict(pairwise(own))
    nodes, devices = int(told.get("--trainer.num_nodes", 1)), int(told.get("--trainer.devices", 1))
    assert (made.trainer.num_nodes, made.trainer.num_devices) == (nodes, devices)
    assert isinstance(made.datamodule.engine, VllmServers) == ("VllmServers" in own)


@pytest.mark.parametrize("words", SERVERS, ids=" ".join)
def test_a_server_is_described(words: list[str], tiny_model: Path) -> None:
    told = dict(pairwise(words))
    model = ("--policy.model", str(tiny_model), "--policy.adapter", "null")
    made = command(["--config", told["--config"], *model], told.get("--host", "127.0.0.1"), int(told["--port"]))
    assert made.url.startswith(f"http://{told.get('--host', '127.0.0.1')}:80")
    assert {word for word in words if word.startswith("--")} <= {"--config", "--host", "--port", "--print-command"}
