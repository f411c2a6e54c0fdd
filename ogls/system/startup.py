"""torchmetrics loads without its metrics until one of them is asked for.

Lightning needs two classes of torchmetrics. That package's first import loads every metric, and with them transformers,
scikit-learn, scipy and pandas, which takes half of the time from a command to its first output. Here the module at
first has the two classes alone. Any other name that is asked for loads the whole module, once and unchanged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any


class LazyTorchmetrics(MetaPathFinder, Loader):
    """This finder finds torchmetrics, once, and loads its core."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        whole = self._loader
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = whole

        def __getattr__(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")
            del module.__dict__["__getattr__"]
            whole.exec_module(module)
            return getattr(module, name)

        module.__dict__.update(__version__=version("torchmetrics"), _logger=logging.getLogger("torchmetrics"))
        import torchmetrics.utilities  # noqa: F401 - comes before the classes, which it imports
        from torchmetrics.collections import MetricCollection
        from torchmetrics.metric import Metric

        module.__dict__.update(Metric=Metric, MetricCollection=MetricCollection, __getattr__=__getattr__)


def defer_torchmetrics() -> None:
    """Has torchmetrics load its core alone at its first import, which has to come later than this call."""
    if "torchmetrics" not in sys.modules:
        sys.meta_path.insert(0, LazyTorchmetrics())
