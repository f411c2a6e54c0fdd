"""Stands in for experiments/run.py: takes its options, writes its files and ends as it does, in milliseconds a step.

`--x` is the accuracy it reaches, linearly over four validations; `--does` is what else happens: `raise`, `killed`
(once), `killed_with_best` (once, with no checkpoint to go on from), `always_killed`, `nan`, `nothing`, `late` (bad at
the last validation alone). `steps.txt` in the working directory gets a line for every step made.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STEPS = 4


def options() -> dict[str, str]:
    words = [word for word in sys.argv[2:] if word != "--print_config"]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def main() -> None:
    given = options()
    if "typo" in given:
        sys.exit("error: no option typo")
    if "--print_config" in sys.argv:
        print(json.dumps(given))
        return
    tracker = {n.rpartition(".")[2]: value for n, value in given.items() if n.startswith("trainer.logger.init_args.")}
    folder = Path(tracker["folder"]) / tracker["run_name"]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step = int(checkpoint.read_text()) if "ckpt_path" in given else 0
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    x, seed, does = float(given["x"]), int(given["seed_everything"]), given.get("does", "")

    def stop(number: int, frame: FrameType | None) -> None:
        checkpoint.write_text(str(step))
        os._exit(128 + number)

    def write(**row: float) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": 0.0, **row}) + "\n")

    signal.signal(signal.SIGTERM, stop)
    if step == 0:
        write(**{"val/avg_at_4": 0.0})
    while step < STEPS:
        time.sleep(float(given.get("seconds", "0.02")))
        step += 1
        with Path("steps.txt").open("a") as file:
            file.write(f"{folder.name} {step}\n")
        if step == 2 and does == "killed_with_best" and not Path("killed.txt").exists():
            Path("killed.txt").touch()
            checkpoint.with_name("best.ckpt").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and (does == "always_killed" or (does == "killed" and not Path("killed.txt").exists())):
            Path("killed.txt").touch()
            checkpoint.write_text(str(step - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and does == "raise":
            raise RuntimeError("out of luck")
        accuracy = float("nan") if does == "nan" and step == 2 else (x + 0.1 * seed) * step / STEPS
        if step == STEPS and does == "late":
            accuracy = 0.0
        write(**{"val/avg_at_4": accuracy, "val/length_mean": 10 * x})
    if does == "late":
        time.sleep(0.5)
    if does != "nothing":
        write(**{"final/avg_at_4": x + 0.1 * seed})
    checkpoint.write_text(str(step))


if __name__ == "__main__":
    main()
