"""One rollout in detail: its text, and the tokens where target and student differ most, as Markdown.

    python analysis/case_study.py --config math.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt --out case.md

Chosen is the rollout with the largest KL(target || student) summed over its distilled tokens, or the one that --problem
and --rollout name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reading import Page, Reading, read_step
from states import opened, parser_of

from ogls.records import RolloutGroup


def choose(page: Page, problem: str | None, rollout: int | None) -> tuple[RolloutGroup, Reading]:
    """Returns the rollout that is asked for, or the one with the largest KL."""
    asked = [pair for pair in page.groups if problem in (None, pair[0].problem.id)]
    if not asked:
        raise ValueError(f"there is no problem {problem!r}; got {[group.problem.id for group, _ in page.groups]}")
    found = [(group, one) for group, all_ in asked for i, one in enumerate(all_) if rollout in (None, i)]
    learned = [pair for pair in found if any(token.learned for token in pair[1].tokens)]
    if not learned:
        raise ValueError("none of these rollouts is learned from: expected a wrong one with a right peer or a solution")
    return max(learned, key=lambda pair: pair[1].kl)


def describe(group: RolloutGroup, reading: Reading, count: int) -> str:
    """Returns the case as Markdown; marked are the `count` scored tokens with the largest KL, [n] by their rank."""
    problem, rollout = group.problem, reading.rollout
    scored = [t for t, token in enumerate(reading.tokens) if token.kl is not None]
    largest = sorted(scored, key=lambda t: -(reading.tokens[t].kl or 0.0))[:count]
    rank = {t: n for n, t in enumerate(largest, start=1)}
    marked = "".join(
        f"⟦{x.piece or x.name}⟧[{rank[t]}]" if t in rank else x.piece for t, x in enumerate(reading.tokens)
    )
    verdict = "right" if rollout.correct else f"wrong: {rollout.verdict.answer or 'no answer'}"
    lines = [
        f"# {cell(problem.id)}",
        f"{len(group.successes)} of {len(group.rollouts)} rollouts are right. This one is {cell(verdict)}; "
        f"expected is {cell(problem.answer)}.",
        *("**Problem**", fenced(problem.text)),
        *(("**Reference solution**", fenced(problem.solution)) if problem.solution else ()),
        *("**Rollout**, ⟦…⟧[n] where target and student differ most", fenced(marked)),
    ]
    rows = [["n", "place", "token", "KL, nats", "distilled"]]
    names = list((reading.tokens[largest[0]].tops or {}) if largest else {})
    rows[0] += [f"{name}: likeliest" for name in names]
    for t in largest:
        token = reading.tokens[t]
        row = [str(rank[t]), str(t), code(token.name), f"{token.kl:.3f}", "yes" if token.learned else "no"]
        for name in names:
            own, tops = (token.chances or {})[name], (token.tops or {})[name][:2]
            row.append(", ".join(f"{code(word)} {p:.2f}" for word, p in tops if p >= 0.005) + f" (this {own:.2f})")
        rows.append(row)
    table = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n\n".join([*lines, "\n".join(table)]) + "\n"


def fenced(text: str) -> str:
    """Returns a block that the text cannot end: its fence is longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def cell(text: str) -> str:
    """Returns text for a line or a cell of a table, with nothing in it that Markdown would act on."""
    flat = " ".join(text.split())
    return "".join(f"&#{ord(c)};" if c in "|`<>&*_[]\\" else c for c in flat)


def code(word: str) -> str:
    """Returns a token as it is, spaces and line ends shown."""
    shown = word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
    return f"<code>{cell(shown)}</code>"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--problem", help="id of the problem; default: any")
    parser.add_argument("--rollout", type=int, help="number of the rollout in its group, from 0; default: any")
    parser.add_argument("--count", type=int, default=8, help="tokens in the table; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("case.md"), help="default: %(default)s")
    options, configuration = parser.parse_known_args(arguments)
    try:
        with opened(configuration, options.ckpt_path) as (model, data):
            page = read_step(model, data, options.step, top=2)
        text = describe(*choose(page, options.problem, options.rollout), options.count)
    except ValueError as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
