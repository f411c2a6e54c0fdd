"""The cost model against real steps on this CPU: rates and phases are measured in turn, in several rounds.

    python analysis/benchmarks/roofline.py --check              # exit code 1 where a phase is off by more than 1.3

The steps are those of `math.yaml` with fewer problems: OGLS-SD on the embedded model, sampled by vLLM. Seconds are the
process's own processor time with one thread, so that what else runs disturbs little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import log
from roofline import Machine, Setup, configured
from torch import Tensor
from torch.nn.functional import linear, silu
from work import Draw, learning

from ogls.algorithm import gradient, weight_totals
from ogls.cli import OglsCLI
from ogls.loss.chunked import passes
from ogls.loss.divergence import ForwardKL
from ogls.policy.attention import _attend
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.sampler import Sampler
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

FACTOR = 1.3
PHASES = ("generate", "sync", "teacher", "student")
_PROBLEMS = 8
Seconds = dict[str, float]  # by phase


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Returns the processor time of a call, the median of several after one that warms up."""
    function()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def with_gradient(function: Callable[[], tuple[Tensor, ...]]) -> None:
    outputs = function()
    torch.autograd.backward(outputs, [output.detach() for output in outputs])


class Bench:
    """A bench measures the rates of this machine at a model's shapes, with the weights of all layers from memory."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, rank: int) -> None:
        self.shapes, self.dtype, self.rank = shapes, dtype, rank
        sizes = [*shapes.projections.values()] * shapes.layers
        self.weights = [torch.randn(outputs, inputs, dtype=dtype) for inputs, outputs in sizes]
        self.head = torch.randn(shapes.vocab, shapes.hidden, dtype=dtype)
        large = torch.empty(1 << 27, dtype=torch.uint8)
        copied = torch.empty_like(large)
        self.bandwidth = 2 * large.numel() / seconds(lambda: copied.copy_(large))

    def rates(self, rows: int, length: int) -> Machine:
        """Returns the rates of passes over `rows` tokens in sequences of `length` tokens."""
        from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

        s, normal = self.shapes, partial(torch.randn, dtype=self.dtype)
        inputs = {width: normal(rows, width) for width in {w.shape[1] for w in self.weights}}
        products = seconds(lambda: [linear(inputs[w.shape[1]], w) for w in self.weights])
        x, gate, norm = normal(rows, s.hidden), normal(rows, s.mlp), LlamaRMSNorm(s.hidden).to(self.dtype)
        heads, angles = normal(1, s.heads + s.kv_heads, rows, s.head_size), normal(1, rows, s.head_size)
        sequences = max(1, rows // length)
        q, k, v = (normal(sequences, length, count, s.head_size) for count in (s.heads, s.kv_heads, s.kv_heads))

        def layer() -> tuple[Tensor, ...]:
            turned = apply_rotary_pos_emb(heads[:, : s.heads], heads[:, s.heads :], angles, angles)
            return norm(x) + norm(x) + x, silu(gate) * gate, *turned

        def attention() -> tuple[Tensor, ...]:
            return (_attend(q, k, v, None, None),)

        thin = [
            (normal(rows, i).requires_grad_(), torch.randn(self.rank, i), torch.randn(o, self.rank))
            for i, o in s.projections.values()
        ]

        def adapter() -> None:
            for states, down, up in thin:
                made = states.float() @ down.requires_grad_().T @ up.requires_grad_().T
                made.to(self.dtype).backward(made.to(self.dtype))

        with torch.no_grad():
            layered, attending = seconds(layer), seconds(attention)
        for tensor in (x, gate, heads, q, k, v):
            tensor.requires_grad_()
        pairs = sequences * length * (length + 1) / 2
        logits, gaps = normal(64, s.vocab), 0.1 * normal(64, s.vocab)
        options = {"temperature": 1.0, "clip": None, "one_sided": False, "wants_gradient": True}
        loss_rows = passes(ForwardKL(), None, logits.device, self.dtype, **options)
        row = seconds(lambda: loss_rows(logits, gaps, torch.empty(64), None, None)) / logits.numel()
        return Machine(
            flops=2 * rows * s.products / products,
            attention=4 * s.queries * pairs / attending,
            bandwidth=self.bandwidth,
            row_value=row,
            layer_token=layered / rows,
            adapter_token=seconds(adapter) / rows,
            attention_passes=seconds(partial(with_gradient, attention)) / attending,
            layer_passes=seconds(partial(with_gradient, layer)) / layered,
        )

    def starts(self, policy: Policy) -> tuple[float, float]:
        """Returns the seconds of a pass over two tokens beside its products, without and with a gradient."""
        rows = {w.shape[1]: torch.randn(2, w.shape[1], dtype=self.dtype) for w in self.weights}
        products = seconds(lambda: [linear(rows[w.shape[1]], w) for w in self.weights])

        def reading() -> Tensor:
            return policy.hidden([[10]], [[10]], [0])

        alone = seconds(torch.no_grad()(reading))
        learning = seconds(lambda: reading().sum().backward())
        policy.zero_grad()
        return max(0.0, alone - products), max(0.0, learning - 2 * products)

    def drawing(self, sequences: int) -> tuple[float, float]:
        """Returns the FLOP/s of a step of so many sequences, its head included, and seconds to draw one token."""
        states, logits = (
            torch.randn(sequences, self.shapes.hidden, dtype=self.dtype),
            torch.randn(sequences, self.shapes.vocab),
        )

        def draw() -> None:
            logprobs = (logits / 1.0).log_softmax(-1)
            chosen = (logprobs.exp() / torch.empty_like(logits).exponential_()).argmax(-1)
            (logprobs >= logprobs.gather(1, chosen[:, None])).sum(-1)

        inputs = {w.shape[1]: torch.randn(sequences, w.shape[1], dtype=self.dtype) for w in self.weights}

        def products() -> None:
            for w in self.weights:
                linear(inputs[w.shape[1]], w)
            linear(states, self.head)

        weights = self.shapes.products + self.shapes.head
        return 2 * sequences * weights / seconds(products), seconds(draw) / sequences


def check(args: argparse.Namespace) -> int:
    """Prints measured and predicted seconds of the phases, and returns 1 where a median is off by more than 1.3."""
    torch.set_num_threads(1)
    size = ["--data.problems_per_step", str(_PROBLEMS), "--policy.dtype", args.dtype, "--data.engine.dtype", args.dtype]
    cli = configured("math.yaml", *size, "--data.engine.memory_gib", "0.5", "--trainer.accelerator", "cpu")
    module, data, policy = cli.model, cli.datamodule, cli.model.policy
    policy.load()
    data.setup("fit")
    module._kept = {"teacher": module.teacher.start(policy)}
    shapes = Shapes.of(policy.model.config.to_dict())
    training = Training(
        shapes=shapes, rank=policy.adapter_rank, targets=policy.lora.among(shapes.projections), dtype=args.dtype
    )
    bench = Bench(shapes, {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype], policy.adapter_rank)
    ratios: dict[str, list[float]] = {phase: [] for phase in PHASES}
    print(f"{'round':8}{'phase':12}{'predicted s':>13}{'measured s':>12}{'measured / predicted':>23}")
    try:
        sampler = data.sampler()
        for number in range(-1, args.rounds):
            measured, predicted = _round(cli, sampler, training, bench, step=number + 1)
            for phase in PHASES:
                if number < 0:
                    continue  # warms up
                ratio = measured[phase] / predicted[phase]
                ratios[phase].append(ratio)
                print(f"{number:<8}{phase:12}{predicted[phase]:13.3f}{measured[phase]:12.3f}{ratio:23.2f}", flush=True)
    finally:
        data.close()
    medians = {phase: statistics.median(found) for phase, found in ratios.items()}
    off = [f"{phase} {ratio:.2f}" for phase, ratio in medians.items() if not 1 / FACTOR <= ratio <= FACTOR]
    print("median  " + ", ".join(f"{phase} {ratio:.2f}" for phase, ratio in medians.items()))
    print(f"beyond a factor of {FACTOR}: {', '.join(off)}" if off else f"all within a factor of {FACTOR}")
    log("roofline", {f"{phase}/measured over predicted": ratio for phase, ratio in medians.items()}, args)
    return int(bool(off))


class Clock:
    """A clock adds up the processor time of functions that it is put around, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def around(self, phase: str, owner: Any, name: str, when: Callable[[], bool] = lambda: True) -> Iterator[list[Any]]:
        """Times the method `name` of `owner` inside this context, and yields the list of its results."""
        original, results = getattr(owner, name), []

        def timed(*inputs: Any, **options: Any) -> Any:
            start, counts = time.process_time(), when()
            results.append(original(*inputs, **options))
            self.seconds[phase] += (time.process_time() - start) * counts
            return results[-1]

        owner.__dict__[name] = timed
        try:
            yield results
        finally:
            del owner.__dict__[name]


