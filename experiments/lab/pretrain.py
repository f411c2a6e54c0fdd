"""Make the micro student of a lab, in 25 minutes of one core.

    OMP_NUM_THREADS=1 python experiments/lab/pretrain.py
    OMP_NUM_THREADS=1 python experiments/lab/pretrain.py --lab families --steps 3200 --batch 32 --rate 1e-3
    OMP_NUM_THREADS=1 python experiments/lab/pretrain.py --lab thinking --steps 2400 --batch 32 --rate 1e-3

A Llama of 3.2 million parameters that reads and writes characters learns demonstrations: those of `demonstrations.py`
for `lab.yaml`, those of `family_habits.py` for `families.yaml`, those of `thinking_habits.py` for `lab_thinking.yaml`.
The second student and the third begin as the first one, which can calculate. The same seed, number of threads and type
of numbers give the same student. What was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import family_habits
import thinking_habits
import torch
import yaml
from demonstrations import CHAINS, PHRASES, PROBLEMS, Demonstrations, Example, Habits, terse
from tokenizers import Tokenizer, decoders, models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ogls.lessons.prompts import ATTEMPT, IDEA, PromptEncoder, Prompts
from ogls.policy.policy import Policy, quickest_dtype
from ogls.policy.pretrained import load_tokenizer, quiet_transformers
from ogls.records import Problem, Sampling
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.by_kind import ByKind
from ogls.tasks.chains import Chains
from ogls.tasks.families import CARE, Families

HERE = Path(__file__).resolve().parent
END, PAD = "<end>", "<pad>"


@dataclass(frozen=True)
class Lab:
    """A lab is what its student learns from.

    Args:
        configs: configurations with the prompts, from the bottom up
        student: folder of the student
        habits: what is planted
        problems: function that makes the problems to learn from
        heldout: function that makes a number of others
        phrases: texts that are one token
        first: folder of the student that this one begins as, with tokens of its own; None for random weights
        chat_template: template that says whether the student thinks; None where it never does
    """

    configs: tuple[str, ...]
    student: Path
    habits: Habits
    problems: Callable[[], list[Problem]]
    heldout: Callable[[int], Sequence[Problem]]
    phrases: Sequence[str]
    first: Path | None = None
    chat_template: str | None = None

    @property
    def prompts(self) -> Prompts:
        """Returns the prompts of the configurations, for a student that does not think."""
        return self._prompts(False)

    @property
    def thinking(self) -> Prompts | None:
        """Returns the same for a student that thinks; None where it never does."""
        return self._prompts(True) if self.chat_template else None

    def _prompts(self, thinking: bool) -> Prompts:
        given: dict[str, Any] = {}
        for config in self.configs:
            given |= yaml.safe_load((HERE.parent / config).read_text())["data"]["prompts"]
        if self.chat_template:
            given |= {key: {"enable_thinking": thinking} for key in ("student_options", "teacher_options")}
        return Prompts(**given)


def chains() -> list[Problem]:
    return [problem for part in PROBLEMS for problem in Chains(**part)]


def heldout_chains(size: int) -> list[Problem]:
    return list(Chains(size=size, split="heldout", **CHAINS))


STUDENT = HERE / "student"
LABS = {
    "chains": Lab(
        ("lab.yaml",),
        STUDENT,
        Habits(),
        chains,
        heldout_chains,
        PHRASES,
    ),
    "families": Lab(
        ("families.yaml",),
        HERE / "families",
        family_habits.FamilyHabits(),
        family_habits.problems,
        lambda size: list(Families(size=min(size, 285), split="heldout")),
        (*family_habits.PHRASES, *family_habits.IDEAS),
        STUDENT,
    ),
    "thinking": Lab(
        ("lab.yaml", "lab_thinking.yaml"),
        HERE / "thinking",
        thinking_habits.ThinkingHabits(),
        chains,
        heldout_chains,
        thinking_habits.PHRASES,
        STUDENT,
        thinking_habits.CHAT_TEMPLATE,
    ),
}


def make_tokenizer(lab: Lab) -> PreTrainedTokenizerFast:
    """One token a character, and one for each phrase that always comes as a whole."""
    if lab.first is not None:
        tokenizer = load_tokenizer(lab.first)
        tokenizer.add_tokens(list(lab.phrases))
        tokenizer.chat_template = lab.chat_template
        return tokenizer
    prompts = lab.prompts
    templates = (prompts.student, *prompts.views.values(), prompts.reflect_wrong, prompts.reflect_right)
    framing = {part for template in templates for part in re.split(r"\{\w+\}", template) if len(part) > 1}
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([PAD, END, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.add_tokens(sorted(framing) + list(lab.phrases))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(lab: Lab, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    if lab.first is not None:
        model = AutoModelForCausalLM.from_pretrained(lab.first, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4096,
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    batches: Iterator[list[Example]],
    steps: int,
    rate: float,
    minutes: float,
    state: Path,
) -> None:
    """AdamW with a short warm-up and a cosine to 0, by steps or by processor time; products in the quickest type."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, mean, done = time.process_time(), 0.0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mean, done = saved["mean"], saved["done"]
    for step in range(steps):
        batch = next(batches)
        if step < done:
            continue
        elapsed = (time.process_time() - began) / 60
        if elapsed >= minutes:
            break
        progress = step / steps
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        optimizer.param_groups[0]["lr"] = rate * factor
        ids, targets = padded(batch)
        # The fused attention's backward pass in bf16 would take half of the time.
        quick = torch.autocast("cpu", torch.bfloat16, enabled=quickest_dtype() == "bfloat16")
        with quick, sdpa_kernel(SDPBackend.MATH):
            logits = model(input_ids=ids).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {mean:.3f}  {60 * elapsed / (step - done + 1):.2f} s a step", flush=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean, "done": step + 1}
            torch.save(saved, state.with_suffix(".part.ckpt"))
            state.with_suffix(".part.ckpt").replace(state)


