"""What every steering strength alpha aims at, from one teacher pass: the target is head(anchor + alpha direction).

    python analysis/alpha_profile.py --config math.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt --out alpha
    python analysis/alpha_profile.py --config math.yaml --study alpha

Writes NAME.png and NAME.csv: means over the distilled tokens, with 95 % bands from resampling problems. A *right text*
is a right rollout of the group or the reference solution. A wrong rollout leaves the nearest one at its *fork*, the
first token that it does not share with it. There the right token is known, and so it is at all tokens before.

The right tokens are likeliest at the alpha with the largest weighted mean of log target(right token) over the distilled
tokens up to and including the fork; that mean is concave in alpha, as the target is an exponential family. Recommended
is the smallest alpha that is worse than this by no more than a hundredth of a nat, or one standard error of the
difference if that is more: beyond it the target moves on and gains nothing. Where the teacher reads the right text
itself, both are optimistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from alpha_values import Sums, collect, fork, right_texts
from matplotlib.axes import Axes
from scipy.stats import spearmanr
from states import distilled, opened, parser_of, reaching, score
from style import COLORS, GREY, panels, save

RESAMPLES = 1000
TOLERANCE = 0.01  # nats per token


def resampled(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Returns mean curves [RESAMPLES, alphas] of draws of problems with replacement; nan where none has a token."""
    draws = np.random.default_rng(0).multinomial(len(over), np.full(len(over), 1 / len(over)), RESAMPLES)
    with np.errstate(invalid="ignore"):
        return (draws @ over) / (draws @ under)


