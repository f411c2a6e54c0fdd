"""A toy of what privilege does to a model: does the mean over what it may read give back what it says unread?

    python analysis/mismatch.py --out mismatch
    python analysis/mismatch.py --model Qwen/Qwen3-1.7B --hint "{question} The answer is {symbol}."

A model is asked for a digit. p0 is its distribution without privilege, p_s the one after a hint that the digit is s.
If hints only told it what it knows, some mixture of the p_s would be p0. Shown are p0, the mixtures with equal weights
and with the weights p0, and the nearest mixture there is, each with its total variation from p0 (OGLS-SD, appendix A).
Writes NAME.png and NAME.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import linprog
from style import COLORS, panels, save

QUESTION = "Name any digit from 0 to 9. Reply with the digit alone."
HINT = "{question}\n\nHint: the digit is {symbol}."
BEGIN = "The digit is "


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Returns sum |p - q| / 2."""
    return float(np.abs(p - q).sum() / 2)


def nearest_mixture(p0: np.ndarray, hinted: np.ndarray) -> np.ndarray:
    """Returns the weights w >= 0 with sum 1 that minimise the total variation of w @ hinted [hints, symbols] from p0
    [symbols].

    A linear program in w and e >= |p0 - w @ hinted|.
    """
    hints, symbols = hinted.shape
    identity = np.eye(symbols)
    solved = linprog(
        c=np.r_[np.zeros(hints), np.ones(symbols) / 2],
        A_ub=np.block([[hinted.T, -identity], [-hinted.T, -identity]]),
        b_ub=np.r_[p0, -p0],
        A_eq=np.r_[np.ones(hints), np.zeros(symbols)][None],
        b_eq=[1.0],
    )
    return solved.x[:hints]


def compare(p0: np.ndarray, hinted: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the mixtures by name."""
    equal = np.full(len(hinted), 1 / len(hinted))
    return {
        "without privilege": p0,
        "mixture, equal weights": equal @ hinted,
        "mixture, weights p0": p0 @ hinted,
        "nearest mixture": nearest_mixture(p0, hinted) @ hinted,
    }


def ask(model: str, question: str, hint: str, begin: str, symbols: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns p0 [symbols] and p_s [hints, symbols], given that a symbol is said, and the mass of all symbols in p0."""
    import torch
    from transformers import AutoModelForCausalLM

    from ogls.lessons.prompts import PromptEncoder, Prompts
    from ogls.policy.pretrained import load_tokenizer, resolve_model
    from ogls.records import Problem

    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    encoder = PromptEncoder(
        Prompts(student="{problem}", system="", chat=tokenizer.chat_template is not None), tokenizer
    )
    ids = [encoder.completion(symbol)[:-1] for symbol in symbols]
    if any(len(one) != 1 for one in ids):
        raise ValueError(f"expected symbols of one token each, got {dict(zip(symbols, ids, strict=True))}")
    texts = [question, *(hint.replace("{question}", question).replace("{symbol}", s) for s in symbols)]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for text in texts:
            prompt = encoder.student(Problem(id="digit", text=text, answer=""))
            rows.append(
                network(torch.tensor([prompt + encoder.completion(begin)[:-1]]))
                .logits[0, -1]
                .double()
                .softmax(-1)[[i for (i,) in ids]]
                .numpy()
            )
    said = np.stack(rows)
    given = said / said.sum(1, keepdims=True)
    return given[0], given[1:], float(said[0].sum())


def draw(mixtures: dict[str, np.ndarray], symbols: str, file: Path) -> None:
    figure, (axes,) = panels(width=8.0, height=3.8)
    places, width = np.arange(len(symbols)), 0.8 / len(mixtures)
    for number, (name, p) in enumerate(mixtures.items()):
        label = name if not number else f"{name}: TV = {total_variation(mixtures['without privilege'], p):.2f}"
        color = ("#000000", COLORS[0], COLORS[4], COLORS[2])[number]
        axes.bar(places + (number - 1.5) * width, p, width, color=color, label=label)
    axes.set(xticks=places, xticklabels=list(symbols), xlabel="digit", ylabel="probability, given a digit")
    axes.legend(frameon=False, fontsize=9)
    save(figure, file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--question", default=QUESTION, help="default: %(default)r")
    parser.add_argument("--hint", default=HINT, help="has the slots {question} and {symbol}; default: %(default)r")
    parser.add_argument("--begin", default=BEGIN, help="how the reply begins; default: %(default)r")
    parser.add_argument("--symbols", default="0123456789", help="of one token each; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("mismatch"), metavar="NAME", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        p0, hinted, mass = ask(options.model, options.question, options.hint, options.begin, options.symbols)
    except ValueError as error:
        parser.error(str(error))
    mixtures = compare(p0, hinted)
    table = pd.DataFrame(mixtures, index=pd.Index(list(options.symbols), name="symbol"))
    draw(mixtures, options.symbols, options.out.with_suffix(".png"))
    table.to_csv(options.out.with_suffix(".csv"))
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))
    for name, p in mixtures.items():
        print(f"total variation from p0, {name}: {total_variation(p0, p):.3f}")
    print(f"mass of p0 on these symbols: {mass:.3f}; a hint is followed with {np.diag(hinted).mean():.3f} on average")
    print(f"written: {options.out}.png, .csv")


if __name__ == "__main__":
    main()
