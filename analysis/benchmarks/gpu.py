"""Everything that has to be measured on a GPU, in one command of less than eight minutes.

    python analysis/benchmarks/gpu.py                      # writes gpu.json beside the working directory's files
    python analysis/benchmarks/gpu.py --smoke              # the same code in seconds on a CPU, with tiny shapes

Needs torch, transformers, peft and lightning; weights are random, in the shapes of Qwen3, so nothing is downloaded.

    kernel    the loss against three bare GEMMs, |V| = 151,936, hidden 2048, 2560, 4096: time, peak memory over what was
              held before; by the Triton kernel, by torch.compile and by torch's operations, KL and JSD, 4,096 tokens,
              and 16,384 for flatness of the peak; agreement of the three, with blocks of three sizes
    trunk     teacher scoring, shared and unshared, K = 2 and 8; the student's pass with and without checkpointing
    step      the train phase of OPSD (one privileged view) and of OGLS-SD (K = 2, 8) at alpha 3, otherwise as
              published: teacher, student, optimiser

No section begins after --budget seconds; what was left out is named.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rows import lessons

from ogls.algorithm import gradient, weight_totals
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon
from ogls.loss.steering import OutcomeSteering
from ogls.methods import OGLS_SD, OPSD, Method
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Lesson

QWEN3_1_7B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
TINY = QWEN3_1_7B | {
    "vocab_size": 997,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Bench:
    """A bench times functions on one device, and keeps what was found."""

    def __init__(self, device: str, budget: float) -> None:
        self.device, self.budget, self.began = torch.device(device), budget, time.perf_counter()
        self.found: dict[str, dict[str, float]] = {}
        self.left_out: list[str] = []

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, name: str, sides: dict[str, Callable[[], object]], rounds: int = 7) -> None:
        """Times ABBA rounds of all sides after two that warm up; ratios are to the first side, within a round."""
        if time.perf_counter() - self.began > self.budget:
            self.left_out.append(name)
            return
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, float] = {}
        try:
            for number in range(-2, rounds):
                for side in [*sides, *reversed(sides)]:
                    self.synchronise()
                    start = time.perf_counter()
                    held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
                    if self.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    sides[side]()
                    self.synchronise()
                    if number >= 0:
                        seconds[side].append(time.perf_counter() - start)
                    if self.device.type == "cuda":
                        peaks[side] = (torch.cuda.max_memory_allocated() - held) / 2**20
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            self.left_out.append(f"{name} (out of memory)")
            return
        first = next(iter(sides))
        print(f"\n{name}")
        for side, taken in seconds.items():
            ratios = sorted(a / b for a, b in zip(taken, seconds[first], strict=True))
            row = {
                "ms": 1e3 * statistics.median(taken),
                "ratio": statistics.median(ratios),
                "ratio_low": ratios[len(ratios) // 10],
                "ratio_high": ratios[-1 - len(ratios) // 10],
                "peak_mib": peaks.get(side, 0.0),
            }
            self.found[f"{name}/{side}"] = row
            spread = f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
            print(
                f"  {side:34}{row['ms']:10.2f} ms{row['ratio']:8.2f} {spread:16}{row['peak_mib']:9.0f} MiB", flush=True
            )


def kernel(bench: Bench, vocab: int, hidden: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(bench.device, torch.bfloat16)

    student, weight = normal(tokens, hidden), normal(vocab, hidden, scale=hidden**-0.5)
    target = student.float() + 0.1 * normal(tokens, hidden).float()
    rows = min(tokens, 2048)
    logits, gaps = (torch.empty(rows, vocab, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    gradient = torch.empty_like(student)

    def gemms() -> None:
        for start in range(0, tokens, rows):
            some = slice(start, start + rows)
            n = len(student[some])
            torch.mm(student[some], weight.T, out=logits[:n])
            torch.mm(student[some], weight.T, out=gaps[:n])
            torch.mm(logits[:n], weight, out=gradient[some])

    def ours(divergence: Divergence, compiled: bool = False) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            states = student.detach().requires_grad_()
            values, _ = chunked_divergence(states, target, weight, None, divergence, compiled=compiled)
            values.mean().backward()
            assert states.grad is not None
            return states.grad

        return run

    sides: dict[str, Callable[[], object]] = {"three GEMMs": gemms}
    for name, divergence, own in (("forward KL", ForwardKL(), OwnKL()), ("JSD", JensenShannon(), OwnJSD())):
        ways = {"": ours(divergence), ", compiled": ours(divergence, True), ", operations": ours(own)}
        expected = ways[", operations"]()
        for way, run in ways.items():
            sides[name + way] = run
            error = ((run() - expected).norm() / expected.norm()).item()
            assert error < 0.01, f"{name}{way}: gradient off by {error:.2%}"
    bench.measure(f"kernel, V={vocab} d={hidden} T={tokens}", sides)


class OwnKL(ForwardKL):
    """This class is none that the Triton kernel knows, so torch's operations do its passes one by one."""


