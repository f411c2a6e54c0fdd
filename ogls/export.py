"""A trained model leaves as a folder that transformers, peft and vLLM load.

    python experiments/run.py export --ckpt_path runs/NAME/checkpoints/best.ckpt --to FOLDER
    python experiments/run.py export --ckpt_path ... --to FOLDER --adapter        # what was trained, beside its base

The folder has weights, tokenizer, chat template, generation config, and a README with what the run reached.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import yaml

from ogls.callbacks.checkpoint_io import SoundCheckpoints, policy_weights
from ogls.policy.lora import Lora, join_adapters
from ogls.policy.policy import Policy
from ogls.policy.pretrained import weights_sha256, write_model
from ogls.tracking.card import card
from ogls.tracking.files import CONFIG, check_checkpoint


def export(
    checkpoint: Path, to: Path, dtype: Literal["bfloat16", "float32"] = "bfloat16", adapter: bool = False
) -> None:
    """Writes what a checkpoint has learned to the folder `to`, which must not hold anything yet.

    Args:
        checkpoint: file of a run, `runs/NAME/checkpoints/best.ckpt`; the run's configuration lies two folders above
        to: folder to write
        dtype: dtype of the weights
        adapter: whether the adapter is written rather than the model with the adapter merged into it. It fits the
            model that `policy.model` names: where training began with another adapter (a cold start), it is the sum of
            both, by a concatenation of their ranks.

    Raises:
        ValueError: the checkpoint is no run's, was trained on other base weights than are there now, has no adapter to
            write, or `to` is in use.
    """
    check_checkpoint(checkpoint)
    run = checkpoint.absolute().parent.parent
    if not (run / CONFIG).is_file():
        raise ValueError(f"--ckpt_path {checkpoint}: there is no {run / CONFIG}; give the file that lies in its run")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"--to {to} has files already: give a new folder")
    settings: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text())["policy"]
    lora = settings.pop("lora")
    if adapter and lora is None:
        raise ValueError("--adapter: this run trained all weights and has no adapter; leave the flag out")
    own = {"dtype": dtype, "gradient_checkpointing": False}
    if lora is not None and not isinstance(lora["targets"], str):
        lora["targets"] = tuple(lora["targets"])
    policy = Policy(**settings | own, lora=None if lora is None else Lora(**lora))
    saved = take(policy, checkpoint)
    to.mkdir(parents=True, exist_ok=True)
    if adapter:
        policy.save_adapter(to)
        if policy.adapter is not None:
            join_adapters(policy.adapter_folder, to, policy.base)
        policy.tokenizer.save_pretrained(to)
    else:
        write_model(policy.folder, to, dict(policy.merged_weights()), dtype)
    fits = f"Base: `{policy.name}`"
    if policy.adapter:
        holds = "this adapter, for the base as it is, is the sum of both" if adapter else "both are in these weights"
        fits += f". Training began with the adapter `{policy.adapter}`; {holds}."
    (to / "README.md").write_text(card(run, checkpoint, saved, "Adapter" if adapter else "Model", fits))


def take(policy: Policy, checkpoint: Path) -> dict[str, Any]:
    """Gives a policy the weights of a checkpoint, and returns all that the file holds.

    Raises:
        ValueError: the checkpoint was trained on other base weights than the policy has, or is damaged.
    """
    saved = SoundCheckpoints().load_checkpoint(checkpoint)
    wanted, there = saved["ogls"]["weights_sha256"], weights_sha256(policy.folder)
    if wanted != there:
        raise ValueError(f"{checkpoint} was trained on other base weights: {wanted}, got {there} in {policy.folder}")
    policy.load().load_trainable(policy_weights(saved))
    policy.version = saved["ogls"]["policy_version"]
    return saved


def parser() -> argparse.ArgumentParser:
    """Returns the parser of `run.py export`."""
    made = argparse.ArgumentParser(
        "run.py export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--ckpt_path", type=Path, required=True, metavar="FILE", help="runs/NAME/checkpoints/best.ckpt")
    made.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder")
    made.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    made.add_argument("--adapter", action="store_true", help="the adapter alone, for the model that it began with")
    return made


def main(arguments: list[str]) -> None:
    """Runs the command line of `run.py export`."""
    options = parser().parse_args(arguments)
    export(options.ckpt_path, options.to, options.dtype, options.adapter)
    print(f"{options.to}: {', '.join(sorted(file.name for file in options.to.iterdir()))}")
