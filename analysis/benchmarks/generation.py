"""Generation: tokens per second and the cost of taking over weights, by engine and way of handing them over.

    python analysis/benchmarks/generation.py                               # 32 prompts x 4 rollouts of 48 tokens
    python analysis/benchmarks/generation.py --prompts 8 --n 8 --max-tokens 1024 --engines adapter merged

Each engine runs in a process of its own, one after the other: `merged` (vLLM with base + B A), `adapter` (vLLM with the
adapter beside the base), `transformers`. Rounds are therefore not interleaved, and on a busy machine the figures of two
engines are not comparable. Start-up is reported apart; the first of the calls is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
from harness import announce, log, parser

ENGINES = ("merged", "adapter", "transformers")


def measure(args: argparse.Namespace, kind: str) -> dict[str, float]:
    """Returns seconds of the start, median seconds of a load, median and range of tokens per second."""
    from ogls.lessons.prompts import PromptEncoder, Prompts
    from ogls.policy.lora import Lora
    from ogls.policy.policy import Policy
    from ogls.policy.pretrained import EMBEDDED
    from ogls.records import Sampling
    from ogls.rollout.engine import RolloutEngine
    from ogls.tasks.chains import Chains

    policy = Policy(args.model or EMBEDDED, args.adapter or None, lora=Lora()).load()
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.normal_(std=1e-4)
    encoder = PromptEncoder(Prompts(system=""), policy.tokenizer)
    chains = Chains(size=args.prompts, seed=1)
    prompts = [encoder.student(chains[i]) for i in range(args.prompts)]
    engine: RolloutEngine
    if kind == "transformers":
        from ogls.rollout.transformers import TransformersEngine

        engine = TransformersEngine()
    else:
        from ogls.rollout.vllm import VllmEngine

        engine = VllmEngine(sync=kind)  # pyright: ignore[reportArgumentType]
    start = time.perf_counter()
    engine.start(policy.folder, max(map(len, prompts)) + args.max_tokens)
    found: dict[str, list[float]] = {"start_s": [time.perf_counter() - start], "load_s": [], "tokens_per_s": []}
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        engine.load(policy, number)
        loaded = time.perf_counter()
        groups = engine.generate(prompts, Sampling(max_tokens=args.max_tokens), args.n, number)
        if number:
            tokens = sum(len(completion.token_ids) for group in groups for completion in group)
            found["load_s"].append(loaded - start)
            found["tokens_per_s"].append(tokens / (time.perf_counter() - loaded))
    engine.close()
    result = {name: float(np.median(values)) for name, values in found.items()}
    return result | {"slowest": min(found["tokens_per_s"]), "fastest": max(found["tokens_per_s"])}


def main() -> None:
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    options.add_argument("--model", default="")
    options.add_argument("--adapter", default="experiments/cold_start")
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--n", type=int, default=4)
    options.add_argument("--max-tokens", type=int, default=48)
    options.add_argument("--in-process", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.in_process:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args, args.in_process)))
        return
    announce(args)
    print(f"\n{'':14}{'tokens/s':>10}{'range':>18}{'load s':>9}{'start s':>9}")
    figures: dict[str, float] = {}
    for kind in args.engines:
        command = [sys.executable, __file__, *sys.argv[1:], "--in-process", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.strip().splitlines()[-1])
        spread = f"{found['slowest']:.0f} .. {found['fastest']:.0f}"
        print(
            f"{kind:14}{found['tokens_per_s']:10.0f}{spread:>18}{found['load_s']:9.2f}{found['start_s']:9.1f}",
            flush=True,
        )
        figures |= {f"{kind}/{name}": value for name, value in found.items()}
    for kind in args.engines[1:]:
        first = args.engines[0]
        figures[f"{kind}/of {first}"] = figures[f"{kind}/tokens_per_s"] / figures[f"{first}/tokens_per_s"]
        print(f"{kind}: {figures[f'{kind}/of {first}']:.2f} of the tokens/s of {first}")
    log("generation", figures, args)


if __name__ == "__main__":
    main()