class OwnJSD(JensenShannon):
    """This class is none that the kernel knows either."""


def block_sizes(bench: Bench, vocab: int) -> None:
    """Times the row passes alone, by blocks of several sizes and numbers of warps."""
    from ogls.loss import triton_rows

    logits, gaps = torch.randn(2, 512, vocab, dtype=torch.bfloat16, device=bench.device)
    values = torch.empty(512, device=bench.device)

    def passes(divergence: Divergence, block: int, warps: int) -> Callable[[], None]:
        def run() -> None:
            triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"] = block, warps
            options = {"temperature": 1.0, "clip": None, "one_sided": False, "wants_gradient": True}
            triton_rows.divergence_rows(logits, gaps, values, None, None, divergence=divergence, **options)

        return run

    before = triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"]
    for divergence in (ForwardKL(), JensenShannon()):
        sizes = (before, (2048, 4), (8192, 8), (8192, 16))
        sides = {f"blocks of {block}, {warps} warps": passes(divergence, block, warps) for block, warps in sizes}
        bench.measure(f"row passes, {type(divergence).__name__}, 512 x {vocab}", sides)
    triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"] = before


def random_policy(shape: dict[str, int], device: torch.device, checkpointing: bool) -> Policy:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0, **shape)
    with tempfile.TemporaryDirectory() as folder:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        policy = Policy(folder, lora=Lora(rank=64, alpha=128), gradient_checkpointing=checkpointing)
        return policy.load().to(device)


def trunk(bench: Bench, policy: Policy, length: int) -> None:
    for views in (2, 8):
        batch = lessons(1, 8, 200, length, views, len(policy.head[0]))
        prefixes = list(dict.fromkeys(view.prefix_ids for lesson in batch for view in lesson.views[1:]))
        owners = [owner for owner in range(len(prefixes)) for _ in batch]
        suffixes = [lesson.token_ids for _ in prefixes for lesson in batch]

        def score(share: bool, prefixes=prefixes, suffixes=suffixes, owners=owners) -> None:
            with torch.no_grad(), policy.without_adapter():
                for owner in range(len(prefixes)):  # one view at a time, as the trainer streams them
                    mine = [s for s, o in zip(suffixes, owners, strict=True) if o == owner]
                    policy.hidden([prefixes[owner]], mine, [0] * len(mine), share_prefixes=share)

        sides: dict[str, Callable[[], object]] = {
            "shared prefixes": lambda score=score: score(True),
            "unshared": lambda score=score: score(False),
        }
        bench.measure(f"teacher, G=8 K={views} length={length}", sides, rounds=3)


def train_phase(policy: Policy, optimizer: torch.optim.Optimizer, method: Method, batch: list[Lesson]) -> None:
    """Runs teacher, student and optimiser of one step, as the trainer does."""
    lent = {"teacher": policy.without_adapter}
    gradient(method, policy, lent, batch, weight_totals(method, batch), 16_384, observe=lambda micro_batch: None)
    optimizer.step()
    optimizer.zero_grad()


def steps(bench: Bench, policy: Policy, length: int) -> None:
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    vocab = len(policy.head[0])
    methods: dict[str, tuple[Method, int]] = {
        "OPSD": (OPSD(), 1),
        "OGLS-SD, K=2": (OGLS_SD(steering=OutcomeSteering(3.0)), 2),
        "OGLS-SD, K=8": (OGLS_SD(steering=OutcomeSteering(3.0)), 8),
    }
    sides: dict[str, Callable[[], object]] = {}
    for name, (method, views) in methods.items():
        batch = lessons(2, 8, 200, length, views, vocab)
        sides[name] = lambda method=method, batch=batch: train_phase(policy, optimizer, method, batch)
    bench.measure(f"train phase, 2 x G=8 length={length}", sides, rounds=3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--smoke", action="store_true")
    options.add_argument("--budget", type=float, default=400.0)
    options.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        sys.exit("no GPU here: --smoke runs the same code with tiny shapes on a CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    bench = Bench(device, args.budget)
    shape, length = (TINY, 12) if args.smoke else (QWEN3_1_7B, 1024)
    policy = random_policy(shape, bench.device, checkpointing=not args.smoke)
    for hidden, tokens in [(64, 48)] if args.smoke else [(2048, 4096), (2560, 4096), (4096, 4096), (2048, 16_384)]:
        kernel(bench, shape["vocab_size"], hidden, tokens)
    if device == "cuda":
        block_sizes(bench, shape["vocab_size"])
    trunk(bench, policy, length)
    steps(bench, policy, length)
    seconds = time.perf_counter() - bench.began
    print(f"\n{seconds:.0f} s; left out for lack of time or memory: {', '.join(bench.left_out) or 'nothing'}")
    machine = {"device": name, "torch": torch.__version__, "seconds": seconds, "left_out": bench.left_out}
    args.out.write_text(json.dumps({"machine": machine, "figures": bench.found}, indent=1))


if __name__ == "__main__":
    main()
