"""People judge located errors: a sample of wrong rollouts to fill in, and what the labels say when it comes back.

    python analysis/judged.py export runs/NAME runs/OTHER --count 100 --judges 2 --out judged
    python analysis/judged.py read judged.csv

`export` draws wrong rollouts with a located error from the `rollouts.jsonl` of runs, and writes NAME.csv to fill in and
NAME_key.csv, which judges do not see. A row asks: does the rollout first go wrong in the marked passage? The answer is
yes or no. Passages are whole lines or sentences; for a fair half of the rows that have another passage, that one is
marked in place of the located one, so that a judge cannot say yes throughout and agree. Neither method nor run is told.

`read` prints agreement and Cohen's kappa, between two judges and of each with the reflector, which says yes to the
passages that it located and no to the others; and how many of its own passages each judge confirms, by method. The 95 %
intervals come from resampling problems, and for shares from `share_interval`, which takes each row by itself. It writes
NAME_agreement.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from ogls.records import Span
from ogls.system.seeds import derive
from ogls.system.statistics import share_interval
from ogls.tracking.files import DESCRIPTION, ROLLOUTS

SHOWN = ("item", "problem", "solution", "rollout", "quoted error")
KEY = ("item", "method", "run", "key", "problem", "located")
LABELS = {"yes": True, "y": True, "1": True, "no": False, "n": False, "0": False}
RESAMPLES = 1000
_PASSAGE = re.compile(r"\S(?:(?![.!?]\s)[^\n])*(?:[.!?](?=\s))?")


def passages(text: str) -> list[Span]:
    """Returns the lines of a text, cut at the ends of sentences, as spans of characters."""
    return [found.span() for found in _PASSAGE.finditer(text)]


def located(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yields the wrong rollouts of runs whose error was located, each text once, with method and run.

    Raises:
        ValueError: a folder is not a run's, or a line of its rollouts cannot be read.
    """
    seen: set[tuple[str, str]] = set()
    for folder in folders:
        description, rollouts = folder / DESCRIPTION, folder / ROLLOUTS
        missing = [file.name for file in (description, rollouts) if not file.is_file()]
        if missing:
            raise ValueError(f"{folder}: expected a run's folder with stored rollouts, but it has no {missing[0]}")
        method = json.loads(description.read_text(encoding="utf-8"))["tags"].get("method", "unnamed")
        for number, line in enumerate(rollouts.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{rollouts}, line {number}: not a JSON object ({error})") from error
            same = (row["question"], row["text"])
            if row["correct"] or not row["error"] or same in seen:
                continue
            seen.add(same)
            yield row | {"method": method, "run": folder.name}


def items(rollouts: Sequence[dict[str, Any]], count: int, judges: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the table to fill in and its key: `count` rollouts in a random order, all of them where there are fewer.

    Args:
        rollouts: wrong rollouts with a located error
        count: number of rows
        judges: number of columns to fill in
        seed: seed of all draws
    """
    rng = random.Random(derive(seed, "judged"))
    shown, key = [], []
    for row in rng.sample(rollouts, min(count, len(rollouts))):
        text, all_ = row["text"], passages(row["text"])
        begin = row["error"]["span"][0]
        own = next((span for span in all_ if begin < span[1]), all_[-1] if all_ else (0, len(text)))
        others = [span for span in all_ if span != own]
        is_own = not others or rng.random() < 0.5
        start, end = own if is_own else rng.choice(others)
        item = hashlib.sha256("\x1f".join((row["run"], row["key"], str(start))).encode()).hexdigest()[:10]
        marked = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
        cells = (item, row["question"], row.get("solution") or row["answer"], marked, text[start:end])
        shown.append({name: _as_text(cell) for name, cell in zip(SHOWN, cells, strict=True)})
        key.append({**{name: row[name] for name in KEY[1:-1]}, "item": item, "located": is_own})
    return pd.DataFrame(shown).assign(**{f"judge {i + 1}": "" for i in range(judges)}), pd.DataFrame(
        key, columns=list(KEY)
    )


def _as_text(cell: str) -> str:
    """Returns a cell that no spreadsheet takes for a formula."""
    return f" {cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def labels_of(file: Path) -> pd.DataFrame:
    """Returns the key's rows with a column of booleans for each judge.

    Raises:
        ValueError: the file is not an exported one, or not filled in.
    """
    beside = file.with_name(f"{file.stem}_key.csv")
    for one in (file, beside):
        if not one.is_file():
            raise ValueError(f"{one}: no such file; expected what `judged.py export` wrote, with its key beside it")
    filled = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    key = pd.read_csv(beside, dtype={"item": str})
    judges = [name for name in filled if re.fullmatch(r"judge \d+", name)]
    lacking = [name for name in ("item", "judge 1") if name not in filled]
    if lacking:
        raise ValueError(
            f"{file}: expected the columns {', '.join(SHOWN)}, judge 1 ..., but there is no {lacking[0]!r}"
        )
    foreign = sorted(set(filled["item"]) ^ set(key["item"]))
    if foreign or filled["item"].duplicated().any():
        raise ValueError(
            f"{file}: expected each of the {len(key)} items of {beside.name} once, got {len(filled)} rows"
            + (f", among them or missing {foreign[0]}" if foreign else " with one of them twice")
        )
    found = key.set_index("item").loc[filled["item"]].reset_index()
    for name in judges:
        said = filled[name].str.strip().str.lower()
        if name != "judge 1" and (said == "").all():
            continue  # there is no second judge
        wrong = said[~said.isin(LABELS)]
        if len(wrong):
            row = wrong.index[0]
            got = repr(filled[name][row]) if said[row] else "an empty cell"
            raise ValueError(
                f"{file}: {name} has {len(wrong)} of {len(said)} rows without a label: expected yes or no, got {got} "
                f"in row {row + 2}"
            )
        found[name] = said.map(LABELS).astype(bool).to_numpy()
    return found


def kappa(one: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Returns Cohen's kappa, (p_agree - p_chance) / (1 - p_chance); nan where both give one and the same label."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the nan
        return float(cohen_kappa_score(one, other, labels=[False, True], sample_weight=weights))


def agreement(found: pd.DataFrame, one: str, other: str) -> dict[str, Any]:
    """Returns agreement and kappa of two columns, with the ends of kappa's interval from resampling problems."""
    problems, at = np.unique(found["problem"].to_numpy(dtype=str), return_inverse=True)
    rng, a, b = np.random.default_rng(0), found[one].to_numpy(), found[other].to_numpy()
    draws = rng.multinomial(len(problems), np.full(len(problems), 1 / len(problems)), RESAMPLES)[:, at]
    kappas = [kappa(a, b, draw) for draw in draws]
    low, high = (np.nan, np.nan) if np.isnan(kappas).all() else np.nanpercentile(kappas, [2.5, 97.5])
    same = share_interval(list((a == b).astype(float)))
    row = {"of": f"{one} and {other}", "items": len(found), "agreement": same.mean, "kappa": kappa(a, b)}
    return row | {"agreement_low": same.low, "agreement_high": same.high, "kappa_low": low, "kappa_high": high}


def tabulate(found: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for each pair of judge, judge and reflector, and for each judge and method the share confirmed."""
    found = found.rename(columns={"located": "reflector"})
    judges = [name for name in found if name.startswith("judge ")]
    pairs = [(a, b) for i, a in enumerate(judges) for b in judges[i + 1 :]] + [(j, "reflector") for j in judges]
    rows = [agreement(found, a, b) for a, b in pairs]
    own = found[found["reflector"]]
    for judge in judges:
        for method, some in own.groupby("method"):
            share = share_interval(list(some[judge].astype(float)))
            row = {"of": f"{judge} confirms {method}", "items": len(some), "agreement": share.mean}
            rows.append(row | {"agreement_low": share.low, "agreement_high": share.high})
    return pd.DataFrame(rows)


def report(table: pd.DataFrame) -> str:
    lines = ["| of | items | agreement | Cohen's kappa |", "|---|---:|---:|---:|"]
    for row in table.to_dict("records"):
        same = f"{row['agreement']:.3f} [{row['agreement_low']:.3f}, {row['agreement_high']:.3f}]"
        has = not pd.isna(row["kappa"])
        beyond = f"{row['kappa']:.3f} [{row['kappa_low']:.3f}, {row['kappa_high']:.3f}]" if has else ""
        lines.append(f"| {row['of']} | {row['items']} | {same} | {beyond} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = made.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a file for people to fill in")
    export.add_argument("runs", nargs="+", type=Path, help="folders of runs, such as runs/NAME")
    export.add_argument("--count", type=int, default=100, help="rollouts; default: %(default)s")
    export.add_argument("--judges", type=int, default=2, help="columns to fill in; default: %(default)s")
    export.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    export.add_argument("--out", type=Path, default=Path("judged"), metavar="NAME", help="default: %(default)s")
    read = commands.add_parser("read", help="say what a filled file says")
    read.add_argument("file", type=Path, help="NAME.csv, filled in, with NAME_key.csv beside it")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        if options.command == "read":
            table = tabulate(labels_of(options.file))
            out = options.file.with_name(f"{options.file.stem}_agreement.csv")
            table.to_csv(out, index=False)
            print(f"{report(table)}\nwritten: {out}")
            return
        files = [options.out.with_name(f"{options.out.name}{end}") for end in (".csv", "_key.csv")]
        there = [file for file in files if file.exists()]
        if there:
            raise ValueError(f"{there[0]} is there already, perhaps filled in: give another --out")
        if options.count < 1 or options.judges < 1:
            raise ValueError(f"--count and --judges must be at least 1, got {options.count} and {options.judges}")
        rollouts = list(located(options.runs))
        if not rollouts:
            raise ValueError(f"no wrong rollout with a located error in {', '.join(map(str, options.runs))}")
        for table, file in zip(items(rollouts, options.count, options.judges, options.seed), files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(file, index=False, encoding="utf-8-sig" if file is files[0] else "utf-8")
    except ValueError as error:
        parser().error(str(error))
    print(f"{min(options.count, len(rollouts))} of {len(rollouts)} wrong rollouts with a located error")
    print(f"written: {files[0]}, to fill in, and {files[1]}, for `read` alone")


if __name__ == "__main__":
    main()