def _round(cli: OglsCLI, sampler: Sampler, training: Training, bench: Bench, step: int) -> tuple[Seconds, Seconds]:
    """Returns measured and predicted seconds of the phases of one step; rates are measured anew."""
    module, data, policy = cli.model, cli.datamodule, cli.model.policy
    method, engine, n = module.method, data.engine, data.sizes.group_size
    clock = Clock()
    policy.version = step
    with clock.around("sync", sampler, "hold"):
        sampler.hold()
    start = time.process_time()
    ((one,),) = engine.generate([[10] * 32], Sampling(max_tokens=16), 1, seed=step)
    alone = (time.process_time() - start) / len(one.token_ids)
    with clock.around("generate", engine, "generate") as drawn:
        batch = data.make_batch(step)
    lessons, budget = batch.lessons, module.tokens_per_micro_batch
    prompts = [len(group.prompt_ids) for group in batch.groups]
    lengths = [len(c.token_ids) for group in drawn[-1] for c in group]
    draw = Draw([length for length in prompts for _ in range(n)], lengths, len(prompts))
    work = learning(method, lessons, budget)
    totals = weight_totals(method, lessons)
    with clock.around("teacher", policy, "hidden", when=lambda: not torch.is_grad_enabled()):
        start = time.process_time()
        gradient(method, policy, module.policy_with, lessons, totals, budget, lambda _: None)
        clock.seconds["student"] = time.process_time() - start - clock.seconds["teacher"]
    module.zero_grad()

    starts = bench.starts(policy)
    taught, trained = (  # products of few rows are slower
        Setup(
            machine=replace(
                bench.rates(sum(made.tokens for made in some) // len(some), data.sizes.max_tokens),
                pass_start=starts[0],
                gradient_start=starts[1],
            ),
            training=training,
        )
        for some in (work.teacher, work.student)
    )
    flops, one_draw = bench.drawing(len(lengths))
    flops_alone, alone_draw = bench.drawing(1)
    weights = bench.shapes.products + bench.shapes.head
    own = max(0.0, alone - 2 * weights / flops_alone - alone_draw)
    layers = bench.shapes.layers * (bench.rates(len(lengths), 1).layer_token or 0.0)
    served = replace(
        trained,
        decoder=replace(trained.machine, flops=flops, engine_step=own, drawn=one_draw + layers),
        whole=True,
        canary=(min(8, len(prompts)), sum(prompts) // len(prompts), 16),
    )
    return clock.seconds, {
        "generate": served.decode(draw),
        "sync": served.load,
        "teacher": taught.step(work)["teacher"],
        "student": trained.step(work)["student"],
    }
