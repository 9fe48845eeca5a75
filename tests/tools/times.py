"""Microseconds of every kernel of the criteria on a CUDA device, forward and backward replayed as a CUDA graph."""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

from bench.cases import Case, has_coco, make_case
from bench.measure import copy_bandwidth
from bench.results import machine
from bench.systems import SYSTEMS, least_bytes

_WARMUP, _REPLAYS = 3, 30


def run(arguments: argparse.Namespace) -> None:
    """Print a table a criterion."""
    bandwidth = copy_bandwidth(torch.device("cuda"))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"A copy moves {bandwidth / 1e12:.2f} TB/s.")
    for system in arguments.systems or SYSTEMS:
        case = case_of(system, arguments)
        dtype = getattr(torch, arguments.dtype)
        step = step_of(system, case, dtype)
        total, kernels = measure(step)
        least = least_bytes(system, case, dtype.itemsize) / bandwidth * 1e6
        print(f"\n{system} {arguments.dtype} B={case.batch_size}: {total:.1f} us as a graph, {least:.1f} for the fewest bytes")
        for name, microseconds in kernels.items():
            print(f"| {name} | {microseconds:.1f} |")


def case_of(system: str, arguments: argparse.Namespace) -> Case:
    """COCO's boxes for detectors, a hundred an image for other tasks."""
    boxes = "coco" if has_coco(arguments.data) else "lognormal"
    boxes = boxes if "-" not in system else "hundred"
    return make_case(boxes, batch_size=arguments.batch_size, imgsz=arguments.imgsz, num_classes=80, data=arguments.data)


def step_of(system: str, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward and backward of a criterion, on leaves that forget their gradients."""
    call = SYSTEMS[system].call(case, dtype, device="cuda")

    def step() -> None:
        for leaf in call.leaves:
            leaf.grad = None
        call().loss.backward()

    return step


def measure(step: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Microseconds of a replay, and of every kernel in it, those of the same name together."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(_REPLAYS + _WARMUP):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[_WARMUP:]), _by_kernel(graph)


def _by_kernel(graph: torch.cuda.CUDAGraph) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            found[event.name] += event.device_time_total / _REPLAYS
    return dict(sorted(found.items(), key=lambda item: -item[1]))
