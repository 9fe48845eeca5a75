"""What a step costs the host, as far as it can be counted."""

import json
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from bench import host

SYSTEMS = pytest.mark.parametrize("system", host.BARS)
COUNT = """
import json, sys, torch
from bench.host_step import count, launching_nothing, make_step

found = {}
with launching_nothing() as driver:  # which goes on counting what is compiled for it
    for system in sys.argv[1:]:
        step = make_step(system, torch.device("cpu"), torch.bfloat16)
        counts = count(step, driver)
        with torch.no_grad():
            step()
            driver.launches = 0
            step()
        found[system] = {**counts, "launches without gradients": driver.launches}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts():
    """Of every criterion, counted in a process of their own."""
    done = subprocess.run([sys.executable, "-c", COUNT, *host.BARS], capture_output=True, text=True, check=True, cwd=host.ROOT)
    return json.loads(done.stdout)


@SYSTEMS
def test_a_step_makes_few_calls_allocations_and_launches(counts, system):
    for what, bar in host.BARS[system].items():
        assert counts[system][what] <= bar, what


@SYSTEMS
def test_gradients_that_nobody_wants_are_not_launched(counts, system):
    expected = {"yolo11": 9, "yolox": 7, "yolo11-obb": 9, "yolo11-seg": 15, "yolo11-pose": 11}
    assert counts[system]["launches without gradients"] == expected[system]


def test_a_worker_counts_and_times():
    with closing(host.Worker(host.ROOT, "yolox", "bfloat16")) as worker:
        assert worker.counts["calls"] <= host.BARS["yolox"]["calls"]
        assert worker.microseconds(2) > 0
        worker._process.kill()
        for _ in range(2):
            with pytest.raises(host.WorkerError, match="yolox bfloat16 ended by SIGKILL"):
                worker.microseconds(1)


def test_a_worker_that_ends_says_why_and_leaves_no_pipe_open():
    end = r"bench/host_step\.py'.* yolo11 no-type ended with 1: (.*\n)*AttributeError: .*no attribute 'no-type'$"
    with pytest.raises(host.WorkerError, match=end):
        host.Worker(host.ROOT, "yolo11", "no-type")


def test_a_worker_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(host, "RUN", "import time; time.sleep(60)")
    monkeypatch.setattr(host, "PATIENCE", 0.1)
    with pytest.raises(host.WorkerError, match=r"ended by SIGKILL$"):
        host.Worker(host.ROOT, "yolo11", "bfloat16")


def test_a_worker_that_ends_costs_no_other_row(monkeypatch, capsys):
    code = """
import sys
if "pose" in sys.argv[1]:
    raise SystemExit("no keypoints")
print('{"calls": 1}', flush=True)
for _ in sys.stdin:
    print(2.0, flush=True)
"""
    monkeypatch.setattr(host, "RUN", code)
    monkeypatch.setattr(host, "_check_out", lambda folder: None)
    monkeypatch.setattr(host, "BARS", {name: host.BARS[name] for name in ("yolo11-pose", "yolox")})
    with pytest.raises(SystemExit, match=r"^yolo11-pose: .*\n(.*\n)*.* ended with 1: no keypoints$"):
        host.run(SimpleNamespace(dtype="bfloat16", rounds=3, steps=1))
    assert "yolox: 1 calls, 2 us" in capsys.readouterr().out
