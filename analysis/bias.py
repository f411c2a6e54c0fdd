r"""Reflection-induced bias as numbers: what privileged views do to the teacher's logits whether or not they are right.

    python analysis/bias.py --config lab.yaml --markers '\boxed{' --places first --out bias
    python analysis/bias.py --config math.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt --markers reference given

At each learned token of the wrong rollouts, with the logits z0 of the plain teacher and the means zbar+ and zbar- of
its logits under success and failure views:

    v+ = zbar+ - z0      v- = zbar- - z0      common part c = (v+ + v-) / 2      contrast Delta = v+ - v-

The size of each is its standard deviation over the vocabulary under p0 = softmax(z0). Of the views' shift, the contrast
removes the common part: since (var v+ + var v-) / 2 = var c + var Delta / 4, its share is var c / (var c + var Delta /
4). It is 1 where both views say the same, 0 where they say the opposite, and 1/2 where they have nothing in common.

*Markers* are tokens by which a style is known. Their mass is the probability that one of them comes next, under the
plain teacher, each pool of views, the steered target and the student. --places first looks at the first token of each
rollout alone, where a style of answers is chosen; --places all at every learned token. A marker is one token, with or
without a space before it: the probability of a longer phrase does not follow from one pass.

Writes NAME.csv and NAME.md (means over tokens, and 95 % intervals from resampling problems) and NAME.png. What a method
does not have, such as failure views, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from alpha_profile import resampled
from matplotlib.axes import Axes
from states import Scored, of_wrong, opened, parser_of, score, steering_of
from style import COLORS, GREY, panels, save
from torch import Tensor

from ogls.data import RolloutDataModule
from ogls.lessons.prompts import PromptEncoder
from ogls.loss.alpha_bound import Head
from ogls.module import SelfDistillation

CHUNK_ROWS = 32
POOLS = {"success": "success views", "failure": "failure views", "idea": "ideas"}
SIZES = {
    "size of v+": "std_success",
    "size of v-": "std_failure",
    "size of an idea's shift": "std_idea",
    "size of the common part c": "std_common",
    "size of the contrast Delta": "std_contrast",
    "size of the target's shift": "std_target",
}
RATIO, REMOVED, GAINED = "c / Delta", "share that the contrast removes", "markers, gained by the target"


def marker_ids(encoder: PromptEncoder, markers: Sequence[str]) -> list[int]:
    """Returns the ids of the markers, each of which is one token, with a space before it or without."""
    found: list[int] = []
    for marker in markers:
        forms = [encoder.tokenizer.encode(text, add_special_tokens=False) for text in (marker, f" {marker}")]
        single = [form[0] for form in forms if len(form) == 1]
        if not single:
            pieces = [encoder.tokenizer.decode([i]) for i in forms[0]]
            raise ValueError(
                f"a marker is one token, but {marker!r} is {len(pieces)}: name the telling one of {pieces}"
            )
        found += single
    return sorted(set(found))


def std(p: Tensor, shift: Tensor) -> Tensor:
    """Returns the standard deviation of each row of `shift` [tokens, vocab] under the probabilities `p`."""
    mean = (p * shift).sum(-1, keepdim=True)
    return (p * (shift - mean) ** 2).sum(-1).sqrt()


def values_of(z0: Tensor, shifts: dict[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """Returns sizes and masses of markers [tokens].

    Args:
        z0: logits of the plain teacher, [tokens, vocab]
        shifts: logits of others less z0, by name: ``success``, ``failure``, ``target`` ...
        ids: ids of the markers
    """
    p0 = z0.softmax(-1)
    found = {f"std_{name}": std(p0, shift) for name, shift in shifts.items()}
    if {"success", "failure"} <= shifts.keys():
        right, wrong = shifts["success"], shifts["failure"]
        found |= {"std_common": std(p0, (right + wrong) / 2), "std_contrast": std(p0, right - wrong)}
        found["var_common"] = found["std_common"] ** 2
        found["var_both"] = (found["std_success"] ** 2 + found["std_failure"] ** 2) / 2
    found["mass_plain"] = p0[:, ids].sum(-1)
    found |= {f"mass_{name}": (z0 + shift).softmax(-1)[:, ids].sum(-1) for name, shift in shifts.items()}
    return found


@torch.no_grad()
def token_values(one: Scored, alpha: float | Tensor, ids: Sequence[int], head: Head) -> dict[str, np.ndarray]:
    """Returns what `values_of` gives for all scored tokens of a lesson."""
    weight, bias = head
    plain = one.pools["plain"]
    others = {role: one.pools[role] for role in POOLS if role in one.pools}
    others |= {"target": one.anchor + alpha * one.direction, "student": one.student}
    parts: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(plain), device=plain.device).split(CHUNK_ROWS):
        # The head is applied to differences of states, so that views that agree have a shift of exactly 0.
        shifts = {name: ((state - plain)[rows].to(weight.dtype) @ weight.T).double() for name, state in others.items()}
        z0 = (plain[rows].to(weight.dtype) @ weight.T).double()
        parts.append(values_of(z0 if bias is None else z0 + bias.double(), shifts, ids))
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is measured are sums over each problem's tokens of weight x value, by name, and of the weight: [problems].

    Args:
        over: sums of each value; names that begin with ``mass_`` count the markers' places alone
        tokens: sums of the weights of learned tokens
        places: sums of the weights of the markers' places
    """

    over: dict[str, np.ndarray]
    tokens: np.ndarray
    places: np.ndarray

    def table(self) -> pd.DataFrame:
        """Returns one row per quantity: value, low and high."""
        there, o = self.over, self.over
        rows = {label: (o[name], self.tokens) for label, name in SIZES.items() if name in there}
        if "std_common" in there:
            rows |= {RATIO: (o["std_common"], o["std_contrast"]), REMOVED: (o["var_common"], o["var_both"])}
        if self.places.any():
            names = {"plain": "plain teacher", **POOLS, "target": "target", "student": "student"}
            masses = {name: label for name, label in names.items() if f"mass_{name}" in there}
            rows |= {f"markers, {label}": (o[f"mass_{name}"], self.places) for name, label in masses.items()}
            rows[GAINED] = (o["mass_target"] - o["mass_plain"], self.places)
        made = []
        for label, (over, under) in rows.items():
            if not under.any():  # views that do nothing at all have no ratio
                made.append((label, np.nan, np.nan, np.nan))
                continue
            low, high = np.nanpercentile(resampled(over[:, None], under[:, None]), [2.5, 97.5])
            made.append((label, over.sum() / under.sum(), low, high))
        return pd.DataFrame(made, columns=["quantity", "value", "low", "high"])


