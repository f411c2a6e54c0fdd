"""On-policy self-distillation of language models: OGLS-SD, ROSD, OPSD, SDPO and their ablations over one trainer.

Names are loaded when they are first used, so that ``import ogls`` takes no time. Start with `SelfDistillation`,
`RolloutDataModule`, `Policy` and a method such as `OPSD`; `make_trainer` gives Lightning's Trainer, `fit` trains.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_METHODS = """
    BudgetedOGLS_SD GRPO GRPO_OGLS_SD GRPOWithKL HighEntropyOPSD Method OGLS_SD OGLS_SD_v2 OnPolicyDistillation OPSD
    OPSD_ECTR PositiveMeanTeacher PositiveOnlySteering RLCSD ROSD ROSDExact ROSDIdeaOnly ROSDPlaceOnly
    ROSDRandomPlace ROSDShifted ROSDShuffled ROSDWithoutReflector SampledTokenOPSD SDPO SDPOWithFeedback SDZero SFT
    SRPO SSOPD TIP U_OPSD
"""
_PLACES = {
    "ogls.methods": _METHODS,
    "ogls.module": "SelfDistillation",
    "ogls.data": "RolloutDataModule",
    "ogls.training": "fit make_trainer",
    "ogls.policy.policy": "Policy",
    "ogls.policy.lora": "Lora",
    "ogls.policy.teacher": "EMA Frozen Live OtherModel Teacher TrustRegion",
    "ogls.records": "Sampling",
    "ogls.tasks.base": "ErrorLocator Mistake MistakeLocator ProblemSource Verifier",
    "ogls.tasks.chains": "ChainErrors Chains TerseSolutions",
    "ogls.tasks.columns": "Columns",
    "ogls.tasks.families": "Families FamilyErrors",
    "ogls.tasks.tables": "HubProblems JsonlProblems",
    "ogls.tasks.reasoning_gym": "ReasoningGym ReasoningGymVerifier",
    "ogls.tasks.by_kind": "ByKind",
    "ogls.tasks.function": "FunctionVerifier",
    "ogls.tasks.math": "MathVerifier",
    "ogls.tasks.multiple_choice": "ChoiceVerifier",
    "ogls.tasks.tool_use": "ToolUseVerifier",
    "ogls.lessons.prompts": "ATTEMPT FEEDBACK IDEA Prompts Wording",
    "ogls.lessons.privilege": """
        LessonDraft PeerOutcomes Privilege PrivilegedText ProblemAlone ReferenceSolution SuccessfulPeer
    """,
    "ogls.lessons.feedback": "Feedback",
    "ogls.lessons.selection": "AllTokens ErrorSpan FirstTokens FromError LastTokens TokenSelection UpToError",
    "ogls.lessons.advantage": "Advantage GroupRelative",
    "ogls.lessons.reflection.model": "ModelReflector",
    "ogls.lessons.reflection.privilege": "CorrectiveIdea LocatedSolution",
    "ogls.lessons.reflection.reflector": "ReflectionLimits Reflector",
    "ogls.loss.steering": "BoundedSteering OutcomeSteering Plain PositiveMean PositiveOnly Steering Unsteered",
    "ogls.loss.divergence": "Divergence ForwardKL JensenShannon ReverseKL SkewKL",
    "ogls.loss.objective": "Distillation Likelihood Mixture Objective ReferenceKL Term",
    "ogls.loss.topk": "TopK",
    "ogls.loss.weighting": "TokenWeighting",
    "ogls.rollout.engine": "RolloutEngine",
    "ogls.rollout.transformers": "TransformersEngine",
    "ogls.rollout.servers": "VllmServers",
    "ogls.rollout.vllm": "VllmEngine",
    "ogls.rollout.accuracy": "Evaluation Subset",
    "ogls.callbacks": "BestCheckpoint",
    "ogls.tracking": "Tracker",
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names.split()}

__all__ = sorted(_PLACE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'ogls' has no attribute {name!r}")
    return getattr(import_module(_PLACE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
