"""All that a machine with a CUDA GPU can show, part by part, each with its log: ``make gpu OUT=folder``.

``--rehearse`` runs the same commands in Triton's interpreter on small cases, so that nothing fails for a silly reason.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tests import peers

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
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
    changes = {"PYTHONPATH": os.getcwd(), "TRITON_YOLO_BACKEND": "triton", "HYPOTHESIS_PROFILE": "interpreter"}
    environment = {**os.environ, **changes, **({"TRITON_INTERPRET": "1"} if arguments.rehearse else {})}
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
        done = subprocess.run(task.command, env=environment, stdout=log, stderr=log, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return "too long"
    except FileNotFoundError:
        return "absent"
    return "passed" if done.returncode == 0 else f"failed {done.returncode}"


def tests(arguments: argparse.Namespace) -> Iterator[Task]:
    """The whole suite on the kernels; but for the interpreter's own, which are skipped, and trainings of the peers."""
    workers = ("-n", "8") if peers.is_installed("xdist") and not arguments.rehearse else ()
    chosen = ("tests/test_stages.py", "-k", "decode") if arguments.rehearse else ("tests",)
    yield Task("suite", 300, (sys.executable, *PYTEST, *workers, *chosen))


def proofs(arguments: argparse.Namespace) -> Iterator[Task]:
    yield Task("no sync, graph, repeats", 90, (sys.executable, *PYTEST, "-v", "tests/test_cuda.py"))


def sanitizer(arguments: argparse.Namespace) -> Iterator[Task]:
    step = (sys.executable, "-m", "bench.small_step")
    yield Task("small step", 90, step)  # compiles what the others run
    for tool in ("memcheck", "racecheck"):
        watch = () if arguments.rehearse else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        yield Task(tool, 90, (*watch, *step))


def benchmarks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Criteria in both types at three batch sizes; all else at one."""
    large = "2" if arguments.rehearse else "64"
    batch_sizes = (large,) if arguments.rehearse else ("16", "64", "128")
    shared = ("--device", "cpu" if arguments.rehearse else "cuda", "--out", str(arguments.out / "results.jsonl"))
    shared += ("--quick", "--imgsz", "64", "--boxes", "lognormal") if arguments.rehearse else ()
    for dtype in ("bfloat16", "float32"):
        for batch_size in batch_sizes:
            options = (*shared, "--dtype", dtype, "--batch-size", batch_size)
            # The dense reference and what is compiled take minutes beside the rest, so they run once.
            whole = (dtype, batch_size) == ("bfloat16", "64")
            others = ("--compile",) if whole else ("--only", *PEERS)
            extra = () if arguments.rehearse else ("--cuda-graph", *others)
            yield Task(f"loss {dtype} B={batch_size}", 150 if whole else 60, (*bench("loss"), *options, *extra))
        for command in ("stages", "assign", "train-step"):
            options = (*shared, "--dtype", dtype, "--batch-size", large)
            options += ("--what", "detector-yolo11") if arguments.rehearse and command == "train-step" else ()
            yield Task(f"{command} {dtype}", 60, (*bench(command), *options))
    if not arguments.rehearse:
        yield Task("scaling", 90, (*bench("scaling"), *shared, "--dtype", "bfloat16"))


def bench(command: str) -> tuple[str, ...]:
    return sys.executable, "-m", "bench", command


PARTS = {"tests": tests, "proofs": proofs, "sanitizer": sanitizer, "benchmarks": benchmarks}
