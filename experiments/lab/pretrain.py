"""Make the micro student of the lab, in 25 minutes of one core.

    OMP_NUM_THREADS=1 python experiments/lab/pretrain.py

A Llama of 3.2 million parameters that reads and writes characters learns the demonstrations of `demonstrations.py`. The
prompts are those of `lab.yaml`. The same seed and the same number of threads give the same student.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from demonstrations import CHAINS, PHRASES, PROBLEMS, Demonstrations, Example, Habits, terse
from tokenizers import Tokenizer, decoders, models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ogls.lessons.prompts import ATTEMPT, IDEA, PromptEncoder, Prompts
from ogls.policy.policy import Policy
from ogls.policy.pretrained import load_tokenizer, quiet_transformers
from ogls.records import Sampling
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.by_kind import ByKind
from ogls.tasks.chains import Chain, Chains, first_mistake

HERE = Path(__file__).resolve().parent
STUDENT = HERE / "student"
END, PAD = "<end>", "<pad>"


def prompts() -> Prompts:
    return Prompts(**yaml.safe_load((HERE.parent / "lab.yaml").read_text())["data"]["prompts"])


def make_tokenizer(prompts: Prompts) -> PreTrainedTokenizerFast:
    """One token a character, and one for each phrase that always comes as a whole."""
    templates = (prompts.student, *prompts.views.values(), prompts.reflect_wrong, prompts.reflect_right)
    framing = {part for template in templates for part in re.split(r"\{\w+\}", template) if len(part) > 1}
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([PAD, END, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.add_tokens(sorted(framing) + list(PHRASES))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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


def train(model: LlamaForCausalLM, batches: Iterator[list[Example]], steps: int, rate: float, minutes: float) -> None:
    """AdamW with a short warm-up and a cosine to 0, by steps or by processor time; products in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, mean = time.process_time(), 0.0
    for step in range(steps):
        elapsed = (time.process_time() - began) / 60
        if elapsed >= minutes:
            break
        progress = step / steps
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        optimizer.param_groups[0]["lr"] = rate * factor
        ids, targets = padded(next(batches))
        # The fused attention's backward pass in bf16 would take half of the time.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(input_ids=ids).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {mean:.3f}  {60 * elapsed / (step + 1):.2f} s a step", flush=True)


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


def report(folder: Path, num_problems: int, seed: int) -> str:
    """Accuracy and share of terse answers by what is in view, on held-out problems at T = 1, as a Markdown table."""
    encoder = PromptEncoder(prompts(), load_tokenizer(folder))
    problems = list(Chains(size=num_problems, split="heldout", **CHAINS))
    rng, chains = random.Random(seed), [Chain.parse(problem.text) for problem in problems]
    right, wrong = [c.work() for c in chains], [c.wrong_work(rng) for c in chains]
    mistakes = [first_mistake(problem, attempt) for problem, attempt in zip(problems, wrong, strict=True)]
    pairs = list(zip(problems, right, wrong, strict=True))
    views = {
        "plain": [encoder.student(p) for p in problems],
        "right worked attempt": [encoder.view(p, ATTEMPT, r) for p, r, _ in pairs],
        "wrong worked attempt": [encoder.view(p, ATTEMPT, w) for p, _, w in pairs],
        "right terse attempt": [encoder.view(p, ATTEMPT, terse(r)) for p, r, _ in pairs],
        "wrong terse attempt": [encoder.view(p, ATTEMPT, terse(w)) for p, _, w in pairs],
        "idea": [encoder.view(p, IDEA, c.idea) for p, c in zip(problems, chains, strict=True)],
        "reflection on a wrong attempt": [encoder.reflect(p, w, False, r) for p, r, w in pairs],
    }
    engine, policy = TransformersEngine(batch_size=256), Policy(str(folder), dtype="float32").load()
    engine.start(policy.folder, 256)
    engine.load(policy, 0)
    verifier = ByKind()
    lines = ["| in view | right | without work |", "|---|---:|---:|"]
    for name, view in views.items():
        texts = [
            encoder.decode(group[0].token_ids) for group in engine.generate(view, Sampling(max_tokens=64), 1, seed)
        ]
        if name.startswith("reflection"):
            good = [read_quote(text) == (m and m.quote) for text, m in zip(texts, mistakes, strict=True)]
        else:
            good = [verifier.grade(p, text).correct for p, text in zip(problems, texts, strict=True)]
        short = sum("=" not in text for text in texts) / len(texts)
        lines.append(f"| {name} | {sum(good) / len(good):.3f} | {short:.3f} |")
    return "\n".join(lines)


def read_quote(text: str) -> str | None:
    try:
        return json.loads(text)["quote"]
    except (ValueError, KeyError, TypeError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="demonstrations a step; default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, for a trial")
    parser.add_argument("--problems", type=int, default=512, help="of the report; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=STUDENT, help="default: %(default)s")
    options = parser.parse_args()
    quiet_transformers()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer(prompts())
    model = make_model(tokenizer)
    problems = [problem for part in PROBLEMS for problem in Chains(**part)]
    demonstrations = Demonstrations(PromptEncoder(prompts(), tokenizer), Habits(), options.seed, problems)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(tokenizer)} tokens")
    train(model, demonstrations.batches(options.batch), options.steps, options.rate, options.minutes)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(report(options.out, options.problems, options.seed))


if __name__ == "__main__":
    main()