def measure(
    model: SelfDistillation, data: RolloutDataModule, step: int | None, ids: Sequence[int], first: bool
) -> Measured:
    """Returns sums over the wrong rollouts of one step's problems, sampled from the present weights.

    Args:
        model: student and teacher
        data: source of the problems
        step: number of the optimiser step; None is the next one of the weights
        ids: ids of the markers
        first: whether markers are looked for at the first token of each rollout alone, learned or not
    """
    lessons = of_wrong(data.make_batch(model.policy.version if step is None else step))
    problems = list(dict.fromkeys(lesson.problem_id for lesson in lessons))
    over: dict[str, np.ndarray] = {}
    tokens, places = np.zeros(len(problems)), np.zeros(len(problems))
    steering, head = steering_of(model.method), model.policy.head
    for lesson, one in zip(lessons, score(model, lessons, pools=True), strict=True):
        row, weights = problems.index(lesson.problem_id), np.array(lesson.token_weights[: len(one.anchor)])
        marked = np.eye(1, len(weights))[0] if first else weights
        alpha = steering.strength(one.anchor, one.direction, model.policy.version, head)
        tokens[row], places[row] = tokens[row] + weights.sum(), places[row] + marked.sum()
        for name, values in token_values(one, alpha, ids, head).items():
            weight = marked if name.startswith("mass_") else weights
            over.setdefault(name, np.zeros(len(problems)))[row] += (weight * values).sum()
    return Measured(over=over, tokens=tokens, places=places)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| quantity | value | 95 % interval |", "|---|---:|---:|"]
    lines += [f"| {r.quantity} | {r.value:.3f} | [{r.low:.3f}, {r.high:.3f}] |" for r in table.itertuples()]
    return "\n".join(lines) + "\n"


def draw(table: pd.DataFrame, file: Path) -> None:
    """Draws sizes on the left and masses of markers on the right, with their intervals."""
    figure, (sizes, masses) = panels(1, 2, 9.5, 3.8)
    of_markers = table["quantity"].str.startswith("markers, ") & (table["quantity"] != GAINED)
    _bars(sizes, table[table["quantity"].isin(SIZES)], "size of ")
    sizes.set_xlabel(r"standard deviation under $p_0$, logits")
    _bars(masses, table[of_markers], "markers, ")
    masses.set_xlabel("probability that a marker comes next")
    removed = table[table["quantity"] == REMOVED]
    for row in removed.itertuples():
        sizes.set_title(
            f"the contrast removes {row.value:.0%} [{row.low:.0%}, {row.high:.0%}] of the shift", fontsize=9
        )
    save(figure, file)


def _bars(axes: Axes, rows: pd.DataFrame, prefix: str) -> None:
    rows = rows.iloc[::-1]
    ends = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
    labels = [name.removeprefix(prefix) for name in rows["quantity"]]
    axes.barh(labels, rows["value"], color=COLORS[0], alpha=0.85)
    axes.errorbar(rows["value"], labels, xerr=ends, fmt="none", ecolor=GREY, capsize=3)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_xlim(left=0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--markers", nargs="+", default=[], metavar="TOKEN", help="tokens by which the style is known")
    parser.add_argument("--places", choices=("first", "all"), default="all", help="of markers; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bias"), metavar="NAME", help="default: %(default)s")
    options, configuration = parser.parse_known_args(arguments)
    try:
        with opened(configuration, options.ckpt_path) as (model, data):
            ids = marker_ids(data.encoder, options.markers)
            found = measure(model, data, options.step, ids, options.places == "first")
            name, version = model.method.name, model.policy.version
    except ValueError as error:
        parser.error(str(error))
    table = found.table()
    if not options.markers:
        table = table[~table["quantity"].str.startswith("markers, ")]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    options.out.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    draw(table, options.out.with_suffix(".png"))
    print(f"{name}, weights after {version} steps: wrong rollouts of {len(found.tokens)} problems")
    print(markdown(table), end="")
    print(f"written: {options.out}.csv, .md, .png")


if __name__ == "__main__":
    main()
