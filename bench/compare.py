"""One thing done by several implementations: each tried alone for agreement and memory, then all timed side by side."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .cases import Case
from .competitors import OURS, Step, Target, label
from .measure import Limits, Timing, Trial, spread, time_interleaved, try_alone

Builder = Callable[[Case, Target], Step]
TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}
HEADER = (
    "| what | implementation | forward ms | backward ms | total ms (p20-p80) | x time | peak MiB | x memory |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|"
)


def compare(what: str, builders: Mapping[str, Builder], case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation. One that fails or disagrees with ours is named, with the reason and without a time."""
    target = Target(torch.device(arguments.device), getattr(torch, arguments.dtype))
    builders = {
        name: build
        for name, build in builders.items()
        if name == OURS or (name in arguments.only if arguments.only else not (arguments.quick and "compile" in name))
    }
    memory_limit = int(arguments.memory_limit * 2**30) if arguments.memory_limit else None
    limits = Limits(arguments.time_limit, memory_limit, runs=1 if arguments.quick else 3)
    trials = {name: try_alone(limits, build, case, target) for name, build in builders.items()}
    ours = trials[OURS]
    if ours.result is None:
        raise SystemExit(f"{what}: {OURS} failed: {ours.failure}")
    trials = {name: check(trial, ours.result, TOLERANCE[arguments.dtype]) for name, trial in trials.items()}
    steps = {name: builders[name](case, target) for name, trial in trials.items() if trial.failure is None}
    timings = time_interleaved(steps, 3 if arguments.quick else arguments.rounds)
    return [_row(what, name, trials[name], timings.get(name), ours, timings[OURS]) for name in builders]


def check(trial: Trial, expected: float, tolerance: float) -> Trial:
    """Turn a trial whose result is not ours into a failure: no speed without agreement."""
    if trial.result is None or abs(trial.result - expected) <= tolerance * abs(expected):
        return trial
    return Trial(failure=f"gives {trial.result:.7g}, ours {expected:.7g}")


def markdown(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['what']} | {row['name']} | {row['failure']} ||||||"
    forward, backward = row["forward"], row["backward"]
    total, p20, p80 = spread([f + b for f, b in zip(forward, backward, strict=True)])
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] is not None else ""
    times_memory = f"{row['x_memory']:.1f}" if row["x_memory"] else ""
    return (
        f"| {row['what']} | {row['name']} | {1e3 * spread(forward)[0]:.1f} | {1e3 * spread(backward)[0]:.1f} "
        f"| {1e3 * total:.1f} ({1e3 * p20:.1f}-{1e3 * p80:.1f}) | {row['x_time']:.1f} | {peak} | {times_memory} |"
    )


def _row(what: str, name: str, trial: Trial, timing: Timing | None, ours: Trial, our_timing: Timing) -> dict[str, Any]:
    return {
        "what": what,
        "name": label(name),
        "failure": trial.failure,
        "result": trial.result,
        "peak_bytes": trial.peak_bytes,
        "forward": timing and timing.forward,
        "backward": timing and timing.backward,
        "x_time": timing and spread(timing.total)[0] / spread(our_timing.total)[0],
        "x_memory": trial.peak_bytes / ours.peak_bytes if trial.peak_bytes and ours.peak_bytes else None,
    }
