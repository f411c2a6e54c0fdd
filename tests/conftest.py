"""Models for the tests: a tiny one made on the spot, and the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.table import (
    pytest_addoption,
    pytest_deselected,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from hypothesis import settings
from random_models import write_model

from tests.faults.nursery import Nursery

__all__ = [
    "pytest_addoption",
    "pytest_deselected",
    "pytest_runtest_logreport",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
]

settings.register_profile("patient", deadline=None)  # a machine may have other work
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama that both engines and the policy can load."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model for the same tokens, with a head of its own that has 32 rows of padding."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 352, "tie_word_embeddings": False}
    return write_model(tmp_path_factory.mktemp("models") / "wide-llama", **sizes)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Folder of the embedded language model; it is dequantised once into the cache."""
    from ogls.policy.pretrained import EMBEDDED, resolve_model

    return resolve_model(EMBEDDED)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making MLflow's tables takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks processes that may be killed."""
    made = Nursery()
    yield made
    made.close()
