"""What a step costs the host, as far as it can be counted."""

import subprocess
import sys

import pytest

from bench import host


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_a_step_makes_few_calls_and_allocations(system):
    worker = host.Worker(host.ROOT, system, "bfloat16")
    worker.close()
    assert worker.counts["calls"] <= host.MAX_CALLS
    assert worker.counts["allocations"] <= host.MAX_ALLOCATIONS
    assert worker.counts["launches"] <= {"yolo11": 10, "yolox": 9}[system]


def test_a_worker_that_ends_says_so_and_leaves_no_pipe_open():
    with pytest.raises(RuntimeError, match=r"bench/host_step\.py'.* yolo11 no-type ended with 1"):
        host.Worker(host.ROOT, "yolo11", "no-type")


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_gradients_that_nobody_wants_are_not_launched(system):
    code = f"""
import torch
from bench.host_step import launching_nothing, make_step
with launching_nothing() as driver:
    step = make_step("{system}", torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        step()
        driver.launches = 0
        step()
    print(driver.launches)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=host.ROOT)
    assert int(done.stdout) == {"yolo11": 9, "yolox": 7}[system]
