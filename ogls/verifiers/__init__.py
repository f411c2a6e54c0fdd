"""Verifiers: is the answer that a text gives the right one?"""

from ogls.verifiers.base import Verifier
from ogls.verifiers.by_kind import ByKind
from ogls.verifiers.choice import ChoiceVerifier
from ogls.verifiers.gold import unverifiable_gold, verify_gold
from ogls.verifiers.math import MathVerifier
from ogls.verifiers.reasoning_gym import ReasoningGymVerifier
from ogls.verifiers.tool_use import ToolUseVerifier

__all__ = [
    "ByKind",
    "ChoiceVerifier",
    "MathVerifier",
    "ReasoningGymVerifier",
    "ToolUseVerifier",
    "Verifier",
    "unverifiable_gold",
    "verify_gold",
]
