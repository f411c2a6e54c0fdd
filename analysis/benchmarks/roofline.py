"""How long a run takes by phase, predicted from its configuration and the rates of a machine; checked by --check.

    python analysis/benchmarks/roofline.py                      # every method and recipe, Qwen3-1.7B, 4B, 8B, one H100
    python analysis/benchmarks/roofline.py --methods OPSD GRPO --models 1.7B --fill 0.25
    python analysis/benchmarks/roofline.py --check                # real steps on this CPU; fails beyond a factor of 1.3

What a step does is read from the method and its configuration (`work.py`). A phase takes as long as the slower of its
arithmetic and its memory traffic, at the rates of the machine:

    trunk, forward       2 P FLOP per token of P weights without embeddings, 4 L w per pair of tokens that attend (L
                         layers, w = heads x head size), and the elementwise work of L layers
    student              the forward pass and the gradient of the states, as much again (2.5 times as much for
                         attention); once more the forward pass with gradient checkpointing, and the gradients of the
                         weights where all are trained; three times the elementwise work (on a CPU as measured); an
                         adapter's two thin products
    head and loss        two or three products of 2 V d FLOP a learned token, passes of V values over the cache
    decoding             a step of B sequences: max(2 P B / flops, (2 P + 2 L k c B) bytes / bandwidth), k = 2 x kv
                         heads x head size numbers a token and layer, c tokens so far; LM head in P, and an engine's own
                         work
    sync                 weights are read, merged and written; the adapter where the engine takes it alone; the canary

A teacher that is another model is Qwen3-8B here. A GPU's rates (`MACHINES`) were measured on an H200. Grading is left
out, and so is how evenly work fills the machine, and Python on a GPU. Rollouts are all as long as `--fill` of their
limit, by which validation grows faster than linearly.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from fake_gpu import QWEN3, Rates, qwen3
from harness import announce, log, parser
from work import Draw, Pass, Work, step_of

from ogls import methods
from ogls.cli import OglsCLI, build, find_configs
from ogls.planner import planned
from ogls.policy.lora import Lora
from ogls.rollout.accuracy import Evaluation
from ogls.system.memory.plan import GIB
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

TEACHER = "8B"  # size of a teacher that is another model, whatever the method names
RECIPES = [("ogls_sd", "1.7B", "h100"), ("opsd", "1.7B", "h100"), ("ogls_sd", "4B", "h100"), ("opsd", "4B", "h100")]
RECIPES += [(name, "4B", "h200") for name in ("rosd", "sdpo", "grpo")]
"""Name of each recipe, the size of the model that it is published for, and a GPU on which it fits."""
HELD_OUT = {"HuggingFaceH4/aime_2024": 30, "data/sciknoweval/chemistry_test.jsonl": 210}  # problems; not read here
_PRODUCTS = {True: 2.0, False: 3.0}  # passes of the weights, forward and backward, with and without an adapter


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine has rates as they are reached.

    Args:
        flops: FLOP/s of products
        attention: FLOP/s of attention
        bandwidth: bytes/s of memory
        row_value: seconds of the loss's elementwise work on one value
        layer_token: seconds of a layer's elementwise work on one token; None is its traffic
        adapter_token: seconds of a layer's adapter on one token, gradients included
        engine_step: seconds of an engine's own work per token of a batch, whatever its size
        adapter_step: seconds that an adapter beside the engine's weights adds to it
        handed: seconds in which a byte of an adapter is written, read by the engine, and laid out
        drawn: seconds to draw one token of one sequence
        attention_passes: what attention and its gradient take, in forward passes; flash makes its scores anew
        layer_passes: what a layer's elementwise work and its gradient take, in forward passes
        pass_start: seconds of a forward pass whatever its tokens, Python and the start of every operation
        gradient_start: the same of a pass with its gradient
    """

    flops: float
    attention: float
    bandwidth: float
    row_value: float = 0.0
    layer_token: float | None = None
    adapter_token: float = 0.0
    engine_step: float = 0.0
    adapter_step: float = 0.0
    handed: float = 0.0
    drawn: float = 0.0
    attention_passes: float = 3.5
    layer_passes: float = 3.0
    pass_start: float = 0.0
    gradient_start: float = 0.0


