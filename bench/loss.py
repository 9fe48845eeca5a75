"""Whole criteria, forward and backward: time, ratio and peak memory of each implementation."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .cases import Case, has_coco, make_case
from .competitors import COMPETITORS, OURS, Target, label
from .measure import Limits, Trial, machine, spread, time_interleaved, try_alone

TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}


def run(arguments: argparse.Namespace) -> None:
    data = Path(arguments.data) if arguments.data else None
    boxes = arguments.boxes or ("coco" if has_coco(data) else "lognormal")
    case = make_case(boxes, batch_size=arguments.batch_size, imgsz=arguments.imgsz, num_classes=arguments.classes, data=data)
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(
        f"B={case.batch_size}, {case.imgsz} px, C={case.num_classes}, {len(case.rows)} boxes ({boxes}), "
        f"{arguments.dtype} on {device}, forward + backward\n"
    )
    print("| system | implementation | forward ms | backward ms | total ms (p20-p80) | x time | peak MiB | x memory |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for system in ["yolo11", "yolox"] if arguments.system == "both" else [arguments.system]:
        for row in measure_system(system, case, Target(device, getattr(torch, arguments.dtype)), arguments):
            print(markdown(row), flush=True)
            if arguments.out:
                sizes = {"boxes": boxes, "num_boxes": len(case.rows), **case._asdict()}
                del sizes["rows"]
                with arguments.out.open("a") as file:
                    file.write(
                        json.dumps({**machine(), **sizes, "device": str(device), "dtype": arguments.dtype, **row}) + "\n"
                    )


def measure_system(system: str, case: Case, target: Target, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Try each implementation alone, leave out those that fail or disagree with ours, and time the rest side by side."""
    builders = {
        name: build
        for name, build in COMPETITORS[system].items()
        if name == OURS or (name in arguments.only if arguments.only else not (arguments.quick and "compile" in name))
    }
    memory_limit = int(arguments.memory_limit * 2**30) if arguments.memory_limit else None
    limits = Limits(arguments.time_limit, memory_limit, runs=1 if arguments.quick else 3)
    trials = {name: try_alone(limits, build, case, target) for name, build in builders.items()}
    ours = trials[OURS]
    if ours.loss is None:
        raise SystemExit(f"{system}: {OURS} failed: {ours.failure}")
    tolerance = TOLERANCE[arguments.dtype]
    trials = {name: check(trial, ours.loss, tolerance) for name, trial in trials.items()}
    steps = {name: builders[name](case, target) for name, trial in trials.items() if trial.failure is None}
    timings = time_interleaved(steps, 3 if arguments.quick else arguments.rounds)
    return [
        {
            "system": system,
            "name": label(name),
            "timing": timings[name]._asdict() if name in timings else None,
            "x_time": spread(timings[name].total)[0] / spread(timings[OURS].total)[0] if name in timings else None,
            "x_memory": trial.peak_bytes / ours.peak_bytes if trial.peak_bytes and ours.peak_bytes else None,
            **trial._asdict(),
        }
        for name, trial in trials.items()
    ]


def check(trial: Trial, expected: float, tolerance: float) -> Trial:
    """Turn a trial whose loss is not ours into a failure: no speed without agreement."""
    if trial.loss is None or abs(trial.loss - expected) <= tolerance * abs(expected):
        return trial
    return Trial(failure=f"loss {trial.loss:.7g}, ours {expected:.7g}")


def markdown(row: dict[str, Any]) -> str:
    if row["failure"]:
        return f"| {row['system']} | {row['name']} | {row['failure']} ||||||"
    forward, backward = row["timing"]["forward"], row["timing"]["backward"]
    total, p20, p80 = spread([f + b for f, b in zip(forward, backward, strict=True)])
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] is not None else ""
    times_memory = f"{row['x_memory']:.1f}" if row["x_memory"] else ""
    return (
        f"| {row['system']} | {row['name']} | {1e3 * spread(forward)[0]:.1f} | {1e3 * spread(backward)[0]:.1f} "
        f"| {1e3 * total:.1f} ({1e3 * p20:.1f}-{1e3 * p80:.1f}) | {row['x_time']:.1f} | {peak} | {times_memory} |"
    )
