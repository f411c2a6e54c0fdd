"""What a run has measured so far, from the file that it writes."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

_ACCURACY = re.compile(r"val/avg_at_\d+")


class RunNumbers:
    """`metrics.jsonl` of one run, read as it grows.

    A run that goes on from a checkpoint writes the file anew, without the steps that are to be made again, or adds to
    it: the later line of a step holds. A line that a kill has cut short is passed over.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written, self._read = 0, 0  # which file of this name, and how much of it
        self._series: dict[str, dict[int, float]] = {}

    def update(self) -> RunNumbers:
        """Reads the lines that have come since."""
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
        """The latest step of any metric; 0 before all of them."""
        return max((max(series) for series in self._series.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: its last validation is repeated as `final/...` there."""
        return any(name.startswith("final/") for name in self._series)

    @property
    def accuracy(self) -> dict[int, float]:
        """avg@k of the held-out problems by step."""
        return next((series for name, series in self._series.items() if _ACCURACY.fullmatch(name)), {})

    @property
    def final_accuracy(self) -> float:
        """avg@k at the run's end."""
        return self._ending(self.accuracy, "val/avg_at_k")

    def last(self, name: str) -> float:
        """The latest value of a metric."""
        return self._ending(self._series.get(name, {}), name)

    def recent(self, name: str, rows: int = 10) -> float:
        """The mean of the latest values: those of single steps are noisy."""
        self.last(name)
        values = [value for _, value in sorted(self._series[name].items())][-rows:]
        return math.fsum(values) / len(values)

    def _ending(self, series: dict[int, float], name: str) -> float:
        if not series:
            raise ValueError(f"{self._file} has no {name}")
        return series[max(series)]

    def not_finite(self) -> str | None:
        """Where the accuracy is not a number."""
        for step, value in sorted(self.accuracy.items()):
            if not math.isfinite(value):
                return f"accuracy is {value} at step {step}"
        return None
