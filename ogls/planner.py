"""A run is planned for its GPU's memory from settings and config.json.

That is before any weights are read.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from ogls.loss.objective import Distillation
from ogls.loss.tiles import CHUNK_BYTES, TILE_BYTES
from ogls.policy.teacher import Frozen
from ogls.system.memory.plan import Asked, Load, Plan, plan
from ogls.system.memory.shapes import Shapes
from ogls.system.memory.training import Training

if TYPE_CHECKING:
    from ogls.data import RolloutDataModule
    from ogls.module import SelfDistillation

_TILES = 5  # of fp32 are alive at a time where a loss has no kernel


def planned(
    module: SelfDistillation, data: RolloutDataModule, device: int, devices: int = 1, sharded: bool = False
) -> Plan:
    """Returns the plan of a training run, and tells its engine.

    Args:
        module: settings of the training
        data: settings of the sampling, whose problems have been looked at
        device: bytes that the run may take of a device
        devices: number of devices that make a step together
        sharded: whether weights are cut among them, rather than held by each

    Raises:
        ValueError: the run does not fit; the message names the nearest setting that does.
    """
    policy, engine = module.policy, data.engine
    shapes = Shapes.of(json.loads((policy.folder / "config.json").read_text()))
    serving = None
    if engine is not None:
        engine.adapter_rank = policy.adapter_rank
        serving = engine.serving(shapes)
    checkpointing = policy.gradient_checkpointing
    asked = Asked(
        tokens=module.asked_tokens,
        checkpointing=None if checkpointing == "auto" else checkpointing,
        cache=None if engine is None else engine.asked_cache,
    )
    training = replace(_training(module, shapes), parts=devices if sharded else 1)
    made = replace(plan(training, serving, _load(module, data, devices), asked, device), devices=devices)
    if engine is not None:
        engine.cache_bytes = made.cache
    return made


def _training(module: SelfDistillation, shapes: Shapes) -> Training:
    policy, method = module.policy, module.method
    teachers = [module.teachers[target.weights] for target in method.targets]
    if module.kl_to_base or "start" in method.needs:
        teachers.append(Frozen())
    supports = [term.support for _, term in method.objective.terms if isinstance(term, Distillation)]
    tiles = any(support is not None and support.of == "union" for support in supports)
    return Training(
        shapes=shapes,
        rank=policy.adapter_rank,
        targets=policy.lora.among(shapes.projections) if policy.lora else (),
        dtype=policy.dtype,
        embeddings=policy.train_embeddings,
        kept_bytes=sum(teacher.kept_bytes(policy) for teacher in {type(t): t for t in teachers}.values()),
        chunk_bytes=CHUNK_BYTES["cuda"] + _TILES * TILE_BYTES["cuda"] * tiles,
        other=None
        if module.other is None
        else Shapes.of(json.loads((module.other.folder / "config.json").read_text())),
    )


def _load(module: SelfDistillation, data: RolloutDataModule, devices: int) -> Load:
    method, sizes, longest = module.method, data.sizes, data.longest_prompt
    rollout = min(sizes.context_length, longest + sizes.max_tokens)
    learned = sizes.max_tokens
    if method.advantage is None and not method.privilege.selects:
        learned = method.selection.last_of(sizes.max_tokens)
    if "demonstrations" in method.needs:
        learned = sizes.context_length
    lesson = min(sizes.context_length, longest + learned)
    read = sizes.context_length - learned + sizes.group_size * learned if method.views else lesson
    return Load(
        lesson=lesson,
        learned=learned,
        view=max(lesson, read) if method.targets else 0,
        context=data.longest_sequence,
        rollouts=sizes.group_size * -(-data.problems_per_step * data.mini_batches // devices),
        rollout=rollout,
    )
