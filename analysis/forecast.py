"""Does the alpha profile before training foretell the alpha that trains best? For several students of the lab.

    OMP_NUM_THREADS=1 python analysis/forecast.py --seeds 1  (makes what is missing, 35 minutes; then the table)
    python analysis/forecast.py --seeds 0                    (the table from the rows that are there)

A student is what became of the lab's own in a few steps of another method (`STUDENTS`). Its profile is made as by
`alpha_profile.py`, from one teacher pass over the problems of the first step, 256 of them; then OGLS_SD as in
``lab.yaml`` trains it at every alpha of `ALPHAS`. The table has, student by student, Spearman's rank correlation of the
two over alphas: the mean log probability of the right tokens under the target, and accuracy on held-out problems.
Alpha 0 teaches nothing and is left out there. What is missed is the accuracy at the best alpha less that at the trained
one nearest to the profile's likeliest, and to the one that it recommends.

Writes NAME_profile.csv, NAME_rows.csv and NAME.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from alpha_profile import profile
from making import LOGS, complete, make_run
from methods import end
from questions import interval
from recipes import PROJECT, Recipe, fit_command, recipes
from scipy.stats import spearmanr
from stored_rows import Row, read_rows, rows_file

from ogls.system.statistics import mean_interval
from ogls.tracking.files import replace_text

QUESTION = "Does the alpha profile before training foretell the alpha that trains best?"
SEEDS = 3
STUDENTS = {  # overlay and number of steps by which the student is made
    "own": None,
    "sft_3": ("sft", 3),
    "sft_6": ("sft", 6),
    "sft_12": ("sft", 12),
    "grpo_20": ("grpo", 20),
    "rosd_10": ("rosd_exact", 10),
}
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GRID = np.linspace(0, 4, 33).tolist()
PROBLEMS = 256
FOLDER = Path("runs") / "students"
OWN = "experiments/lab/student"
RANKS = "rank correlation"


def model_of(student: str) -> str:
    """Returns the model of a student, as runs name it."""
    return OWN if STUDENTS[student] is None else f"{FOLDER}/{student}"


def make_student(student: str, experiment: str, tracking_uri: str) -> None:
    """Trains the lab's student for a few steps by another method and exports the weights, unless that was done.

    Raises:
        RuntimeError: a command failed.
    """
    made = STUDENTS[student]
    if made is None or Path(model_of(student)).exists():
        return
    overlay, steps = made
    name = f"student-{student}"
    logger = {"experiment": experiment, "tracking_uri": tracking_uri, "run_name": name, "traces": 0}
    words = ["--config", "lab.yaml", "--config", f"{overlay}.yaml", "--seed_everything", "100"]
    words += ["--trainer.max_epochs", "1", "--data.steps_per_epoch", str(steps), "--data.val.size", "16"]
    last = Path("runs") / name / "checkpoints" / "last.ckpt"
    fitted = fit_command(words, logger)
    exported = [*fitted[:2], "export", "--ckpt_path", str(last), "--to", model_of(student), "--dtype", "float32"]
    for command in (fitted, exported):
        log = LOGS / f"{name}-{command[2]}.log"
        code, _ = make_run(command, log)
        if code:
            raise RuntimeError(f"the student {student} was not made, see {log}")


def recipe_of(student: str, alpha: float) -> tuple[str, Recipe]:
    """Returns the recipe of a student's training at one alpha, and how it is written."""
    own = recipes("lab.yaml", [f"ogls_sd --policy.model {model_of(student)} --method.steering.alpha {alpha:g}"])
    ((key, recipe),) = own.items()
    return key, recipe


def wanted() -> dict[str, Recipe]:
    """Returns the recipes of all runs by how they are written."""
    return dict(recipe_of(student, alpha) for student in STUDENTS for alpha in ALPHAS)


def profile_of(student: str) -> pd.DataFrame:
    """Returns the student's profile: alpha, the criterion, and what the profile recommends."""
    words = ["--config", "lab.yaml", "--policy.model", model_of(student), "--data.problems_per_step", str(PROBLEMS)]
    table, advice, _ = profile(words, None, None, GRID)
    kept = table[["alpha", "log_p_right", "log_p_right_low", "log_p_right_high"]]
    told = {"likeliest": advice.likeliest, "low": advice.low, "high": advice.high, "recommended": advice.recommended}
    return kept.assign(student=student, **told)


def add_profiles(file: Path) -> None:
    """Makes the profiles that the file lacks, and stores each at once."""
    there = pd.read_csv(file) if file.is_file() else pd.DataFrame({"student": []})
    for student in STUDENTS:
        if student not in set(there["student"]):
            there = pd.concat([there, profile_of(student)], ignore_index=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, there.round(6).to_csv(index=False))


