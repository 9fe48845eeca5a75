"""All that a machine with a CUDA GPU can show, the most valuable first, in five minutes: ``make gpu OUT=folder``.

``--rehearse`` runs the same commands in Triton's interpreter on small cases, so that nothing fails for a silly reason.
The folder gets ``log.txt`` of all commands, ``summary.txt`` and ``results.jsonl``.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import torch

from . import peers, results

# A plugin that warns under xdist fails a suite in which warnings are errors.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--continue-on-collection-errors")
PEERS = ("ultralytics", "pixeltable-yolox", "libreyolo")
_SUMMARY = 8000  # characters
_TELLING = re.compile(r"^(\|(?!---).*\|$|FAILED|ERROR|E  |.*(\d passed|\d failed|ERROR SUMMARY|RACECHECK SUMMARY|us, .* less))")


class Task(NamedTuple):
    """One command: its name, the seconds that it may take, and what it is; some go side by side with their neighbours."""

    name: str
    limit: float
    command: tuple[str, ...]
    is_side_by_side: bool = False


class Done(NamedTuple):
    task: Task
    status: str
    seconds: float
    output: str


def run(arguments: argparse.Namespace) -> None:
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --rehearse runs everything in the interpreter")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The profile of few examples: each new size is a new compile.
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HYPOTHESIS_PROFILE": "interpreter"}
    if arguments.rehearse:
        environment.update(TRITON_INTERPRET="1", TRITON_YOLO_BACKEND="triton")
    slower = 10 if arguments.rehearse else 1
    end = time.perf_counter() + arguments.seconds * slower
    done: list[Done] = []
    with (arguments.out / "log.txt").open("w") as log:
        for part in arguments.parts or BY_DEFAULT:
            for tasks in together(PARTS[part](arguments)):
                done += attempt([task._replace(limit=task.limit * slower) for task in tasks], environment, log, end)
    text = summary(done)
    (arguments.out / "summary.txt").write_text(text)
    print(text)
    if any(one.status != "passed" for one in done):
        raise SystemExit(1)


def together(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """What runs side by side first, then the others one by one."""
    tasks = list(tasks)
    if side_by_side := [task for task in tasks if task.is_side_by_side]:
        yield side_by_side
    yield from ([task] for task in tasks if not task.is_side_by_side)


def attempt(tasks: list[Task], environment: dict[str, str], log: IO[str], end: float) -> list[Done]:
    """Run commands side by side, none past its own limit or the ``end`` of everything."""
    start = time.perf_counter()
    done = []
    with ExitStack() as stack:  # a pipe that nobody reads yet would stop who writes, a file does not
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in tasks]
        running = [_start(task, environment, file) for task, file in zip(tasks, files, strict=True)]
        for task, process, file in zip(tasks, running, files, strict=True):
            status = _finish(process, max(0.0, min(start + task.limit, end) - time.perf_counter()))
            file.seek(0)
            done.append(Done(task, status, time.perf_counter() - start, file.read()))
            print(f"$ {' '.join(task.command)}\n{done[-1].output}", file=log, flush=True)
            print(f"{task.name:32} {status:10} {done[-1].seconds:6.1f} s", flush=True)
    return done


def _start(task: Task, environment: dict[str, str], output: IO[str]) -> "subprocess.Popen[bytes] | None":
    try:
        return subprocess.Popen(task.command, env=environment, stdout=output, stderr=output, start_new_session=True)
    except FileNotFoundError:
        return None


def _finish(process: "subprocess.Popen[bytes] | None", seconds: float) -> str:
    if process is None:
        return "absent"
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: a tool's own child would keep the device
        process.wait()
        return "too long"
    return "passed" if status == 0 else f"failed {status}"


def summary(done: list[Done]) -> str:
    """A line a command with what it measured or why it failed, all of it short enough to be read at once."""
    head = f"commit {results.provenance()['commit']}, " + ", ".join(f"{k} {v}" for k, v in results.machine().items())
    blocks = []
    for one in done:
        telling = [line[:400] for line in one.output.splitlines() if _TELLING.match(line)]
        if one.status == "passed" and one.task.is_side_by_side:  # it only compiled; its times are nobody's
            telling = []
        elif one.status != "passed" and not telling:
            telling = [line[:400] for line in one.output.splitlines()[-3:]]
        blocks.append("\n".join([f"{one.task.name}: {one.status} in {one.seconds:.1f} s", *telling]))
    share = (_SUMMARY - len(head) - 2 * len(blocks)) // max(len(blocks), 1)
    spare = sum(max(0, share - len(block)) for block in blocks)
    long = sum(len(block) > share for block in blocks)
    share += spare // max(long, 1)
    return "\n".join([head, *(block if len(block) <= share else f"{block[: share - 4]} ..." for block in blocks)])[:_SUMMARY]


def compiling(arguments: argparse.Namespace) -> Iterator[Task]:
    """Everything that is timed once, side by side: compilation would take a third of the time."""
    out = ("--out", os.devnull)
    for dtype in ("bfloat16", "float32"):
        for command in ("loss", "stages", "assign", "tasks"):
            options = (*_case(arguments, dtype, "2"), "--quick", "--only", "nothing-else", *out)
            yield Task(f"compile {command} {dtype}", 100, (*bench(command), *options), is_side_by_side=True)
    yield Task("compile small step", 100, (sys.executable, "-m", "tests.tools", "small-step"), is_side_by_side=True)


def proofs(arguments: argparse.Namespace) -> Iterator[Task]:
    """No synchronisation, CUDA graphs, equal repeats; and what a step costs the host."""
    yield Task("no sync, graphs, repeats", 90, (sys.executable, *PYTEST, "tests/test_cuda.py"))
    if not arguments.rehearse:
        yield Task("host", 30, (*bench("host"), "--rounds", "5"))


def criteria(arguments: argparse.Namespace) -> Iterator[Task]:
    """Both criteria beside the peers and as CUDA graphs."""
    for dtype in ("bfloat16", "float32"):
        for batch_size in ("2",) if arguments.rehearse else ("64", "16"):
            extra = () if arguments.rehearse else ("--cuda-graph", "--only", *PEERS)
            options = (*_case(arguments, dtype, batch_size), *_results(arguments), *extra)
            yield Task(f"loss {dtype} B={batch_size}", 40, (*bench("loss"), *options))


def suite(arguments: argparse.Namespace) -> Iterator[Task]:
    """The whole suite on the kernels; but for the interpreter's own, which are skipped, and trainings of the peers."""
    workers = ("-n", "8") if peers.is_installed("xdist") and not arguments.rehearse else ()
    everything = ("tests", "--ignore", "tests/kernels/test_compile.py", "--ignore", "tests/test_cuda.py")
    chosen = ("tests/test_stages.py", "-k", "decode") if arguments.rehearse else everything
    yield Task("suite", 120, (sys.executable, *PYTEST, *workers, *chosen))


