"""All that a machine with a CUDA GPU can show, part by part, each with its log: ``make gpu OUT=folder``.

``--rehearse`` runs the same commands in Triton's interpreter on small cases, so that nothing fails for a silly reason.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import peers

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
PEERS = ("ultralytics", "pixeltable-yolox", "libreyolo")


class Task(NamedTuple):
    """One command: its name, the seconds that it may take, and what it is."""

    name: str
    limit: float
    command: tuple[str, ...]


def run(arguments: argparse.Namespace) -> None:
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --rehearse runs everything in the interpreter")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The profile of few examples: each new size is a new compile.
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HYPOTHESIS_PROFILE": "interpreter"}
    if arguments.rehearse:
        environment.update(TRITON_INTERPRET="1", TRITON_YOLO_BACKEND="triton")
    failed = []
    for part in arguments.parts or PARTS:
        with (arguments.out / f"{part}.log").open("w") as log:
            for task in PARTS[part](arguments):
                start = time.perf_counter()
                print(f"$ {' '.join(task.command)}", file=log, flush=True)
                limit = task.limit * (10 if arguments.rehearse else 1)
                status = attempt(task, environment, log.fileno(), limit)
                print(f"{part:10} {task.name:28} {status:10} {time.perf_counter() - start:6.1f} s", flush=True)
                failed += [task.name] * (status != "passed")
    if failed:
        raise SystemExit(f"see the logs in {arguments.out}: {', '.join(failed)}")


def attempt(task: Task, environment: dict[str, str], log: int, limit: float) -> str:
    try:
        process = subprocess.Popen(task.command, env=environment, stdout=log, stderr=log, start_new_session=True)
    except FileNotFoundError:
        return "absent"
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: a tool's own child would keep the device
        process.wait()
        return "too long"
    return "passed" if status == 0 else f"failed {status}"


def tests(arguments: argparse.Namespace) -> Iterator[Task]:
    """The whole suite on the kernels; but for the interpreter's own, which are skipped, and trainings of the peers."""
    workers = ("-n", "8") if peers.is_installed("xdist") and not arguments.rehearse else ()
    everything = ("tests", "--ignore", "tests/kernels/test_compile.py")
    chosen = ("tests/test_stages.py", "-k", "decode") if arguments.rehearse else everything
    yield Task("suite", 300, (sys.executable, *PYTEST, *workers, *chosen))


def proofs(arguments: argparse.Namespace) -> Iterator[Task]:
    yield Task("no sync, graph, repeats", 90, (sys.executable, *PYTEST, "-v", "tests/test_cuda.py"))


def sanitizer(arguments: argparse.Namespace) -> Iterator[Task]:
    step = (sys.executable, "-m", "tests.tools", "small-step")
    yield Task("small step", 90, step)  # compiles what the others run
    for tool in ("memcheck", "racecheck"):
        watch = () if arguments.rehearse else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        # Without torch's cache every tensor is an allocation of its own, whose end memcheck knows.
        yield Task(tool, 150, ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watch, *step))


def benchmarks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Criteria in both types at three batch sizes; all else at one."""
    large = "2" if arguments.rehearse else "64"
    batch_sizes = (large,) if arguments.rehearse else ("16", "64", "128")
    shared = ("--device", "cpu" if arguments.rehearse else "cuda", "--out", str(arguments.out / "results.jsonl"))
    shared += ("--quick", "--imgsz", "64", "--boxes", "lognormal") if arguments.rehearse else ()
    for dtype in ("bfloat16", "float32"):
        for batch_size in batch_sizes:
            options = (*shared, "--dtype", dtype, "--batch-size", batch_size)
            extra = () if arguments.rehearse else ("--cuda-graph", "--only", *PEERS)
            yield Task(f"loss {dtype} B={batch_size}", 60, (*bench("loss"), *options, *extra))
        for command in ("stages", "assign", "train-step"):
            options = (*shared, "--dtype", dtype, "--batch-size", large)
            options += ("--what", "detector-yolo11") if arguments.rehearse and command == "train-step" else ()
            yield Task(f"{command} {dtype}", 90, (*bench(command), *options))
    if not arguments.rehearse:
        yield Task("scaling", 90, (*bench("scaling"), *shared, "--dtype", "bfloat16"))
        # What is dense or compiled takes minutes, so it comes last, once, into a file of its own.
        options = (*shared[:2], "--out", str(arguments.out / "compiled.jsonl"), "--dtype", "bfloat16", "--batch-size", "64")
        yield Task("loss, compiled", 240, (*bench("loss"), *options, "--compile"))


def bench(command: str) -> tuple[str, ...]:
    return sys.executable, "-m", "bench", command


PARTS = {"tests": tests, "proofs": proofs, "sanitizer": sanitizer, "benchmarks": benchmarks}
