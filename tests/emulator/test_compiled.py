"""Every operation as compiled for each architecture, on the emulator, beside the eager backend."""

import pytest
import torch

import triton_yolo as ty
from tests.compare import TOLERANCE
from tests.tools import __main__ as tools
from tests.tools import small_step
from tests.tools.emulator import emulated

CPU = torch.device("cpu")


@pytest.mark.parametrize("target", ["cuda:75", "cuda:80", "cuda:90", "cuda:120"])
def test_small_step(target):
    is_whole = target == "cuda:90"  # what else there is takes long to compile
    with ty.backend("eager"):
        expected = small_step.run(CPU, is_whole=is_whole)
    with emulated(target) as launches, ty.backend("triton"):
        found = small_step.run(CPU, is_whole=is_whole)
    assert len({launch.kernel for launch in launches}) >= 20
    for name, want in expected.items():
        error = (found[name].double() - want.double()).abs().max()
        assert error <= TOLERANCE[torch.float32] * want.double().abs().max(), name
    if is_whole:
        with emulated(target, seed=1), ty.backend("triton"):
            again = small_step.run(CPU)
        assert all(again[name].equal(first) for name, first in found.items()), "the order of programs changes bits"


def test_instructions_are_counted(monkeypatch, capsys):
    options = ["--systems", "yolo11", "yolox", "--imgsz", "96", "--batch-size", "1", "--data", ""]
    monkeypatch.setattr("sys.argv", ["tools", "instructions", *options])
    tools.main()
    out = capsys.readouterr().out
    assert out.count("_claim_kernel |") == out.count("| all |") == 2
