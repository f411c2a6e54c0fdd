"""Rollouts as one self-contained HTML page: every token coloured by KL(target || student), with what each view says.

    python analysis/tokens.py --config math.yaml --ckpt_path runs/NAME/checkpoints/best.ckpt --out tokens.html

Point at a token, or click it and walk with the arrow keys: the likeliest tokens under the student, the plain teacher,
the success and failure pools and the target. Tokens that are not distilled are grey, the located error is underlined.
The page asks nothing of the network and runs nothing that a rollout says: all text is set as text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from reading import Page, Reading, Token, read_step
from states import opened, parser_of

TEMPLATE = Path(__file__).with_name("tokens.html")


def render(page: Page) -> str:
    """Returns the template with the page's data in it."""
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(page.title)).replace("{{data}}", as_json(page))


def as_json(page: Page) -> str:
    """Returns the page for a script element: no character of it can end that element or begin another."""
    groups = [
        {
            "id": group.problem.id,
            "problem": group.problem.text,
            "answer": group.problem.answer,
            "solution": group.problem.solution,
            "rollouts": [_row(reading) for reading in readings],
        }
        for group, readings in page.groups
    ]
    text = json.dumps({"title": page.title, "groups": groups}, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row(reading: Reading) -> dict:
    rollout = reading.rollout
    status = "truncated" if rollout.truncated else rollout.verdict.status
    tokens = [_cells(token) for token in reading.tokens]
    return {"correct": rollout.correct, "status": status, "extracted": rollout.verdict.answer, "tokens": tokens}


def _cells(token: Token) -> dict:
    """Returns a token under short names, probabilities to five digits: pages hold many tokens."""
    cells: dict = {"n": token.name, "s": token.piece, "l": int(token.learned), "e": int(token.error)}
    if token.kl is not None and token.chances is not None and token.tops is not None:
        cells["k"] = round(token.kl, 5)
        cells["c"] = {name: round(p, 5) for name, p in token.chances.items()}
        cells["t"] = {name: [[word, round(p, 5)] for word, p in words] for name, words in token.tops.items()}
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--top", type=int, default=6, help="tokens shown of each view; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tokens.html"), help="default: %(default)s")
    options, configuration = parser.parse_known_args(arguments)
    try:
        with opened(configuration, options.ckpt_path) as (model, data):
            page = read_step(model, data, options.step, options.top)
    except ValueError as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(page), encoding="utf-8")
    print(f"written: {options.out}, {options.out.stat().st_size / 1e6:.1f} MB, {len(page.groups)} problems")


if __name__ == "__main__":
    main()
