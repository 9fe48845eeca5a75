"""What the kernels of whole criteria issue, as counted by the emulator; the same in every run of one version of Triton."""

import os
from pathlib import Path

import pytest
import torch
import triton

import triton_yolo as ty
from bench.cases import has_coco, make_case
from bench.competitors import OURS, Target
from bench.keypoints import KEYPOINTS
from bench.systems import SYSTEMS
from bench.tasks import TASKS
from tests.tools.emulator import emulated

DATA = Path(os.environ["TRITON_YOLO_DATA"]) if "TRITON_YOLO_DATA" in os.environ else None


MORE = 1.0 if triton.__version__.startswith("3.7.") else 1.07
"""Other versions than that of the bars issue a few per cent more."""
CPU_BFLOAT16 = Target(torch.device("cpu"), torch.bfloat16)


def launches_of(system, case, **options):
    call = SYSTEMS[system].call(case, torch.bfloat16, **options)
    with emulated("cuda:90") as launches, ty.backend("triton"):
        call().loss.backward()
    return {launch.kernel: launch for launch in launches}


def launches_of_term(terms, name, case):
    step = terms[name][OURS](case, CPU_BFLOAT16)
    with emulated("cuda:90") as launches, ty.backend("triton"):
        step.backward(step.forward())
    return {launch.kernel: launch for launch in launches}


def issued(launches):
    return {kernel: launch.num_warps * launch.instructions.sum() for kernel, launch in launches.items()}


def longest(launches):
    return {kernel: launch.instructions.max() for kernel, launch in launches.items()}


def whole_image_case(imgsz=640):
    """One image, with a box over all of it."""
    case = make_case("lognormal", batch_size=1, imgsz=imgsz, num_classes=80)
    case.rows[0, 2:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    return case


@pytest.fixture(scope="module")
def whole_image():
    return {system: launches_of(system, whole_image_case()) for system in ("yolo11", "yolox")}


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_no_program_is_long(whole_image, system):
    assert max(longest(whole_image[system]).values()) <= 3000, longest(whole_image[system])


def test_no_program_is_long_where_all_anchors_take_part():
    launches = launches_of("yolox", whole_image_case(), candidates="box_and_center")
    assert max(longest(launches).values()) <= 3000, longest(launches)


@pytest.mark.parametrize(("system", "bar"), [("yolo11", 965_000), ("yolox", 215_000)])
def test_few_instructions_an_image(whole_image, system, bar):
    assert sum(issued(whole_image[system]).values()) <= bar, issued(whole_image[system])


def test_few_instructions_a_logit(whole_image):
    assert 32 * issued(whole_image["yolo11"])["_yolo11_class_kernel"] <= 18.8 * 80 * 8400


@pytest.mark.parametrize(("system", "most"), [("yolo11", 9), ("yolox", 8)])
def test_few_launches(whole_image, system, most):
    assert len(whole_image[system]) <= most + 1


def test_programs_of_oriented_boxes():
    """A tile of 128 anchors, of which ProbIoU is worked out, is the longest."""
    launches = launches_of("yolo11-obb", whole_image_case(160))
    assert max(longest(launches).values()) <= 3600 * MORE, longest(launches)
    assert sum(issued(launches).values()) <= 255_000 * MORE, issued(launches)


def test_programs_of_keypoints():
    launches = launches_of_term(KEYPOINTS, "keypoint_loss", whole_image_case(320))
    assert max(longest(launches).values()) <= 3000, longest(launches)
    assert sum(issued(launches).values()) <= 145_000, issued(launches)


def test_programs_of_masks():
    """A program shares the tiles of all groups, of which each takes 700; all groups over a pixel are one program's."""
    launches = launches_of_term(TASKS, "mask_loss", whole_image_case(96))
    lengths = longest(launches)
    assert lengths.pop("_mask_positive_kernel") <= 3400 * MORE
    assert max(lengths.values()) <= 3000 * MORE, lengths
    assert sum(issued(launches).values()) <= 400_000 * MORE, issued(launches)


@pytest.mark.parametrize(("system", "bar"), [("yolo11", 0.38 * 4_775_000), ("yolox", 0.12 * 4_567_000)])
def test_two_images_of_coco(system, bar):
    """Shares of what commit c59763f issued."""
    if not has_coco(DATA):
        pytest.skip("COCO box sizes: TRITON_YOLO_DATA names no folder with coco_boxes.json")
    launches = launches_of(system, make_case("coco", batch_size=2, imgsz=640, num_classes=80, data=DATA))
    assert sum(issued(launches).values()) <= bar, issued(launches)
    assert max(longest(launches).values()) <= 3000, longest(launches)
