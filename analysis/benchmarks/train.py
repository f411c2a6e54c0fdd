"""One training step on recorded rollouts, without sampling: OPSD and OGLS-SD against TRL's SDPOTrainer.

    python analysis/benchmarks/train.py                            # embedded model after its cold start, 4 x G=8
    python analysis/benchmarks/train.py --groups 8 --trl-batch 16
    python analysis/benchmarks/train.py --dtype float32            # where a processor has no bf16

Rollouts are sampled once from arithmetic chains, then every side gets the same token ids: teacher, student, clipping
and AdamW of one step. OPSD reads the worked solution (K = 1); OGLS-SD the plain prompt and all rollouts of the group
(K = G). Forward KL, each rollout's mean over its tokens, averaged over rollouts; the same LoRA in fp32, no
checkpointing.

TRL 1.16's `SDPOTrainer` takes part where it is installed (`pip install trl==1.16.0`), in OPSD's role: full logits, base
weights as teacher, the privileged prompt of OPSD, no importance ratio, no logging, in micro-batches of --trl-batch
rollouts; autocast where --trl-autocast asks for it. Its tokenising, grading and re-prompting are left out. TRL's
`DistillationTrainer` has a teacher that reads what the student reads, so its counterpart is our plain teacher: base
weights, the plain prompt, the mean over all tokens, a chunked loss on both sides. Before anything is timed, loss and
gradient of each pair are compared in fp32 (in bf16 TRL's softmax over bf16 logits rounds).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from harness import announce, installed, log, parser, report, time_sides
from torch import Tensor

from ogls import algorithm
from ogls.lessons.prompts import ATTEMPT, PromptEncoder, Prompts
from ogls.loss.divergence import ForwardKL
from ogls.loss.objective import Distillation
from ogls.loss.steering import OutcomeSteering
from ogls.methods import OGLS_SD, OPSD, Method
from ogls.policy.lora import PROJECTIONS, Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import EMBEDDED
from ogls.records import Lesson, Problem, Role, Sampling, View
from ogls.rollout.transformers import TransformersEngine
from ogls.tasks.chains import Chains

BUDGET = 8192
CLIP = 1.0
PLAIN_KL = Distillation(ForwardKL())  # what TRL computes too
READING = OPSD(objective=PLAIN_KL)
STEERING = OGLS_SD(objective=PLAIN_KL, steering=OutcomeSteering())


def record(policy: Policy, encoder: PromptEncoder, groups: int, group_size: int, length: int) -> list[list[Lesson]]:
    """Returns the same rollouts with OPSD's view and with those of OGLS-SD, whose first half is taken for right."""
    chains = Chains(size=groups, split="heldout", seed=1)
    problems = [chains[i] for i in range(groups)]
    prompts = [encoder.student(problem) for problem in problems]
    engine = TransformersEngine()
    engine.start(policy.folder, 2048)
    engine.load(policy, 0)
    sampled = engine.generate(prompts, Sampling(max_tokens=length), group_size, 0)
    opsd, steered = [], []
    for problem, prompt, completions in zip(problems, prompts, sampled, strict=True):
        texts = [str(encoder.tokenizer.decode(list(c.token_ids), skip_special_tokens=True)) for c in completions]

        def reading(role: Role, text: str, problem: Problem = problem) -> View:
            return View(role=role, prefix_ids=encoder.view(problem, ATTEMPT, text))

        solution = reading("success", problem.solution or "")
        peers = [reading("success" if row < group_size // 2 else "failure", text) for row, text in enumerate(texts)]
        for completion in completions:
            tokens = completion.token_ids
            lesson = Lesson(
                problem_id=problem.id,
                prompt_ids=prompt,
                token_ids=tokens,
                token_weights=(1.0 / len(tokens),) * len(tokens),
                views=(View(role="plain", prefix_ids=prompt), solution),
            )
            opsd.append(lesson)
            steered.append(replace(lesson, views=(lesson.views[0], *peers)))
    return [opsd, steered]


def gradient(policy: Policy, method: Method, lessons: Sequence[Lesson]) -> float:
    """Returns the loss, and adds its gradient to the adapter: the product's own step."""
    lent = {"teacher": functools.partial(method.teacher.applied_to, policy, {})}
    totals = algorithm.weight_totals(method, lessons)
    return algorithm.gradient(method, policy, lent, lessons, totals, BUDGET, observe=lambda micro_batch: None)


def step(compute: Callable[[], float], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> float:
    loss = compute()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def padded_batch(lessons: Sequence[Lesson]) -> dict[str, Tensor]:
    """Returns the recorded batch, padded as TRL pads what it samples, with its SDPO teacher's context."""
    from trl.trainer.utils import pad  # pyright: ignore[reportMissingImports]

    def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        ids = [torch.tensor(row) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        return pad(ids, padding_value=0, padding_side=side), pad(ones, padding_value=0, padding_side=side)

    prompts, prompt_mask = padded([lesson.prompt_ids for lesson in lessons], "left")
    read, read_mask = padded([lesson.views[-1].prefix_ids for lesson in lessons], "left")
    completions, mask = padded([lesson.token_ids for lesson in lessons], "right")
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "teacher_input_ids": torch.cat([read, completions], 1),
        "teacher_attention_mask": torch.cat([read_mask, mask], 1),
        "self_distillation_mask": torch.ones(len(lessons)),
    }


def trl_trainer(
    policy: Policy, lessons: Sequence[Lesson], batch: int, autocast: bool, dtype: torch.dtype, privileged: bool
) -> Any:
    """Returns TRL's SDPOTrainer, or its DistillationTrainer where the teacher is not privileged, with the batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.trainer.utils import split_tensor_dict  # pyright: ignore[reportMissingImports]

    num_parts = len(lessons) // batch
    recorded = padded_batch(lessons)
    if not privileged:
        recorded = {name: recorded[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    total = {} if privileged else {"num_items_in_batch": recorded["completion_mask"].sum()}

    class Recorded(SDPOTrainer if privileged else DistillationTrainer):
        parts = tuple(part | total for part in split_tensor_dict(recorded, num_parts))

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return generation_batch

        def _log_self_distillation_metric(self, mode: str, value: float) -> None:
            pass

    shared = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": autocast,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": num_parts,
        "max_completion_length": recorded["completion_ids"].shape[1],
        "temperature": 1.0,
        "report_to": "none",
    }
    model = AutoModelForCausalLM.from_pretrained(policy.folder, dtype=dtype)
    if privileged:
        own = {"distillation_mode": "full_logits", "distillation_alpha": 0.0, "distillation_is_clip": None}
        config = SDPOConfig(**shared, **own, num_generations=8, distillation_weight=1.0, teacher_model_kind="base")
        further = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    else:
        config = DistillationConfig(**shared, beta=0.0)
        further = {"teacher_model": AutoModelForCausalLM.from_pretrained(policy.folder, dtype=dtype)}
    trainer = Recorded(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["-"] * len(lessons)}),
        processing_class=policy.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"),
        **further,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = num_parts
    return trainer


def trl_gradient(trainer: Any) -> float:
    return sum(trainer.training_step(trainer.model, part, None).item() for part in trainer.parts)


def assert_agreement(model: str, adapter: str | None, lessons: Sequence[Lesson], privileged: bool) -> None:
    """Checks that TRL's loss and gradient are ours in fp32, with a copy of our adapter, a random one."""
    policy = Policy(model, adapter, lora=Lora(), dtype="float32").load()
    trainer = trl_trainer(policy, lessons, len(lessons), False, torch.float32, privileged)
    theirs = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    pairs = [(p, next(q for n, q in theirs.items() if n.endswith(name))) for name, p in mine.items()]
    assert len(pairs) == len(theirs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p.normal_(std=0.03, generator=generator))
    losses = gradient(policy, READING, lessons), trl_gradient(trainer)
    ours = torch.cat([p.grad.flatten() for p, _ in pairs if p.grad is not None])
    other = torch.cat([q.grad.flatten() for _, q in pairs if q.grad is not None])
    off = float((ours - other).norm() / ours.norm())
    print(
        f"in fp32, {len(lessons)} rollouts: loss {losses[0]:.6f}, TRL's {losses[1]:.6f}; gradients differ by {off:.2%}"
    )
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0], "the sides do not compute the same"
    assert off < 0.01, "the sides do not compute the same"


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", default=EMBEDDED)
    options.add_argument("--adapter", default="experiments/cold_start")
    options.add_argument("--groups", type=int, default=4)
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--length", type=int, default=48)
    options.add_argument("--trl-batch", type=int, default=8)
    options.add_argument("--trl-autocast", action="store_true")
    options.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = options.parse_args()
    announce(args)
    policy = Policy(args.model, args.adapter or None, lora=Lora(), dtype=args.dtype).load()
    encoder = PromptEncoder(Prompts(system=""), policy.tokenizer)
    opsd, steered = record(policy, encoder, args.groups, args.group_size, args.length)
    tokens = [len(lesson.token_ids) for lesson in opsd]
    print(f"{len(opsd)} rollouts of {min(tokens)} to {max(tokens)} tokens, {sum(tokens)} in all; prompt ", end="")
    print(f"{len(opsd[0].prompt_ids)}, solution's view {len(opsd[0].views[1].prefix_ids)} tokens")

    def side(compute: Callable[[], float], parameters: list[Any]) -> Callable[[], float]:
        return functools.partial(step, compute, parameters, torch.optim.AdamW(parameters, lr=1e-6))

    trainable = list(policy.trainable().values())
    unread = [View(role="success", prefix_ids=lesson.prompt_ids) for lesson in opsd]  # nothing but the prompt
    plain = [
        replace(lesson, views=(lesson.views[0], view), token_weights=(1.0,) * len(lesson.token_ids))
        for lesson, view in zip(opsd, unread, strict=True)
    ]
    ours = {
        "OPSD": (READING, opsd),
        f"OGLS-SD, K={args.group_size}": (STEERING, steered),
        "plain teacher": (READING, plain),
    }
    print("; ".join(f"{name} is {method.name}" for name, (method, _) in ours.items()), end="")
    print("; rollouts and token weights are the recorded ones")
    table = {
        f"ours, {name}": side(functools.partial(gradient, policy, method, lessons), trainable)
        for name, (method, lessons) in ours.items()
    }
    if installed("trl"):
        peers = {"TRL, SDPOTrainer, OPSD": "OPSD", "TRL, DistillationTrainer, plain teacher": "plain teacher"}
        for name, role in peers.items():
            _, lessons = ours[role]
            privileged = role == "OPSD"
            assert_agreement(args.model, args.adapter or None, lessons[: args.group_size], privileged)
            dtype = getattr(torch, args.dtype)
            trainer = trl_trainer(policy, lessons, args.trl_batch, args.trl_autocast, dtype, privileged)
            theirs = [p for p in trainer.model.parameters() if p.requires_grad]
            table[name] = side(functools.partial(trl_gradient, trainer), theirs)
    losses = {name: f"{run():.5f}" for name, run in table.items()}
    print(f"losses in {args.dtype}:", losses)
    log("train", report(time_sides(table, args), "ours, OPSD", args), args)


if __name__ == "__main__":
    main()
