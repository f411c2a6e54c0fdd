r"""A style is planted in what the teacher reads: how much of it does the student learn, and does the bias foretell it?

    OMP_NUM_THREADS=1 python analysis/planted.py     makes the rows that are missing, then table and figure
    python analysis/planted.py --seeds 0             table and figure from the rows that are there

A share of the texts in the teacher's views becomes the answer alone (`ogls.lessons.planted`). The lab's student likes
that style and cannot perform it: such an answer is a guess. For each method, share and seed, one row is stored: the
bias of the initial student's targets, measured before training (`bias.py`: markers gained by the target at the first
token), then one run, and of its last weights accuracy, length and share of answers without work on held-out problems.
A command that was stopped makes the rows that are missing; a run that was stopped amid its steps is made again.

Rank correlations are Spearman's, over methods and shares, from means over seeds. Their intervals come from resampling
these cells; cells of one method are alike, so the intervals are somewhat too narrow.

Writes NAME_rows.csv, NAME.md and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bias import GAINED, REMOVED, marker_ids, measure
from making import LOGS, make_run, stale
from questions import interval, over_seeds
from recipes import PROJECT, Recipe, fit_command
from scipy.stats import spearmanr
from states import opened
from stored_rows import rows_file
from style import COLORS, MARKERS, panels, save

from ogls.data import RolloutDataModule
from ogls.system.seeds import derive
from ogls.system.statistics import mean_interval
from ogls.tracking.files import replace_text
from ogls.tracking.names import stamp

QUESTION = "How much of a style that is planted in what the teacher reads does the student learn, by method?"
SEEDS = 5
SHARES = (0.0, 0.25, 0.5, 1.0)
STYLE = "\\boxed{"
"""Token that begins an answer without work."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Arm:
    """An arm is a method with the privilege in which the style is planted.

    Args:
        overlays: names of configurations on top of ``lab.yaml``
        privilege: name of the privilege
        arguments: arguments of the privilege
        roles: roles of the texts that the style is planted in; None is all
    """

    overlays: tuple[str, ...]
    privilege: str
    arguments: tuple[tuple[str, int], ...] = ()
    roles: tuple[str, ...] | None = None

    def recipe(self, share: float, further: Sequence[str] = ()) -> Recipe:
        """Returns what makes a run, but for its seed; `further` are words of the command line."""
        inner = {"class_path": self.privilege, "init_args": dict(self.arguments)}
        outer = {"privilege": inner, "share": share, "roles": self.roles}
        planted = {"class_path": "ogls.lessons.planted.AnswersAlone", "init_args": outer}
        arguments = ("--method.privilege", json.dumps(planted), *further)
        return Recipe(config="lab.yaml", overlays=self.overlays, arguments=arguments)


ONE_PEER = (("max_peers", 1),)
ARMS = {
    "OPSD": Arm(("opsd", "plain_kl", "up_to_error"), "ReferenceSolution"),
    "PositiveMeanTeacher": Arm(("positive_mean", "plain_kl", "up_to_error", "one_peer"), "PeerOutcomes", ONE_PEER),
    "OGLS_SD": Arm((), "PeerOutcomes", ONE_PEER),
    "ROSD": Arm(("rosd", "rosd_student"), "CorrectiveIdea"),
    "OGLS_SD, right views alone": Arm((), "PeerOutcomes", ONE_PEER, roles=("success",)),
}


def held_out(data: RolloutDataModule, ids: Sequence[int]) -> dict[str, float]:
    """Returns accuracy, length and share of answers that begin with the style, of the present weights."""
    sampler, problems = data.sampler(), list(data.val_problems)
    sampler.hold()
    prompts = [data.encoder.evaluated(problem) for problem in problems]
    evaluation = data.evaluation
    seed = derive(data.seed, "planted")
    groups = sampler.rollouts(problems, prompts, evaluation.samples, evaluation.sampling, seed)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "accuracy": float(np.mean([rollout.correct for rollout in rollouts])),
        "length": float(np.mean([len(rollout.completion.token_ids) for rollout in rollouts])),
        "terse": float(np.mean([rollout.completion.token_ids[0] in ids for rollout in rollouts])),
    }


