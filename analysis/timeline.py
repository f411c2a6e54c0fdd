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


def steps_of(phases: Sequence[Phase]) -> list[Step]:
    """Returns the steps. A step ends with its training; it begins where the one before, or a validation, has ended."""
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    for p in sorted(phases, key=lambda p: p.end):
        if p.lane == "training":
            begins[p.step + 1] = p.end
            if p.name != "validate":
                ends[p.step] = p.end
    first = min(ends, default=0)
    begins.setdefault(first, min((p.start for p in phases if p.step == first), default=0.0))
    return [(step, begins.get(step, ends[step]), ends[step]) for step in sorted(ends)]


def within(phases: Sequence[Phase], begin: float, end: float) -> list[Phase]:
    """Returns what ran between two times, cut to fit."""
    cut = [replace(p, start=max(p.start, begin), end=min(p.end, end)) for p in phases]
    return [p for p in cut if p.end > p.start]


def seconds(phases: Sequence[Phase], lane: str) -> dict[str, float]:
    """Returns the seconds of a lane by the name of the phase."""
    total: dict[str, float] = defaultdict(float)
    for p in phases:
        if p.lane == lane:
            total[p.name] += p.end - p.start
    return dict(total)


def overlap(phases: Sequence[Phase]) -> float:
    """Returns the seconds in which both lanes work."""
    working = {lane: [p for p in phases if p.lane == lane and p.name != "wait"] for lane in LANES}
    pairs = ((a, b) for a in working["training"] for b in working["rollouts"])
    return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a, b in pairs)


def draw_lanes(axes: Axes, phases: Sequence[Phase], steps: Sequence[Step]) -> None:
    begin, width = steps[0][1], steps[-1][2] - steps[0][1]
    for step, left, right in steps:
        axes.axvspan(left - begin, right - begin, color="#e4e4e4" if step % 2 else "#f3f3f3", linewidth=0, zorder=0)
        name = f"step {step}" if right - left > 0.05 * width else str(step)
        axes.text((left + right) / 2 - begin, 1.52, name, ha="center", va="bottom", fontsize=9)
    ahead = overlap(phases) > 0.01 * width
    for p in phases:
        at, length = LANES.index(p.lane), p.end - p.start
        axes.barh(at, length, left=p.start - begin, height=0.72, color=PHASES.get(p.name, GREY), linewidth=0)
        if length > 0.035 * width:
            text = f"{length:.1f} s" + (f"\nfor {p.step}" if ahead and p.lane == "rollouts" else "")
            axes.text((p.start + p.end) / 2 - begin, at, text, ha="center", va="center", fontsize=8, color="white")
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlim(0, width)
    axes.set_xlabel("seconds")


def draw_shares(axes: Axes, phases: Sequence[Phase], whole: float) -> None:
    for at, lane in enumerate(LANES):
        spent, left = seconds(phases, lane), 0.0
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


def draw(phases: Sequence[Phase], steps: Sequence[Step], name: str, file: Path) -> str:
    """Writes the picture and returns its title. Validations between the steps count for no step."""
    shown = within(phases, steps[0][1], steps[-1][2])
    counted = [p for _, begin, end in steps for p in within(shown, begin, end)]
    whole = sum(end - begin for _, begin, end in steps)
    busy = {lane: sum(v for phase, v in seconds(counted, lane).items() if phase != "wait") / whole for lane in LANES}
    title = (
        f"{name}: {whole / len(steps):.1f} s per step, of which rollouts {busy['rollouts']:.0%}, "
        f"training {busy['training']:.0%}, both at once {overlap(counted) / whole:.0%}"
    )
    figure, (lanes, shares) = panels(2, 1, width=11.0, height=5.0)
    for axes in (lanes, shares):
        axes.grid(visible=False)
        axes.set_yticks(range(len(LANES)), LANES)
    draw_lanes(lanes, shown, steps)
    draw_shares(shares, counted, whole)
    there = {p.name for p in shown}
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
        phases = read_trace(options.run / TRACE)
        steps = steps_of(phases)
        if not steps:
            raise ValueError(f"{options.run / TRACE} has no step yet")
        last = steps[-1][0]
        validated = max((p.step for p in phases if p.name == "validate" and p.step < last), default=0)
        first, last = options.steps or (max(last - 4, validated + 1), last)
        chosen = [step for step in steps if first <= step[0] <= last]
        if not chosen:
            raise ValueError(f"no step from {first} to {last}: the trace has {steps[0][0]} to {steps[-1][0]}")
        print(draw(phases, chosen, options.run.resolve().name, out))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
