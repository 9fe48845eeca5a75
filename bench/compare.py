"""One thing done by several implementations: each tried alone for agreement and memory, then all timed side by side."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from .cases import Case
from .competitors import OURS, Step, Target, label
from .measure import Limits, Timing, Trial, spread, time_interleaved, try_alone

Builder = Callable[[Case, Target], Step]
TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}
HEADER = (
    "| what | implementation | forward ms | backward ms | total ms (p20-p80) | x time "
    "| GB/s | of a copy | peak MiB | x memory | off float64 by |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


class ComparisonError(Exception):
    """Ours gives nothing to compare with."""


def compare(what: str, builders: Mapping[str, Builder], case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation. One that fails or has another definition is named, with the reason and without a time."""
    target = Target(torch.device(arguments.device), getattr(torch, arguments.dtype))
    builders = {name: build for name, build in builders.items() if is_wanted(name, arguments)}
    memory_limit = int(arguments.memory_limit * 2**30) if arguments.memory_limit else None
    limits = Limits(arguments.time_limit, memory_limit, runs=1 if arguments.quick else 3)
    exact = try_alone(limits, builders[OURS], case, target._replace(dtype=torch.float64, rounded_to=target.dtype))
    if exact.result is None:
        raise ComparisonError(f"{what}: {OURS} failed in float64: {exact.failure}")
    alone = tqdm(builders.items(), f"{what}: memory", leave=False, disable=None)
    trials = {name: _try(limits, name, build, case, target, exact.result) for name, build in alone}
    ours = trials[OURS]
    if ours.failure is not None:
        raise ComparisonError(f"{what}: {OURS} failed: {ours.failure}")
    steps = {name: builders[name](case, target) for name, trial in trials.items() if trial.failure is None}
    timings = time_interleaved(steps, 3 if arguments.quick else arguments.rounds)
    shared = {"exact": exact.result, "least_bytes": steps[OURS].least_bytes, "copy_bandwidth": arguments.copy_bandwidth}
    return [{**_row(what, name, trials[name], timings.get(name), ours, timings[OURS]), **shared} for name in builders]


def _try(limits: Limits, name: str, build: Builder, case: Case, target: Target, exact: float) -> Trial:
    """Try an implementation. In half precision its arithmetic may be far off; its definition shows in float32."""
    trial = try_alone(limits, build, case, target)
    is_half = target.dtype.itemsize == 2
    if trial.failure is not None or not is_half or name.partition(" ")[0] == OURS:
        return check(trial, exact, TOLERANCE[str(target.dtype).removeprefix("torch.")])
    definition = try_alone(limits._replace(runs=1), build, case, Target(target.device, torch.float32, target.dtype))
    failure = check(definition, exact, TOLERANCE["float32"]).failure
    return trial if failure is None else Trial(failure=failure)


def is_wanted(name: str, arguments: argparse.Namespace) -> bool:
    """Ours always, a way to run it on request, and the others if they are named or none is; compiled ones take minutes."""
    if name == OURS:
        return True
    if OURS in name:
        return bool(arguments.cuda_graph if "graph" in name else arguments.compile)
    return name in arguments.only if arguments.only else not (arguments.quick and "compile" in name)


def check(trial: Trial, expected: float, tolerance: float) -> Trial:
    """Turn a trial whose result is another into a failure: no speed without agreement."""
    if trial.result is None or abs(trial.result - expected) <= tolerance * abs(expected):
        return trial
    return Trial(failure=f"gives {trial.result:.7g}, not {expected:.7g}")


def markdown(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['what']} | {row['name']} | {row['failure']} |||||||||"
    forward, backward = row["forward"], row["backward"]
    total, p20, p80 = spread([f + b for f, b in zip(forward, backward, strict=True)])
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] is not None else ""
    times_memory = f"{row['x_memory']:.1f}" if row["x_memory"] else ""
    speed = share = ""
    if least := row.get("least_bytes"):
        speed, share = f"{least / total / 1e9:.1f}", f"{100 * least / total / row['copy_bandwidth']:.0f} %"
    error = f"{abs(row['result'] / row['exact'] - 1):.1e}" if row.get("exact") else ""
    parts = [milliseconds(seconds) for seconds in (spread(forward)[0], spread(backward)[0], total, p20, p80)]
    return (
        f"| {row['what']} | {row['name']} | {parts[0]} | {parts[1]} | {parts[2]} ({parts[3]}-{parts[4]}) | {row['x_time']:.1f} "
        f"| {speed} | {share} | {peak} | {times_memory} | {error} |"
    )


def milliseconds(seconds: float) -> str:
    """Three digits, of what a GPU takes too."""
    return f"{1e3 * seconds:.1f}" if seconds >= 0.01 or seconds == 0 else f"{1e3 * seconds:.3f}"


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
