"""How long a step takes and what it needs, predicted from shapes and rates of the hardware; checked by --check.

    python analysis/benchmarks/roofline.py                                    # OGLS-SD and OPSD, Qwen3 on one H100
    python analysis/benchmarks/roofline.py --machine h100 --model 1.7b --length 2048 --group-size 8 --views 8
    python analysis/benchmarks/roofline.py --check                            # this CPU, the embedded model, measured

A phase takes as long as the slower of its arithmetic and its memory traffic, at the machine's *measured* rates:

    trunk, forward       2 P + 2 L w c FLOP per token     P weights without embeddings, L layers, w = heads x head size,
                                                          c mean tokens attended to (causal: half of the length)
                         on a CPU, where it takes as long, also the elementwise work of L layers, three times that
                         with the gradient
    student              forward, gradient of the states (as much again), and once more with gradient checkpointing;
                         a frozen base has no weight gradients; on a CPU also the adapter's two thin products beside
                         each of the base's and their gradients
    head and loss        three products of 2 V d FLOP a distilled token, one more pass of V values over the cache
    decoding             max(2 P B / flops, (2 P + 2 L k c B) bytes / bandwidth) a step, B sequences at once, k = 2 x kv
                         heads x head size numbers a token and layer, two bytes each; LM head in P
    teacher              each distinct view once, then each rollout that reads it, shared; one by one, unshared

Left out: launches, the optimiser, grading, Python, and how evenly work fills the machine. A step can be a
few percent faster than this only if the rates are wrong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from fake_gpu import qwen3
from harness import announce, log, parser

from ogls.system.memory.shapes import Shapes

GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """A machine has rates as they are reached.

    Args:
        flops: FLOP/s of bf16 products
        bandwidth: bytes/s of memory
        row_value: seconds of the loss's elementwise work on one value
        layer_token: seconds of a layer's elementwise work on one token
        adapter_token: seconds of a layer's adapter on one token, gradients included
    """

    flops: float
    bandwidth: float
    row_value: float = 0.0
    layer_token: float = 0.0
    adapter_token: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step has rollouts of one length; `views` is K beside the plain one, each read by a whole group."""

    prompts: int = 8
    group_size: int = 8
    prompt: int = 200
    length: int = 2048
    views: int = 8
    distilled: float = 1.0  # share of the rollouts' tokens that have a loss
    checkpointing: bool = False


SMOLLM2 = Shapes(
    layers=30, hidden=576, mlp=1536, heads=9, kv_heads=3, head_size=64, vocab=49_152, tied=True, norms_heads=False
)
MODELS = {"smollm2": SMOLLM2} | {name.lower(): Shapes.of(qwen3(name)) for name in ("1.7B", "4B", "8B")}
MACHINES = {"h100": Machine(flops=5.5e14, bandwidth=2.7e12), "h200": Machine(flops=5.5e14, bandwidth=3.9e12)}


def forward(model: Shapes, context: float) -> float:
    """Returns the FLOP of one token that attends to `context` tokens."""
    return 2 * model.products + 4 * model.layers * model.queries * context


def activation_bytes(model: Shapes) -> int:
    """Returns the bytes that one token keeps for the backward pass, two per number: per layer the inputs of norms,
    projections, products and the MLP's three wide rows, without attention's probabilities (a GPU recomputes them).
    """
    return 2 * model.layers * (6 * model.hidden + 3 * model.queries + 2 * model.keys + 4 * model.mlp)


def trunk(model: Shapes, machine: Machine, tokens: float, context: float, passes: float = 1.0) -> float:
    """Returns seconds; `passes` is 1 forward, 2 with the gradient, 3 with checkpointing, too."""
    elementwise = passes + (passes > 1.0)  # a derivative touches two values where the function touches one
    beside = elementwise * machine.layer_token + (passes > 1.0) * machine.adapter_token
    return tokens * (passes * forward(model, context) / machine.flops + model.layers * beside)


