"""An engine in a process of its own: the same completions, and an end of that process for every end of this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.engine import RolloutEngine
from ogls.rollout.guard import EngineGuard
from ogls.rollout.process import EngineProcess, environment_of_one
from tests.scripted import ScriptedEngine, numbers

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45]]
SAMPLING = Sampling(max_tokens=40)


def sums(policy: Policy) -> str:
    """Of the sizes of all merged weights, and of those of the adapter."""
    with TemporaryDirectory() as folder:
        policy.save_adapter(Path(folder))
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
    merged = dict(policy.merged_weights())
    return " and ".join(f"{sum(float(w.double().abs().sum()) for w in ws.values()):.6f}" for ws in (merged, adapter))


class Reading(ScriptedEngine):
    """Says of the weights that it was given what their sum is, as a log-prob would: in an error."""

    def _load(self, policy: Policy) -> None:
        if policy.lora is not None:
            raise ValueError(sums(policy))


@pytest.fixture
def beside(tiny_model: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(ScriptedEngine(numbers))
    engine.start(tiny_model, 256)
    yield engine
    engine.close()


def completions(engine: RolloutEngine, policy: Policy) -> object:
    engine.load(policy, 3)
    assert engine.version == 3
    return engine.generate(PROMPTS, SAMPLING, 3, seed=7)


def test_it_gives_what_the_engine_gives(beside: EngineProcess, tiny_model: Path) -> None:
    policy, here = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load(), ScriptedEngine(numbers)
    here.start(tiny_model, 256)
    assert completions(beside, policy) == completions(here, policy)


def test_weights_arrive_as_they_are(tiny_model: Path) -> None:
    policy = Policy(str(tiny_model), lora=Lora(rank=4), dtype="float32").load()
    torch.manual_seed(0)
    for p in policy.trainable().values():
        p.data += torch.randn_like(p)
    engine = EngineProcess(Reading(numbers))
    engine.start(tiny_model, 256)
    with pytest.raises(ValueError, match=sums(policy)):  # an error there is the same error here
        engine.load(policy, 0)
    engine.close()


def test_it_has_one_gpu_and_no_place_in_a_group() -> None:
    kept = {"HOME": "/root", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "VLLM_LOGGING_LEVEL": "INFO"}
    group = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
    group |= {"ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    environment = kept | dict.fromkeys(group, "1")
    assert environment_of_one(environment, None) == kept
    assert environment_of_one(environment, 3) == kept | {"CUDA_VISIBLE_DEVICES": "3"}
    for seen, expected in {"4,5, 6,7": "6", "GPU-a,GPU-b,MIG-c": "MIG-c"}.items():
        assert environment_of_one({"CUDA_VISIBLE_DEVICES": seen}, 2) == {"CUDA_VISIBLE_DEVICES": expected}


@pytest.mark.fault("engine dies")
def test_a_process_that_was_killed_is_rebuilt(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = EngineProcess(ScriptedEngine(numbers))
    guard = EngineGuard(engine)
    guard.start(tiny_model, 256)
    guard.load(Policy(str(tiny_model)).load(), 0)
    expected = guard.generate(PROMPTS, SAMPLING, 2, seed=1)
    assert engine._process is not None
    os.kill(engine._process.pid, signal.SIGKILL)
    assert guard.generate(PROMPTS, SAMPLING, 2, seed=1) == expected
    engine.close()
    assert "the engine's process has ended" in capfd.readouterr().err


@pytest.mark.fault("kill -9 of the trainer")
def test_it_ends_with_the_trainer(tiny_model: Path) -> None:
    script = f"""
    import os
    from pathlib import Path
    from ogls.rollout.process import EngineProcess
    from tests.scripted import ScriptedEngine, numbers

    engine = EngineProcess(ScriptedEngine(numbers))
    engine.start(Path({str(tiny_model)!r}), 256)
    print(engine._process.pid, flush=True)
    os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    stat, deadline = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 60
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline
