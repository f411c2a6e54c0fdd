"""A memory plan decides what fits on a GPU before anything is loaded.

    context + weights, optimiser, teacher + the larger of a micro-batch and a teacher's pass + the engine  <=  device

Whatever a configuration leaves open is decided in this order: no activation is computed twice, a micro-batch is large
enough to keep the device busy, and keys and values of all rollouts of a step have room. Whatever is left goes to keys
and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ogls.system.memory.serving import Serving
from ogls.system.memory.training import Training

GIB = 2**30
CONTEXT = 5 << 27  # bytes of the CUDA context and its libraries
SPARE = 0.03  # of the device, for what the allocator cannot use and for what is not counted
ENOUGH = 16_384  # tokens of a micro-batch of a small model, from which on a GPU does not wait for what launches kernels


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load is the largest text that a run can bring.

    Args:
        lesson: prompt and learned tokens of the longest lesson
        learned: learned tokens of it
        view: tokens of the longest view with all that is read after it; 0 where no teacher reads
        context: tokens of the longest sequence that the engine has to hold
        rollouts: rollouts that a step samples
        rollout: prompt and sampled tokens of the longest rollout of a step
    """

    lesson: int
    learned: int
    view: int
    context: int
    rollouts: int
    rollout: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a configuration asks for; None lets the plan decide.

    Args:
        tokens: `model.tokens_per_micro_batch`
        checkpointing: `policy.gradient_checkpointing`
        cache: bytes of `data.engine.memory_gib`
    """

    tokens: int | None = None
    checkpointing: bool | None = None
    cache: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan is what is decided, and the bytes by what they are for.

    Args:
        tokens: tokens per micro-batch
        checkpointing: whether activations are computed anew in the backward pass
        cache: bytes of the engine's keys and values
        device: bytes of the device
        rows: bytes by purpose
        devices: number of devices of the run, each of which holds these bytes
    """

    tokens: int
    checkpointing: bool
    cache: int
    device: int
    rows: dict[str, int]
    devices: int = 1

    @property
    def total(self) -> int:
        """Returns the sum of all bytes."""
        return sum(self.rows.values())

    def table(self) -> str:
        """Returns the plan as lines for whoever starts a run."""
        chosen = f"{self.tokens} tokens per micro-batch, gradient checkpointing {'on' if self.checkpointing else 'off'}"
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        lines = [f"Memory of {self.device / GIB:.1f} GiB{each}, planned: {chosen}"]
        lines += [f"  {name:<34}{size / GIB:7.2f} GiB" for name, size in self.rows.items() if size]
        return "\n".join([*lines, f"  {'all':<34}{self.total / GIB:7.2f} GiB"])


def plan(training: Training, serving: Serving | None, load: Load, asked: Asked, device: int) -> Plan:
    """Returns the first plan that fits, in the order of preference that this module's first lines give.

    Args:
        training: bytes of the trainer
        serving: bytes of an engine on the same device; None where there is none
        load: largest text of the run
        asked: what the configuration has decided
        device: bytes of the device

    Raises:
        ValueError: nothing fits; the message names the nearest setting that does, if there is one.
    """
    found = _first(training, serving, load, asked, device)
    if found is not None:
        return found
    least = min(_plans(training, serving, load, asked, device), key=lambda made: made.total)
    largest = max(least.rows.items(), key=lambda row: row[1])
    said = (
        f"this run does not fit on the device: it needs {least.total / GIB:.1f} GiB, {largest[1] / GIB:.1f} of them "
        f"for {largest[0]}, and has {_usable(device) / GIB:.1f} of the device's {device / GIB:.1f} GiB"
    )
    for setting, changed in _nearer(training, serving, load, asked, device):
        if _first(*changed, device) is not None:
            raise ValueError(f"{said}; what fits: {setting}")
    raise ValueError(f"{said}; no setting of it fits: take a smaller model or a larger device")


def _usable(device: int) -> int:
    return int(device * (1 - SPARE))


def _first(training: Training, serving: Serving | None, load: Load, asked: Asked, device: int) -> Plan | None:
    fitting = (p for p in _plans(training, serving, load, asked, device) if p.total <= _usable(device))
    chosen = next(fitting, None)
    if chosen is None or serving is None or asked.cache is not None:
        return chosen
    left = _usable(device) - chosen.total
    cache = min(chosen.cache + left, serving.max_num_seqs * serving.cache(load.context))
    return _made(training, serving, load, chosen.tokens, chosen.checkpointing, cache, device)


