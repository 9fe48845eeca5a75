"""Time and memory of a training step's criterion, forward and backward."""

import ctypes
import gc
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .cases import Case
from .competitors import Step, Target
from .processes import ending

_LONGEST = 160  # text of a failure
_CACHE = 2**28  # bytes, more than any accelerator's cache


class Timing(NamedTuple):
    """Seconds of every round."""

    forward: list[float]
    backward: list[float]

    @property
    def total(self) -> list[float]:
        return [sum(both) for both in zip(*self, strict=True)]


class Trial(NamedTuple):
    """What one implementation gave in a process of its own: the sum of its result and the bytes, or why there is none."""

    result: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None


class Limits(NamedTuple):
    """Of a trial: seconds, bytes of address space, and runs that measure its memory."""

    seconds: float
    bytes: int | None
    runs: int


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return statistics.median(seconds), fifths[0], fifths[3]


def time_interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, Timing]:
    """Run every step once a round."""
    for step in steps.values():
        _run(step)
    timings = {name: Timing([], []) for name in steps}
    for name in tqdm(interleaved(steps, rounds), "time", rounds * len(steps), leave=False, disable=None):
        forward, backward = _run(steps[name])
        timings[name].forward.append(forward)
        timings[name].backward.append(backward)
    return timings


def interleaved(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, each round beginning with another one, so that a busy machine disturbs all alike."""
    names = list(names)
    for i in range(rounds):
        yield from names[i % len(names) :] + names[: i % len(names)]


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def try_alone(limits: Limits, build: Callable[[Case, Target], Step], case: Case, target: Target) -> Trial:
    """Build a step and measure the peak of the memory that one run of it takes beyond its inputs.

    On the CPU this happens in a process of its own and is the kernel's high-water mark of the resident set, reset just before
    a warm run: it counts everything, whatever allocates it, and nothing is sampled; gradients of the predictions are part of
    it. Linux only. The least of several runs, since gaps in the heap only add. On an accelerator it is the peak of torch's
    allocator, which needs no process.
    """
    if target.device.type != "cpu":
        return _try(limits, build, case, target)
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as errors:
        process = context.Process(target=_try_and_send, args=(sender, errors.name, limits, build, case, target))
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(limits.seconds) else Trial(failure=f"takes more than {limits.seconds} s")
        except EOFError:  # it has ended, or will at once
            process.join(limits.seconds)
        finally:
            process.kill()
            process.join()
        return Trial(failure=ending(process.exitcode or 0, errors, 1)[:_LONGEST])


def _try_and_send(sender: Connection, errors: str, limits: Limits, *args: Any) -> None:
    with open(errors, "ab") as file:
        os.dup2(file.fileno(), 2)
    if limits.bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.bytes, limits.bytes))
    sender.send(_try(limits, *args))


def _try(limits: Limits, build: Callable[[Case, Target], Step], case: Case, target: Target) -> Trial:
    try:
        step = build(case, target)
        out = step.forward()
        step.backward(out)
        peaks = [_peak_of_run(step) for _ in range(limits.runs)]
        return Trial(out.detach().sum(dtype=torch.float64).item(), None if None in peaks else min(peaks))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        return Trial(failure=f"{type(error).__name__}: {first_line}"[:_LONGEST])


def copy_bandwidth(device: torch.device, num_bytes: int = 2**28) -> float:
    """Bytes a second, read and written, of a copy within the memory of a device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_interleaved({"copy": Step(lambda: target.copy_(source), (), device)}, 15)["copy"].forward
    return 2 * num_bytes / spread(seconds)[0]


def _run(step: Step) -> tuple[float, float]:
    """Seconds forward and backward; on an accelerator those of its own clock, with nothing of the inputs in its cache."""
    for leaf in step.leaves:
        leaf.grad = None
    if _is_on_cpu(step):
        start = time.perf_counter()
        out = step.forward()
        middle = time.perf_counter()
        step.backward(out)
        return middle - start, time.perf_counter() - middle if step.leaves else 0.0
    accelerator = torch.get_device_module(step.device)
    start, middle, end = (accelerator.Event(enable_timing=True) for _ in range(3))
    torch.empty(_CACHE, dtype=torch.uint8, device=step.device).zero_()
    start.record()
    out = step.forward()
    middle.record()
    step.backward(out)
    end.record()
    accelerator.synchronize()
    return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3


def _peak_of_run(step: Step) -> int | None:
    for leaf in step.leaves:
        leaf.grad = None
    gc.collect()
    if not _is_on_cpu(step):
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step.backward(step.forward())
        torch.accelerator.synchronize()
        return torch.accelerator.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    _run(step)
    return _status_bytes("VmHWM") - before


def _is_on_cpu(step: Step) -> bool:
    return step.device.type == "cpu"


def _status_bytes(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])
