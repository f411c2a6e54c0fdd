"""Everything that has to be measured on a GPU, in one command of twelve minutes.

    python analysis/benchmarks/gpu.py             # appends to gpu.jsonl, a line per figure, at once
    python analysis/benchmarks/gpu.py --fake      # the same calls on meta tensors: what is to be expected of an H100

Weights are random, in the shapes of Qwen3-1.7B, so nothing is downloaded. A section that fails is named, and the next
one begins; none begins after --budget seconds.

    rates       what the device reaches: products in bf16 and fp32, copies of memory, launches of small kernels
    attention   one layer's attention over a ragged group: the one varlen call, and the grids that it replaces
    loss        the loss against its three products, |V| = 151,936, hidden 2048 and 4096: KL, JSD, top-k; error of the
                gradient; 16,384 tokens beside 4,096, for flatness of the peak
    rows        the row passes alone, by blocks of several sizes and numbers of warps
    passes      teacher and student, seconds a token, and the student's peak beside the memory plan's
    sharing     the student's pass over a long prompt and 8 rollouts: prompt read once, and with every rollout
    step        the train phase of OPSD and of OGLS-SD with 2 and 8 peers: teacher, student, optimiser
    fit         two steps of `run.py fit` with 2,048 tokens a rollout: seconds by phase, serial and one_step_off
    decoding    vLLM on rollouts of 512 tokens: 32 and 256 at a time, merged or adapter

The last two need vLLM and start it four times, for a minute each, but for up to three where it has to compile first.
--fake leaves them, rates and rows out, and says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fake_gpu import FakeGpu, qwen3
from rows import lessons

from ogls.algorithm import gradient, weight_totals
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import Divergence, ForwardKL, JensenShannon
from ogls.loss.steering import OutcomeSteering
from ogls.loss.topk import TopK
from ogls.methods import OGLS_SD, OPSD, Method
from ogls.policy.attention import packed_attention
from ogls.policy.layout import grids
from ogls.policy.lora import Lora
from ogls.policy.packing import pack
from ogls.policy.policy import Policy
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("rates", "attention", "loss", "rows", "passes", "sharing", "step", "fit", "decoding")
Side = Callable[[], object]
LORA = Lora(rank=64, alpha=128)
RAGGED = [600, 2000, 8192, 1024, 4096]  # tokens of a group's rollouts, as they come
GIB = 2**30


class Bench:
    """A bench times functions on a GPU, and writes each figure down at once."""

    device = torch.device("cuda")
    fake = False

    def __init__(self, budget: float, out: Path, layers: int) -> None:
        self.budget, self.out, self.began = budget, out, time.perf_counter()
        self.config = qwen3("1.7B", num_hidden_layers=layers)
        self.failed: list[str] = []

    def section(self, name: str, run: Callable[[], None]) -> None:
        """Runs one section; whatever it raises is noted."""
        if time.perf_counter() - self.began > self.budget:
            self.failed.append(f"{name} (no time left)")
            return
        print(f"\n== {name}", flush=True)
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0]})")
        if not self.fake:
            torch.cuda.empty_cache()

    def note(self, section: str, **figures: Any) -> None:
        with self.out.open("a") as lines:
            lines.write(json.dumps({"section": section, **figures}) + "\n")
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        print(f"  {section}: " + ", ".join(shown), flush=True)

    def measure(self, section: str, sides: dict[str, Side], tokens: int, rounds: int = 5) -> None:
        """Times ABBA rounds of all sides after two that warm up; ratios are to the first side, within a round."""
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, float] = {}
        for number in range(-2, rounds):
            for side in [*sides, *reversed(sides)]:
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                sides[side]()
                torch.cuda.synchronize()
                if number >= 0:
                    seconds[side].append(time.perf_counter() - start)
                peaks[side] = (torch.cuda.max_memory_allocated() - held) / GIB
        first = next(iter(sides))
        for side, taken in seconds.items():
            ratios = sorted(a / b for a, b in zip(taken, seconds[first], strict=True))
            self._tell(section, side, statistics.median(taken), tokens, peaks[side], ratios)

    def _tell(self, section: str, side: str, taken: float, tokens: int, peak: float, ratios: list[float]) -> None:
        figures = {"ms": 1e3 * taken, "us_a_token": 1e6 * taken / tokens, "peak_gib": peak}
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        self.note(section, side=side, **figures, ratio=statistics.median(ratios), ratio_low=low, ratio_high=high)


class FakeBench(Bench):
    """A fake bench predicts what a GPU would need, on meta tensors."""

    device = torch.device("meta")
    fake = True

    def __init__(self, budget: float, out: Path, layers: int, gpu: FakeGpu) -> None:
        super().__init__(budget, out, layers)
        self.gpu = gpu

    def measure(self, section: str, sides: dict[str, Side], tokens: int, rounds: int = 5) -> None:
        first = None
        for side, run in sides.items():
            self.gpu.reset()
            held = self.gpu.live
            run()
            taken, kernels = sum(self.gpu.seconds.values()), self.gpu.kernels.total()
            first = first or taken
            self._tell(section, side, taken, tokens, (self.gpu.peak - held) / GIB, [taken / first])
            most = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in self.gpu.seconds.most_common(4))
            self.note(section, side=side, kernels=kernels, waits=self.gpu.waits, most=most)


def rates(bench: Bench) -> None:
    """Measures what `fake_gpu.Rates` assumes."""
    if bench.fake:
        print("  left out: they are given")
        return
    for dtype in (torch.bfloat16, torch.float32):
        for rows, inner, columns in ((8192, 8192, 8192), (16_384, 2048, 6144), (4096, 2048, 151_936)):
            a, b = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((rows, inner), (inner, columns)))
            taken = median_seconds(partial(torch.mm, a, b))
            shape = f"{rows} x {inner} x {columns}"
            bench.note("rates", product=str(dtype), shape=shape, tflops=2e-12 * rows * inner * columns / taken)
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    bench.note("rates", copy_gb_a_second=2e-9 * len(x) / median_seconds(x.clone))
    small = torch.zeros(8, device="cuda")
    seconds = median_seconds(lambda: [small.add_(1.0) for _ in range(1000)])
    bench.note("rates", launch_us=1e3 * seconds)


def median_seconds(run: Side) -> float:
    """Returns the median of ten times, by the device's clock, after three that warm up."""
    taken = []
    for number in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if number > 2:
            taken.append(1e-3 * start.elapsed_time(end))
    return statistics.median(taken)