def summary(rows: Sequence[Row], profiles: pd.DataFrame) -> pd.DataFrame:
    """Returns one line per student whose runs are there at every alpha, with accuracies as means over seeds."""
    accuracy = {row.recipe: [other.accuracy for other in rows if other.recipe == row.recipe] for row in rows}
    lines = []
    for student, own in profiles.groupby("student", sort=False):
        found = [accuracy.get(recipe_of(str(student), alpha)[0], []) for alpha in ALPHAS]
        if not all(found):
            continue
        after = np.array([np.mean(values) for values in found])
        criterion = np.interp(ALPHAS, own["alpha"], own["log_p_right"])
        first = own.iloc[0]
        missed = {name: after.max() - after[_nearest(first[name])] for name in ("likeliest", "recommended")}
        key = recipe_of(str(student), ALPHAS[0])[0]
        before = float(np.mean([row.accuracy_before for row in rows if row.recipe == key]))
        lines.append(
            {
                "student": student,
                "before": before,
                **{f"alpha {alpha:g}": value for alpha, value in zip(ALPHAS, after, strict=True)},
                "likeliest": f"{first['likeliest']:g} [{first['low']:.2g}, {first['high']:.2g}]",
                "recommended": f"{first['recommended']:g}",
                RANKS: float(spearmanr(criterion[1:], after[1:]).statistic),
                **{f"missed by the {name}": float(value) for name, value in missed.items()},
                "seeds": min(map(len, found)),
            }
        )
    return pd.DataFrame(lines)


def missed_by_one(table: pd.DataFrame) -> dict[float, float]:
    """Returns what the same alpha for all students misses of the best accuracy of each, mean over students."""
    after = table[[f"alpha {alpha:g}" for alpha in ALPHAS]].to_numpy(dtype=float)
    missed = (after.max(1, keepdims=True) - after).mean(0)
    return dict(zip(ALPHAS[1:], missed[1:].tolist(), strict=True))


def _nearest(alpha: float) -> int:
    return int(np.abs(np.array(ALPHAS) - alpha).argmin())


def markdown(table: pd.DataFrame) -> str:
    """Returns the table and the means over students with their 95 % intervals (Student's t)."""
    means = (RANKS, "missed by the likeliest", "missed by the recommended")
    digits = dict.fromkeys(["before", *(f"alpha {a:g}" for a in ALPHAS), *means[1:]], ".3f") | {RANKS: ".2f"}
    records: list[dict[str, Any]] = table.to_dict("records")
    cells = [[f"{v:{digits[c]}}" if c in digits else str(v) for c, v in row.items()] for row in records]
    lines = [list(table.columns), ["---"] + ["---:"] * (len(table.columns) - 1), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += "\n"
    for column in means:
        mean, low, high = (f"{value:{digits[column]}}" for value in mean_interval(table[column].tolist()))
        text += f"\nMean {column} over {len(table)} students: {mean} [{low}, {high}]."
    constant = [f"{missed:.3f} at {alpha:g}" for alpha, missed in missed_by_one(table).items()]
    text += f"\nMean missed by one alpha for all: {', '.join(constant)}."
    made = [f"{name} is that after {how[1]} steps of `{how[0]}.yaml`" for name, how in STUDENTS.items() if how]
    return (
        f"{text}\n\nAccuracy on held-out problems before training, and after it at each alpha (`lab.yaml`). What is "
        "likeliest, with its 95 % range, and recommended is the profile's, before training. The student own is the "
        f"lab's; {', '.join(made)}.\n"
    )


def answers(out: Path) -> dict[str, str]:
    """Returns questions that the stored rows answer, with the answers, for docs/evidence.md; none without rows.

    Args:
        out: path of the files without their endings
    """
    profiles, rows = profiles_file(out), read_rows(rows_file(out))
    table = summary(rows, pd.read_csv(profiles)) if profiles.is_file() else pd.DataFrame()
    if table.empty:
        return {}
    of = f"{len(table)} students"
    ranks, missed = (mean_interval(table[column].tolist()) for column in (RANKS, "missed by the likeliest"))
    one = missed_by_one(table)
    best = min(one, key=lambda alpha: one[alpha])
    return {
        f"{QUESTION} Rank correlation over alphas": interval(*ranks, of, digits=2),
        "What is missed of the best accuracy by training at the likeliest alpha?": interval(*missed, of),
        f"And by one alpha for all, {best:g}, which is known to be the best afterwards?": f"**{one[best]:.3f}** ({of})",
    }


def profiles_file(out: Path) -> Path:
    """Returns the file with the students' profiles."""
    return out.with_name(f"{out.name}_profile.csv")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0 to N - 1; 0 makes no rows; default: %(default)s")
    parser.add_argument("--experiment", default="forecast", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=PROJECT / "analysis" / "results" / "forecast", metavar="NAME")
    options = parser.parse_args(arguments)
    profiles, file, failed = profiles_file(options.out), rows_file(options.out), 0
    try:
        if options.seeds:
            for student in STUDENTS:
                make_student(student, options.experiment, options.tracking_uri)
            add_profiles(profiles)
            failed = complete(wanted(), options.seeds, file, options.experiment, options.tracking_uri, jobs=1)
        table = summary(read_rows(file), pd.read_csv(profiles)) if profiles.is_file() else pd.DataFrame()
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    if table.empty:
        parser.error(f"{file}: no student has rows at every alpha; --seeds 1 makes them")
    text = markdown(table)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {profiles}, {file}, {options.out}.md")
    end(failed)


if __name__ == "__main__":
    main()
