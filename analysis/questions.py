"""What referees ask is answered in a line each, from stored rows: the page docs/evidence.md.

A question names a table, two of its recipes and a measure, of which the answer is the difference. Where the table has
no rows of either, the answer is "not run yet".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from seeds import FEWEST, difference
from stored_rows import Row

from ogls.system.statistics import mean_interval

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"
NOT_RUN = "not run yet"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a referee is answered by the difference of two recipes of a table.

    Args:
        text: the question
        table: name of the table
        ours: the one recipe
        theirs: the other one; without it, the answer is the difference between after and before training
        measure: field of a row; ``accuracy`` is judged over seeds and problems, all others over seeds
        unit: word behind the number
        sets: names of the evaluation sets whose problems count; none stands for all
    """

    text: str
    table: str
    ours: str = ""
    theirs: str = ""
    measure: str = "accuracy"
    unit: str = ""
    sets: tuple[str, ...] = ()

    def answer(self, rows: Sequence[Row]) -> str:
        """Returns the mean difference with its 95 % interval, over the seeds that both recipes have."""
        one, other = ({row.seed: row for row in rows if row.recipe == recipe} for recipe in (self.ours, self.theirs))
        if not self.theirs:
            other = {seed: replace(row, right=row.before) for seed, row in one.items()}
        seeds = sorted(one.keys() & other.keys())
        if not seeds:
            return NOT_RUN
        if self.measure == "accuracy":
            table = np.array([_differences(one[seed], other[seed], self.sets) for seed in seeds])
            found = difference(table)
            told = f"{_seeds(len(seeds))} x {table.shape[1]} problems"
            if len(seeds) < FEWEST:
                return f"{found.mean:+.3f}, no interval: {told}"
            p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
            return f"**{found.mean:+.3f} ± {found.half:.3f}** ({p_value}; {told})"
        values = [getattr(one[seed], self.measure) - getattr(other[seed], self.measure) for seed in seeds]
        return over_seeds(values, f" {self.unit}", 3 if self.measure == "kl_to_base" else 1)


def _differences(ours: Row, theirs: Row, sets: Sequence[str]) -> list[float]:
    one, other = (row.accuracies(row.right) for row in (ours, theirs))
    common = sorted(one.keys() & other.keys())
    return [one[name] - other[name] for name in common if not sets or name.partition("/")[0] in sets]


def _surface(alpha: float, clip: str = "", divergence: str = "ForwardKL") -> str:
    return f"ogls_sd{clip} --method.objective.divergence {divergence} --method.steering.alpha {alpha}"


def _pool(size: int, without_self: str = "false") -> str:
    return f"ogls_sd --method.privilege.max_peers {size} --method.privilege.exclude_self {without_self}"


def _group(size: int) -> str:
    return f"ogls_sd --data.group_size {size} --data.problems_per_step {128 // size}"


def _cost(table: str, ours: str, theirs: str, told: str) -> Question:
    unit = "processor seconds a run"
    text = f"What does it cost beside {told}?"
    return Question(text=text, table=table, ours=ours, theirs=theirs, measure="seconds", unit=unit)


def _right(table: str) -> Question:
    text = "What do right rollouts add? Against learning from wrong ones alone, as the paper does"
    return Question(text=text, table=table, ours=OWN, theirs=WRONG_ONLY)


def _as_dear(table: str, method: str, steps: int, theirs: str) -> Question:
    text = f"And OGLS_SD on wrong rollouts alone than {method} at its cost, {steps} steps?"
    return Question(text=text, table=table, ours=WRONG_ONLY, theirs=theirs)


FAMILIES = ("order", "sign", "square", "carry", "units", "pages", "cuts", "percent", "cars", "modulo", "fraction")
FAMILIES += ("average", "fence", "clock", "undo")
DOMAINS = {  # families that are trained on, by the overlay that says so
    "families_four": ("order", "carry", "pages", "fraction"),
    "families_other_four": ("sign", "units", "cuts", "average"),
}


def _domains(text: str, ours: str, theirs: str = "", own: bool = False) -> tuple[Question, ...]:
    """Returns a question once for each set of families that was trained on, about these or about all others."""
    return tuple(
        Question(
            text=f"{text} ({', '.join(trained)})",
            table="domains",
            ours=f"{ours}+{overlay}",
            theirs=theirs and f"{theirs}+{overlay}",
            sets=trained if own else tuple(name for name in FAMILIES if name not in trained),
        )
        for overlay, trained in DOMAINS.items()
    )


