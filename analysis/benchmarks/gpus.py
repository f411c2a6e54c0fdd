"""How long a step takes on 1 to 64 GPUs and what each holds, predicted; where it stops scaling, and why.

    python analysis/benchmarks/gpus.py                    # Qwen3-4B and 8B: adapters by DDP, all weights sharded
    python analysis/benchmarks/gpus.py --models 4B --most 16 --between 1e10

It is the cost model of `roofline.py` with the work shared out among GPUs. Of G groups of rollouts a process gets the
whole number G / T, rounded up, and the step waits for whoever has most. To it come:

    tail          rollouts are as long as the quantiles of 0 to their limit, and the step waits for the longest: however
                  few sequences a GPU has, each token of the longest costs a reading of all weights
    all-gathers   sharded: every pass gathers all weights (2 bytes each) once, with a gradient once more, and sums
                  gradients (4 bytes each); this hides behind the arithmetic, so that the longer of both counts
    all-reduce    DDP: gradients of the adapter, 8 bytes each, after the arithmetic
    weight sync   weights are gathered in fp32, sent to every server in bf16, and laid out there anew; the canary

The columns are seconds of a step of `qwen3_sdpo.yaml`: 32 problems x 8 rollouts of up to 8,192 tokens, 4,096 on
average. *ahead* is the step with `data.one_step_off`, in which the servers draw while the others train. A star marks a
phase that waits for all-gathers. *GiB each* is what a GPU that trains holds, without keys and values; with more room
the plan computes fewer activations anew. Rates between GPUs are assumed: NVLink in a node of 8, 400 Gb/s a GPU
between nodes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fake_gpu import qwen3
from harness import announce, log, parser
from roofline import MACHINES, MEMORY, Setup, configured
from work import Draw, Work, step_of

from ogls.planner import planned
from ogls.policy.lora import Lora
from ogls.system.memory.plan import GIB, Plan
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

CONFIG = "qwen3_sdpo.yaml"
LAYOUTS: dict[str, tuple[tuple[str, ...], float, bool]] = {
    "adapter of rank 64, DDP, an engine on every GPU": (("--policy.lora", "{rank: 64, alpha: 128}"), 1.0, False),
    "all weights, sharded, half of the GPUs are servers": ((), 0.5, True),
}
"""Further arguments, share of the GPUs that train (all others are servers), and whether weights are cut."""
ENOUGH = 1.4  # twice the GPUs have to be so many times as fast


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links are bytes/s that each GPU reaches in a collective: inside a node, and where it spans nodes."""

    inside: float = 3.0e11
    between: float = 4.0e10
    node: int = 8

    def seconds(self, size: float, among: int, crosses: bool = False) -> float:
        """Returns the seconds in which every one of so many GPUs gets, or sums, `size` bytes that all have parts of."""
        rate = self.between if crosses or among > self.node else self.inside
        return size * (among - 1) / among / rate


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout shares a step out among processes that train and engines that sample, which may be the same GPUs."""

    setup: Setup
    work: Work
    groups: int
    trainers: int
    engines: int
    sharded: bool
    links: Links

    @property
    def share(self) -> float:
        """Returns the largest part of the groups that one process trains on."""
        return -(-self.groups // self.trainers) / self.groups

    def drawn(self, draw: Draw) -> Draw:
        """Returns what the busiest engine draws: some of the prompts, with rollouts of all lengths."""
        few, each = -(-draw.num_prompts // self.engines), len(draw.lengths) // draw.num_prompts
        longest = 2 * max(draw.lengths)  # the mean stays as it was
        count = few * each
        lengths = [max(1, round((i + 1) / count * longest)) for i in range(count)]
        return Draw(draw.prompts[:count], lengths, few)

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds of a step by phase; those that gather weights have the longer of work and gathering."""
        setup, work, whole = self.setup, self.work, self.setup.shapes.weights
        teacher = self.share * sum(map(setup.teacher, work.teacher))
        student = self.share * (sum(map(setup.gradient, work.student)) + sum(setup.loss(*one) for one in work.losses))
        reduced = 0.0
        if self.sharded:
            gather, scatter = (self.links.seconds(size * whole, self.trainers) for size in (2, 4))
            teacher = max(teacher, -(-len(work.teacher) * self.share // 1) * gather)
            student = max(student, -(-len(work.student) * self.share // 1) * (2 * gather + scatter))
        else:
            reduced = 2 * self.links.seconds(4 * setup.training.trainable, self.trainers)
        sync = work.loads * setup.load
        if self.engines != self.trainers or self.sharded:
            crosses = self.trainers + self.engines > self.links.node
            sync += work.loads * self.links.seconds(4 * whole, self.trainers)
            sync += work.loads * 2 * whole / (self.links.between if crosses else self.links.inside)
        return {
            "rollouts": sum(part * setup.decode(self.drawn(draw)) for part, draw in work.draws),
            "sync": sync,
            "teacher": teacher,
            "student": student,
            "update": setup.optimiser / (self.trainers if self.sharded else 1) + reduced,
        }

    def gathers(self, phase: str) -> bool:
        """Returns whether a phase waits for weights to be gathered."""
        return phase in ("teacher", "student") and self.seconds[phase] > replace(self, sharded=False).seconds[phase]

    def longest(self) -> str:
        """Returns what takes most of a step, and why."""
        seconds = self.seconds
        name = max(seconds, key=lambda phase: seconds[phase])
        twice = replace(self, engines=2 * self.engines).seconds["rollouts"]
        if name == "rollouts":
            return "the longest rollout" if seconds["rollouts"] < ENOUGH * twice else "all rollouts"
        return f"all-gathers of the {name}" if self.gathers(name) else name


def laid_out(
    arguments: Sequence[str], size: str, trainers: int, engines: int, sharded: bool, args: object, links: Links
) -> tuple[Layout, Plan | None]:
    """Returns a configuration on so many GPUs, and the memory plan of one that trains; None where it does not fit."""
    prompt, machine = vars(args)["prompt"], vars(args)["machine"]
    cli = configured(CONFIG, *arguments)
    module, data = cli.model, cli.datamodule
    engine = data.engine
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(qwen3(size)))
            module.policy.__dict__["folder"] = Path(folder)
            data.longest_prompt = prompt
            if sharded:
                data.engine = None  # it is on other GPUs
            try:
                plan = planned(module, data, MEMORY[machine], trainers, sharded)
                fits = True
            except ValueError:
                plan, fits = planned(module, data, 4 * MEMORY[machine], trainers, sharded), False
        lora: Lora | None = module.policy.lora
        shapes = Shapes.of(qwen3(size))
        serving = engine.serving(shapes)
        training = Training(
            shapes=shapes,
            rank=module.policy.adapter_rank,
            targets=lora.among(shapes.projections) if lora else (),
            dtype="bfloat16",
        )
        cache = plan.cache if not sharded else int(0.9 * MEMORY[machine]) - serving.share(0)
        setup = Setup(
            machine=MACHINES[machine],
            training=training,
            checkpointing=plan.checkpointing,
            cache=min(cache, MEMORY[machine]),
            max_num_seqs=serving.max_num_seqs,
            whole=lora is None,
        )
        work = step_of(module.method, data, plan.tokens, prompt, 0.5)
        groups = data.problems_per_step * data.mini_batches
        layout = Layout(
            setup=setup,
            work=work,
            groups=groups,
            trainers=trainers,
            engines=engines,
            sharded=sharded,
            links=links,
        )
        return layout, plan if fits else None
    finally:
        data.close()


def rows(size: str, title: str, args: object, links: Links) -> Iterator[tuple[int, Layout, Plan | None]]:
    arguments, training, sharded = LAYOUTS[title]
    number = 1 if training == 1 else 2
    while number <= vars(args)["most"]:
        trainers = round(number * training)
        engines = number if training == 1 else number - trainers
        layout, plan = laid_out(arguments, size, trainers, engines, sharded, args, links)
        if trainers > layout.groups:
            print(f"| {number} | more processes that train than the {layout.groups} groups of a step: refused |")
            return
        yield number, layout, plan
        number *= 2


def table(size: str, title: str, args: object, links: Links) -> dict[str, float]:
    """Prints a Markdown table, and under it where doubling the GPUs no longer pays; returns its figures."""
    print(f"\nQwen3-{size}, {title}\n")
    phases: Sequence[str] = ("rollouts", "sync", "teacher", "student", "update")
    print(f"| GPUs | GiB each | {' | '.join(phases)} | step | ahead | GPU hours for 100 steps | most of it |")
    print("|---:|---:|" + "---:|" * (len(phases) + 3) + "---|")
    figures: dict[str, float] = {}
    before, stops = 0.0, ""
    for number, layout, plan in rows(size, title, args, links):
        seconds = layout.seconds
        step = sum(seconds.values())
        rest = step - seconds["rollouts"] - seconds["sync"]
        ahead = max(seconds["rollouts"], rest) + seconds["sync"]
        apart = layout.sharded
        best = ahead if apart else step
        held = "does not fit" if plan is None else f"{(plan.total - plan.cache) / GIB:.0f}"
        cells = [f"{seconds[name]:.1f}{'*' * layout.gathers(name)}" for name in phases]
        cells += [f"{step:.0f}", f"{ahead:.0f}" if apart else "", f"{number * best * 100 / 3600:.0f}"]
        print(f"| {number} | {held} | {' | '.join(cells)} | {layout.longest()} |", flush=True)
        if before and before / best < ENOUGH and not stops:
            stops = f"It stops scaling at {number // 2} GPUs: twice as many are {before / best:.2f} times as fast"
            stops += f", and most of the step is {layout.longest()}."
        before = best
        figures |= {f"{size}/{title}/{number}/{name}": value for name, value in seconds.items()}
    print(f"\n{stops or 'It scales to the end of the table.'}")
    return figures


def main() -> None:
    options = parser(__doc__ or "", rounds=1)
    options.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    options.add_argument("--models", choices=["0.6B", "1.7B", "4B", "8B"], nargs="*", default=["4B", "8B"])
    options.add_argument("--most", type=int, default=64, help="largest number of GPUs; default: %(default)s")
    options.add_argument("--prompt", type=int, default=200, help="tokens of a problem; default: %(default)s")
    options.add_argument("--inside", type=float, default=Links.inside, help="bytes/s a GPU in a node")
    options.add_argument("--between", type=float, default=Links.between, help="bytes/s a GPU between nodes")
    args = options.parse_args()
    announce(args)
    links, figures = Links(inside=args.inside, between=args.between), {}
    for size in args.models:
        for title in LAYOUTS:
            figures |= table(size, title, args, links)
    log("gpus", figures, args)


if __name__ == "__main__":
    main()
