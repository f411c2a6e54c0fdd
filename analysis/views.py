"""What a model answers by what it reads, and where a teacher's shift sits: is there anything to learn from a teacher?

    python analysis/views.py --config math.yaml --config science.yaml --samples 4 --out views

Held-out problems are sampled with the problem alone, and once each with what a teacher may read: the reference
solution, a right and a wrong attempt of the model's own, and what the locator says of that wrong attempt. *As read* is
the share of answers that are those of the text in view, right or wrong: the rate at which the model copies.

*Right without it* is of the same problems with nothing in view, by rollouts that did not choose them: where there is a
wrong attempt to read, the model is right less often than elsewhere. *Gain by it* is the mean difference of the two.

A group of k rollouts is mixed if some are right and some are not. Where every problem had the same chance a to be
answered right, a share 1 - a^k - (1 - a)^k of groups would be mixed, and two rollouts of one problem would both be
right with probability a^2. What the second is above that is the variance of the chance over problems: 0 where the model
guesses everywhere, a (1 - a) where it knows some problems and none of the others.

A wrong rollout leaves the nearest right text at its *fork* (see `alpha_values.py`). Of the divergence between the
method's target and the student, summed over all tokens of wrong rollouts of a step, the shares before, at and after the
fork are told, and that of each rollout's token of largest divergence.

Writes NAME.csv (a row per figure, with ends of its 95 % interval over problems) and NAME.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from alpha_profile import resampled
from alpha_values import fork, right_texts
from questions import interval
from reading import distributions
from recipes import digest_of
from states import of_wrong, opened, parser_of, reaching, score

from ogls.data import RolloutDataModule
from ogls.lessons.prompts import ATTEMPT, IDEA, Wording
from ogls.module import SelfDistillation
from ogls.records import Problem, Rollout, RolloutGroup
from ogls.system.seeds import derive
from ogls.system.statistics import share_interval
from ogls.tasks.base import MistakeLocator

KEPT = {  # what is stored, by the name of its files: what it is about, and the words of its command
    "views_legs": (
        "Word problems, SmolLM2-135M",
        "--config math.yaml --config legs.yaml --policy.dtype bfloat16 --data.val.size 256 --data.problems_per_step 16",
    ),
    "views_science": (
        "Multiple choice, SmolLM2-135M",
        "--config math.yaml --config science.yaml --config science_domains.yaml --policy.dtype bfloat16 "
        "--data.problems_per_step 16",
    ),
}
QUESTION = "What does the model answer by what it reads, and where does its teacher's shift sit?"
MOST_ANSWERS = 10
"""Where problems have no more different answers than these, each is told: how often it is given, and is right."""
DIGEST = "digest"
"""Column of NAME.csv: the digest of the configuration."""
Figure = tuple[str, str, float, float, float, int]
"""What is in view, name of the figure, value, low, high, number of problems."""


def _shown(name: str, figure: str, values: Sequence[float]) -> Figure:
    mean, low, high = share_interval(values)
    return name, figure, mean, low, high, len(values)


def _mean(group: RolloutGroup, of: Callable[[Rollout], float]) -> float:
    return float(np.mean([of(rollout) for rollout in group.rollouts]))


def answers(name: str, groups: Sequence[RolloutGroup], read: Sequence[str | None] = ()) -> Iterator[Figure]:
    """Yields what groups say: accuracy, format errors, entropy, and how often the answer is the one that was read.

    Args:
        name: what is in view
        groups: one group per problem
        read: answer of the text in view, by problem; none where a text has no answer
    """
    yield _shown(name, "right", [_mean(group, lambda r: r.correct) for group in groups])
    yield _shown(name, "no answer", [_mean(g, lambda r: r.truncated or r.verdict.status != "graded") for g in groups])
    if read:
        pairs = zip(groups, read, strict=True)
        yield _shown(name, "as read", [_mean(g, lambda r, a=a: r.verdict.answer == a) for g, a in pairs])
    over = np.array([[-sum(sum(r.completion.logprobs) for r in group.rollouts)] for group in groups])
    under = np.array([[sum(len(r.completion.logprobs) for r in group.rollouts)] for group in groups])
    low, high = np.nanpercentile(resampled(over, under), [2.5, 97.5])
    yield name, "entropy, nats a token", over.sum() / under.sum(), low, high, len(groups)


def gained(name: str, groups: Sequence[RolloutGroup], without: Sequence[RolloutGroup]) -> Iterator[Figure]:
    """Yields how often problems are right with nothing in view, and by how much more with the text.

    Args:
        name: what is in view
        groups: one group per problem, with the text
        without: the same problems with nothing in view, by rollouts that had no part in choosing them
    """
    before, after = ([_mean(group, lambda r: r.correct) for group in some] for some in (without, groups))
    yield _shown(name, "right without it", before)
    more = np.subtract(after, before)[:, None]
    low, high = np.percentile(resampled(more, np.ones_like(more)), [2.5, 97.5])
    yield name, "gain by it", float(more.mean()), low, high, len(groups)


def guessing(groups: Sequence[RolloutGroup]) -> Iterator[Figure]:
    """Yields how far groups are from what the same chance everywhere would give."""
    rights = np.array([len(group.successes) for group in groups])
    k = len(groups[0].rollouts)
    yield _shown("nothing", "mixed groups", [group.mixed for group in groups])
    draws = np.random.default_rng(0).integers(len(groups), size=(1000, len(groups)))

    def told(figure: str, of: Callable[[np.ndarray], np.ndarray]) -> Figure:
        low, high = np.percentile(of(rights[draws]), [2.5, 97.5])
        return "nothing", figure, float(of(rights[None])[0]), low, high, len(groups)

    def alike(counts: np.ndarray) -> np.ndarray:
        accuracy = counts.mean(-1) / k
        return 1 - accuracy**k - (1 - accuracy) ** k

    def variance(counts: np.ndarray) -> np.ndarray:
        both = (counts * (counts - 1)).mean(-1) / (k * (k - 1))
        return both - (counts.mean(-1) / k) ** 2

    yield told("mixed groups, the same chance everywhere", alike)
    yield told("variance of the chance over problems", variance)
    yield told("that variance if it knew or did not", lambda n: n.mean(-1) / k * (1 - n.mean(-1) / k))
    gold = sorted({group.problem.answer for group in groups})
    for answer in gold if len(gold) <= MOST_ANSWERS else ():
        yield _shown(
            "nothing", f"answers {answer}", [_mean(g, lambda r, a=answer: r.verdict.answer == a) for g in groups]
        )
        yield _shown("nothing", f"would be right: {answer} throughout", [g.problem.answer == answer for g in groups])


def read_by(
    data: RolloutDataModule, groups: Sequence[RolloutGroup]
) -> dict[str, tuple[Wording, Sequence[tuple[Problem, str, str | None]]]]:
    """Returns what can be in view: the words around it, and per problem the text and its answer."""
    with_solution = [(g.problem, g.problem.solution, g.problem.answer) for g in groups if g.problem.solution]
    right = [(g.problem, g.successes[0]) for g in groups if g.successes]
    wrong = [(g.problem, r) for g in groups for r in [x for x in g.failures if x.verdict.answer is not None][:1]]
    found: dict[str, tuple[Wording, Sequence[tuple[Problem, str, str | None]]]] = {
        "the reference solution": (ATTEMPT, with_solution),
        "a right attempt of its own": (ATTEMPT, [(p, r.text, r.verdict.answer) for p, r in right]),
        "a wrong attempt of its own": (ATTEMPT, [(p, r.text, r.verdict.answer) for p, r in wrong]),
    }
    if isinstance(data.locator, MistakeLocator):
        located = [(p, data.locator.mistake(p, r.text)) for p, r in wrong]
        found["the idea for that wrong attempt"] = (IDEA, [(p, m.idea, None) for p, m in located if m is not None])
    return {name: some for name, some in found.items() if some[1]}


def asked(data: RolloutDataModule, samples: int) -> dict[str, list[Figure]]:
    """Returns the figures of all held-out problems, set by set and of all together."""
    data.setup("validate")
    sampler, sampling = data.sampler(), data.evaluation.sampling
    sampler.hold()
    problems = list(data.val_problems)
    prompts = [data.encoder.evaluated(problem) for problem in problems]
    plain, others = (
        sampler.rollouts(problems, prompts, samples, sampling, derive(data.seed, "views", *which))
        for which in ((), ("others",))
    )
    without = {(group.problem.set, group.problem.id): group for group in others}
    answered: dict[str, tuple[list[RolloutGroup], list[str | None]]] = {"nothing": (plain, [])}
    for name, (wording, texts) in read_by(data, plain).items():
        prompts = [data.encoder.view(problem, wording, text) for problem, text, _ in texts]
        groups = sampler.rollouts([p for p, _, _ in texts], prompts, 1, sampling, derive(data.seed, "views", name))
        answered[name] = groups, [answer for _, _, answer in texts]
    found: dict[str, list[Figure]] = {}
    for part in ["", *data.val_problems.sets]:
        figures: list[Figure] = []
        for name, (groups, read) in answered.items():
            own = [i for i, group in enumerate(groups) if part in ("", group.problem.set)]
            if not own:
                continue
            some = [groups[i] for i in own]
            figures += answers(name, some, [read[i] for i in own] if read and any(read) else [])
            if name == "nothing":
                figures += guessing(some)
            else:
                figures += gained(name, some, [without[group.problem.set, group.problem.id] for group in some])
        found[part or "all"] = figures
    return found


def shift(model: SelfDistillation, data: RolloutDataModule, step: int | None) -> list[Figure]:
    """Returns where the divergence of target and student sits in the wrong rollouts of one step."""
    batch = data.make_batch(model.policy.version if step is None else step)
    lessons, rights = of_wrong(batch), right_texts(data, batch.groups)
    names = ["before the fork", "at the fork", "after the fork", "at the largest token"]
    nats: list[list[float]] = []
    tokens: list[list[int]] = []
    for one in score(model, [reaching(lesson, len(lesson.token_ids)) for lesson in lessons], pools=True):
        kl = np.array([cell["kl"] for cell in distributions(model, one, data.encoder, 1)])
        place, _ = fork(one.lesson.token_ids, rights[one.lesson.problem_id])
        at = np.arange(len(kl))
        parts = (at < place, at == place, at > place, at == kl.argmax())
        nats.append([kl[part].sum() for part in parts])
        tokens.append([part.sum() for part in parts])
    sums = pd.DataFrame(nats, columns=names).groupby([lesson.problem_id for lesson in lessons])
    over, rollouts = sums.sum(), sums.size().to_numpy()[:, None]  # by problem: its rollouts are alike
    whole = over[names[:3]].sum(axis=1).to_numpy()[:, None]
    figures: list[Figure] = []
    for name, few in zip(names, np.mean(tokens, axis=0), strict=True):
        own = over[[name]].to_numpy()
        low, high = np.nanpercentile(resampled(own, whole), [2.5, 97.5])
        figures.append(("shift", f"{name} ({few:.1f} tokens)", own.sum() / whole.sum(), low, high, len(over)))
    low, high = np.percentile(resampled(whole, rollouts), [2.5, 97.5])
    told = f"nats a rollout ({len(lessons)} rollouts)"
    figures.append(("shift", told, whole.sum() / len(lessons), low, high, len(over)))
    return figures


def markdown(found: dict[str, list[Figure]]) -> str:
    """Returns all figures, a row per set, view and figure."""
    lines = ["| problems | in view | figure | value | 95 % interval | n |", "|---|---|---|---:|---:|---:|"]
    for part, figures in found.items():
        lines += [f"| {part} | {v} | {f} | {x:.3f} | [{lo:.3f}, {hi:.3f}] | {n} |" for v, f, x, lo, hi, n in figures]
    return "\n".join(lines) + "\n"


ASKED = {  # what is in view and the figure, by the question that it answers
    "how often is a group of four mixed?": ("nothing", "mixed groups"),
    "and where every problem has the same chance?": ("nothing", "mixed groups, the same chance everywhere"),
    "how sure is the student? Entropy, nats a token": ("nothing", "entropy, nats a token"),
    "how often is it right?": ("nothing", "right"),
    "and with the solution in view?": ("the reference solution", "right"),
    "how often does it repeat a wrong attempt in view?": ("a wrong attempt of its own", "as read"),
    "what does the idea for a wrong attempt add, on those problems?": ("the idea for that wrong attempt", "gain by it"),
}


def sound(out: Path) -> bool:
    """Returns whether the configurations of stored figures still say what they said when the figures were made."""
    digests = pd.read_csv(out.with_suffix(".csv"))[DIGEST]
    return set(digests) == {digest_of(KEPT[out.name][1].split())}


def told(out: Path, about: str) -> dict[str, str]:
    """Returns questions that stored figures answer, with the answers, for docs/evidence.md; none without figures.

    Args:
        out: path of the files without their endings
        about: what the questions are about
    """
    file = out.with_suffix(".csv")
    if not file.is_file():
        return {}
    table = pd.read_csv(file)
    found = table[table["problems"] == "all"].set_index(["in view", "figure"])
    rows = {question: found.loc[figure] for question, figure in ASKED.items() if figure in found.index}
    return {
        f"{about}: {question}": interval(row["value"], row["low"], row["high"], f"{row['n']} problems")
        for question, row in rows.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=4, help="rollouts per problem with nothing in view")
    parser.add_argument("--out", type=Path, default=Path("views"), metavar="NAME", help="default: %(default)s")
    options, configuration = parser.parse_known_args(arguments)
    if options.samples < 2:
        parser.error(f"--samples must be at least 2, so that groups can be mixed, got {options.samples}")
    try:
        with opened(configuration, options.ckpt_path) as (model, data):
            moved = shift(model, data, options.step)
            found = asked(data, options.samples) | {"a step": moved}
            name, version = model.method.name, model.policy.version
    except ValueError as error:
        parser.error(str(error))
    rows = [(part, *figure) for part, figures in found.items() for figure in figures]
    table = pd.DataFrame(rows, columns=["problems", "in view", "figure", "value", "low", "high", "n"])
    table[DIGEST] = digest_of(configuration)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out.with_suffix(".csv"), index=False)
    options.out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(f"{name}, weights after {version} steps")
    print(markdown(found), end="")
    print(f"written: {options.out}.csv, .md")


if __name__ == "__main__":
    main()
