"""Whose choice of a backend holds where."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

import triton_yolo as ty
from triton_yolo import _backend


@pytest.fixture(autouse=True)
def process_choice():
    before = _backend.current()
    ty.backend("auto")
    yield
    ty.backend(before)


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_interleaved_blocks_of_two_threads_leave_nothing_behind():
    steps = [threading.Event() for _ in range(3)]
    found = []

    def first():
        with ty.backend("eager"):
            steps[0].set()
            steps[1].wait(10)
            found.append(_backend.current())
        steps[2].set()

    thread = threading.Thread(target=first)
    thread.start()
    steps[0].wait(10)
    with ty.backend("triton"):
        steps[1].set()
        steps[2].wait(10)
        assert _backend.current() == "triton"
    thread.join()
    assert found == ["eager"]
    assert _backend.current() == "auto"
    assert in_another_thread(_backend.current) == "auto"


def test_choices_made_before_either_block_begins():
    first, second = ty.backend("eager"), ty.backend("triton")
    with first:
        assert _backend.current() == "eager"
        with second:
            assert _backend.current() == "triton"
    assert _backend.current() == "auto"
    assert in_another_thread(_backend.current) == "auto"


def test_a_plain_call_holds_in_every_thread_and_a_block_in_its_own():
    ty.backend("eager")
    assert in_another_thread(_backend.current) == "eager"
    with ty.backend("triton"):
        assert in_another_thread(_backend.current) == "eager"
        ty.backend("auto")
        assert _backend.current() == "triton"
    assert _backend.current() == "auto"


def test_a_choice_may_be_entered_again():
    choice = ty.backend("eager")
    with choice, choice:
        assert _backend.current() == "eager"
    with choice:
        assert _backend.current() == "eager"
    assert _backend.current() == "auto"


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


def test_choices_are_not_collected():
    for _ in range(1000):
        ty.backend("auto")
    assert len(_backend._calls) <= 100


def test_tasks_have_their_own_blocks():
    async def task(name: str) -> str:
        with ty.backend(name):
            await asyncio.sleep(0)
            return _backend.current()

    async def both():
        return await asyncio.gather(task("eager"), task("triton"))

    assert asyncio.run(both()) == ["eager", "triton"]
    assert _backend.current() == "auto"


@pytest.mark.parametrize(("value", "name"), [("", "auto"), ("eager", "eager")])
def test_environment_variable(value, name):
    code = "from triton_yolo import _backend; print(_backend.current())"
    env = {**os.environ, "TRITON_YOLO_BACKEND": value}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout == f"{name}\n"
    )
