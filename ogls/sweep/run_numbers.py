"""A run's numbers so far are read from the file that it writes."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

from ogls.tracking.files import SUBSET, WHOLE, accuracies


class RunNumbers:
    """RunNumbers reads `metrics.jsonl` of one run as it grows.

    A run that goes on from a checkpoint writes the file anew without the steps that it makes again, or adds to it. Of
    several lines of one step, the last one counts. A line that a kill has cut short is passed over.

    Args:
        file: path of metrics.jsonl, which need not exist yet
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written, self._read = 0, 0  # which file of this name, and how much of it
        self._series: dict[str, dict[int, float]] = {}

    def update(self) -> RunNumbers:
        """Reads the lines that were added since the last call, and returns the object itself."""
        if not self._file.exists():
            return self
        with self._file.open("rb") as file:
            written = os.fstat(file.fileno()).st_ino
            if written != self._written:
                self._written, self._read, self._series = written, 0, {}
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                self._read += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                for name, value in row.items():
                    if name not in ("step", "time"):
                        self._series.setdefault(name, {})[int(row["step"])] = float(value)
        return self

    @property
    def step(self) -> int:
        """Returns the latest step of any metric; 0 where there is none yet."""
        return max((max(series) for series in self._series.values()), default=0)

    @property
    def finished(self) -> bool:
        """Returns whether the run came to its end, where it repeats its last validation as `final/...`."""
        return any(name.startswith("final/") for name in self._series)

    @property
    def accuracy(self) -> dict[int, float]:
        """Returns avg@k by step of the held-out problems that every validation samples, all or a subset."""
        return self._named(SUBSET) or self._named(WHOLE)

    @property
    def finals(self) -> dict[str, float]:
        """Returns what the run measured at its end, ``final/avg_at_4`` among it; empty before that."""
        return {name: series[max(series)] for name, series in self._series.items() if name.startswith("final/")}

    @property
    def accuracies(self) -> list[str]:
        """Returns the names of the accuracies, that of whole validations first."""
        return accuracies(self._series)

    @property
    def final_accuracy(self) -> float:
        """Returns the latest avg@k of all held-out problems. Raises ValueError where there is none."""
        return self._ending(self._named(WHOLE), "val/avg_at_k")

    def _named(self, pattern: re.Pattern[str]) -> dict[int, float]:
        return next((series for name, series in self._series.items() if pattern.fullmatch(name)), {})

    def last(self, name: str) -> float:
        """Returns the latest value of a metric. Raises ValueError where there is none."""
        return self._ending(self._series.get(name, {}), name)

    def recent(self, name: str, rows: int = 10) -> float:
        """Returns the mean of the latest `rows` values of a metric, since values of single steps are noisy."""
        self.last(name)
        values = [value for _, value in sorted(self._series[name].items())][-rows:]
        return math.fsum(values) / len(values)

    def _ending(self, series: dict[int, float], name: str) -> float:
        if not series:
            raise ValueError(f"{self._file} has no {name}")
        return series[max(series)]

    def not_finite(self) -> str | None:
        """Returns where the accuracy is not a finite number, as a message; None where it always is."""
        for step, value in sorted(self.accuracy.items()):
            if not math.isfinite(value):
                return f"accuracy is {value} at step {step}"
        return None
