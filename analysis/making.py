"""Making is what turns recipes and seeds into rows: runs of their own processes, whose numbers MLflow has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlflow import MlflowClient
from recipes import Recipe
from stored_rows import SECONDS, THREADS, Row, add_row, read_rows, row_of, sound, write_rows

from ogls.system import attached
from ogls.tracking.files import CHECKPOINTS

LOGS = Path("runs") / "logs"
Done = Callable[[str, str], None]
"""Function that is called with a recipe, as it is written, and the id of a run in MLflow."""


def finished(client: MlflowClient, experiment: str, recipe: Recipe) -> dict[int, str]:
    """Returns run ids by seed, the newest where a seed was run twice.

    A run of the same files whose method had another name, because the code gave it other defaults, does not count.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    where = f"attributes.status = 'FINISHED' and tags.recipe = '{recipe.digest}'"
    runs = client.search_runs([found.experiment_id], where, order_by=["attributes.start_time ASC"])
    own = [run for run in runs if run.data.tags.get("method") == recipe.name]
    return {int(run.data.tags["seed"]): run.info.run_id for run in own}


def log_of(recipe: str, which: str) -> Path:
    """Returns the file for the output of a run of a recipe, as it is written."""
    return LOGS / (re.sub(r"[^\w+.-]+", "-", recipe) + f"-{which}.log")


def threads() -> str:
    """Returns the number of threads of a run: one, unless the environment says otherwise."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def make_run(command: Sequence[str], log: Path) -> tuple[int, float]:
    """Carries out a command that ends with this process; returns its exit code and processor seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads()}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        words = [command[0], str(Path(attached.__file__)), *command[1:]]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        assert process.stdin is not None
        with process.stdin:
            _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def make_runs(
    todo: Sequence[tuple[str, int]],
    wanted: Mapping[str, Recipe],
    experiment: str,
    tracking_uri: str,
    jobs: int,
    done: Done = lambda key, run: None,
) -> int:
    """Makes runs, `jobs` at a time, one thread each unless the environment says otherwise; returns how many failed.

    The output of each run goes to a file of its own, named by recipe and seed.

    Args:
        todo: recipes and seeds
        wanted: recipes by how they are written
        experiment: experiment in MLflow
        tracking_uri: MLflow's store
        jobs: number of runs at a time
        done: function that is called after every run that came to its end, one call at a time
    """
    lock = threading.Lock()

    def make(job: tuple[str, int]) -> bool:
        (key, seed), began = job, time.monotonic()
        recipe = wanted[key]
        log = log_of(key, f"s{seed}")
        code, seconds = make_run(recipe.command(seed, experiment, tracking_uri), log)
        with lock:
            client = MlflowClient(tracking_uri)
            run = finished(client, experiment, recipe).get(seed) if code == 0 else None
            state = "finished" if run else f"failed with {code}, see {log}" if code else f"not in MLflow, see {log}"
            print(f"{key}, seed {seed}: {state} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
            if run:
                client.set_tag(run, SECONDS, f"{seconds:.1f}")
                client.set_tag(run, THREADS, threads())
                done(key, run)
        return run is not None

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not made for made in pool.map(make, todo))


def complete(
    wanted: Mapping[str, Recipe],
    seeds: int,
    file: Path,
    experiment: str,
    tracking_uri: str,
    jobs: int,
    update: Callable[[], object] = lambda: None,
) -> int:
    """Makes the rows that a file lacks of recipes and seeds; returns how many runs failed.

    Rows of these recipes whose configuration files have changed are told and taken away first.

    Args:
        wanted: recipes by how they are written
        seeds: number of seeds, 0 to N - 1
        file: file of the rows
        experiment: experiment in MLflow
        tracking_uri: MLflow's store
        jobs: number of runs at a time
        update: function that is called after every new row
    """
    rows = read_rows(file)
    kept = [row for row in rows if sound(row, wanted) and row.method == _name(wanted, row)]
    if len(kept) < len(rows):
        print(stale(file, [row.recipe for row in rows if row not in kept]) + "; they are made again", flush=True)
        write_rows(file, kept)
    client, there = MlflowClient(tracking_uri), {(row.recipe, row.seed) for row in kept}
    # Seed by seed, so that a table of all recipes is there early.
    lacking = [(key, seed) for seed in range(seeds) for key in wanted if (key, seed) not in there]
    runs = {key: finished(client, experiment, wanted[key]) for key in dict.fromkeys(key for key, _ in lacking)}

    def store(key: str, run: str) -> None:
        add_row(file, row_of(client, run, key, wanted[key]))
        update()
        shutil.rmtree(Path("runs") / client.get_run(run).data.tags.get("folder", "-") / CHECKPOINTS, ignore_errors=True)

    for key, seed in lacking:
        if seed in runs[key]:
            store(key, runs[key][seed])
    todo = [(key, seed) for key, seed in lacking if seed not in runs[key]]
    print(f"{len(todo)} runs to make, {len(wanted) * seeds - len(todo)} are there", flush=True)
    return make_runs(todo, wanted, experiment, tracking_uri, jobs, store)


def _name(wanted: Mapping[str, Recipe], row: Row) -> str:
    return wanted[row.recipe].name if row.recipe in wanted else row.method


def stale(file: Path, recipes: Sequence[str]) -> str:
    """Returns a line that tells rows whose configuration files have changed, by the recipe of each."""
    told = ", ".join(sorted(set(recipes)))
    return f"{file}: {len(recipes)} rows are stale, since configurations have changed since they were made: {told}"