def _plans(training: Training, serving: Serving | None, load: Load, asked: Asked, device: int) -> Iterator[Plan]:
    """Yields all plans that may be chosen, the best first; each has its smallest cache."""
    caches = [0]
    if serving is not None:
        least = serving.cache(load.context)
        all_rollouts = min(load.rollouts, serving.max_num_seqs) * serving.cache(load.rollout)
        caches = [max(least, all_rollouts), least] if asked.cache is None else [asked.cache]
    kept_or_not = [False, True] if asked.checkpointing is None else [asked.checkpointing]
    quick = [max(ENOUGH >> halvings, load.lesson) for halvings in range(4)]
    budgets = quick if asked.tokens is None else [asked.tokens]
    ways = [(budget, anew) for anew in kept_or_not for budget in budgets]
    if asked.tokens is None:
        ways += [(load.lesson, anew) for anew in kept_or_not]
    for cache in caches:
        for tokens, checkpointing in dict.fromkeys(ways):
            yield _made(training, serving, load, tokens, checkpointing, cache, device)


def _made(
    training: Training,
    serving: Serving | None,
    load: Load,
    tokens: int,
    checkpointing: bool,
    cache: int,
    device: int,
) -> Plan:
    at_once = max(tokens, load.lesson)  # a lesson above the budget stands alone
    student = training.micro_batch(at_once, checkpointing)
    teacher = training.teacher_pass(max(2 * tokens, load.view), at_once) if load.view else 0
    rows = {
        "CUDA context": CONTEXT,
        "policy: weights": training.weights,
        "policy: gradients and AdamW": training.optimiser,
        "weights of the teacher": training.teacher,
        "weights that are gathered": training.gathered,
        f"a micro-batch of {at_once} tokens": student,
        "a teacher's pass, beyond that": max(0, teacher - student),
    }
    if serving is not None:
        rows |= {
            "engine: CUDA context": CONTEXT * serving.own_process,
            "engine: weights": serving.weights,
            "engine: passes" + " and CUDA graphs" * serving.graphs: serving.workspace,
            "engine: keys and values": cache,
        }
    return Plan(tokens=tokens, checkpointing=checkpointing, cache=cache, device=device, rows=rows)


def _nearer(
    training: Training, serving: Serving | None, load: Load, asked: Asked, device: int
) -> Iterator[tuple[str, tuple[Training, Serving | None, Load, Asked]]]:
    """Yields settings that may fit where a run does not, the nearest first, each with the run that it makes."""
    if asked.checkpointing is False:
        on = replace(asked, checkpointing=True)
        yield "policy.gradient_checkpointing true", (training, serving, load, on)
    if asked.tokens is not None:
        for tokens in (asked.tokens * eighths // 8 for eighths in range(7, 0, -1)):
            if tokens >= load.lesson:
                changed = (training, serving, load, replace(asked, tokens=tokens))
                yield f"model.tokens_per_micro_batch {tokens}", changed
        yield "model.tokens_per_micro_batch null", (training, serving, load, replace(asked, tokens=None))
    if serving is not None and asked.cache is not None:
        yield "data.engine.memory_gib null", (training, serving, load, replace(asked, cache=None))
    free = Asked()
    if asked != free:
        names = "model.tokens_per_micro_batch, data.engine.memory_gib and policy.gradient_checkpointing"
        yield f"{names} left to the plan (null, null, auto)", (training, serving, load, free)
    for eighths in range(7, 0, -1):
        learned, context = load.learned * eighths // 8, load.context * eighths // 8
        less = load.learned - learned
        shorter = replace(load, lesson=load.lesson - less, learned=learned, rollout=load.rollout - less)
        yield f"data.max_tokens {learned}, with all else left to the plan", (training, serving, shorter, free)
        if context >= load.rollout:
            view = load.view and load.view - load.context + context
            smaller = replace(load, context=context, view=view)
            said = f"data.context_length {context}, evaluations to match, with all else left to the plan"
            yield said, (training, serving, smaller, free)
    if not training.rank:
        adapter = replace(training, rank=64, targets=tuple(training.shapes.projections))
        served = None if serving is None else replace(serving, rank=64)
        yield "policy.lora {rank: 64, alpha: 128} (an adapter)", (adapter, served, load, free)
    for parts in () if training.parts > 1 else (2, 4, 8):
        said = f"--trainer.strategy sharded with --trainer.devices {parts}, with all else left to the plan"
        yield said, (replace(training, parts=parts), serving, load, free)