def make_row(
    arm: str, share: float, seed: int, options: argparse.Namespace, before: dict[str, float] | None
) -> dict[str, Any]:
    """Returns a row: what is measured before training, and what came of a run.

    Args:
        arm: name of the arm
        share: share of the texts in which the style is planted
        seed: random seed of rollouts and problems
        options: what the command line says
        before: what `held_out` gives before training, where another row with this seed has it

    Raises:
        RuntimeError: the run failed.
    """
    recipe, name = ARMS[arm].recipe(share, options.args), f"planted-{stamp()}"
    words = [*recipe.files, *recipe.arguments, "--seed_everything", str(seed)]
    row: dict[str, Any] = {"method": arm, "share": share, "seed": seed, "digest": recipe.digest}
    with opened([*words, "--data.problems_per_step", str(options.problems)], None) as (model, data):
        ids = marker_ids(data.encoder, [STYLE])
        found = measure(model, data, None, ids, first=True).table().set_index("quantity")["value"]
        row |= {
            "bias": found[GAINED],
            "removed": found.get(REMOVED, np.nan),
            "shift": found["size of the target's shift"],
        }
        row |= before or {f"{key}_before": value for key, value in held_out(data, ids).items()}
        row["name"] = model.method.name
    # The run's own validations are small: its last weights are evaluated below.
    logger = {"experiment": options.experiment, "tracking_uri": options.tracking_uri, "run_name": name, "traces": 0}
    folder, log = Path("runs") / name, LOGS / f"{name}.log"
    code, _ = make_run(fit_command([*words, "--data.val.size", "16"], logger), log)
    if code:
        raise RuntimeError(f"{arm}, share {share:g}, seed {seed} failed, see {log}")
    with opened(words, folder / "checkpoints" / "last.ckpt") as (model, data):
        row |= {"steps": model.policy.version, **held_out(data, marker_ids(data.encoder, [STYLE]))}
    shutil.rmtree(folder / "checkpoints")  # a hundred megabytes; the row has what they were for
    return row


