"""ROSD: reflect on where a rollout went wrong, and distil from there on under the idea that would have helped."""

from ogls.reflection.base import Case, Means, Reflector
from ogls.reflection.chains import ChainReflector
from ogls.reflection.model import ModelReflector
from ogls.reflection.privilege import CorrectiveIdea, LocatedSolution

__all__ = ["Case", "ChainReflector", "CorrectiveIdea", "LocatedSolution", "Means", "ModelReflector", "Reflector"]