OWN, LOCATED = "ogls_sd", "opsd+plain_kl+error_span"
WRONG_ONLY = "ogls_sd --method.privilege.learn_successes false"
"""`OWN` without the right rollouts, from which the paper's method does not learn either."""
OGLS, OPSD, UP = "ogls_sd_published", "opsd", "+up_to_error"
STUDENT = "+rosd_student"
FULL = f"rosd{STUDENT}"
AS_DEAR_OPSD = f"{LOCATED} --data.steps_per_epoch 8"
AS_DEAR_ROSD = "rosd --trainer.max_epochs 3 --data.steps_per_epoch 3"
"""Of `default`: by the time of a step (`steps.py`) about as many seconds as `OWN` takes for 12 steps."""
AS_DEAR_GRPO, AS_DEAR_SFT = "grpo --data.steps_per_epoch 10", "sft --data.steps_per_epoch 32"
"""The same of `legs`, beside `WRONG_ONLY`."""
CHOICES_GRPO, CHOICES_SFT = "grpo --data.steps_per_epoch 9", "sft --data.steps_per_epoch 23"
CHOICES_ROSD = "rosd --data.steps_per_epoch 5"
"""The same of `science`, with the two before it."""
THOUGHTFUL = ("opsd", f"opsd+plain_kl{UP}", "ogls_sd")
NEITHER = " --data.prompts.teacher_options '{enable_thinking: false}'"
BOTH = " --data.prompts.student_options '{enable_thinking: true}'"
"""Of `thinking`: who thinks in training; without either the teacher alone does."""
CAPPED = "ogls_sd --method.objective.importance_cap 2 --data.mini_batches"
QUESTIONS: Mapping[str, tuple[Question, ...]] = {
    "OGLS-SD (arXiv 2605.12400)": (
        Question(text="Is it better than OPSD, both tuned?", table="lab", ours=OGLS, theirs=OPSD),
        Question(text="And where both learn up to the error?", table="lab", ours=OGLS + UP, theirs=OPSD + UP),
        Question(
            text="Does the token selection help? Up to the error against all tokens",
            table="lab",
            ours=OGLS + UP,
            theirs=OGLS,
        ),
        Question(text="Is it better than GRPO in as many steps?", table="lab", ours=OGLS, theirs="grpo"),
        Question(text="Is it better than likelihood of the solutions (SFT)?", table="lab", ours=OGLS, theirs="sft"),
        Question(text="Is it better than SDPO?", table="lab", ours=OGLS, theirs="sdpo"),
        Question(
            text="Is it the contrast? Against the mean of right views", table="lab", ours=OGLS, theirs="positive_mean"
        ),
        Question(text="Are failures needed? Against success alone", table="lab", ours=OGLS, theirs="positive_only"),
        Question(text="Is it better than RLCSD's contrast?", table="lab", ours=OGLS, theirs="rlcsd"),
        Question(text="Is it better than opsd_ectr's contrast?", table="lab", ours=OGLS, theirs="opsd_ectr"),
        Question(
            text="How far does it drift? KL to base, against OPSD",
            table="lab",
            ours=OGLS,
            theirs=OPSD,
            measure="kl_to_base",
            unit="nats a token",
        ),
        Question(
            text="Does it grow longer or shorter than OPSD?",
            table="lab",
            ours=OGLS,
            theirs=OPSD,
            measure="length",
            unit="tokens",
        ),
        _cost("lab", OGLS, OPSD, "OPSD"),
        Question(
            text="How sensitive is it to alpha? 4 against 1", table="surface", ours=_surface(4), theirs=_surface(1)
        ),
        Question(text="And 0.5 against 1?", table="surface", ours=_surface(0.5), theirs=_surface(1)),
        Question(
            text="Does clipping help? 0.05 against none",
            table="surface",
            ours=_surface(1, " --method.objective.clip 0.05"),
            theirs=_surface(1),
        ),
        Question(
            text="Which way round is the KL? Reverse against forward",
            table="surface",
            ours=_surface(1, divergence="ReverseKL"),
            theirs=_surface(1),
        ),
        Question(
            text="And how sensitive is that to alpha? 4 against 1, by reverse KL",
            table="surface",
            ours=_surface(4, divergence="ReverseKL"),
            theirs=_surface(1, divergence="ReverseKL"),
        ),
        Question(text="How many views? One a pool against all", table="pools", ours=_pool(1), theirs=_pool(4)),
        Question(
            text="May a rollout be in its own pool? Without against with it",
            table="pools",
            ours=_pool(4, "true"),
            theirs=_pool(4),
        ),
        Question(
            text="Does it bear stale rollouts? Up to 8 updates against none",
            table="staleness",
            ours=f"{CAPPED} 9",
            theirs=f"{CAPPED} 1",
        ),
        Question(
            text="Large groups or many problems? 16 rollouts a problem against 4, as many in all",
            table="groups",
            ours=_group(16),
            theirs=_group(4),
        ),
    ),
    "Thinking style: a student that can think (`lab_thinking.yaml`)": tuple(
        Question(
            text=f"{name}: {what}, judged {mode}",
            table="thinking",
            ours=f"{recipe}{style}",
            theirs=f"{recipe}{NEITHER}",
            sets=(part,),
        )
        for recipe, name in zip(THOUGHTFUL, ("OPSD", "OPSD up to the error", "OGLS_SD"), strict=True)
        for style, what in (("", "the teacher alone thinks, against nobody"), (BOTH, "both think, against nobody"))
        for part, mode in (("thinking", "thinking"), ("direct", "without thinking"))
    ),
    "ROSD (arXiv 2605.28014)": (
        Question(text="Is it better than OPSD, both tuned?", table="lab", ours="rosd", theirs=OPSD),
        Question(text="Is it better than OGLS-SD, both tuned?", table="lab", ours="rosd", theirs=OGLS),
        Question(text="Is it better than GRPO in as many steps?", table="lab", ours="rosd", theirs="grpo"),
        _cost("lab", "rosd", OPSD, "OPSD"),
        Question(
            text="Without its idea: a right rollout to read, and its place",
            table="rosd",
            ours=f"rosd_place_only{STUDENT}",
            theirs=FULL,
        ),
        Question(
            text="Without its place: all tokens learned",
            table="rosd",
            ours=f"rosd_idea_only{STUDENT}",
            theirs=FULL,
        ),
        Question(
            text="Without its reflector: a right rollout to read, and no place",
            table="rosd",
            ours="rosd_no_reflector",
            theirs=FULL,
        ),
        Question(
            text="Does the place have to be right? Eight tokens late",
            table="rosd",
            ours=f"rosd_shifted{STUDENT}",
            theirs=FULL,
        ),
        Question(text="At a random place", table="rosd", ours=f"rosd_random{STUDENT}", theirs=FULL),
        Question(
            text="Does the idea have to be that problem's?",
            table="rosd",
            ours=f"rosd_shuffled{STUDENT}",
            theirs=FULL,
        ),
        Question(
            text="Does the reflector have to be right? Exact against its own",
            table="rosd",
            ours="rosd_exact",
            theirs=FULL,
        ),
        Question(
            text="Where ideas decide: those of other problems",
            table="families",
            ours="rosd_exact+shuffle_ideas",
            theirs="rosd_exact",
        ),
        Question(
            text="Where ideas decide: without its reflector",
            table="families",
            ours="rosd_no_reflector",
            theirs="rosd_exact",
        ),
        Question(text="Where ideas decide, is it better than OPSD?", table="families", ours="rosd", theirs="opsd"),
        *_domains("Trained on four families: what does it gain on these, after against before?", "rosd", own=True),
        *_domains("And out of its domain, on the eleven others?", "rosd"),
        *_domains("Is it better than OPSD there?", "rosd", "opsd"),
        *_domains("And than OPSD learned up to the error?", "rosd", "opsd+plain_kl+up_to_error"),
        *_domains("And on the four themselves?", "rosd", "opsd+plain_kl+up_to_error", own=True),
        Question(text="Does a person find the error where the reflector does? (Cohen's kappa)", table="labels"),
    ),
    "SmolLM2-135M: the default run": (
        Question(text="Does it improve the model? After 12 steps against before", table="default", ours=OWN),
        Question(text="And OPSD, learned from located errors?", table="default", ours=LOCATED),
        Question(text="And ROSD as published?", table="default", ours="rosd"),
        Question(text="Is the default run better than that OPSD?", table="default", ours=OWN, theirs=LOCATED),
        Question(text="And than it at about its cost, 16 steps?", table="default", ours=OWN, theirs=AS_DEAR_OPSD),
        _right("default"),
        Question(text="Is it better than ROSD?", table="default", ours=OWN, theirs="rosd"),
        Question(text="And than ROSD at about its cost, 9 steps?", table="default", ours=OWN, theirs=AS_DEAR_ROSD),
        _cost("default", OWN, LOCATED, "that OPSD"),
    ),
    "SmolLM2-135M: word problems in natural language (leg_counting)": (
        Question(
            text="Does OGLS_SD, set as in the default run, improve the model? After 12 steps against before",
            table="legs",
            ours=OWN,
        ),
        Question(text="And OPSD, learned from located errors?", table="legs", ours=LOCATED),
        Question(text="And ROSD as published?", table="legs", ours="rosd"),
        Question(text="And GRPO?", table="legs", ours="grpo"),
        Question(text="And likelihood of the solutions (SFT)?", table="legs", ours="sft"),
        _right("legs"),
        Question(text="Is OGLS_SD better than that OPSD?", table="legs", ours=OWN, theirs=LOCATED),
        Question(text="Is it better than GRPO?", table="legs", ours=OWN, theirs="grpo"),
        _as_dear("legs", "GRPO", 20, AS_DEAR_GRPO),
        _as_dear("legs", "SFT", 64, AS_DEAR_SFT),
        _cost("legs", WRONG_ONLY, AS_DEAR_GRPO, "that GRPO"),
        _cost("legs", WRONG_ONLY, AS_DEAR_SFT, "that SFT"),
    ),
    "SmolLM2-135M: multiple choice in physics (SciKnowEval), whose answers it guesses": (
        Question(
            text="Does OGLS_SD, set as in the default run, improve the model? After 12 steps against before",
            table="science",
            ours=OWN,
        ),
        Question(text="And OPSD, learned from located errors?", table="science", ours=LOCATED),
        Question(text="And ROSD as published?", table="science", ours="rosd"),
        Question(text="And GRPO?", table="science", ours="grpo"),
        Question(text="And likelihood of the right options (SFT)?", table="science", ours="sft"),
        _right("science"),
        Question(text="Is OGLS_SD better than that OPSD?", table="science", ours=OWN, theirs=LOCATED),
        _as_dear("science", "GRPO", 18, CHOICES_GRPO),
        _as_dear("science", "SFT", 46, CHOICES_SFT),
        _as_dear("science", "ROSD", 10, CHOICES_ROSD),
    ),
}

