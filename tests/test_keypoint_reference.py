"""The reference's keypoints against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

import reference as ref
from reference import yolo11_pose


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_places_are_twice_as_far_from_the_cells_corner():
    raw = numbers(0, 0, 9, 1, -0.5, 9, 0.25, 0.25, 9).reshape(1, 3, 3)
    assert ref.decode_keypoints(raw, numbers(3.5, 1.5)[None]).tolist() == [[[3, 1], [5, 0], [3.5, 1.5]]]
    assert ref.decode_keypoints(raw[..., :2], numbers(3.5, 1.5)[None]).tolist() == [[[3, 1], [5, 0], [3.5, 1.5]]]


def test_a_keypoint_is_visible_unless_its_flag_is_0():
    keypoints = numbers(0, 0, 2, 5, 5, 0, 5, 5, 1, 5, 5, -1, 5, 5, 0.3, 5, math.nan, 2, 5, 5, math.nan).reshape(-1, 3)
    assert yolo11_pose.is_visible(keypoints).tolist() == [True, False, True, True, True, False, False]
    assert yolo11_pose.is_visible(numbers(0, 0, -1, 5, math.inf, 0).reshape(-1, 2)).tolist() == [True, True, False]


# (2 * 0.5)^2 * 2 * 2 = 4 divides the squared distance.
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ([1, 1, 1, 1], (0 + 3 * (1 - math.exp(-1))) / 4),
        ([1, 1, 0, 0], (0 + 1 - math.exp(-1)) / 2),
        ([0, 0, 1, 0], 1 - math.exp(-1)),
        ([1, 0, 0, 0], 0),
        ([0, 0, 0, 0], 0),
    ],
)
def test_distance_is_the_mean_over_the_visible(visible, expected):
    pred = numbers(1, 1, 3, 1, 1, -1, 1 + math.sqrt(2), 1 + math.sqrt(2)).reshape(1, 4, 2)
    mask, sigmas = torch.tensor([visible]).bool(), torch.full((4,), 0.5).double()
    found = yolo11_pose.keypoint_distance(pred, torch.ones(1, 4, 2).double(), mask, numbers(2), sigmas)
    assert found.item() == pytest.approx(expected, rel=1e-8)


def test_distance_has_a_sigma_for_each_keypoint_and_knows_flat_boxes():
    # Squared distances of 8 * sigma^2 * area, with 1e-9 in place of an area of 0.
    sigmas = numbers(0.1, 0.025)
    pred = torch.stack([sigmas * math.sqrt(8 * 1e-9), 0 * sigmas], -1)[None]
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = yolo11_pose.keypoint_distance(pred, torch.zeros(1, 2, 2), mask, numbers(0), sigmas)
    assert found.item() == pytest.approx(1 - math.exp(-1), rel=1e-12)


def test_sigmas():
    assert yolo11_pose.default_sigmas(17, 3)[:4] == (0.026, 0.025, 0.025, 0.035)
    assert yolo11_pose.default_sigmas(17, 3)[-1] == 0.089
    assert yolo11_pose.default_sigmas(17, 2) == (1 / 17,) * 17
    assert yolo11_pose.default_sigmas(4, 3) == (0.25,) * 4


def test_loss_of_one_anchor():
    # Cell (0, 0) of 8 px says (2, 1) cells; the keypoint is at (1, 1), in a box of 2 x 1 cells: 1 / (1 * 2 * 2).
    pred = numbers(1, 0.5, 0, 9, 9, 9).reshape(2, 1, 3).requires_grad_()
    rows, boxes = torch.tensor([[1], [-1]]), numbers(0, 0, 0, 0, 3, 5, 19, 13).reshape(2, 4)
    keypoints = numbers(0, 0, 0, 8, 8, 2).reshape(2, 1, 3)
    found = ref.keypoint_loss(pred, rows, keypoints, boxes, [(1, 1)], strides=(8,), sigmas=[0.5])
    pose, kobj = 12 * (1 - math.exp(-1 / 4)), math.log(2)
    assert found.pose.item() == pytest.approx(pose, rel=1e-8)
    assert found.kobj.item() == pytest.approx(kobj, rel=1e-12)
    assert found.loss.item() == pytest.approx(2 * (pose + kobj), rel=1e-8)
    # A step of raw numbers is two cells; the logit of what is visible pulls by a half.
    (grad,) = torch.autograd.grad(found.loss, pred)
    slope = 2 * 12 * math.exp(-1 / 4) * 2 * 1 / 4 * 2
    assert grad.flatten().tolist() == pytest.approx([slope, 0, 2 * -0.5, 0, 0, 0], rel=1e-8)
    # With the same keypoint unseen, the logit alone says anything.
    found = ref.keypoint_loss(pred, rows, 0 * keypoints, boxes, [(1, 1)], strides=(8,), sigmas=[0.5])
    assert (found.pose, found.kobj.item()) == (0, pytest.approx(kobj))
    (grad,) = torch.autograd.grad(found.loss, pred)
    assert grad.flatten().tolist() == [0, 0, 1, 0, 0, 0]
    # Without a flag there is no second term.
    found = ref.keypoint_loss(pred[..., :2], rows, keypoints, boxes, [(1, 1)], strides=(8,), sigmas=[0.5], pose_gain=1)
    assert (found.pose.item(), found.kobj) == (pytest.approx(pose / 12, rel=1e-8), 0)


def test_positives_count_alike_whatever_is_visible():
    # Three positives of two keypoints that are far off: with two visible, with one, with none; logits of 0.
    pred = torch.full((1, 4, 6), 1e3).double()
    pred[..., 2::3] = 0
    keypoints = torch.zeros(3, 2, 3).double()
    keypoints[0, :, 2] = keypoints[1, 0, 2] = 1
    boxes = numbers(0, 0, 8, 8).expand(3, 4)
    found = ref.keypoint_loss(pred, torch.tensor([[0, 1, 2, -1]]), keypoints, boxes, [(2, 2)], strides=(8,))
    assert found.pose.item() == pytest.approx(12 * 2 / 3)
    assert found.kobj.item() == pytest.approx(math.log(2))


def test_loss_without_positives_is_0():
    pred = torch.randn(2, 4, 6, requires_grad=True)
    rows = torch.full((2, 4), -1)
    found = ref.keypoint_loss(pred, rows, torch.zeros(0, 2, 3), torch.zeros(0, 4), [(2, 2)], strides=(8,))
    assert found == (0, 0, 0)
    assert not torch.autograd.grad(found.loss, pred)[0].any()


def test_rows_keep_their_numbers_among_padding():
    # Row 0 is padding, row 2 of image 0; one cell each of 8 px. The keypoint of row 1 is where its cell says, that of 2 is not.
    rows = numbers(-1, 0, 0.5, 0.5, 1, 1, 1, 0, 0.5, 0.5, 1, 1, 0, 0, 0.5, 0.5, 1, 1).reshape(3, 6)
    keypoints = numbers(9, 9, 1, 0, 0, 1, 1, 0, 1).reshape(3, 1, 3)
    preds = torch.full((2, 1, 4), 0.5).double(), torch.zeros(2, 1, 1).double(), torch.zeros(2, 1, 3).double()
    out = ref.yolo11_pose_loss(*preds, [(1, 1)], rows, keypoints, strides=(8,), reg_max=1, sigmas=[0.5])
    detection = ref.yolo11_loss(*preds[:2], [(1, 1)], rows, strides=(8,), reg_max=1)
    assert out.num_fg == 2
    assert out.pose.item() == pytest.approx(12 * (1 - math.exp(-1 / 2)) / 2, rel=1e-6)
    assert out.loss.item() == pytest.approx(detection.loss.item() + 2 * (out.pose + out.kobj).item())


@pytest.mark.parametrize("which", range(3))
def test_no_number_shows_everywhere(which):
    """Each of four cells says a quarter of the box, all of which are positive."""
    preds = [torch.full((1, 4, n), 0.5).double() for n in (4, 2, 6)]
    rows, keypoints = numbers(0, 1, 0.5, 0.5, 1, 1).reshape(1, 6), torch.rand(1, 2, 3).double()
    preds[which][0, 2, 1] = math.nan
    for x in preds:
        x.requires_grad_()
    out = ref.yolo11_pose_loss(*preds, [(2, 2)], rows, keypoints, strides=(8,), reg_max=1)
    assert out.loss.isnan()
    assert all(grad.isnan().all() for grad in torch.autograd.grad(out.loss, preds))