def make_rows(file: Path, options: argparse.Namespace) -> int:
    """Makes the rows that are missing or stale, seed by seed, storing each at once; returns how many failed."""
    cells = [(a, share, seed) for seed in range(options.seeds) for share in options.shares for a in options.arms]
    rows = read_rows(file)
    kept = [row for row in rows if sound(row, options.args)]
    if len(kept) < len(rows):
        print(stale(file, [row["method"] for row in rows if row not in kept]) + "; they are made again", flush=True)
    there, failed = {(row["method"], row["share"], row["seed"]) for row in kept}, 0
    todo = [cell for cell in cells if cell not in there]
    print(f"{len(todo)} rows to make, {len(cells) - len(todo)} are there", flush=True)
    order = {arm: place for place, arm in enumerate(ARMS)}
    for arm, share, seed in todo:
        began = time.monotonic()
        start = next((row for row in kept if row["seed"] == seed), None)
        before = start and {key: value for key, value in start.items() if key.endswith("_before")}
        try:
            row = make_row(arm, share, seed, options, before)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        kept.append(row)
        kept.sort(key=lambda row: (order[row["method"]], row["share"], row["seed"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, pd.DataFrame(kept).round(6).to_csv(index=False))
        minutes = (time.monotonic() - began) / 60
        print(f"{arm}, share {share:g}, seed {seed}: {row['accuracy']:.3f} after {minutes:.1f} minutes", flush=True)
    return failed


def sound(row: Mapping[str, Any], further: Sequence[str] = ()) -> bool:
    """Returns whether the configurations of a row's arm still say what they said when the row was made."""
    return bool(row["digest"] == ARMS[row["method"]].recipe(row["share"], further).digest)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return pd.read_csv(file).to_dict("records") if file.is_file() else []


def cells_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns means over seeds by method and share.

    `change` is the accuracy after less that before; `excess` and `loss` are bias and accuracy against the same method
    with nothing planted, seed by seed.
    """
    rows = rows.assign(change=rows["accuracy"] - rows["accuracy_before"])
    base = rows[rows["share"] == 0].set_index(["method", "seed"])
    own = pd.MultiIndex.from_frame(rows[["method", "seed"]])
    rows["excess"] = rows["bias"] - base["bias"].reindex(own).to_numpy()
    rows["loss"] = base["accuracy"].reindex(own).to_numpy() - rows["accuracy"]
    wanted = ["bias", "removed", "terse", "length", "accuracy", "change", "excess", "loss"]
    groups = rows.groupby(["method", "share"], sort=False)
    return groups[wanted].mean().assign(seeds=groups.size()).reset_index()


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Returns Spearman's correlation with the ends of its interval from resampling pairs; nan where there is none."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    found = [spearmanr(x[d], y[d]).statistic for d in draws if len(set(x[d])) > 1 and len(set(y[d])) > 1]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def forecasts(cells: pd.DataFrame) -> dict[str, tuple[float, float, float, int]]:
    """Returns, by what is compared, the rank correlation, its ends and the number of cells."""
    # With nothing planted an arm that is about some of the texts is the arm of all of them.
    cells = cells[(cells["share"] > 0) | cells["method"].map(lambda arm: ARMS[arm].roles is None)]
    planted = cells[cells["share"] > 0].dropna(subset=["excess", "loss"])
    pairs = {
        "bias that the style adds, and loss of accuracy by it (share > 0)": (planted, "excess", "loss"),
        "bias, and change of accuracy by training": (cells, "bias", "change"),
        "bias, and share of answers without work after training": (cells, "bias", "terse"),
    }
    return {
        text: (*rank_correlation(some[x].to_numpy(), some[y].to_numpy()), len(some))
        for text, (some, x, y) in pairs.items()
    }


def markdown(rows: pd.DataFrame) -> str:
    """Returns the table: one line per method and share, then the correlations, then the names of the methods."""
    lines = ["| method | planted | seeds | bias before | removed | without work | length | accuracy | change |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    rows = rows.assign(change=rows["accuracy"] - rows["accuracy_before"])
    for (method, share), some in rows.groupby(["method", "share"], sort=False):
        removed = "" if some["removed"].isna().any() else f"{some['removed'].mean():.2f}"
        cells = [f"{some['bias'].mean():+.3f}", removed]
        cells += [_shown(some[key]) for key in ("terse", "length", "accuracy", "change")]
        lines.append(f"| {label(str(method))} | {share:g} | {len(some)} | {' | '.join(cells)} |")
    lines += ["", "| rank correlation of | value | 95 % interval | cells |", "|---|---:|---:|---:|"]
    for text, (value, low, high, count) in forecasts(cells_of(rows)).items():
        lines.append(f"| {text} | {value:.2f} | [{low:.2f}, {high:.2f}] | {count} |")
    start = rows[["accuracy_before", "length_before", "terse_before"]].mean()
    lines += ["", f"Before training: accuracy {start.iloc[0]:.3f}, length {start.iloc[1]:.1f}, without work "]
    lines[-1] += f"{start.iloc[2]:.3f}. Steps: {', '.join(map(str, sorted(rows['steps'].unique())))}. Names, at the "
    lines[-1] += "largest share:"
    lines.append("")
    for method, some in rows.groupby("method", sort=False):
        lines.append(f"- {label(str(method))}: `{some.sort_values('share')['name'].iloc[-1]}`")
    return "\n".join(lines) + "\n"


def answers(out: Path) -> dict[str, str]:
    """Returns questions that the stored rows answer, with the answers, for docs/evidence.md; none without rows.

    Args:
        out: path of the files without their endings
    """
    rows = pd.DataFrame(read_rows(rows_file(out)))
    if rows.empty:
        return {}
    told = {}
    terse = rows.pivot_table(index=["method", "seed"], columns="share", values="terse")
    removed = rows[rows["share"] == 1].groupby("method")["removed"]
    both = terse[1.0] - terse[0.0] if {0.0, 1.0} <= {*terse.columns} else terse.iloc[:0, 0]
    for method, gained in both.dropna().groupby("method", sort=False):
        question = f"A style planted in the texts in view: more answers in that style under {label(str(method))}"
        told[question] = over_seeds(list(gained))
    if "OGLS_SD" in removed.groups:
        told["What share of such views' shift does the contrast remove?"] = over_seeds([*removed.get_group("OGLS_SD")])
    for text, (value, low, high, count) in forecasts(cells_of(rows)).items():
        told[f"Rank correlation of {text}"] = interval(value, low, high, f"{count} cells", digits=2)
    return told


def label(arm: str) -> str:
    """Returns what tables and figures call an arm: none is a method as published, and the true name is in its rows."""
    kind, comma, rest = arm.partition(",")
    return f"{kind}[...]{comma}{rest}"


def _shown(values: pd.Series) -> str:
    digits = 1 if values.abs().max() > 2 else 3
    mean, low, _ = mean_interval(list(values))
    return f"{mean:.{digits}f}" + ("" if len(values) == 1 else f" ± {mean - low:.{digits}f}")


def draw(rows: pd.DataFrame, file: Path) -> None:
    figure, axes = panels(2, 2, 9.5, 7.0)
    cells = cells_of(rows)
    kinds = {"terse": "answers without work, after training", "length": "tokens per answer", "accuracy": "accuracy"}
    for one, (key, said) in zip(axes, kinds.items(), strict=False):
        for number, (method, some) in enumerate(cells.groupby("method", sort=False)):
            style = {"color": COLORS[number], "marker": MARKERS[number], "label": label(str(method))}
            one.plot(some["share"], some[key], linewidth=2, **style)
            seeds = rows[rows["method"] == method]
            one.plot(seeds["share"], seeds[key], "_", color=COLORS[number], alpha=0.6)
        one.axhline(rows[f"{key}_before"].mean(), color="#555555", linestyle=":", label="before training")
        one.set(xlabel="share of the texts in view that are the answer alone", ylabel=said)
    last = axes[3]
    for number, (method, some) in enumerate(cells[cells["share"] > 0].groupby("method", sort=False)):
        last.plot(some["excess"], some["loss"], MARKERS[number], color=COLORS[number], label=label(str(method)))
    last.axhline(0, color="#555555", linewidth=0.8)
    last.set(xlabel="bias that the style adds, before training", ylabel="loss of accuracy by the style")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0 to N - 1; 0 makes no rows; default: %(default)s")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--problems", type=int, default=64, help="that the bias is measured on; default: %(default)s")
    parser.add_argument("--experiment", default="planted", help="in MLflow; default: %(default)s")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=PROJECT / "analysis" / "results" / "bias", metavar="NAME")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="the rest goes to every run")
    options = parser.parse_args(arguments)
    file = rows_file(options.out)
    try:
        failed = make_rows(file, options)
    except ValueError as error:
        parser.error(str(error))
    if failed and not file.is_file():
        sys.exit(f"all {failed} rows failed")
    if not file.is_file():
        parser.error(f"{file}: there are no rows yet; --seeds 1 makes some")
    rows = pd.read_csv(file)
    text = markdown(rows)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, options.out.with_suffix(".png"))
    print(text)
    print(f"written: {file}, {options.out}.md, .png")
    if failed:
        sys.exit(f"{failed} rows failed; the same command makes them again")


if __name__ == "__main__":
    main()