BEFORE = """## What is measured before training, and what came of it

On the lab where no model is named; [bias](bias.md) and [sweeps](sweeps.md) say how.
"""
HEAD = """# Evidence

What referees ask of two papers, answered on the lab where it can be: a student of 3 million parameters, arithmetic
chains, 20 steps. Where ideas decide, and where four families are trained on, the student is the second lab's, with
fifteen families of problems; who should think is asked of the third lab's student; parts that name SmolLM2 are about a
real language model. A number is a difference in held-out accuracy where nothing else is said: the first method minus
the second, ± half of its 95 % interval for new seeds on new problems, with p before any correction (the tables have
Holm's; [statistics](statistics.md) says how). What holds for these students is not thereby true of large models.

`make evidence` lists the tables and what they cost, `make evidence TABLE=lab` makes the rows that are missing and the
table, and with `ARGS=--rebuild` the table alone, in seconds, from `analysis/results/lab_rows.csv`. In `lab` every
method has its own rate and main setting, the best of as many trials for each, judged by other held-out problems
(`make evidence TABLE=tuning`; all trials are in `analysis/results/tuning.csv`). This page is written from the same
rows. [Results](results.md) tells what the tables say, and what was found without one.
"""


def over_seeds(values: Sequence[float], unit: str = "", digits: int = 3) -> str:
    """Returns an answer that is the mean of one value per seed, ± half of its 95 % interval (Student's t)."""
    mean, _, high = mean_interval(list(values))
    if len(values) < FEWEST:
        return f"{mean:+.{digits}f}{unit}, no interval: {_seeds(len(values))}"
    return f"**{mean:+.{digits}f} ± {high - mean:.{digits}f}**{unit} ({_seeds(len(values))})"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"


def interval(value: float, low: float, high: float, of: str, digits: int = 3) -> str:
    """Returns an answer that is a number with the ends of its 95 % interval, and what it was measured of."""
    return f"**{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]** ({of})"


def page(rows: Mapping[str, Sequence[Row]], told: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the page.

    Args:
        rows: rows of each table, by its name; a table that is not among them has not been run
        told: answers that are no differences, by question and by what gives them
    """
    parts = [HEAD]
    above = ["| question | answer | command |", "|---|---|---|"]
    for title, questions in QUESTIONS.items():
        lines = [f"## {title}", "", *above]
        for question in questions:
            answer = question.answer(rows.get(question.table, ()))
            command = "" if question.table not in rows else f"`make evidence TABLE={question.table}`"
            lines.append(f"| {question.text} | {answer} | {command} |")
        parts.append("\n".join(lines) + "\n")
    lines = [BEFORE, *above]
    for command, found in told.items():
        lines += [f"| {text} | {answer} | {command} |" for text, answer in found.items()]
    parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
