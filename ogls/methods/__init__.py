"""Each file is a paper, whose methods are presets of independent choices.

Importing this package makes all methods known by name.
"""

from ogls.methods.base import Method
from ogls.methods.grpo import GRPO, GRPOWithKL
from ogls.methods.high_entropy import HighEntropyOPSD
from ogls.methods.mixtures import GRPO_OGLS_SD
from ogls.methods.ogls_sd import OGLS_SD, BudgetedOGLS_SD, OGLS_SD_v2, PositiveMeanTeacher, PositiveOnlySteering
from ogls.methods.on_policy_distillation import OnPolicyDistillation
from ogls.methods.opsd import OPSD
from ogls.methods.opsd_ectr import OPSD_ECTR
from ogls.methods.rlcsd import RLCSD
from ogls.methods.rosd import (
    ROSD,
    ROSDExact,
    ROSDIdeaOnly,
    ROSDPlaceOnly,
    ROSDRandomPlace,
    ROSDShifted,
    ROSDShuffled,
    ROSDWithoutReflector,
)
from ogls.methods.sampled_token import SampledTokenOPSD
from ogls.methods.sd_zero import SDZero
from ogls.methods.sdpo import SDPO, SRPO, SDPOWithFeedback
from ogls.methods.sft import SFT
from ogls.methods.ssopd import SSOPD
from ogls.methods.tip import TIP
from ogls.methods.u_opsd import U_OPSD

__all__ = [
    "GRPO",
    "GRPO_OGLS_SD",
    "OGLS_SD",
    "OPSD",
    "OPSD_ECTR",
    "RLCSD",
    "ROSD",
    "SDPO",
    "SFT",
    "SRPO",
    "SSOPD",
    "TIP",
    "U_OPSD",
    "BudgetedOGLS_SD",
    "GRPOWithKL",
    "HighEntropyOPSD",
    "Method",
    "OGLS_SD_v2",
    "OnPolicyDistillation",
    "PositiveMeanTeacher",
    "PositiveOnlySteering",
    "ROSDExact",
    "ROSDIdeaOnly",
    "ROSDPlaceOnly",
    "ROSDRandomPlace",
    "ROSDShifted",
    "ROSDShuffled",
    "ROSDWithoutReflector",
    "SDPOWithFeedback",
    "SDZero",
    "SampledTokenOPSD",
]
