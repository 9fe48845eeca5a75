"""What the kernels of YOLO11's criterion issue, as counted by the emulator; the same in every run of one version of Triton."""

import pytest
import torch

import triton_yolo as ty
from bench.cases import STRIDES, make_case, yolo11_preds
from tests.tools.emulator import emulated


@pytest.fixture(scope="module")
def launches():
    """One image of 640 px, with a box over all of it."""
    case = make_case("lognormal", batch_size=1, imgsz=640, num_classes=80)
    case.rows[0, 2:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    inputs = [x.to(torch.bfloat16).transpose(1, 2).requires_grad_() for x in yolo11_preds(case)]
    with emulated("cuda:90") as launches, ty.backend("triton"):
        ty.YOLO11Loss(case.num_classes, strides=STRIDES)(*inputs, case.feat_shapes, case.rows).loss.backward()
    return {launch.kernel: launch for launch in launches}


def test_no_program_is_long(launches):
    longest = {kernel: launch.instructions.max() for kernel, launch in launches.items()}
    assert max(longest.values()) <= 3000, longest


def test_few_instructions_an_image(launches):
    issued = {kernel: launch.num_warps * launch.instructions.sum() for kernel, launch in launches.items()}
    assert sum(issued.values()) <= 1_100_000, issued
    assert 32 * issued["_yolo11_class_kernel"] <= 18.5 * 80 * 8400


def test_few_launches(launches):
    assert len(launches) <= 10 + 1