def attention(bench: Bench) -> None:
    """One prompt of 200 tokens and a ragged group after it, at the heads of Qwen3-1.7B."""
    suffixes = [[1] * n for n in RAGGED]
    row = pack(
        [[1] * 200], suffixes, [0] * len(suffixes), share_prefixes=True, device=bench.device, dtype=torch.bfloat16
    )
    branches = [n - 1 for n in RAGGED]
    padded = replace(row, layout=grids([200], branches, [0] * len(branches), bench.device, torch.bfloat16))
    tokens = len(row.token_ids)
    inputs = [torch.randn(1, heads, tokens, 128, device=bench.device, dtype=torch.bfloat16) for heads in (16, 8, 8)]

    def attend(packing: Any) -> Side:
        def run() -> None:
            xs = [x.detach().requires_grad_() for x in inputs]
            out, _ = packed_attention(torch.nn.Identity(), *xs, None, packing=packing)
            out.backward(torch.empty_like(out))

        return run

    bench.measure("attention, forward and backward", {"varlen": attend(row), "grids": attend(padded)}, tokens)


def loss(bench: Bench, hidden: int, tokens: int) -> None:
    vocab = 151_936

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, device=bench.device)).bfloat16()

    student, weight = normal(tokens, hidden), normal(vocab, hidden, scale=hidden**-0.5)
    target = student.float() + 0.1 * normal(tokens, hidden).float()
    rows = min(tokens, 2048)
    logits, gaps = (torch.empty(rows, vocab, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    out = torch.empty_like(student)

    def products() -> None:
        for start in range(0, tokens, rows):
            some = slice(start, start + rows)
            torch.mm(student[some], weight.T, out=logits)
            torch.mm(student[some], weight.T, out=gaps)
            torch.mm(logits, weight, out=out[some])

    def ours(
        divergence: Divergence, support: TopK | None = None, head: torch.Tensor = weight
    ) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            states = student.detach().requires_grad_()
            values, _ = chunked_divergence(states, target, head, None, divergence, support=support)
            values.mean().backward()
            assert states.grad is not None
            return states.grad

        return run

    ways = {
        "forward KL": (ForwardKL(), None),
        "JSD": (JensenShannon(), None),
        "JSD, top 100": (JensenShannon(), TopK(100)),
    }
    sides: dict[str, Side] = {"three products": products}
    section = f"loss, |V| = {vocab}, hidden {hidden}, {tokens} tokens"
    for name, way in ways.items():
        sides[name] = run = ours(*way)
        if not bench.fake and tokens <= 4096:
            exact = ours(*way, head=weight.float())()
            bench.note(
                section, side=name, gradient_error=float((run().float() - exact.float()).norm() / exact.float().norm())
            )
    bench.measure(section, sides, tokens)


def row_passes(bench: Bench) -> None:
    """Times the row passes alone, by blocks of several sizes and numbers of warps."""
    if bench.fake:
        print("  left out: these are Triton's own choices")
        return
    from ogls.loss import triton_rows

    vocab = 151_936
    logits, gaps = torch.randn(2, 512, vocab, dtype=torch.bfloat16, device=bench.device)
    values = torch.empty(512, device=bench.device)

    def passes(divergence: Divergence, block: int, warps: int) -> Side:
        def run() -> None:
            triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"] = block, warps
            options = {"temperature": 1.0, "clip": None, "one_sided": False, "wants_gradient": True}
            triton_rows.divergence_rows(logits, gaps, values, None, None, divergence=divergence, **options)

        return run

    before = triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"]
    for divergence in (ForwardKL(), JensenShannon()):
        sizes = (before, (2048, 4), (4096, 16), (8192, 8), (8192, 16))
        sides = {f"blocks of {block}, {warps} warps": passes(divergence, block, warps) for block, warps in sizes}
        bench.measure(f"rows, {type(divergence).__name__}", sides, 512)
    triton_rows.BLOCK, triton_rows.OPTIONS["num_warps"] = before


def random_policy(bench: Bench, folder: Path, lora: Lora | None, checkpointing: bool) -> Policy:
    if isinstance(bench, FakeBench):
        return bench.gpu.policy(bench.config, lora, checkpointing)
    return Policy(str(folder), lora=lora, gradient_checkpointing=checkpointing).load().to(bench.device)


def learn(policy: Policy, prefix: list[int], suffixes: list[list[int]]) -> None:
    """Makes the pass of a student, and a gradient."""
    policy.hidden([prefix], suffixes, [0] * len(suffixes)).float().square().mean().backward()


def passes(bench: Bench, folder: Path) -> None:
    prefix, suffixes, tokens = [1] * 200, [[1] * n for n in RAGGED], 200 + sum(RAGGED)
    shapes = Shapes.of(bench.config)
    for lora, checkpointing in ((LORA, False), (LORA, True), (None, False)):
        policy = random_policy(bench, folder, lora, checkpointing)

        def teacher(policy: Policy = policy) -> None:
            with torch.no_grad():
                policy.hidden([prefix], suffixes, [0] * len(suffixes))

        what = f"{'adapter' if lora else 'all weights'}, {'with' if checkpointing else 'without'} checkpointing"
        bench.measure(
            f"passes, {what}",
            {"teacher": teacher, "student": partial(learn, policy, prefix, suffixes)},
            tokens,
            rounds=3,
        )
        counted = Training(
            shapes=shapes, rank=lora.rank if lora else 0, targets=lora.among(shapes.projections) if lora else ()
        )
        bench.note(f"passes, {what}", planned_gib=counted.student(tokens, checkpointing) / GIB)


def sharing(bench: Bench, folder: Path) -> None:
    """With gradient checkpointing, because 8 rollouts of 4,096 tokens after 8,192 are more than 80 GB hold without."""
    policy = random_policy(bench, folder, LORA, checkpointing=True)
    for prompt, rollout in ((16_384, 128), (16_384, 1024), (8192, 4096)):
        prefix, suffixes = [1] * prompt, [[1] * rollout] * 8

        def each(prefix: list[int] = prefix, suffixes: list[list[int]] = suffixes) -> None:
            for suffix in suffixes:
                learn(policy, prefix, [suffix])

        once = partial(learn, policy, prefix, suffixes)
        sides: dict[str, Side] = {"once": once, "with every rollout": each}
        bench.measure(f"sharing, {prompt} tokens and 8 x {rollout}", sides, prompt + 8 * rollout, rounds=2)


def step(bench: Bench, folder: Path) -> None:
    """One update, in micro-batches of up to 32,768 tokens, unless another number is named."""
    policy = random_policy(bench, folder, LORA, checkpointing=False)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6, fused=not bench.fake)
    ways: dict[str, tuple[Method, int, int]] = {
        "OPSD, micro-batches of 8,192": (OPSD(), 1, 8192),
        "OPSD": (OPSD(), 1, 32_768),
        "OGLS-SD, 2 peers": (OGLS_SD(steering=OutcomeSteering(3.0)), 2, 32_768),
        "OGLS-SD, 8 peers": (OGLS_SD(steering=OutcomeSteering(3.0)), 8, 32_768),
    }
    sides: dict[str, Side] = {}
    tokens = 0
    for name, (method, views, size) in ways.items():
        batch = lessons(2, 8, 200, 1024, views, 151_936)
        tokens = sum(len(lesson.token_ids) for lesson in batch)

        def run(method: Method = method, batch: list = batch, size: int = size) -> None:
            lent = {"teacher": partial(method.teacher.applied_to, policy, {})}
            gradient(method, policy, lent, batch, weight_totals(method, batch), size, observe=lambda _: None)
            optimizer.step()
            optimizer.zero_grad()

        sides[name] = run
    bench.measure("train phase, 2 groups of 8 rollouts of 1,024 tokens", sides, tokens, rounds=3)


def decoding(bench: Bench, folder: Path) -> None:
    if bench.fake:
        print("  left out: needs vLLM on a GPU")
        return
    from ogls.records import Sampling
    from ogls.rollout.vllm import VllmEngine

    policy = random_policy(bench, folder, LORA, checkpointing=False)
    for sync in ("merged", "adapter"):
        engine = VllmEngine(sync=sync, memory_gib=24)
        engine.adapter_rank = LORA.rank
        began = time.perf_counter()
        engine.start(policy.folder, 1024)
        engine.load(policy, 0)
        started = time.perf_counter() - began
        try:
            for batch in (32, 256):
                prompts, sampling = [[i + 10] * 128 for i in range(batch)], Sampling(max_tokens=512)
                began = time.perf_counter()
                drawn = engine.generate(prompts, sampling, 1, seed=0)
                tokens = sum(len(c.token_ids) for (c,) in drawn)
                rate = tokens / (time.perf_counter() - began)
                bench.note("decoding", side=sync, batch=batch, tokens_a_second=rate, start_seconds=started)
        finally:
            engine.close()


def fit(bench: Bench, folder: Path) -> None:
    if bench.fake:
        print("  left out: needs vLLM on a GPU")
        return
    for ahead in (False, True):
        with tempfile.TemporaryDirectory() as work:
            settings = {
                "data.train": "Chains",
                "data.train.size": 64,
                "data.val": "Chains",
                "data.val.size": 4,
                "data.val.split": "heldout",
                "policy.model": folder,
                "trainer.max_epochs": 1,
                "data.steps_per_epoch": 2 + ahead,
                "data.max_tokens": 2048,
                "data.engine.max_num_seqs": 32,
                "data.evaluation.sampling.max_tokens": 128,
                "data.context_length": 4096,
                "data.one_step_off": str(ahead).lower(),
                "method.objective.importance_cap": 2.0,
                "method.top_p": 1.0,
                "method.top_k": 0,
            }
            command = [sys.executable, str(ROOT / "experiments" / "run.py"), "fit", "--config", "qwen3_opsd.yaml"]
            command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            subprocess.run(command, cwd=work, check=True, timeout=400)
            rows = [json.loads(line) for file in Path(work).glob("runs/*/metrics.jsonl") for line in file.open()]
            for row in rows:
                if "train/loss" in row:
                    found = {k: v for k, v in row.items() if k.startswith(("time/", "speed/", "train/engine"))}
                    bench.note("fit", side="one_step_off" if ahead else "serial", step=row["step"], **found)


def write_model(config: dict[str, Any], folder: Path) -> None:
    """Writes Qwen3-1.7B's shape with random weights, and the small tokenizer of the lab, which it has chat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ogls.policy.pretrained import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "experiments" / "lab" / "student")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    settings = AutoConfig.for_model(**config, eos_token_id=tokenizer.eos_token_id)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)


def run_all(bench: Bench, folder: Path, wanted: Sequence[str]) -> None:
    sizes = ((2048, 4096), (4096, 4096), (2048, 16_384))
    sections: dict[str, dict[str, Callable[[], None]]] = {
        "rates": {"rates": partial(rates, bench)},
        "attention": {"attention": partial(attention, bench)},
        "loss": {f"loss, hidden {h}, {t} tokens": partial(loss, bench, h, t) for h, t in sizes},
        "rows": {"rows": partial(row_passes, bench)},
    }
    for run in (passes, sharing, step, fit, decoding):
        sections[run.__name__] = {run.__name__: partial(run, bench, folder)}
    for section in wanted:
        for name, carry_out in sections[section].items():
            bench.section(name, carry_out)
    seconds = time.perf_counter() - bench.began
    print(f"\n{seconds:.0f} s; left out or failed: {', '.join(bench.failed) or 'nothing'}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fake", action="store_true", help="predict on meta tensors")
    options.add_argument("--budget", type=float, default=600.0, help="seconds after which no section begins")
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    options.add_argument("--layers", type=int, default=28, help="layers of the model; fewer are quicker")
    options.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    args = options.parse_args()
    if args.fake:
        with FakeGpu() as gpu:
            bench = FakeBench(args.budget, args.out, args.layers, gpu)
            bench.note("start", torch=torch.__version__, **vars(gpu.rates))
            run_all(bench, Path(), args.sections)
    elif not torch.cuda.is_available():
        sys.exit("no GPU here: --fake predicts what one would need")
    else:
        bench = Bench(args.budget, args.out, args.layers)
        free, total = torch.cuda.mem_get_info()
        device = torch.cuda.get_device_name()
        bench.note("start", torch=torch.__version__, device=device, free_gib=free / GIB, total_gib=total / GIB)
        with tempfile.TemporaryDirectory() as folder:
            write_model(bench.config, Path(folder))
            run_all(bench, Path(folder), args.sections)
    sys.exit(bool(bench.failed))


if __name__ == "__main__":
    main()
