"""Prompts are tried on a model: its completions are printed.

    python experiments/run.py generate "What is 12 + 8 - 9?" --config math.yaml --n 4
    python experiments/run.py generate "What is 12 + 8 - 9?" --ckpt_path runs/NAME/checkpoints/best.ckpt
    python experiments/run.py generate --file prompts.txt --config math.yaml      # a prompt per line

Templates, engine and sampling are those of a validation: data.prompts, data.engine, data.evaluation.sampling. All other
options are those of `fit`, such as --data.evaluation.sampling.temperature 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ogls.export import take
from ogls.lessons.prompts import PromptEncoder
from ogls.records import Problem
from ogls.system.seeds import derive
from ogls.tracking.files import CONFIG, check_checkpoint

_SECTIONS = ("seed_everything", "trainer", "method", "policy", "model", "data")


def main(arguments: Sequence[str], build: Callable[[], Any]) -> None:
    """Runs the command line of `run.py generate`.

    Args:
        arguments: words after ``generate``
        build: function that makes model and data from options of `run.py fit` in `sys.argv`

    Raises:
        ValueError: there is no such checkpoint or file of prompts, or nothing to try.
    """
    options, rest = parser().parse_known_args(arguments)
    prompts, settings = divided(rest)
    if prompts and options.file is not None:
        raise ValueError(f"--file {options.file} and the prompt {prompts[0]!r}: give one of them")
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, got {options.n}")
    if options.ckpt_path is not None:
        check_checkpoint(options.ckpt_path)
    batches = [prompts] if prompts else _read(options.file)
    if not any(word.partition("=")[0] == "--config" for word in settings):
        if options.ckpt_path is None:
            raise ValueError("which model? Give --ckpt_path FILE of a run, or --config FILE")
        settings = ["--config", str(_beside(options.ckpt_path)), *settings]
    for i, word in enumerate(settings):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if Path(value).name == CONFIG:
            settings[i] = f"{flag}{equals}{_sections(Path(value))}"
    sys.argv[1:] = settings
    made = build()
    model, data = made.model, made.datamodule
    try:
        if options.ckpt_path is not None:
            take(model.policy, options.ckpt_path)
        model.policy.load().to(made.trainer.strategy.root_device)
        which, step = options.ckpt_path or model.policy.folder, model.policy.version
        sampling = data.evaluation.sampling
        print(f"{which}, after step {step}; temperature {sampling.temperature}", file=sys.stderr, flush=True)
        data.encoder = PromptEncoder(data.prompts, model.policy.tokenizer)
        for batch in batches:
            _complete(data, batch, options.n)
    finally:
        data.close()


def parser() -> argparse.ArgumentParser:
    """Returns the parser of what `generate` has beside the options of `fit`."""
    made = argparse.ArgumentParser(
        "run.py generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="run.py generate [PROMPT ...] [--file FILE] [--ckpt_path FILE] [--n N] [--config FILE] [--key value]",
    )
    made.add_argument("--ckpt_path", type=Path, metavar="FILE", help="trained weights (default: those it begins with)")
    made.add_argument("--file", metavar="FILE", help="file with a prompt per line; - is the input, as without a prompt")
    made.add_argument("--n", type=int, default=1, help="number of completions per prompt (default: %(default)s)")
    return made


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns prompts and options: a word that is no option, and no option's value, is a prompt."""
    prompts: list[str] = []
    options: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before.startswith("--") and "=" not in before
        (options if word.startswith("--") or is_value else prompts).append(word)
    return prompts, options


def _read(file: str | None) -> Iterator[list[str]]:
    """Yields the lines that are not empty: one at a time where somebody types them, else all at once."""
    if file not in (None, "-"):
        try:
            yield _kept(Path(file).read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 at byte {error.start}"
            raise ValueError(f"--file {file}: {why}; expected a text with a prompt per line") from error
    elif sys.stdin.isatty():
        print("A prompt per line; Ctrl-D ends.", file=sys.stderr, flush=True)
        yield from ([line] for line in map(str.strip, sys.stdin) if line)
    else:
        yield _kept(sys.stdin)


def _kept(lines: Iterable[str]) -> list[str]:
    if kept := [line.strip() for line in lines if line.strip()]:
        return kept
    raise ValueError("there is no prompt: give one as an argument, by --file, or a line of the input")


def _beside(checkpoint: Path) -> Path:
    """Returns the file with the configuration of a checkpoint's run."""
    file = checkpoint.absolute().parent.parent / CONFIG
    if not file.is_file():
        raise ValueError(f"--ckpt_path {checkpoint}: there is no {file}: name its configuration by --config")
    return file


def _sections(file: Path) -> str:
    """Returns the configuration of a run as text in braces, without what belongs to `fit` alone."""
    if not file.is_file():
        raise ValueError(f"--config {file}: there is no such file")
    written = yaml.safe_load(file.read_text())
    return json.dumps({name: written[name] for name in _SECTIONS if name in written})


def _complete(data: Any, prompts: Sequence[str], n: int) -> None:
    problems = [Problem(id=str(i), text=text, answer="") for i, text in enumerate(prompts)]
    ids = [data.encoder.evaluated(problem) for problem in problems for _ in range(n)]
    sampler = data.sampler()
    sampler.hold()
    completions = iter(sampler.replies(ids, data.evaluation.sampling, derive(data.seed, "generate")))
    for prompt in prompts:
        print(f"\n> {prompt}")
        for number in range(1, n + 1):
            completion = next(completions)
            cut = ", cut off" if completion.finish_reason == "length" else ""
            print(f"--- {number} of {n}, {len(completion.token_ids)} tokens{cut}")
            print(data.encoder.decode(completion.token_ids), flush=True)
