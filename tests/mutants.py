"""Which faults, planted one at a time, do the tests notice?

    make mutants                              all of them: about half an hour on two cores
    python tests/mutants.py --only selection  those of files whose name has this word

Each mutant changes one expression of the algorithm in a copy of the project and runs the tests named beside it. It is
killed when a test fails. A mutant that survives is printed as a difference, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("ogls", "tests", "experiments", "analysis", "sweeps", "docs", "pyproject.toml", "README.md", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """One expression that is replaced by another; it stands in `file` exactly once."""

    file: str
    old: str
    new: str
    tests: str


ALGORITHM, UPDATE, MODULE = "tests/test_algorithm.py", "tests/test_update.py", "tests/test_module.py"
BUILD, SELECTION, PRIVILEGE = (
    "tests/lessons/test_build.py",
    "tests/lessons/test_selection.py",
    "tests/lessons/test_privilege.py",
)
STEERING, DIVERGENCE, CHUNKED = (
    "tests/loss/test_steering.py",
    "tests/loss/test_divergence.py",
    "tests/loss/test_chunked.py",
)
TEACHER, OTHER, GRPO, ATTENTION = (
    "tests/policy/test_teacher.py",
    "tests/policy/test_other.py",
    "tests/loss/test_policy_gradient.py",
    "tests/policy/test_attention.py",
)

MUTANTS = [
    Mutant("loss/chunked.py", "        out[1] -= out[0]\n", "", f"{CHUNKED} {ALGORITHM}"),
    Mutant("policy/other.py", "own.get(token) != wanted.get(token)", "token not in own", OTHER),
    Mutant("policy/other.py", "weight[:rows]", "weight", OTHER),
    Mutant("lessons/privilege.py", "LessonDraft(rollout=rollout, plain=True)", "LessonDraft(rollout=rollout)", OTHER),
    Mutant("algorithm.py", "part + factor * value / (total or 1.0)", "part + value / (total or 1.0)", ALGORITHM),
    Mutant("algorithm.py", "value / (total or 1.0)\n", "value\n", ALGORITHM),
    Mutant("algorithm.py", "towards.weighted(per_token(some, term.token_weights, hidden))", "towards", ALGORITHM),
    Mutant("algorithm.py", "policy_with[target.weights]", 'policy_with["teacher"]', ALGORITHM),
    Mutant(
        "algorithm.py", "sum(sum(term.token_weights(lesson)) for", "sum(len(term.token_weights(lesson)) for", ALGORITHM
    ),
    Mutant("algorithm.py", "        loss += part.item()\n", "        loss = part.item()\n", f"{MODULE} {ALGORITHM}"),
    Mutant(
        "algorithm.py",
        "anchor, direction, policy.version, reader.head)",
        "anchor, direction, 0, reader.head)",
        f"{ALGORITHM} {MODULE}",
    ),
    Mutant(
        "algorithm.py",
        "max(term.num_scored(lesson) for term in taught)",
        "min(term.num_scored(lesson) for term in taught)",
        ALGORITHM,
    ),
    Mutant("algorithm.py", 'seed_of("reflections")', 'seed_of("rollouts")', UPDATE),
    Mutant("module.py", "self.max_grad_norm or float", "None or float", UPDATE),
    Mutant("module.py", "(step + 1) / self.warmup_steps", "step / self.warmup_steps", UPDATE),
    Mutant("module.py", "if step < self.warmup_steps:", "if step <= self.warmup_steps:", UPDATE),
    Mutant("module.py", "return 1.0 - progress", "return 1.0", UPDATE),
    Mutant("module.py", "0.5 * (1.0 + math.cos(math.pi * progress))", "1.0 - progress", UPDATE),
    Mutant(
        "module.py",
        "            if finite:\n                self.teacher",
        "            if True:\n                self.teacher",
        UPDATE,
    ),
    Mutant("module.py", "optimizer.zero_grad()  # AdamW", "pass  # AdamW", "tests/faults/test_numbers.py"),
    Mutant("data.py", "derive(self.seed, purpose, step)", "derive(self.seed, purpose)", UPDATE),
    Mutant(
        "data.py",
        "derive(self.seed, name, int(with_solution))",
        "derive(self.policy.version, name, int(with_solution))",
        UPDATE,
    ),
    Mutant(
        "lessons/advantage.py",
        "(float(rollout.correct) - mean) / scale",
        "float(rollout.correct) / scale",
        "tests/lessons/test_advantage.py",
    ),
    Mutant(
        "lessons/advantage.py", "(mean * (1 - mean)) ** 0.5", "(mean * (1 - mean))", "tests/lessons/test_advantage.py"
    ),
    Mutant("lessons/advantage.py", "if not group.mixed:", "if False:", "tests/lessons/test_advantage.py"),
    Mutant("lessons/build.py", "draft.selection or self.selection", "self.selection", f"{BUILD} {PRIVILEGE}"),
    Mutant("lessons/build.py", "draft.weight * weight for", "weight for", BUILD),
    Mutant("lessons/build.py", "len(view.prefix_ids) <= room", "len(view.prefix_ids) < room", BUILD),
    Mutant("lessons/build.py", "self.context_length - lesson.num_learned", "self.context_length", BUILD),
    Mutant("lessons/build.py", "self.advantage.routed and any", "any", f"{BUILD} {MODULE}"),
    Mutant(
        "lessons/build.py",
        "if lost or too_long or not lesson.num_learned:",
        "if lost or not lesson.num_learned:",
        BUILD,
    ),
    Mutant(
        "lessons/privilege.py",
        "members = [m for m in pool if not (self.exclude_self and m is own)]",
        "members = list(pool)",
        PRIVILEGE,
    ),
    Mutant("lessons/privilege.py", "if right and wrong:", "if right:", PRIVILEGE),
    Mutant("lessons/privilege.py", "self.truncated_failures or not r.truncated", "True", PRIVILEGE),
    Mutant("lessons/privilege.py", "if peer is not rollout]", "]", PRIVILEGE),
    Mutant(
        "lessons/privilege.py",
        "if len(rollout.completion.token_ids) < middle:",
        "if len(rollout.completion.token_ids) <= middle:",
        PRIVILEGE,
    ),
    Mutant("lessons/privilege.py", "return texts[: self.max_peers]", "return texts", PRIVILEGE),
    Mutant(
        "lessons/privilege.py",
        'group.rollouts if self.rollouts == "all" else group.failures',
        "group.rollouts",
        PRIVILEGE,
    ),
    Mutant("lessons/selection.py", "return inside[0], inside[-1] + 1", "return inside[0], inside[-1]", SELECTION),
    Mutant("lessons/selection.py", "if low < end and high > start", "if low <= end and high > start", SELECTION),
    Mutant(
        "lessons/selection.py",
        "_length(rollout) if error is None else error[1]",
        "_length(rollout) if error is None else error[0]",
        SELECTION,
    ),
    Mutant("lessons/selection.py", "0 if error is None else error[0], _length", "0, _length", SELECTION),
    Mutant(
        "lessons/selection.py",
        "error[0] - self.before, error[1] + self.after",
        "error[0], error[1] + self.after",
        SELECTION,
    ),
    Mutant("lessons/selection.py", "if t >= error[0] else 0.0", "if t > error[0] else 0.0", SELECTION),
    Mutant("lessons/selection.py", "math.log(2) / self.half_life", "1 / self.half_life", SELECTION),
    Mutant("lessons/selection.py", "max(0, error[0] + self.tokens)", "max(0, error[0] - self.tokens)", SELECTION),
    Mutant(
        "loss/steering.py",
        'difference(mean_of(roles, "success"), mean_of(roles, "failure"))',
        'difference(mean_of(roles, "failure"), mean_of(roles, "success"))',
        STEERING,
    ),
    Mutant(
        "loss/steering.py",
        'return plain, difference(mean_of(roles, "success"), plain)',
        'return plain, mean_of(roles, "success")',
        STEERING,
    ),
    Mutant(
        "loss/steering.py", "alpha * min(1.0, step / ramp_steps)", "alpha * min(1.0, (step + 1) / ramp_steps)", STEERING
    ),
    Mutant(
        "loss/steering.py",
        "self.anchor + self.alpha * self.direction",
        "self.anchor + self.direction",
        f"{STEERING} {ALGORITHM}",
    ),
    Mutant("loss/divergence.py", "return pt * u, -pt", "return pt * u, ps - pt", f"{DIVERGENCE} {CHUNKED}"),
    Mutant("loss/divergence.py", "return summand, summand + ps", "return summand, summand", f"{DIVERGENCE} {CHUNKED}"),
    Mutant("loss/divergence.py", "ph *= self.beta - 1.0", "ph *= -self.beta", f"{DIVERGENCE} {CHUNKED}"),
    Mutant(
        "loss/divergence.py",
        "summand > clip if one_sided else summand.abs() > clip",
        "summand.abs() > clip",
        f"{DIVERGENCE} {CHUNKED}",
    ),
    Mutant("loss/divergence.py", "ph.masked_fill_(binds, 0.0)", "pass", f"{DIVERGENCE} {CHUNKED}"),
    Mutant(
        "loss/chunked.py",
        "ps, ph.sum(-1, keepdim=True), value=-1.0",
        "ps, ph.sum(-1, keepdim=True), value=0.0",
        CHUNKED,
    ),
    Mutant("loss/chunked.py", "gradient[rows].masked_fill_(reached[:, None], 0.0)", "pass", CHUNKED),
    Mutant("loss/chunked.py", "(upstream / ctx.temperature)", "upstream", CHUNKED),
    Mutant("loss/chunked.py", "torch.ones_like(probs[:, :1])", "torch.zeros_like(probs[:, :1])", CHUNKED),
    Mutant("loss/triton_topk.py", "logits.scatter_(-1, inside, -torch.inf)", "pass", "tests/loss/test_triton_rows.py"),
    Mutant("loss/topk.py", "tail_gap = tail_q", "tail_gap = tail_p", "tests/loss/test_topk.py"),
    Mutant("loss/topk.py", "tail_ph / tail_p.clamp(min=tiny) - total", "-total", "tests/loss/test_topk.py"),
    Mutant("loss/objective.py", ".clamp(max=cap)", "", "tests/loss/test_objective.py"),
    Mutant(
        "loss/objective.py",
        "return lesson.token_weights if lesson.views else (0.0,) * len(lesson.token_weights)",
        "return lesson.token_weights",
        f"tests/loss/test_objective.py {ALGORITHM}",
    ),
    Mutant("loss/objective.py", "tuple((factor * inner, term)", "tuple((factor, term)", "tests/loss/test_objective.py"),
    Mutant("loss/policy_gradient.py", "torch.minimum(free, clipped)", "free", GRPO),
    Mutant(
        "loss/policy_gradient.py",
        "ratio.clamp(1 - self.clip_low, 1 + self.clip_high)",
        "ratio.clamp(1 - self.clip_high, 1 + self.clip_low)",
        GRPO,
    ),
    Mutant("loss/policy_gradient.py", "weight / count if self.per", "weight if self.per", GRPO),
    Mutant(
        "loss/alpha_bound.py",
        "low, high = torch.where(within, middle, low), torch.where(within, high, middle)",
        "low, high = torch.where(within, low, middle), torch.where(within, middle, high)",
        "tests/loss/test_alpha_bound.py",
    ),
    Mutant("loss/entropy.py", "total.log() - mass", "total.log() + mass", "tests/loss/test_entropy.py"),
    Mutant("policy/layout.py", "torch.cat([row[o], own])", "torch.cat([own, row[o]])", ATTENTION),
    Mutant("policy/layout.py", "keys.argsort(stable=True)", "torch.arange(len(keys))", ATTENTION),
    Mutant("policy/attention.py", "window_size=(-1, 0)", "window_size=(-1, -1)", ATTENTION),
    Mutant("policy/fused.py", "self.variance_epsilon)", "0.0)", "tests/policy/test_policy.py"),
    Mutant(
        "policy/teacher.py", "kept[name].to(p.device), self.decay)", "kept[name].to(p.device), 1 - self.decay)", TEACHER
    ),
    Mutant(
        "policy/teacher.py",
        "student(*args, **options).float(), self.share)",
        "student(*args, **options).float(), 1 - self.share)",
        TEACHER,
    ),
    Mutant(
        "policy/teacher.py",
        "policy.swapped(kept) if policy.lora is None else policy.without_adapter()",
        "policy.without_adapter() if policy.lora else __import__('contextlib').nullcontext()",
        TEACHER,
    ),
    Mutant(
        "policy/teacher.py",
        "return {name: p.detach().clone() for name, p in policy.trainable().items()}",
        "return {name: p.detach() for name, p in policy.trainable().items()}",
        TEACHER,
    ),
    Mutant(
        "rollout/engine.py",
        "derive(seed, seen[prompt], *prompt)",
        "derive(seed, seen[prompt])",
        "tests/rollout/test_transformers.py",
    ),
    Mutant(
        "rollout/engine.py",
        "derive(seed, seen[prompt], *prompt)",
        "derive(seed, *prompt)",
        "tests/rollout/test_transformers.py",
    ),
]


def survives(mutant: Mutant, copy: Path) -> bool:
    """Plants the mutant in a copy of the project and returns whether its tests still pass."""
    file = copy / "ogls" / mutant.file
    whole = file.read_text()
    if whole.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has {whole.count(mutant.old)} times, instead of once: {mutant.old!r}")
    file.write_text(whole.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "not slow and not torture"], cwd=copy, env=environment, capture_output=True, text=True
        )
    finally:
        file.write_text(whole)
    if done.returncode not in (0, 1, 2):  # 2: the fault shows as early as at import
        raise SystemExit(f"the tests of a mutant could not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="word in the name of the changed file; default: all")
    parser.add_argument("--workers", type=int, default=2, help="mutants that are tried side by side; default: 2")
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.file]
    begun = time.monotonic()
    with TemporaryDirectory(prefix="ogls-mutants-") as folder, ThreadPoolExecutor(given.workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(given.workers):
            copy = Path(folder) / str(number)
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, copy / name)
            copies.put(copy)

        def tried(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                alive = survives(mutant, copy)
            finally:
                copies.put(copy)
            print(f"{'SURVIVES' if alive else 'killed  '}  {mutant.file}: {mutant.new.strip()}", flush=True)
            return alive

        alive = [mutant for mutant, lives in zip(chosen, pool.map(tried, chosen), strict=True) if lives]
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{len(chosen) - len(alive)} of {len(chosen)} mutants killed in {minutes:.0f} min")
    for mutant in alive:
        print(f"\nogls/{mutant.file}, {mutant.tests} pass:\n-{mutant.old}\n+{mutant.new}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
