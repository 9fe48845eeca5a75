"""What a step costs the host: Python calls, allocations, launches, microseconds, beside the version before the redesign."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from .processes import ending

BASELINE = "c59763f"
MIN_SPEEDUP = 6
PATIENCE = 600  # seconds that a worker has for an answer, the first of which compiles
ROOT = Path(__file__).parents[1]
RUN = f"import runpy; runpy.run_path({str(ROOT / 'bench' / 'host_step.py')!r}, run_name='__main__')"
"""A script whose folder does not go on the path, as with Python's -P, which 3.10 has not."""
BARS = {
    "yolo11": {"calls": 108, "allocations": 12, "launches": 10},
    "yolox": {"calls": 106, "allocations": 12, "launches": 9},
    "yolo11-obb": {"calls": 130, "allocations": 12, "launches": 11},
    "yolo11-seg": {"calls": 260, "allocations": 50, "launches": 20},
    "yolo11-pose": {"calls": 185, "allocations": 19, "launches": 15},
}
_COUNTS = json.loads((Path(__file__).parent / "host_baseline.json").read_text())


class WorkerError(RuntimeError):
    """A worker ended before it was told to, or took too long."""


class Worker:
    """A process that measures steps of the package in ``root`` on demand."""

    def __init__(self, root: Path, system: str, dtype: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", RUN, system, dtype]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=environment, text=True, cwd=root, **pipes)
        try:
            self.counts: dict[str, int] = self._answer()
        except BaseException:
            self.close()
            raise

    def microseconds(self, steps: int) -> float:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # which an answer that does not come tells
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        patience = threading.Timer(PATIENCE, self._process.kill)
        patience.start()
        try:
            line = self._process.stdout.readline()
            if line:
                return json.loads(line)
            end = ending(self._process.wait(), self._errors, 5)
            raise WorkerError(f"{' '.join(map(str, self._process.args))} {end}")
        finally:
            patience.cancel()


def run(arguments: argparse.Namespace) -> None:
    """Print a line a criterion, and fail past a bar."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        old = _check_out(Path(folder))
        for system in BARS:
            try:
                failures += _measure(system, old, arguments)
            except WorkerError as error:
                failures.append(f"{system}: {error}")
    if old is None:
        print(f"{BASELINE} is not in this repository's history: no comparison of times")
    if failures:
        raise SystemExit("\n".join(failures))


def _measure(system: str, old: Path | None, arguments: argparse.Namespace) -> list[str]:
    """Print the line of a criterion; which bars it is past."""
    with ExitStack() as stack:
        ours = stack.enter_context(closing(Worker(ROOT, system, arguments.dtype)))
        theirs = None
        if old is not None and system in _COUNTS:
            theirs = stack.enter_context(closing(Worker(old, system, arguments.dtype)))
        times: tuple[list[float], list[float]] = [], []
        for _ in range(arguments.rounds):
            for worker, found in zip((ours, theirs), times, strict=True):
                if worker is not None:
                    found.append(worker.microseconds(arguments.steps))
    counts, bars = ours.counts, BARS[system]
    failures = [f"{system} makes {counts[what]} {what}, not {bars[what]}" for what in counts if counts[what] > bars[what]]
    text = ", ".join(f"{number} {what}" for what, number in counts.items()) + f", {statistics.median(times[0]):.0f} us"
    if theirs is not None:
        speedup = statistics.median(a / b for a, b in zip(times[1], times[0], strict=True))
        text += f", {speedup:.1f} times less than {BASELINE}"
        if speedup < MIN_SPEEDUP:
            failures.append(f"{system} takes {speedup:.1f} times less than {BASELINE}, not {MIN_SPEEDUP}")
    was = ", ".join(f"{number} {what}" for what, number in _COUNTS.get(system, {}).items())
    print(f"{system}: {text}" + (f" ({was} there)" if was else ""), flush=True)
    return failures


def _check_out(folder: Path) -> Path | None:
    """The package at the commit to compare with, if there is a history."""
    archive = folder / "old.tar"
    command = ["git", "-C", str(ROOT), "archive", "-o", str(archive), BASELINE, "triton_yolo"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "old", filter="data")
    return folder / "old"
