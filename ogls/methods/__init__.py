"""A paper, a file: methods as presets of their choices. Importing this package makes all of them known by name."""

from ogls.methods.base import Method
from ogls.methods.grpo import GRPO, GRPOWithKL
from ogls.methods.mixtures import GRPO_OGLS_SD
from ogls.methods.ogls_sd import OGLS_SD, BudgetedOGLS_SD, OGLS_SD_v2, PositiveMeanTeacher, PositiveOnlySteering
from ogls.methods.opsd import OPSD
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
from ogls.methods.sdpo import SDPO, SRPO
from ogls.methods.sft import SFT

__all__ = [
    "GRPO",
    "GRPO_OGLS_SD",
    "OGLS_SD",
    "OPSD",
    "RLCSD",
    "ROSD",
    "SDPO",
    "SFT",
    "SRPO",
    "BudgetedOGLS_SD",
    "GRPOWithKL",
    "Method",
    "OGLS_SD_v2",
    "PositiveMeanTeacher",
    "PositiveOnlySteering",
    "ROSDExact",
    "ROSDIdeaOnly",
    "ROSDPlaceOnly",
    "ROSDRandomPlace",
    "ROSDShifted",
    "ROSDShuffled",
    "ROSDWithoutReflector",
]
