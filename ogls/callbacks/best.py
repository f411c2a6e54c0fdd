"""BestCheckpoint writes a run's checkpoints and finds the one to go on from."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError

from ogls.callbacks.checkpoint_io import SoundCheckpoints, newest_sound, policy_weights
from ogls.tracking import Tracker, tracker_of
from ogls.tracking.card import card
from ogls.tracking.files import ADAPTER, BEST_CHECKPOINT, CHECKPOINTS
from ogls.tracking.tracker import label, stamp

MODEL = "best_model"  # folder beside that of the adapter; all weights are too large to be an artifact
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", BEST_CHECKPOINT


_MONITOR = re.compile(
    r"(?P<split>val|val_subset)(?:_with_solution)?/(?:(?P<set>[^/]+)/)?(?:(?P<figure>avg|pass|maj)_at_(?P<k>\d+).*|[^/]+)"
)


def described(tracker: Tracker, trainer: Any) -> Tracker:
    """Returns the tracker, after telling it method and seed where the command line has not done so."""
    if tracker.method is None:
        tracker.describe(trainer.lightning_module.method.name, trainer.datamodule.seed)
    return tracker


class BestCheckpoint(ModelCheckpoint):
    """BestCheckpoint writes `best.ckpt` by a validation metric, and `last.ckpt` to go on from.

    Where an adapter is trained, the best one is saved, too, as `best_adapter`; where all weights are, the best model is
    written at the end of the run, as `best_model`, for transformers and vLLM. `last.ckpt` is written before the first
    step, every `save_every` steps, after each validation and at the end; what had the name before stays as
    `previous.ckpt`. `fit --ckpt_path last` goes on with the newest run of the same method and seed, or with `run_name`
    where one is given, from the sound checkpoint that is furthest on. They lie in the tracker's folder of the run;
    without a tracker, where Lightning puts them for another logger, and without any logger in a new folder of `runs`.

    Args:
        monitor: validation metric whose highest value is the best; null takes avg@k of the problems that every
            validation samples
        save_every: number of optimiser steps from one `last.ckpt` to the next within an epoch

    Raises:
        ValueError: `save_every` is below 1.
    """

    def __init__(self, monitor: str | None = None, save_every: int = 5) -> None:
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every}")
        super().__init__(
            monitor=monitor,
            mode="max",
            save_top_k=1,
            filename="best",
            save_last=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.save_every = save_every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError where some validation will not give the metric, before any weights are loaded."""
        data = cast(Any, trainer).datamodule
        name, samples = data.evaluation.watched
        self.monitor = self.monitor or f"{name}/avg_at_{samples}"
        asked = _MONITOR.fullmatch(self.monitor)
        if asked and (data.fit_follows or stage == "fit"):
            k, sets = int(asked["k"] or 1), list(data.val_problems.sets)
            if asked["set"] and asked["set"] not in sets:
                known = f"data.val has the sets {', '.join(sets)}" if sets else "data.val is a single set"
                raise ValueError(f"a checkpoint waits for {self.monitor}, but {known}")
            if asked["figure"] == "maj" and not data.verifier.tells_answers:
                raise ValueError(
                    f"a checkpoint waits for {self.monitor}, but data.verifier does not say which answer a text gives"
                )
            if asked["split"] != name or k > samples or (asked["figure"] == "avg" and k != samples):
                raise ValueError(
                    f"a checkpoint waits for {self.monitor}, but every validation has {samples} samples as {name}/* "
                    f"(data.evaluation): expected {name}/avg_at_{samples}"
                )
        self.dirpath = self.dirpath or self._own_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def _own_folder(self, trainer: Any) -> str | None:
        """Returns the folder of checkpoints; None leaves it to Lightning, which asks the first of the other loggers."""
        if trainer.fast_dev_run:  # nothing is written
            return None
        if tracker := tracker_of(trainer):
            return str(tracker.run_folder / CHECKPOINTS)
        if trainer.loggers:
            return None
        method, seed = trainer.lightning_module.method.name, trainer.datamodule.seed
        return str(Path("runs") / f"{label(method, seed)}-{stamp()}" / CHECKPOINTS)

    def save_last_now(self, trainer: Trainer) -> Path | None:
        """Writes `last.ckpt` and returns its path; the file that had this name stays as `previous.ckpt`.

        A `fast_dev_run` writes nothing, and None is returned.
        """
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return None
        assert self.dirpath is not None
        path = Path(self.dirpath) / LAST
        if trainer.is_global_zero and path.exists():
            previous = path.with_name(PREVIOUS)
            with suppress(OSError):  # a full disk, or a file system without links
                previous.unlink(missing_ok=True)
                os.link(path, previous)
        trainer.save_checkpoint(path, weights_only=False)
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, SoundCheckpoints) and writer.failed and (tracker := tracker_of(trainer)):
            tracker.log_metrics({"train/checkpoints_failed": writer.failed}, trainer.global_step)
        return path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over which checkpoint is the best so far, unless it lies in another run's folder."""
        assert self.dirpath is not None
        if Path(state_dict["dirpath"]).resolve() == Path(self.dirpath).resolve():
            super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves step 0. A run that goes on writes the best adapter anew: a kill may have come amid its files."""
        super().on_train_start(trainer, pl_module)
        if self.dirpath is None:  # a fast_dev_run
            return
        best, policy = Path(self.dirpath) / BEST, cast(Any, pl_module).policy
        if trainer.ckpt_path is not None and policy.lora is not None and trainer.strategy.broadcast(best.exists()):
            with suppress(ValueError):  # damaged, as the choice of the checkpoint has said
                saved = trainer.strategy.checkpoint_io.load_checkpoint(best)
                with policy.swapped(policy_weights(saved)):
                    self._save_adapter(trainer, policy)
        if trainer.global_step == 0:
            self.save_last_now(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Saves after every `save_every` steps; the last step of an epoch has to wait for the epoch's end."""
        if trainer.global_step % self.save_every == 0 and not trainer.is_last_batch:
            self.save_last_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step of an epoch: from an earlier checkpoint, Lightning would go on in the same epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self.save_last_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the adapter beside `best.ckpt` where the validation is the best so far."""
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        policy: Any = pl_module.policy
        if self.best_model_score is not before and policy.lora is not None:
            self._save_adapter(trainer, policy)

    def _save_adapter(self, trainer: Trainer, policy: Any) -> None:
        if not trainer.is_global_zero:  # but it may hold a part of the adapter
            policy.save_adapter(None)
            return
        draft = self._adapter.with_name(f".{ADAPTER}.draft")
        try:
            policy.save_adapter(draft)
            policy.tokenizer.save_pretrained(draft)
            (draft / "README.md").write_text(self._fits(policy))
            self._adapter.mkdir(exist_ok=True)
            for file in draft.iterdir():
                file.replace(self._adapter / file.name)
            draft.rmdir()
        except (OSError, SafetensorError) as error:  # best.ckpt holds the adapter, too, so the run goes on
            print(f"{self._adapter} keeps what it had: {error}", file=sys.stderr)

    def _fits(self, policy: Any) -> str:
        """Returns what the adapter's folder says of the model that it fits."""
        base = f"`{policy.name}`"
        if policy.adapter:
            base += f" with the adapter `{policy.adapter}` merged into it, which lies in `{policy.folder}`"
        lines = ["# The adapter of the best validation", "", f"It fits {base}, and no other model.", ""]
        if policy.adapter:
            lines += [f"For `{policy.name}` as it is, this writes the sum of both adapters:", "", "```sh"]
            lines += [
                f"python experiments/run.py export --ckpt_path {self.dirpath}/{BEST} --to FOLDER --adapter",
                "```",
                "",
            ]
        return "\n".join(lines)

    def _save_model(self, trainer: Trainer, policy: Any) -> None:
        """Writes the best model from `best.ckpt`; a folder that has the name is whole, whenever a kill comes."""
        assert self.dirpath is not None
        best, to = Path(self.dirpath) / BEST, Path(self.dirpath).parent / MODEL
        draft = to.with_name(f".{MODEL}.draft")
        try:
            saved = cast(Any, trainer.strategy.checkpoint_io.load_checkpoint(best))
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            policy.save_model(draft, policy_weights(saved))
            (draft / "README.md").write_text(card(to.parent, best, saved, "Model", f"Base: `{policy.name}`"))
            shutil.rmtree(to, ignore_errors=True)
            draft.rename(to)
        except (OSError, SafetensorError, ValueError) as error:  # best.ckpt holds the weights, too
            shutil.rmtree(draft, ignore_errors=True)
            print(f"{to} is not written: {error}", file=sys.stderr)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step and the best model, and hands the best adapter to the tracker.

        Without a tracker it says where to look.
        """
        last, tracker, policy = self.save_last_now(trainer), tracker_of(trainer), cast(Any, pl_module).policy
        if last is not None and policy.lora is None and trainer.is_global_zero and last.with_name(BEST).exists():
            self._save_model(trainer, policy)
        if tracker is not None and self._adapter.exists():
            tracker.log_folder(self._adapter, ADAPTER)
        if tracker is None and last is not None and trainer.is_global_zero:
            print(f"Checkpoints: {last.parent}", flush=True)

    @property
    def _adapter(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath).parent / ADAPTER

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Returns the one checkpoint to go on from; Lightning takes the newest of those returned."""
        tracker = tracker_of(trainer)
        if tracker is None:
            raise ValueError("--ckpt_path last finds the runs of ogls.Tracker alone: name the file, .../last.ckpt")
        tracker = described(tracker, trainer)
        run = newest_run(tracker)
        if run is None:
            wanted = tracker.run_folder if tracker.named else f"{tracker.folder / tracker.label}-*"
            raise ValueError(
                f"--ckpt_path last: there is no run {wanted}; a run of another method or seed is named by "
                "--trainer.logger.init_args.run_name"
            )
        newest = newest_sound([path for name in (LAST, PREVIOUS, BEST) if (path := run / CHECKPOINTS / name).exists()])
        if newest is None:
            raise ValueError(f"--ckpt_path last: there is no sound checkpoint in {run / CHECKPOINTS}")
        return {str(newest)}


def newest_run(tracker: Tracker) -> Path | None:
    """Returns the folder of the run that is meant: `run_name`, or else the last that began of the method and seed."""
    if tracker.named:
        return tracker.run_folder if tracker.run_folder.is_dir() else None
    return max(tracker.folder.glob(f"{tracker.label}-*"), key=lambda run: run.name[len(tracker.label) :], default=None)
