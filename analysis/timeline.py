"""When each phase of a run's steps ran, as a picture: what waits for what, and what a faster step has to shorten.

    python analysis/timeline.py runs/NAME                     (up to five steps after the last validation)
    python analysis/timeline.py runs/NAME --steps 1 3

Below the timeline is what each half of the step spent that time on. Writes timeline.png beside the trace.json that it
is made from, which https://ui.perfetto.dev and chrome://tracing open as it is.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from style import COLORS, GREY, panels, save

from ogls.records import Phase
from ogls.tracking.files import TRACE, read_trace

PHASES = {
    "sync": COLORS[7],
    "generate": COLORS[0],
    "grade": COLORS[5],
    "reflect": COLORS[3],
    "lessons": "#9e9ac8",
    "wait": "#d9d9d9",
    "teacher": COLORS[1],
    "student": COLORS[4],
    "diagnostics": "#f0e442",
    "optimizer": COLORS[2],
    "validate": COLORS[6],
}
LANES = ("training", "rollouts")  # upwards
Step = tuple[int, float, float]  # its number, beginning and end


def steps_of(intervals: Sequence[Phase]) -> list[Step]:
    """A step ends with its training; it begins where the one before, or the validation after that, has ended."""
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    for i in sorted(intervals, key=lambda i: i.end):
        if i.lane == "training":
            begins[i.step + 1] = i.end
            if i.phase != "validate":
                ends[i.step] = i.end
    first = min(ends, default=0)
    begins.setdefault(first, min((i.start for i in intervals if i.step == first), default=0.0))
    return [(step, begins.get(step, ends[step]), ends[step]) for step in sorted(ends)]


def within(intervals: Sequence[Phase], begin: float, end: float) -> list[Phase]:
    """What ran between two times, cut to fit."""
    cut = [replace(i, start=max(i.start, begin), end=min(i.end, end)) for i in intervals]
    return [i for i in cut if i.end > i.start]


def seconds(intervals: Sequence[Phase], lane: str) -> dict[str, float]:
    """Of each phase in a lane."""
    total: dict[str, float] = defaultdict(float)
    for i in intervals:
        if i.lane == lane:
            total[i.phase] += i.end - i.start
    return dict(total)


def overlap(intervals: Sequence[Phase]) -> float:
    """Seconds in which both lanes work."""
    working = {lane: [i for i in intervals if i.lane == lane and i.phase != "wait"] for lane in LANES}
    pairs = ((a, b) for a in working["training"] for b in working["rollouts"])
    return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a, b in pairs)


def draw_lanes(axes: Axes, intervals: Sequence[Phase], steps: Sequence[Step]) -> None:
    begin, width = steps[0][1], steps[-1][2] - steps[0][1]
    for step, left, right in steps:
        axes.axvspan(left - begin, right - begin, color="#e4e4e4" if step % 2 else "#f3f3f3", linewidth=0, zorder=0)
        name = f"step {step}" if right - left > 0.05 * width else str(step)
        axes.text((left + right) / 2 - begin, 1.52, name, ha="center", va="bottom", fontsize=9)
    ahead = overlap(intervals) > 0.01 * width
    for i in intervals:
        at, length = LANES.index(i.lane), i.end - i.start
        axes.barh(at, length, left=i.start - begin, height=0.72, color=PHASES.get(i.phase, GREY), linewidth=0)
        if length > 0.035 * width:
            text = f"{length:.1f} s" + (f"\nfor {i.step}" if ahead and i.lane == "rollouts" else "")
            axes.text((i.start + i.end) / 2 - begin, at, text, ha="center", va="center", fontsize=8, color="white")
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlim(0, width)
    axes.set_xlabel("seconds")


def draw_shares(axes: Axes, intervals: Sequence[Phase], whole: float) -> None:
    for at, lane in enumerate(LANES):
        spent, left = seconds(intervals, lane), 0.0
        for phase in [*PHASES, *sorted(spent.keys() - PHASES)]:
            share = 100 * spent.get(phase, 0.0) / whole
            axes.barh(at, share, left=left, height=0.72, color=PHASES.get(phase, GREY), linewidth=0)
            if share > 3:
                axes.text(left + share / 2, at, f"{share:.0f} %", ha="center", va="center", fontsize=8, color="white")
            left += share
        if left < 95:
            axes.text(
                (left + 100) / 2, at, f"idle {100 - left:.0f} %", ha="center", va="center", fontsize=8, color=GREY
            )
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the steps' time, %")


def draw(intervals: Sequence[Phase], steps: Sequence[Step], name: str, file: Path) -> str:
    """Writes the picture; returns its title, which sums it up. Validations between the steps count for no step."""
    shown = within(intervals, steps[0][1], steps[-1][2])
    counted = [i for _, begin, end in steps for i in within(shown, begin, end)]
    whole = sum(end - begin for _, begin, end in steps)
    busy = {lane: sum(v for phase, v in seconds(counted, lane).items() if phase != "wait") / whole for lane in LANES}
    title = (
        f"{name}: {whole / len(steps):.1f} s a step, of which rollouts {busy['rollouts']:.0%}, "
        f"training {busy['training']:.0%}, both at once {overlap(counted) / whole:.0%}"
    )
    figure, (lanes, shares) = panels(2, 1, width=11.0, height=5.0)
    for axes in (lanes, shares):
        axes.grid(visible=False)
        axes.set_yticks(range(len(LANES)), LANES)
    draw_lanes(lanes, shown, steps)
    draw_shares(shares, counted, whole)
    there = {i.phase for i in shown}
    order = [phase for phase in [*PHASES, *sorted(there - PHASES.keys())] if phase in there]
    handles = [Patch(color=PHASES.get(phase, GREY), label=phase) for phase in order]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, file)
    return title


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--steps", nargs=2, type=int, metavar=("FIRST", "LAST"), help="default: the last five")
    parser.add_argument("--out", type=Path, help="default: timeline.png in the run's folder")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "timeline.png"
    try:
        intervals = read_trace(options.run / TRACE)
        steps = steps_of(intervals)
        if not steps:
            raise ValueError(f"{options.run / TRACE} has no step yet")
        last = steps[-1][0]
        validated = max((i.step for i in intervals if i.phase == "validate" and i.step < last), default=0)
        first, last = options.steps or (max(last - 4, validated + 1), last)
        chosen = [step for step in steps if first <= step[0] <= last]
        if not chosen:
            raise ValueError(f"no step from {first} to {last}: the trace has {steps[0][0]} to {steps[-1][0]}")
        print(draw(intervals, chosen, options.run.resolve().name, out))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
