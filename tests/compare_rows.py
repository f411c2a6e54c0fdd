"""Do two versions of the code measure the same, to the last bit?

    python tests/compare_rows.py record before.json      on the one version
    python tests/compare_rows.py check before.json       on the other: names what differs, and ends with 1

Runs `experiments/lab.yaml` (20 steps, seeds 0 to 2) and `experiments/math.yaml` (6 steps, a scripted engine)
through the command line and keeps every row of metrics.jsonl but for what a clock says. One thread each, two at a time;
about six minutes on two cores. What follows ``--`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SCRIPTED = ("--data.engine", "tests.scripted.ChainEngine", "--trainer.max_epochs", "1")
RUNS = {f"lab-{seed}": ("--config", "lab.yaml", "--seed_everything", str(seed)) for seed in range(3)}
RUNS["math"] = ("--config", "math.yaml", *SCRIPTED)
CLOCK = ("time/", "speed/")

Rows = list[dict[str, float]]


def rows_of(name: str, folder: Path, further: list[str]) -> Rows:
    logger = {"folder": str(folder), "run_name": name, "tracking_uri": f"sqlite:///{folder}/{name}.db"}
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), "fit", *RUNS[name], "--trainer.accelerator", "cpu"]
    command += [word for key, value in logger.items() for word in (f"--trainer.logger.init_args.{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *further], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "time" and not key.startswith(CLOCK)}
        for line in lines
    ]


def differences(before: Rows, after: Rows) -> list[str]:
    """What is not the same, a line each; the order of the columns is no difference."""
    found = [] if len(before) == len(after) else [f"{len(before)} rows before, {len(after)} after"]
    for old, new in zip(before, after, strict=False):
        for key in sorted(old.keys() | new.keys()):
            if repr(old.get(key)) != repr(new.get(key)):  # repr: nan is the same as nan
                found.append(f"step {old['step']}: {key} {old.get(key)!r} before, {new.get(key)!r} after")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    given, further = parser.parse_args(words[:split]), words[split + 1 :]
    with TemporaryDirectory(prefix="ogls-rows-") as folder, ThreadPoolExecutor(2) as pool:
        made = dict(
            zip(given.runs, pool.map(lambda name: rows_of(name, Path(folder), further), given.runs), strict=True)
        )
    if given.what == "record":
        given.file.write_text(json.dumps(made))
        print({name: len(rows) for name, rows in made.items()})
        return
    before = json.loads(given.file.read_text())
    failed = False
    for name, rows in made.items():
        found = differences(before[name], rows)
        failed |= bool(found)
        values = sum(len(row) for row in rows)
        print(f"{name}: {len(rows)} rows, {values} values, {len(found) or 'none'} differ")
        print("".join(f"  {line}\n" for line in found[:10]), end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