def tabulate(sums: Sums, alphas: Sequence[float]) -> pd.DataFrame:
    """Returns one row per alpha: the mean of each quantity, its _low and its _high."""
    columns = {"alpha": np.asarray(alphas)}
    for name, (over, under) in sums.items():
        if not under.any():
            raise ValueError(
                f"no token tells {name}: expected wrong rollouts that leave a right text at a distilled token"
            )
        low, high = np.nanpercentile(resampled(over, under), [2.5, 97.5], axis=0)
        columns |= {name: over.sum(0) / under.sum(), f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(columns)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """`likeliest` maximises the mean of log_p_right, [low, high] is its 95 % range over resampled problems."""

    likeliest: float
    low: float
    high: float
    recommended: float


def advise(sums: Sums, alphas: Sequence[float]) -> Advice:
    over, under = sums["log_p_right"]
    draws = resampled(over, under)
    draws = draws[~np.isnan(draws).any(1)]
    best = int(over.sum(0).argmax())
    loss = (over.sum(0)[best] - over.sum(0)) / under.sum()
    tolerated = np.maximum((draws[:, [best]] - draws).std(0), TOLERANCE)
    low, high = np.percentile(np.asarray(alphas)[draws.argmax(1)], [2.5, 97.5])
    first = int((loss <= tolerated).argmax())
    return Advice(likeliest=alphas[best], low=float(low), high=float(high), recommended=alphas[first])


def profile(
    configuration: Sequence[str], checkpoint: Path | None, step: int | None, alphas: Sequence[float]
) -> tuple[pd.DataFrame, Advice, str]:
    """Returns the table over alpha, what it advises, and a line that says what it was measured on.

    Args:
        configuration: options of ``run.py fit``
        checkpoint: weights of the student; None takes those it starts from
        step: optimiser step whose problems are sampled; None takes the checkpoint's

    Raises:
        ValueError: the method's target has no alpha, or no rollout tells anything.
    """
    with opened(configuration, checkpoint) as (model, data):
        batch = data.make_batch(model.policy.version if step is None else step)
        lessons, rights = distilled(batch), right_texts(data, batch.groups)
        forks = [fork(lesson.token_ids, rights[lesson.problem_id])[0] for lesson in lessons]
        longer = [
            reaching(lesson, min(max(lesson.num_learned, place + 1), len(lesson.token_ids)))
            for lesson, place in zip(lessons, forks, strict=True)
        ]
        scored = score(model, longer)
        if not any(one.direction.any() for one in scored):
            raise ValueError(f"the steering of {model.method.name} has no direction, so its target has no alpha")
        sums = collect(lessons, scored, rights, alphas, model.policy.head)
    told = f"{len(lessons)} lessons of {len(batch.groups)} problems, weights after {model.policy.version} steps"
    return tabulate(sums, alphas), advise(sums, alphas), told


def sweep_points(storage: str, study: str) -> pd.DataFrame:
    """Returns alpha and mean value of a study's finished trials.

    Minimised values are negated; of several values the first counts.
    """
    import optuna

    try:
        found = optuna.load_study(study_name=study, storage=storage)
    except KeyError as error:
        raise ValueError(f"{storage} has no study {study!r}") from error
    trials = found.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    names = {
        name for trial in trials for name in trial.params if name.rpartition(".")[2] == "alpha" and "lora" not in name
    }
    if len(names) != 1:
        raise ValueError(
            f"expected a study with one steering alpha and finished trials, got {sorted(names)} in {len(trials)} trials"
        )
    (name,), sign = names, -1 if found.directions[0] == optuna.study.StudyDirection.MINIMIZE else 1
    rows = [(trial.params[name], sign * trial.values[0]) for trial in trials if name in trial.params]
    return pd.DataFrame(rows, columns=["alpha", "value"]).groupby("alpha", as_index=False)["value"].mean()


def draw(table: pd.DataFrame, advice: Advice, sweep: pd.DataFrame | None, file: Path) -> None:
    figure, (distance, entropy, probability, criterion) = panels(2, 2, 9.5, 6.4)
    _lines(distance, table, {"kl_target_student": "KL(target‖student)", "kl_target_plain": "KL(target‖plain teacher)"})
    distance.plot(
        table["alpha"], table["hoeffding_bound"], ":", color=GREY, label=r"its bound, $\alpha^2$ range$^2$ / 8"
    )
    distance.set_ylabel("nats per distilled token")
    distance.set_yscale("symlog", linthresh=max(1e-3, float(table["kl_target_student"].min())))
    _lines(entropy, table, {"target_entropy": "entropy of the target"})
    entropy.set(ylabel="nats per distilled token", ylim=(0, None))
    _lines(probability, table, {"p_right": "right continuation", "p_rollout": "the rollout's own token"})
    probability.set(ylabel="target probability at the fork", ylim=(0, 1))
    _lines(criterion, table, {"log_p_right": "right tokens up to the fork"})
    criterion.set(ylabel="log target probability, nats")
    criterion.axvspan(advice.low, advice.high, color=GREY, alpha=0.12, linewidth=0, label="likeliest, 95 % range")
    criterion.axvline(advice.recommended, color=COLORS[2], label=rf"recommended $\alpha$ = {advice.recommended:g}")
    if sweep is not None:
        beside = criterion.twinx()
        beside.plot(sweep["alpha"], sweep["value"], "D", color=COLORS[1], label="sweep (right axis)")
        beside.set_ylabel("objective of the sweep")
        criterion.plot([], [], "D", color=COLORS[1], label="trials of the sweep (right axis)")
    for axes in (distance, entropy, probability, criterion):
        axes.set_xlabel(r"steering strength $\alpha$")
        axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def _lines(axes: Axes, table: pd.DataFrame, names: dict[str, str]) -> None:
    for (name, label), color in zip(names.items(), COLORS, strict=False):
        dashes = "-" if color == COLORS[0] else "--"  # where lines coincide, both are seen
        axes.plot(table["alpha"], table[name], dashes, color=color, linewidth=2, label=label)
        axes.fill_between(
            table["alpha"], table[f"{name}_low"], table[f"{name}_high"], color=color, alpha=0.15, linewidth=0
        )


def report(table: pd.DataFrame, advice: Advice, sweep: pd.DataFrame | None) -> str:
    shown = table.iloc[:: max(1, len(table) // 8)]
    shown = shown[[name for name in shown if not name.endswith(("_low", "_high"))]]
    lines = [shown.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
    edge = ", the largest tried" if advice.likeliest == table["alpha"].max() else ""
    lines.append(f"right tokens are likeliest at alpha {advice.likeliest:g} [{advice.low:g}, {advice.high:g}]{edge}")
    lines.append(f"recommended alpha: {advice.recommended:g}, as good but for {TOLERANCE} nats or one standard error")
    if sweep is not None:
        top = sweep.loc[sweep["value"].idxmax()]
        lines.append(f"best alpha of the sweep: {top['alpha']:g} (objective {top['value']:.4g}, {len(sweep)} alphas)")
        if len(sweep) > 2:
            predicted = np.interp(sweep["alpha"], table["alpha"], table["log_p_right"])
            rho = float(spearmanr(predicted, sweep["value"]).statistic)
            lines.append(f"rank correlation of the criterion with the sweep's objective: {rho:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--alphas", type=float, nargs=3, default=(0, 4, 33), metavar=("FROM", "TO", "COUNT"), help="%(default)s"
    )
    parser.add_argument("--study", help="name of a finished study over alpha, shown beside the profile")
    parser.add_argument("--storage", default="sqlite:///sweeps.db", help="of the study; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("alpha"), metavar="NAME", help="default: %(default)s")
    options, configuration = parser.parse_known_args(arguments)
    low, high, count = options.alphas
    try:
        sweep = sweep_points(options.storage, options.study) if options.study else None
        alphas = np.linspace(low, high, int(count)).tolist()
        table, advice, told = profile(configuration, options.ckpt_path, options.step, alphas)
    except ValueError as error:
        parser.error(str(error))
    draw(table, advice, sweep, options.out.with_suffix(".png"))
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    print(told)
    print(report(table, advice, sweep))
    print(f"written: {options.out}.png, .csv")


if __name__ == "__main__":
    main()
