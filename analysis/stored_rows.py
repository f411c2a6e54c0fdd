"""Stored rows are all that tables, paired tests and figures need of runs: one line of a CSV file per run.

MLflow's runs only feed them, so a table is made again in seconds, by anyone, and completed over days and machines.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from recipes import Recipe, labels
from runs import accuracy_by_problem

from ogls.tracking.files import replace_text

SECONDS, THREADS = "processor_seconds", "threads"
"""Tags of a run in MLflow that say what it took."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row is one run: what it was, what came of it, and what it took.

    Args:
        recipe: overlays and arguments, as they are written on the command line
        method: name that the method derives from its choices
        settings: further words of the run's command line
        digest: digest of the configuration files and of `settings`
        seed: seed of the run
        step: last step
        samples: number of rollouts of each held-out problem, k
        accuracy: avg@k after the last step
        passed: pass@k after the last step
        length: mean length of a held-out rollout in tokens
        kl_to_base: KL to the model that training began with; nan where it was not measured
        sampled: number of tokens that were sampled to learn from
        learned: number of tokens that were learned, every time that they were counted
        seconds: processor seconds of the whole run, its validations included; nan where they were not measured
        threads: number of threads of each of the run's processes
        problems: digest of the names of the held-out problems
        before: number of right rollouts of each held-out problem before training, in the order of their names
        right: the same after the last step
        curve: avg@k by step, such as ``0:0.45 10:0.5``
    """

    recipe: str
    method: str
    settings: str
    digest: str
    seed: int
    step: int
    samples: int
    accuracy: float
    passed: float
    length: float
    kl_to_base: float
    sampled: int
    learned: int
    seconds: float
    threads: int
    problems: str
    before: str
    right: str
    curve: str

    @property
    def run(self) -> str:
        """Returns a name of the run that no other row of the file has."""
        return f"{self.recipe}, seed {self.seed}"

    @property
    def accuracy_before(self) -> float:
        """Returns the accuracy before training, where the curve begins."""
        return float(self.curve.partition(" ")[0].partition(":")[2])

    def accuracies(self, counts: str) -> dict[str, float]:
        """Returns the accuracy of each problem, of `before` or `right`: by set and place, of the same problems."""
        return {
            f"{name}{self.problems}-{place}": count / self.samples
            for name, own in decode(counts, self.samples).items()
            for place, count in enumerate(own)
        }


_TYPES = {field.name: {"str": str, "int": int, "float": float}[str(field.type)] for field in fields(Row)}


def encode(accuracies: Mapping[str, float], samples: int, sets: bool = False) -> str:
    """Returns the numbers of right rollouts of all problems, by the problems' names, as one word or one per set.

    A number is a digit; where there can be ten and more, dots stand between numbers. What comes from several sets is
    told apart by its set: ``sums=0810 words=7``.

    Raises:
        ValueError: an accuracy is no multiple of one in `samples`.
    """
    by_set: dict[str, list[str]] = {}
    for name, accuracy in sorted(accuracies.items()):
        count = round(accuracy * samples)
        if abs(count - accuracy * samples) > 1e-6 * samples:
            raise ValueError(f"the problem {name!r} has the accuracy {accuracy}, which is no multiple of 1/{samples}")
        by_set.setdefault(name.partition("/")[0] if sets else "", []).append(str(count))
    between = "" if samples < 10 else "."
    return " ".join(f"{name}={between.join(own)}" if name else between.join(own) for name, own in by_set.items())


def decode(counts: str, samples: int) -> dict[str, list[int]]:
    """Returns the numbers that `encode` wrote, by ``SET/``, or by the empty word where there is one set."""
    found = {}
    for word in counts.split():
        name, several, numbers = word.rpartition("=")
        found[name + "/" * bool(several)] = [int(n) for n in (numbers if samples < 10 else numbers.split("."))]
    return found


def row_of(client: MlflowClient, run: str, key: str, recipe: Recipe) -> Row:
    """Returns the row of a finished run.

    Args:
        client: where the run is
        run: its id
        key: recipe as it is written
        recipe: the recipe itself

    Raises:
        ValueError: the run lacks what a row needs.
    """
    found = client.get_run(run)
    tags, last = found.data.tags, found.data.metrics
    ks = [int(number[1]) for name in last if (number := re.fullmatch(r"val/avg_at_(\d+)", name))]
    if len(ks) != 1:
        raise ValueError(f"the run {run} of {key} has no validation: expected a metric val/avg_at_N")
    (k,) = ks
    curve = dict(sorted((m.step, m.value) for m in client.get_metric_history(run, f"val/avg_at_{k}")))
    first, end = min(curve), max(curve)
    before, after = (accuracy_by_problem(client, run, step) for step in (first, end))
    sets = any(re.fullmatch(rf"val/.+/avg_at_{k}", name) for name in last)

    def by_step(name: str) -> dict[int, float]:
        return {m.step: m.value for m in client.get_metric_history(run, name)}

    took = by_step("time/generate")
    sampled = sum(rate * took[step] for step, rate in by_step("speed/generate_tokens_per_s").items())
    return Row(
        recipe=key,
        method=recipe.name,
        settings=shlex.join(recipe.arguments),
        digest=recipe.digest,
        seed=int(tags["seed"]),
        step=end,
        samples=k,
        accuracy=curve[end],
        passed=last.get(f"val/pass_at_{k}", math.nan),
        length=last.get("val/length_mean", math.nan),
        kl_to_base=last.get("val/kl_to_base", math.nan),
        sampled=round(sampled),
        learned=round(sum(by_step("train/tokens_learned").values())),
        seconds=float(tags.get(SECONDS, "nan")),
        threads=int(tags.get(THREADS, "0")),
        problems=hashlib.sha256("\n".join(sorted(after)).encode()).hexdigest()[:12],
        before=encode(before, k, sets),
        right=encode(after, k, sets),
        curve=" ".join(f"{step}:{value!r}" for step, value in curve.items()),
    )


def rows_file(out: Path) -> Path:
    """Returns the file with the rows of a table."""
    return out.with_name(f"{out.name}_rows.csv")


def read_rows(file: Path) -> list[Row]:
    """Returns the rows of a file; none where there is no file. Raises ValueError where it is no file of rows."""
    if not file.exists():
        return []
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    if list(table.columns) != list(_TYPES):
        raise ValueError(f"{file} has other columns than rows have: expected {', '.join(_TYPES)}")
    return [Row(**{name: _TYPES[name](text) for name, text in line.items()}) for line in table.to_dict("records")]


def write_rows(file: Path, rows: list[Row]) -> None:
    """Replaces the file by these rows, seed by seed, in one move."""
    table = pd.DataFrame([asdict(row) for row in rows], columns=list(_TYPES)).sort_values(["seed", "recipe"])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, table.to_csv(index=False, na_rep="nan"))


def add_row(file: Path, row: Row) -> None:
    """Puts a row into the file, in place of one of the same recipe and seed."""
    others = [other for other in read_rows(file) if other.run != row.run]
    write_rows(file, [*others, row])


def sound(row: Row, wanted: Mapping[str, Recipe]) -> bool:
    """Returns whether a row's recipe still says what it said when the row was made; of other recipes it is true."""
    return row.recipe not in wanted or row.digest == wanted[row.recipe].digest


def called(rows: list[Row]) -> dict[str, str]:
    """Returns what tables call each recipe of the rows."""
    return labels({row.recipe: row.method for row in rows})


def history_of(rows: list[Row]) -> pd.DataFrame:
    """Returns the accuracy of every validation as `runs.read` gives it: method, seed, run, step, value, low, high."""
    names = called(rows)
    lines = [
        {"method": names[row.recipe], "seed": row.seed, "run": row.run, "step": int(step), "value": float(value)}
        for row in rows
        for step, _, value in (point.partition(":") for point in row.curve.split())
    ]
    return pd.DataFrame(lines).assign(low=math.nan, high=math.nan)


def of_sets(rows: list[Row]) -> dict[str, pd.DataFrame]:
    """Returns the last accuracy of each evaluation set, as `history_of` gives it; nothing where there is one set."""
    names, found = called(rows), {}
    for row in rows:
        for name, counts in decode(row.right, row.samples).items():
            line = {"method": names[row.recipe], "seed": row.seed, "run": row.run, "step": row.step}
            value = float(np.mean(counts)) / row.samples
            found.setdefault(name.rstrip("/"), []).append(line | {"value": value})
    return {name: pd.DataFrame(lines) for name, lines in found.items() if name}
