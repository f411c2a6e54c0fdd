"""Train on each set, test on all: methods in and out of their domain, from configurations to a table.

    python analysis/matrix.py --config math.yaml --methods rosd sdpo --overlays domains --train chemistry physics

`data.val` names the test sets, `{chemistry: ..., physics: ...}`, here in domains.yaml; each name of --train is an
overlay that sets `data.train`, here chemistry.yaml and physics.yaml. Every method is run on every train set with every
seed, as by `methods.py`, which also says what a recipe is; what NAME_rows.csv or MLflow has is not made again.

Writes NAME.md and NAME.csv: accuracy on each test set after training, and its change, paired by problem, since before.
With three seeds and more, ± is half of the 95 % interval for new seeds on new problems, and * marks changes that are
there with p < 0.05 after Holm's correction for all changes in the table. With fewer seeds the interval is over problems
alone, and nothing is marked.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from compare import markdown
from methods import end, named, parser_of_runs, recipes_of, rows_of
from recipes import arguments_of, labels, stack_of
from seeds import FEWEST, Difference, difference, holm
from stored_rows import Row

from ogls.system.statistics import mean_interval, share_interval

Problems = Mapping[str, float]
"""The accuracy of each problem, by its name: SET/ID."""


def crossed(methods: Sequence[str], train: Sequence[str]) -> dict[tuple[str, str], str]:
    """Returns the recipe of each train set's overlay and method, as it is written."""
    return {
        (overlay, method): shlex.join(["+".join((*stack_of(method), *stack_of(overlay))), *arguments_of(method)])
        for method in methods
        for overlay in train
    }


def by_set(validations: Sequence[Problems]) -> dict[str, np.ndarray]:
    """Returns the accuracies of each set as an array with the axes [runs, problems], by the set's name.

    Args:
        validations: accuracy of each problem, one mapping per run; problems that not all have are left out

    Raises:
        ValueError: problems belong to no set.
    """
    table = pd.DataFrame(validations).dropna(axis=1)
    single = [name for name in table.columns if "/" not in name]
    if single or table.empty:
        raise ValueError("the runs have a single evaluation set: name several, data.val: {math: ..., science: ...}")
    table = table[sorted(table.columns)]
    sets = pd.Index([name.partition("/")[0] for name in table.columns])
    return {name: table.loc[:, sets == name].to_numpy() for name in dict.fromkeys(sets)}


def judged(table: np.ndarray) -> Difference:
    """Returns the mean of a table [runs, problems] for new seeds on new problems; of few seeds for new problems."""
    if len(table) >= FEWEST:
        return difference(table)
    mean, _, high = mean_interval(table.mean(0).tolist())
    return Difference(mean=mean, half=high - mean, p_value=math.nan)


def tabulate(cells: Mapping[tuple[str, str], tuple[Sequence[Problems], Sequence[Problems]]]) -> pd.DataFrame:
    """Returns one row per train set, method and test set: accuracy before and after, change, and their intervals.

    Args:
        cells: by train set and method, the accuracies by problem before training and after, one of each per run
    """
    rows = []
    for (train, method), (before, after) in cells.items():
        firsts, lasts = by_set(before), by_set(after)
        for test, last in lasts.items():
            if firsts[test].shape != last.shape:
                raise ValueError(f"{method} on {train}: {test} has other problems before training than after")
            now, change = judged(last), judged(last - firsts[test])
            if len(last) < FEWEST:  # the interval of one evaluation, by its longer side
                mean, low, high = share_interval(last.mean(0).tolist())
                now = replace(now, half=max(mean - low, high - mean))
            row = {"train": train, "method": method, "test": test, "seeds": len(last), "problems": last.shape[1]}
            row |= {"before": firsts[test].mean(), "after": now.mean, "after ±": now.half}
            rows.append(row | {"change": change.mean, "change ±": change.half, "p": change.p_value})
    table = pd.DataFrame(rows)
    return table.assign(**{"p, Holm": holm(table["p"].tolist())})


def matrices(table: pd.DataFrame) -> str:
    """Returns two tables for the eye, accuracy and change: a row per train set and method, a column per test set."""
    after = [f"{mean:.3f} ± {half:.3f}" for mean, half in zip(table["after"], table["after ±"], strict=True)]
    change = [
        f"{mean:+.3f} ± {half:.3f}{' *' if p < 0.05 else ''}"
        for mean, half, p in zip(table["change"], table["change ±"], table["p, Holm"], strict=True)
    ]
    texts = []
    for name, cells in (("accuracy", after), ("change", change)):
        wide = table.assign(cell=cells).pivot_table(
            index=["train", "method"], columns="test", values="cell", aggfunc="first", sort=False
        )
        texts.append(markdown(wide.reset_index().rename(columns={"train": f"{name} after training on"})))
    return "\n".join(texts)


def write(rows: Sequence[Row], written: Mapping[tuple[str, str], str], out: Path, heading: str = "") -> str:
    """Writes NAME.md and NAME.csv, and returns the text.

    Args:
        rows: rows of the runs
        written: recipes, by train set and method, as `crossed` gives them; one without rows has no line
        out: path of the files without their endings
        heading: what the text begins with

    Raises:
        ValueError: the runs have a single evaluation set.
    """
    names = labels({method: row.method for (_, method), key in written.items() for row in rows if row.recipe == key})
    cells = {}
    for (train, method), key in written.items():
        if own := [row for row in rows if row.recipe == key]:
            before, after = ([row.accuracies(getattr(row, which)) for row in own] for which in ("before", "right"))
            cells[train, names[method]] = (before, after)  # the train set is a column
    table = tabulate(cells)
    text = "\n".join(part for part in (heading, matrices(table)) if part)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    table.to_csv(out.with_suffix(".csv"), index=False)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--train", nargs="+", required=True, metavar="OVERLAY", help="overlays that set data.train")
    parser.add_argument("--out", type=Path, default=Path("matrix"), metavar="NAME", help="default: %(default)s")
    options = parser.parse_args(arguments)
    written = crossed(options.methods, options.train)
    wanted = recipes_of(list(written.values()), options, parser)
    if not named(wanted, options, parser):
        return
    rows, failed = rows_of(wanted, options, options.out)
    try:
        print(write(rows, written, options.out))
    except ValueError as error:
        parser.error(str(error))
    print(f"written: {options.out}.md, .csv, _rows.csv")
    end(failed)


if __name__ == "__main__":
    main()