def loss(model: Shapes, machine: Machine, tokens: float) -> float:
    return tokens * (6 * model.head / machine.flops + model.vocab * machine.row_value)


def decode(model: Shapes, machine: Machine, sequences: int, prompt: int, length: int) -> float:
    weights = model.products + model.head
    compute = sequences * 2 * weights / machine.flops
    traffic = (2 * weights + sequences * model.kv_bytes * (prompt + length / 2)) / machine.bandwidth
    return length * max(compute, traffic)


def predict(model: Shapes, machine: Machine, step: Step) -> dict[str, float]:
    """Returns seconds of the phases and GiB of memory."""
    rollouts = step.prompts * step.group_size
    tokens = rollouts * step.length * step.distilled
    attempt = step.prompt + step.length  # a view: the problem and another rollout
    plain = step.prompts * step.prompt + tokens
    shared = step.prompts * step.views * attempt + step.views * tokens
    unshared = rollouts * step.views * (attempt + step.length * step.distilled)
    found = {
        "generate": decode(model, machine, rollouts, step.prompt, step.length),
        "student": trunk(model, machine, plain, step.length / 2, 3.0 if step.checkpointing else 2.0),
        "teacher, plain view": trunk(model, machine, plain, step.length / 2),
        "teacher, K views": trunk(model, machine, shared, attempt),
        "teacher, K views unshared": trunk(model, machine, unshared, attempt),
        "head and loss": loss(model, machine, tokens),
    }
    once = ("generate", "student", "head and loss")
    found["OPSD step"] = sum(found[name] for name in once) + trunk(
        model, machine, step.prompts * attempt + tokens, attempt
    )
    found["OGLS step"] = sum(found[name] for name in (*once, "teacher, plain view", "teacher, K views"))
    found["OGLS / OPSD, train phase"] = (found["OGLS step"] - found["generate"]) / (
        found["OPSD step"] - found["generate"]
    )
    micro = min(plain, 4 * attempt)
    found["GiB weights"] = 2 * (model.products + model.head) / GIB
    found["GiB activations, four rollouts"] = micro * activation_bytes(model) / GIB
    found["GiB keys and values, all rollouts"] = rollouts * attempt * model.kv_bytes / GIB
    return found


# ---- the check: rates of this machine, then a student pass, a teacher pass and a loss ----