def padded(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and next-token targets [examples, tokens]; -1 where nothing is learned: prompts and padding."""
    longest = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full_like(ids, -1)
    for row, (prompt, completion) in enumerate(batch):
        both = torch.tensor(prompt + completion)
        ids[row, : len(both)] = both
        targets[row, len(prompt) - 1 : len(both) - 1] = both[len(prompt) :]
    return ids, targets


def report(lab: Lab, prompts: Prompts, folder: Path, num_problems: int, seed: int) -> str:
    """Accuracy, length and share of terse answers by what is in view, on held-out problems at T = 1, as Markdown."""
    encoder = PromptEncoder(prompts, load_tokenizer(folder))
    problems, habits = list(lab.heldout(num_problems)), lab.habits
    rng, works = random.Random(seed), [habits.read(problem) for problem in problems]
    right, wrong = [w.work() for w in works], [w.wrong_work(rng) for w in works]
    mistakes = [habits.mistakes.mistake(problem, attempt) for problem, attempt in zip(problems, wrong, strict=True)]
    pairs = list(zip(problems, right, wrong, strict=True))
    views = {
        "nothing": [encoder.student(p) for p in problems],
        "right worked attempt": [encoder.view(p, ATTEMPT, r) for p, r, _ in pairs],
        "wrong worked attempt": [encoder.view(p, ATTEMPT, w) for p, _, w in pairs],
        "right terse attempt": [encoder.view(p, ATTEMPT, terse(r)) for p, r, _ in pairs],
        "wrong terse attempt": [encoder.view(p, ATTEMPT, terse(w)) for p, _, w in pairs],
        "idea": [encoder.view(p, IDEA, w.idea) for p, w in zip(problems, works, strict=True)],
        "another problem's idea": [
            encoder.view(p, IDEA, other.idea) for p, other in zip(problems, works[1:] + works[:1], strict=True)
        ],
        "the idea to take care": [encoder.view(p, IDEA, CARE) for p in problems],
        "reflection": [encoder.reflect(p, w, False, r) for p, r, w in pairs],
    }
    engine, policy = TransformersEngine(batch_size=256), Policy(str(folder), dtype="float32").load()
    engine.start(policy.folder, 384)
    engine.load(policy, 0)
    verifier = ByKind()
    lines = ["| in view | right | without work | tokens |", "|---|---:|---:|---:|"]
    for name, view in views.items():
        sampled = [group[0].token_ids for group in engine.generate(view, Sampling(max_tokens=128), 1, seed)]
        texts = [encoder.decode(ids) for ids in sampled]
        if name.startswith("reflection"):
            for part in ("quote", "idea"):
                good = [read(text, part) == (m and getattr(m, part)) for text, m in zip(texts, mistakes, strict=True)]
                lines.append(f"| reflection on a wrong attempt: {part} | {sum(good) / len(good):.3f} | | |")
            continue
        good = [verifier.grade(p, text).correct for p, text in zip(problems, texts, strict=True)]
        short = sum("=" not in text for text in texts) / len(texts)
        length = sum(map(len, sampled)) / len(sampled)
        lines.append(f"| {name} | {sum(good) / len(good):.3f} | {short:.3f} | {length:.1f} |")
    return "\n".join(lines)


def read(text: str, part: str) -> str | None:
    try:
        return json.loads(text)[part]
    except (ValueError, KeyError, TypeError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lab", choices=LABS, default="chains", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="demonstrations a step; default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, for a trial")
    parser.add_argument("--problems", type=int, default=512, help="of the report; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: the lab's student")
    parser.add_argument("--first", type=Path, help="student to begin as; default: the lab's")
    parser.add_argument("--report", action="store_true", help="train nothing, and say how good the student is")
    options = parser.parse_args()
    quiet_transformers()
    torch.manual_seed(options.seed)
    lab = LABS[options.lab]
    lab = replace(lab, first=options.first or lab.first)
    out = options.out or lab.student
    out.parent.mkdir(parents=True, exist_ok=True)
    if not options.report:
        tokenizer = make_tokenizer(lab)
        model = make_model(lab, tokenizer)
        encoder = PromptEncoder(lab.prompts, tokenizer)
        thinking = lab.thinking and PromptEncoder(lab.thinking, tokenizer)
        examples = Demonstrations(encoder, lab.habits, options.seed, lab.problems(), thinking)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(tokenizer)} tokens")
        state = out.with_suffix(".ckpt")
        train(model, examples.batches(options.batch), options.steps, options.rate, options.minutes, state)
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        state.unlink(missing_ok=True)
    for prompts in filter(None, (lab.prompts, lab.thinking)):
        print(report(lab, prompts, out, options.problems, options.seed), end="\n\n")


if __name__ == "__main__":
    main()
