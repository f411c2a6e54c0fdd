"""A class checks the ranges of its own numbers, and every refusal reads alike.

Upper ends are far above all that has been published: they catch slips of the keyboard, such as 1e3 for 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POSITIVE = "(0, 1e6]"
TEMPERATURE = "[0.01, 100]"  # below it logits overflow, and the likeliest token is all there is
STRENGTH = "[0, 1000]"  # of a steering


def within(name: str, value: float | None, interval: str) -> None:
    """Raises ValueError unless a number is in an interval; neither nan nor an infinity ever is.

    Args:
        name: name of the setting in the message
        value: number to check; None is a setting that is off
        interval: ends of the interval, such as ``(0, 0.1]``, where a square bracket takes its end in
    """
    if value is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def check(owner: Any, intervals: Mapping[str, str], where: str = "") -> None:
    """Raises ValueError unless the attributes of an object are in their intervals.

    Args:
        owner: object whose attributes are checked
        intervals: interval by the attribute's name
        where: words before the name in the message; the name of the object's class where there are none
    """
    for name, interval in intervals.items():
        within(f"{where or type(owner).__name__}.{name}", getattr(owner, name), interval)