def sanitizer(arguments: argparse.Namespace) -> Iterator[Task]:
    step = (sys.executable, "-m", "tests.tools", "small-step")
    for tool in ("memcheck", "racecheck"):
        watch = () if arguments.rehearse else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        # Without torch's cache every tensor is an allocation of its own, whose end memcheck knows.
        yield Task(tool, 60, ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watch, *step))


def steps(arguments: argparse.Namespace) -> Iterator[Task]:
    """Whole training steps, stock and patched."""
    for dtype in ("bfloat16", "float32"):
        options = (*_case(arguments, dtype, "2" if arguments.rehearse else "16"), *_results(arguments))
        options += ("--what", "detector-yolo11") if arguments.rehearse else ()
        yield Task(f"train-step {dtype}", 60, (*bench("train-step"), *options))


def stages(arguments: argparse.Namespace) -> Iterator[Task]:
    for command in ("stages", "assign"):
        options = (*_case(arguments, "bfloat16", "2" if arguments.rehearse else "64"), *_results(arguments))
        yield Task(f"{command} bfloat16", 60, (*bench(command), *options))


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Oriented boxes, masks and keypoints beside the peer."""
    options = (*_case(arguments, "bfloat16", "2" if arguments.rehearse else "8"), *_results(arguments))
    yield Task("tasks bfloat16", 60, (*bench("tasks"), *options))


def scaling(arguments: argparse.Namespace) -> Iterator[Task]:
    """How time grows, and what is dense or compiled, which takes minutes."""
    if not arguments.rehearse:
        options = (*_case(arguments, "bfloat16", "64"), *_results(arguments))
        yield Task("scaling", 120, (*bench("scaling"), *options))
        yield Task("loss, compiled", 240, (*bench("loss"), *options, "--compile"))


def bench(command: str) -> tuple[str, ...]:
    return sys.executable, "-m", "bench", command


def _case(arguments: argparse.Namespace, dtype: str, batch_size: str) -> tuple[str, ...]:
    options = ("--device", "cpu" if arguments.rehearse else "cuda", "--dtype", dtype, "--batch-size", batch_size)
    return (*options, "--quick", "--imgsz", "64", "--boxes", "lognormal") if arguments.rehearse else options


def _results(arguments: argparse.Namespace) -> tuple[str, ...]:
    return "--out", str(Path(arguments.out) / "results.jsonl")


Part = Callable[[argparse.Namespace], Iterator[Task]]
PARTS: dict[str, Part] = {
    "compile": compiling, "proofs": proofs, "loss": criteria, "suite": suite, "sanitizer": sanitizer, "steps": steps,
    "tasks": tasks, "stages": stages, "scaling": scaling,
}  # fmt: skip
BY_DEFAULT = tuple(part for part in PARTS if part != "scaling")
"""In the order of their worth; what does not fit the time is named as too long."""
