"""Which implementation runs: chosen for a process, or for a block of one thread or task."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

import triton_yolo as ty
from triton_yolo import _backend


@pytest.fixture(autouse=True)
def _keep_choice(monkeypatch):
    monkeypatch.setattr(_backend, "_calls", [])


def test_blocks_of_two_threads_may_interleave():
    """One enters first and leaves first."""
    before, seen = _backend.current(), []
    entered, left = threading.Event(), threading.Event()

    def other():
        with ty.backend("eager"):
            seen.append(_backend.current())
            entered.set()
            left.wait()
            seen.append(_backend.current())
        seen.append(_backend.current())

    with ty.backend("auto"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        assert _backend.current() == "auto"
    left.set()
    thread.join()
    assert seen == ["eager", "eager", before]
    assert _backend.current() == before


def test_tasks_have_their_own_blocks():
    async def use(name, steps):
        with ty.backend(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                assert _backend.current() == name

    async def both():
        await asyncio.gather(use("eager", 2), use("auto", 5), use("triton", 1))

    before = _backend.current()
    asyncio.run(both())
    assert _backend.current() == before


def test_one_object_serves_several_threads():
    choice, seen = ty.backend("eager"), []

    def use(wait, signal):
        with choice:
            signal.set()
            wait.wait()
            seen.append(_backend.current())

    first, second = threading.Event(), threading.Event()
    threads = [threading.Thread(target=use, args=pair) for pair in ((second, first), (first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["eager", "eager"]


def test_a_plain_call_counts_in_every_thread():
    seen = []
    ty.backend("eager")
    thread = threading.Thread(target=lambda: seen.append(_backend.current()))
    thread.start()
    thread.join()
    assert seen == ["eager"]


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_variable_means_the_default(value):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_YOLO_BACKEND"}
    if value is not None:
        environment["TRITON_YOLO_BACKEND"] = value
    code = "from triton_yolo import _backend; print(_backend.current())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "auto"