_RATES = Rates()
H100 = Machine(
    flops=_RATES.flops,
    attention=_RATES.attention,
    bandwidth=_RATES.bandwidth,
    row_value=10 / _RATES.bandwidth,  # two logits are read twice, and one written
    engine_step=2.1e-3,  # vLLM 0.26 on an H200 that had other work, 32 and 256 sequences, beyond their traffic
    adapter_step=9e-4,  # Qwen3-1.7B, rank 64: 2.6e-4 of 32 and 2.1e-3 of 256 sequences in one run with merged weights
    handed=5e-9,  # and 0.7 to 0.9 s to take over an adapter of 139 MB, canary included
    drawn=1.1e-5,
)
MEMORY = {"h100": int(79.1 * GIB), "h200": int(139.8 * GIB)}
MACHINES = {"h100": H100, "h200": Machine(**{**vars(H100), "bandwidth": 4.2e12, "row_value": 10 / 4.2e12})}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A set-up is who computes what on which machine.

    Args:
        machine: rates of passes over many tokens
        decoder: rates of an engine's step, which has few; None are the same
        training: shapes, adapter and dtype of the student
        checkpointing: whether activations are computed anew
        cache: bytes of the engine's keys and values
        max_num_seqs: largest number of sequences that the engine samples side by side
        cached_bytes: bytes per number of keys and values
        whole: whether the engine takes all weights at each load
        canary: prompts that the engine continues after each load, their length, and tokens drawn after each
        other: shapes of a teacher that is another model; None for the student's own
    """

    machine: Machine
    training: Training
    decoder: Machine | None = None
    checkpointing: bool = False
    cache: float = float("inf")
    max_num_seqs: int = 256
    cached_bytes: int = 2
    whole: bool = False
    canary: tuple[int, int, int] = (8, 200, 16)
    other: Shapes | None = None

    @property
    def shapes(self) -> Shapes:
        return self.training.shapes

    @property
    def width(self) -> int:
        """Returns the bytes of a number."""
        return 2 if self.training.dtype == "bfloat16" else 4

    # ---- the trainer ----

    def forward(self, made: Pass) -> float:
        return self._products(made, 1.0, 1.0) + made.tokens * self._beside + self.machine.pass_start

    def teacher(self, made: Pass) -> float:
        if self.other is None:
            return self.forward(made)
        own = Training(shapes=self.other, rank=1, targets=(), dtype=self.training.dtype)
        return replace(self, training=own, other=None).forward(made)

    def gradient(self, made: Pass) -> float:
        """Returns the seconds of a pass, forward and backward."""
        anew, m = float(self.checkpointing), self.machine
        products = _PRODUCTS[bool(self.training.rank)] + anew
        adapter = made.tokens * self.shapes.layers * m.adapter_token * bool(self.training.rank)
        multiplied = self._products(made, products, m.attention_passes + anew)
        return multiplied + made.tokens * (m.layer_passes + anew) * self._beside + adapter + m.gradient_start

    def _products(self, made: Pass, products: float, attention: float) -> float:
        s, m = self.shapes, self.machine
        pairs = 4 * s.layers * s.queries * made.pairs
        return products * 2 * s.products * made.tokens / m.flops + attention * pairs / m.attention

    @property
    def _beside(self) -> float:
        """Returns the seconds of all layers' elementwise work on a token: what is kept is written, and read twice."""
        if self.machine.layer_token is not None:
            return self.shapes.layers * self.machine.layer_token
        kept = (self.training.student(2048, False) - self.training.student(1024, False)) / 1024
        return 3 * kept / self.machine.bandwidth

    def loss(self, tokens: int, products: int) -> float:
        s, m = self.shapes, self.machine
        return tokens * (2 * products * s.head / m.flops + s.vocab * m.row_value)

    @property
    def optimiser(self) -> float:
        """Returns the seconds of an update: weight, gradient and two means are read, three of them written, in fp32."""
        return 7 * 4 * self.training.trainable / self.machine.bandwidth

    # ---- the engine ----

    def decode(self, draw: Draw) -> float:
        """Returns the seconds of one call of the engine, whose sequences end one after the other."""
        s, m = self.shapes, self.decoder or self.machine
        weights = s.products + s.head
        if not draw.lengths:
            return 0.0
        longest, total = max(draw.lengths), len(draw.lengths)
        read = sum(draw.prompts) / total
        mean = sum(draw.lengths) / total
        kv = s.kv_bytes * self.cached_bytes / 2
        at_once = min(total, self.max_num_seqs, max(1.0, self.cache / (kv * (read + mean))))
        seconds, width = 0.0, max(1, longest // 64)
        own = m.engine_step + (0.0 if self.whole else m.adapter_step)
        for start in range(0, longest, width):
            ending = [min(n - start, width) for n in draw.lengths if n > start]
            alive = sum(ending) / max(ending)  # on average
            turns = alive / min(alive, at_once)  # those that find no room wait
            batch = alive / turns
            compute = 2 * weights * batch / m.flops
            traffic = (self.width * weights + batch * kv * (read + start + width / 2)) / m.bandwidth
            seconds += turns * max(ending) * (max(compute, traffic) + own + batch * m.drawn)
        tokens = round(read * draw.num_prompts)
        return seconds + self.forward(Pass(tokens, round(tokens * read / 2)))

    @property
    def load(self) -> float:
        """Returns the seconds in which the engine takes weights, and is checked."""
        s, (prompts, read, drawn) = self.shapes, self.canary
        merging = 2 * self.training.rank * s.products / self.machine.flops if self.whole else 0.0
        # Adapter times adapter is written, read with the weights, and their sum written; the engine takes it, and lays
        # it out anew.
        whole = (8 if self.training.rank else 4) * self.width * s.weights / self.machine.bandwidth
        moved = whole if self.whole else self.width * self.training.trainable * self.machine.handed
        sung, length = Draw([read] * prompts, [drawn] * prompts, prompts), read + drawn
        heard = self.forward(Pass(prompts * length, prompts * length**2 // 2)) + self.loss(prompts * drawn, 1)
        return merging + moved + self.decode(sung) + heard

    def step(self, work: Work) -> dict[str, float]:
        """Returns the seconds of an optimiser step by phase."""
        return {
            "generate": sum(share * self.decode(draw) for share, draw in work.draws),
            "sync": work.loads * self.load,
            "teacher": sum(map(self.teacher, work.teacher)),
            "student": sum(map(self.gradient, work.student)) + sum(self.loss(*learned) for learned in work.losses),
            "optimizer": self.optimiser,
        }


# ---- a configuration ----


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run is what a configuration makes: its step, how often it comes, and its validations."""

    name: str
    setup: Setup
    work: Work
    steps: int
    validations: tuple[Draw, ...]
    note: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds of a step by phase, and of the whole run's validations."""
        return self.setup.step(self.work)

    @property
    def validation(self) -> float:
        return sum(self.setup.decode(draw) for draw in self.validations)

    @property
    def share(self) -> float:
        """Returns the validations' share of the run's time."""
        return self.validation / (self.validation + self.steps * sum(self.seconds.values()))


def validations(cli: OglsCLI, problems: int, prompt: int, fill: float) -> tuple[Draw, ...]:
    """Returns the draws of all validations of a run, those before and after training included."""
    evaluation: Evaluation = cli.datamodule.evaluation
    trainer: Any = cli.trainer
    amid = sum((epoch + 1) % trainer.check_val_every_n_epoch == 0 for epoch in range(trainer.max_epochs - 1))
    subset = evaluation.while_training
    held_out = range(problems)
    fewer = len(held_out if subset is None else subset.of(held_out))
    length = max(1, round(fill * evaluation.sampling.max_tokens))

    def of(count: int, samples: int) -> Draw:
        return Draw([prompt] * count * samples, [length] * count * samples, count)

    whole, part = of(problems, evaluation.samples), of(fewer, evaluation.subset_samples)
    return (*[whole] * 2, *[part] * amid) * (1 + evaluation.with_solution)


def configured(config: str, *arguments: str) -> OglsCLI:
    """Returns what a configuration makes, with problems that need no download and no weights."""
    few = [f"--data.{split}={value}" for split in ("train", "val") for value in ("Chains",)]
    few += [f"--data.{split}.size=8" for split in ("train", "val")]
    before, sys.argv = sys.argv, ["run.py"]
    try:
        return build(["--config", config, *arguments, *few, "--data.test=null", "--trainer.logger=false"], run=False)
    finally:
        sys.argv = before


def held_out(config: str) -> int:
    """Returns how many problems a configuration validates on."""
    (file,) = find_configs(["--config", config])[1::2]
    source = yaml.safe_load(Path(file).read_text())["data"]["val"]["init_args"]
    named = source.get("dataset") or source.get("path")
    return HELD_OUT[named] if named in HELD_OUT else source["size"]


def predicted(
    config: str, arguments: Sequence[str], size: str, machine: str, prompt: int, fill: float, name: str = ""
) -> Run:
    """Returns the run of a configuration with a Qwen3 of this size on one GPU.

    Raises:
        ValueError: the method cannot learn from stand-ins.
    """
    cli = configured(config, *arguments)
    module, data = cli.model, cli.datamodule
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(qwen3(size)))
            module.policy.__dict__["folder"] = Path(folder)
            if module.other is not None:
                teacher = Path(folder) / "teacher"
                teacher.mkdir()
                (teacher / "config.json").write_text(json.dumps(qwen3(TEACHER)))
                module.other.__dict__["folder"] = teacher
            data.longest_prompt = prompt
            note = ""
            try:
                plan = planned(module, data, MEMORY[machine])
            except ValueError:  # the table says so, and what it would be with room
                note, plan = "does not fit", planned(module, data, 4 * MEMORY[machine])
        policy, engine = module.policy, data.engine
        shapes = Shapes.of(qwen3(size))
        lora: Lora | None = policy.lora
        training = Training(
            shapes=shapes,
            rank=policy.adapter_rank,
            targets=lora.among(shapes.projections) if lora else (),
            dtype=policy.dtype,
        )
        serving = engine.serving(shapes) if engine is not None else None
        setup = Setup(
            machine=MACHINES[machine],
            training=training,
            checkpointing=plan.checkpointing,
            cache=min(plan.cache, MEMORY[machine]),
            max_num_seqs=serving.max_num_seqs if serving else 256,
            cached_bytes=(serving.cached_bytes or serving.dtype_bytes) if serving else 2,
            whole=lora is None,
            other=None if module.other is None else Shapes.of(qwen3(TEACHER)),
        )
        return Run(
            name=name or type(module.method).__name__,
            setup=setup,
            work=step_of(module.method, data, plan.tokens, prompt, fill),
            steps=cli.trainer.max_epochs * data.steps_per_epoch,
            validations=validations(cli, held_out(config), prompt, fill),
            note=note,
        )
    finally:
        data.close()


def table(runs: Iterator[Run]) -> dict[str, float]:
    """Prints a line per run, and returns the figures by name."""
    phases = ("generate", "sync", "teacher", "student", "optimizer")
    print(f"{'seconds a step':32}" + "".join(f"{name:>10}" for name in (*phases, "step")) + "   hours  validation")
    figures: dict[str, float] = {}
    for run in runs:
        seconds = run.seconds
        step = sum(seconds.values())
        hours = (run.steps * step + run.validation) / 3600
        cells = "".join(f"{value:10.2f}" for value in (*seconds.values(), step))
        print(f"{run.name:32}{cells}{hours:8.1f}{run.share:11.0%}  {run.note}", flush=True)
        figures |= {f"{run.name}/{name}": value for name, value in seconds.items()}
        figures |= {f"{run.name}/hours": hours, f"{run.name}/validation": run.share}
    return figures


def all_methods(config: str, names: Sequence[str], size: str, args: argparse.Namespace) -> Iterator[Run]:
    for name in names:
        try:
            yield predicted(config, ["--method", name], size, args.machine, args.prompt, args.fill)
        except ValueError as error:
            print(f"{name:32}left out: {str(error)[:60]}")


def recipes(prompt: int, fill: float) -> Iterator[Run]:
    """Yields the runs of the recipes as they stand."""
    for name, size, machine in RECIPES:
        yield predicted(f"qwen3_{name}.yaml", [], size, machine, prompt, fill, f"qwen3_{name}, {size}, {machine}")


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--check", action="store_true", help="measure steps on this CPU, and compare")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the check")
    options.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    options.add_argument("--models", choices=list(QWEN3), nargs="*", default=["1.7B", "4B", "8B"])
    options.add_argument("--methods", nargs="*", default=[name for name in methods.__all__ if name != "Method"])
    options.add_argument("--config", default="qwen3_ogls_sd.yaml", help="sizes that all methods share")
    options.add_argument("--prompt", type=int, default=200, help="tokens of a problem")
    options.add_argument("--fill", type=float, default=1.0, help="length of rollouts as a share of their limit")
    args = options.parse_args()
    announce(args)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    if args.check:
        from check import check

        sys.exit(check(args))
    figures: dict[str, float] = {}
    for size in args.models:
        print(f"\nQwen3-{size} on one {args.machine}, {args.config} with another method")
        made = table(all_methods(args.config, args.methods, size, args))
        figures |= {f"{size}/{name}": value for name, value in made.items()}
    print("\nrecipes as they stand; those that train all weights do not fit on an H100")
    log("roofline", figures | table(recipes(args.prompt, args.fill)), args)


if __name__ == "__main__":
    main()
