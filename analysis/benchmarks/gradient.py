"""Error of the loss's bf16 gradient on a trained model, against the same states through a head in fp64.

    python analysis/benchmarks/gradient.py                 # the embedded model after its cold start, arithmetic chains
    python analysis/benchmarks/gradient.py --model Qwen/Qwen3-0.6B --adapter ''

Student and target are final-norm states of the model's own bf16 trunk, on worked solutions of chains:

    plain        target = the student's start, student = the same after a small random change of its adapter
    privileged   target = the model that reads the solution, student = the model that does not

Compared are the difference form (the product's), two bf16 products rounded apart, and two bf16 products with fp32
results. The error is |g - g_exact| / |g_exact| over all tokens; `worst token` is the largest of single tokens among
those whose gradient is not tiny. There is no clock here, so a busy machine does not matter.
"""

from __future__ import annotations

import torch
from harness import announce, log, parser
from torch import Tensor

from ogls.lessons.prompts import ATTEMPT, PromptEncoder, Prompts
from ogls.loss.chunked import chunked_divergence
from ogls.loss.divergence import ForwardKL, JensenShannon, ReverseKL
from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.policy.pretrained import EMBEDDED
from ogls.tasks.chains import Chains

DIVERGENCES = {"forward KL": ForwardKL(), "reverse KL": ReverseKL(), "JSD(0.5)": JensenShannon()}


def states(policy: Policy, encoder: PromptEncoder, num_problems: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns student and target states [tokens, d] and the tokens that they predict [tokens], by case."""
    chains = Chains(size=num_problems, split="heldout", seed=1)
    problems = [chains[i] for i in range(num_problems)]
    solutions = [problem.solution or "" for problem in problems]
    suffixes = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in solutions]
    plain = [encoder.student(problem) for problem in problems]
    told = [encoder.view(problem, ATTEMPT, text) for problem, text in zip(problems, solutions, strict=True)]
    owners = list(range(num_problems))
    with torch.no_grad():
        start = policy.hidden(plain, suffixes, owners)
        privileged = policy.hidden(told, suffixes, owners)
        generator = torch.Generator().manual_seed(0)
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.normal_(std=2e-4, generator=generator)
        moved = policy.hidden(plain, suffixes, owners)
    ids = torch.tensor([token for suffix in suffixes for token in suffix])
    return {"plain": (moved, start, ids), "privileged": (start, privileged, ids)}


def exact(student: Tensor, target: Tensor, weight: Tensor, divergence: object) -> tuple[Tensor, Tensor]:
    return gradient(student.double(), target.double(), weight.double(), divergence)


def gradient(
    student: Tensor, target: Tensor, weight: Tensor, divergence: object, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns value and gradient by the product's kernel."""
    student = student.detach().requires_grad_()
    values, _ = chunked_divergence(student, target, weight, None, divergence, token_ids=ids)  # pyright: ignore
    (found,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), found


def apart(student: Tensor, target: Tensor, weight: Tensor, divergence: object, rounded: bool) -> Tensor:
    """Returns the gradient where each side has its own logits, in bf16 (`rounded`) or as fp32 sums of bf16 products."""
    logits = [(h @ weight.T).float() if rounded else h.float() @ weight.float().T for h in (student, target)]
    z = logits[0].requires_grad_()
    log_p, log_q = z.log_softmax(-1), logits[1].log_softmax(-1)
    summand, ph = divergence.terms(log_p.exp(), log_q.exp(), log_q - log_p)  # pyright: ignore
    del summand
    dz = ph - log_p.exp() * ph.sum(-1, keepdim=True)
    return dz.detach().to(weight.dtype) @ weight


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", default=EMBEDDED)
    options.add_argument("--adapter", default="experiments/cold_start")
    options.add_argument("--problems", type=int, default=8)
    args = options.parse_args()
    announce(args)
    policy = Policy(args.model, args.adapter or None, lora=Lora()).load()
    encoder = PromptEncoder(Prompts(system=""), policy.tokenizer)
    weight, bias = policy.head
    assert bias is None
    figures: dict[str, float] = {}
    print(f"\n{'':26}{'nats':>9}{'difference':>13}{'worst token':>13}{'bf16 apart':>12}{'fp32 apart':>12}")
    for case, (student, target, ids) in states(policy, encoder, args.problems).items():
        for name, divergence in DIVERGENCES.items():
            values, truth = exact(student, target, weight, divergence)
            _, ours = gradient(student, target, weight, divergence, ids)
            sides = {
                "difference": ours,
                "bf16 apart": apart(student, target, weight, divergence, rounded=True),
                "fp32 apart": apart(student, target, weight, divergence, rounded=False),
            }
            errors = {side: float((g.double() - truth).norm() / truth.norm()) for side, g in sides.items()}
            size = truth.norm(dim=-1)
            clear = size > 1e-3 * size.max()
            worst = float(((ours.double() - truth).norm(dim=-1) / size)[clear].max())
            print(
                f"{case + ', ' + name:26}{float(values.mean()):9.5f}{errors['difference']:13.2%}{worst:13.2%}"
                f"{errors['bf16 apart']:12.2%}{errors['fp32 apart']:12.2%}"
            )
            figures |= {f"{case}/{name}/{side}": error for side, error in errors.items()}
            figures |= {f"{case}/{name}/worst token": worst, f"{case}/{name}/nats": float(values.mean())}
    log("gradient", figures, args)


if __name__ == "__main__":
    main()
