"""Made-up batches for the benchmarks of trunks: groups of rollouts with views, as token ids."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ogls.records import Lesson, View


def lessons(
    groups: int, group_size: int, prompt: int, length: int, views: int, vocab: int, seed: int = 0
) -> list[Lesson]:
    """Returns `groups` x `group_size` lessons of about `length` learned tokens (a third more or less).

    Each has a plain view and `views` privileged ones, half of them failures: the prompt and an attempt of another
    rollout of the group.
    """
    rng = random.Random(seed)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, min(vocab, 40_000)) for _ in range(rng.randint(mean * 2 // 3, mean * 4 // 3)))

    made = []
    for group in range(groups):
        asked, attempts = ids(prompt), [ids(length) for _ in range(max(views, 1))]
        read = [
            View(role="success" if number < (views + 1) // 2 else "failure", prefix_ids=asked + attempt)
            for number, attempt in enumerate(attempts[:views])
        ]
        for _ in range(group_size):
            tokens = ids(length)
            made.append(
                Lesson(
                    problem_id=str(group),
                    prompt_ids=asked,
                    token_ids=tokens,
                    token_weights=(1.0,) * len(tokens),
                    views=(View(role="plain", prefix_ids=asked), *read),
                )
            )
    return made


def random_model(folder: Path, **shape: int) -> Path:
    """Writes a Llama of this shape with random weights to `folder`, which it returns."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