def best(function, repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def this_machine(model: Shapes, tokens: int) -> Machine:
    """Returns the rates of this machine, measured on the model's shapes.

    They are those of its largest product, of a copy, of the loss's row passes, of what a layer does beside its products
    (two norms, the gate, two sums, the rotation), and of its adapter of rank 16 in fp32.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    from ogls.loss.tiles import for_each_tile

    wide, x = (
        torch.randn(model.layers, model.mlp, model.hidden).bfloat16(),
        torch.randn(tokens, model.hidden).bfloat16(),
    )
    seconds = best(lambda: [torch.nn.functional.linear(x, weight) for weight in wide])  # each from memory
    norm, gate = LlamaRMSNorm(model.hidden).bfloat16(), torch.randn(tokens, model.mlp).bfloat16()
    heads = torch.randn(1, model.heads + model.kv_heads, tokens, model.head_size).bfloat16()
    angles = torch.randn(1, tokens, model.head_size).bfloat16()

    @torch.no_grad()
    def layer() -> None:
        norm(x) + norm(x) + x
        torch.nn.functional.silu(gate) * gate
        apply_rotary_pos_emb(heads[:, : model.heads], heads[:, model.heads :], angles, angles)

    layer_token = best(layer) / tokens
    thin = [
        (torch.randn(tokens, i).bfloat16().requires_grad_(), torch.randn(16, i), torch.randn(o, 16))
        for i, o in model.projections.values()
    ]

    def adapter() -> None:
        for states, down, up in thin:
            down, up = down.requires_grad_(), up.requires_grad_()
            made = states.float() @ down.T @ up.T
            made.bfloat16().backward(made.bfloat16())

    adapter_token = best(adapter) / tokens
    large = torch.empty(1 << 27, dtype=torch.uint8)
    bandwidth = 2 * large.numel() / best(lambda: large.clone())
    logits = torch.randn(64, model.vocab).bfloat16()
    gaps = 0.1 * torch.randn(64, model.vocab).bfloat16()
    from functools import partial

    from ogls.loss.chunked import divergence_rows
    from ogls.loss.divergence import ForwardKL

    rows = partial(
        divergence_rows,
        divergence=ForwardKL(),
        temperature=1.0,
        clip=None,
        one_sided=False,
        wants_gradient=True,
    )
    row = best(lambda: for_each_tile(rows, logits, gaps, torch.empty(64), None, None)) / logits.numel()
    return Machine(2 * tokens * wide.numel() / seconds, bandwidth, row, layer_token, adapter_token)


def check(args: argparse.Namespace) -> dict[str, float]:
    """Prints predicted and measured seconds of the trainer's phases on the embedded model, and returns the ratios."""
    from ogls.loss.chunked import chunked_divergence
    from ogls.loss.divergence import ForwardKL
    from ogls.policy.lora import Lora
    from ogls.policy.policy import Policy
    from ogls.policy.pretrained import EMBEDDED

    model = MODELS["smollm2"]
    policy = Policy(EMBEDDED, lora=Lora()).load()
    weight, _ = policy.head
    figures: dict[str, float] = {}
    print(f"\n{'tokens':>8}{'phase':>12}{'predicted s':>13}{'measured s':>12}{'measured / predicted':>23}")
    for rollouts, length in ((4, 64), (8, 64), (8, 128)):
        tokens = rollouts * length
        machine = this_machine(model, tokens)
        prefix, suffixes = [list(range(10, 42))], [list(range(50, 50 + length)) for _ in range(rollouts)]
        states = policy.hidden(prefix, suffixes, [0] * rollouts).detach().requires_grad_()

        def teacher(prefix=prefix, suffixes=suffixes):
            with torch.no_grad(), policy.without_adapter():
                policy.hidden(prefix, suffixes, [0] * len(suffixes))

        def student(prefix=prefix, suffixes=suffixes):
            policy.hidden(prefix, suffixes, [0] * len(suffixes)).float().square().mean().backward()

        def kernel(states=states):
            values, _ = chunked_divergence(states, states.detach() + 0.1, weight, None, ForwardKL())
            values.mean().backward()

        predicted = {
            "teacher": trunk(model, machine, tokens + 32, length / 2),
            "student": trunk(model, machine, tokens + 32, length / 2, 2.0),
            "loss": loss(model, machine, tokens),
        }
        for name, function in (("teacher", teacher), ("student", student), ("loss", kernel)):
            measured = best(function, 3)
            ratio = measured / predicted[name]
            print(f"{tokens:8}{name:>12}{predicted[name]:13.3f}{measured:12.3f}{ratio:23.2f}", flush=True)
            figures[f"{tokens}/{name}/measured over predicted"] = ratio
    return figures


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--check", action="store_true")
    options.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    options.add_argument("--model", choices=sorted(MODELS), nargs="*", default=["1.7b", "4b", "8b"])
    for name, value in vars(Step()).items():
        kind = type(value)
        extra = {"action": "store_true"} if kind is bool else {"type": kind, "default": value}
        options.add_argument(f"--{name.replace('_', '-')}", **extra)
    args = options.parse_args()
    announce(args)
    if args.check:
        log("roofline", check(args), args)
        return
    step = Step(**{name: getattr(args, name) for name in vars(Step())})
    columns = {name: predict(MODELS[name], MACHINES[args.machine], step) for name in args.model}
    print(f"\n{'':36}" + "".join(f"{name:>10}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:36}" + "".join(f"{column[row]:10.2f}" for column in columns.values()))
    log("roofline", {f"{m}/{row}": value for m, column in columns.items() for row, value in column.items()}, args)


if __name__ == "__main__":
    main()
