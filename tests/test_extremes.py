"""Unusual arguments of the public functions, with values worked out by hand."""

import math

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE

ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on the CPU only: elsewhere it would synchronise")
SHAPES = [(2, 2)]


def given_assignment():
    """A criterion and the arguments of ``loss_of``: two images with a box each, which has one anchor of its image."""
    criterion = ty.YOLO11Loss(3, strides=(8,))
    preds = torch.zeros(2, 4, 64, device=DEVICE), torch.zeros(2, 4, 3, device=DEVICE)
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5], [1, 2, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    target_row = torch.tensor([[0, -1, -1, -1], [-1, -1, 1, -1]], device=DEVICE)
    target_score = torch.full((2, 4), 0.5, device=DEVICE)
    return criterion, [*preds, SHAPES, ty.Targets.from_yolo(rows, 16), target_row, target_score, torch.ones((), device=DEVICE)]


def test_loss_of_a_given_assignment():
    criterion, args = given_assignment()
    out = criterion.loss_of(*args)
    # All logits 0: ln 2 for each of 24 classes, whatever the target. Bins are uniform: each is ln 16, weighted by 1/2 twice.
    torch.testing.assert_close(out.cls, torch.tensor(0.5 * 24 * math.log(2), device=DEVICE))
    torch.testing.assert_close(out.dfl, torch.tensor(1.5 * math.log(16), device=DEVICE))
    torch.testing.assert_close(out.loss, 2 * (out.box + out.cls + out.dfl))
    assert out.num_fg == 2


def test_loss_of_a_given_assignment_of_oriented_boxes():
    _, (dist, scores, _, _, *assignment) = given_assignment()
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5, 0.3], [1, 2, 0.5, 0.5, 0.5, 0.5, -0.3]], device=DEVICE)
    preds, targets = (dist, torch.zeros(2, 4, 1, device=DEVICE), scores), ty.Targets.from_yolo(rows, 16)
    out = ty.YOLO11OBBLoss(3, strides=(8,)).loss_of(*preds, SHAPES, targets, *assignment)
    torch.testing.assert_close(out.cls, torch.tensor(0.5 * 24 * math.log(2), device=DEVICE))
    # A square turned by 0.3 against the prediction, weighted by 1/2 twice.
    torch.testing.assert_close(out.angle, torch.tensor(math.sin(0.6) ** 2, device=DEVICE))
    torch.testing.assert_close(out.loss, 2 * (out.box + out.cls + out.dfl + out.angle))
    assert out.num_fg == 2
    with pytest.raises(ValueError, match=r"targets.boxes_xywh must have shape \(2, 5\)"):
        ty.YOLO11OBBLoss(3, strides=(8,)).loss_of(*preds, SHAPES, ty.Targets.from_yolo(rows[:, :6], 16), *assignment)


@pytest.mark.parametrize("targets", [torch.ones(4, 6, device=DEVICE), list(given_assignment()[1][3]), None])
def test_loss_of_targets_of_another_form(targets):
    criterion, args = given_assignment()
    with pytest.raises(TypeError, match=r"targets must be triton_yolo\.Targets, which from_yolo makes of rows, got"):
        criterion.loss_of(*args[:3], targets, *args[4:])


@ON_CPU
@pytest.mark.parametrize("row", [2, 1000, 2**32, 1], ids=["after the last", "far after it", "beyond int32", "of another image"])
def test_loss_of_a_row_that_is_not_there(row):
    criterion, args = given_assignment()
    args[4][0, 0] = row
    with pytest.raises(ValueError, match=f"target_row must be rows of targets .* got \\[{row}\\]"):
        criterion.loss_of(*args)


@ON_CPU
@pytest.mark.parametrize("field", [{"labels": torch.tensor([1, -1])}, {"labels": torch.tensor([1, 3])},
                                   {"image_index": torch.tensor([0, -1])}])  # fmt: skip
def test_loss_of_a_row_that_is_no_ground_truth(field):
    criterion, args = given_assignment()
    args[3] = args[3]._replace(**field)
    with pytest.raises(ValueError, match=r"target_row must be rows of targets .* got \[1\]"):
        criterion.loss_of(*args)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="an error on the CPU")
@pytest.mark.parametrize("row", [2, 1000, 2**32, 1])
def test_loss_of_a_row_that_is_not_there_is_background_elsewhere(row):
    criterion, args = given_assignment()
    args[4][0, 0] = -1
    expected = criterion.loss_of(*args)
    args[4][0, 0] = row
    assert torch.equal(criterion.loss_of(*args).loss, expected.loss)


def test_second_backward_after_targets_were_changed_in_place():
    criterion, (dist, scores, shapes, _, *_) = given_assignment()
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9]], device=DEVICE)
    dist.requires_grad_()
    out = criterion(dist, scores, shapes, rows)
    out.loss.backward(retain_graph=True)
    rows[:, 4:] = 0.3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_second_backward_after_l1_was_switched():
    criterion = ty.YOLOXLoss(3, strides=(8,), use_l1=True).to(DEVICE)
    preds = torch.zeros(1, 4, 8, device=DEVICE, requires_grad=True)
    out = criterion(preds, SHAPES, torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9]], device=DEVICE))
    out.loss.backward(retain_graph=True)
    criterion.use_l1 = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_class_weights_are_finite_and_not_negative(wrong):
    with pytest.raises(ValueError, match="class_weights must be finite and not negative"):
        ty.YOLO11Loss(3, class_weights=torch.tensor([1.0, wrong, 1.0]))


def test_topk_beyond_64_bits():
    metric = torch.rand(1, 2, 5, device=DEVICE) + 0.1
    assert ty.select_topk_candidates(metric, 2**63 - 1).all()
    with pytest.raises(ValueError, match="topk must fit in 64 bits"):
        ty.select_topk_candidates(metric, 2**63)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
@pytest.mark.parametrize("scale", [2.0**34, 2.0**60], ids=["areas whose square overflows", "areas near the end of float32"])
def test_gradient_of_large_boxes(kind, scale):
    """An overlap has no unit: the gradient of boxes that are so much larger is so much smaller."""

    def gradient(factor):
        a = (torch.tensor([0.0, 0, 2, 3], device=DEVICE) * factor).requires_grad_()
        b = torch.tensor([1.0, -1, 4, 2], device=DEVICE) * factor
        return torch.autograd.grad(ty.bbox_iou(a, b, kind=kind, eps=0.0), a)[0]

    torch.testing.assert_close(gradient(scale) * scale, gradient(1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log_size", [20.0, 43.0, 44.0, 50.0, 86.0])
def test_giou_of_a_prediction_around_the_truth(log_size):
    """Predicted boxes that contain the truth leave no gap in the enclosing box: however large they are, GIoU is IoU, here 0."""
    criterion = ty.YOLOXLoss(3, strides=(8,), iou_loss="giou").to(DEVICE)
    preds = torch.zeros(1, 4, 8, device=DEVICE)
    preds[..., 2:4] = log_size
    out = criterion(preds, SHAPES, torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5]], device=DEVICE))
    torch.testing.assert_close(out.iou, torch.tensor(5.0, device=DEVICE))


@pytest.mark.parametrize("sides", [(1.0, 1.0), (2.0**64, 1.0), (1.0, 2.0**120), (2.0**63, 2.0**63), (2.0**100, 2.0**126)])
def test_giou_of_boxes_whose_areas_overflow(sides):
    """Of a box and one of half its width, half its width beside it: union 3/2 and enclosing box 2, in units of w h."""
    w, h = sides
    a = torch.tensor([0.0, 0, w, h], device=DEVICE, requires_grad=True)
    giou = ty.bbox_iou(a, torch.tensor([1.5 * w, 0.0, 2 * w, h], device=DEVICE), kind="giou", eps=0.0)
    assert giou.item() == pytest.approx(-0.25)
    (grad,) = torch.autograd.grad(giou, a)
    # Each side of a has its part of (d union - 3/4 d enclosing) / 2; the upper and lower ones enclose by half, being ties.
    assert (grad[[0, 2]] * w).tolist() == pytest.approx([-1 / 8, 1 / 2])
    assert (grad[[1, 3]] * h).tolist() == pytest.approx([-1 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("kind", "expected"), [("iou", 1 / 3), ("giou", 1 / 3), ("diou", 1 / 3 - 4 / 45), ("ciou", 1 / 3 - 4 / 45)]
)
def test_overlaps_up_to_the_length_that_squares_can_hold(kind, expected):
    """Two boxes 8 by 6, of which half overlaps: 24 of 72. They are 4 apart, and both reach over root 180, which is 1e19."""
    unit = torch.tensor(1e19 / math.sqrt(180), device=DEVICE)
    a, b = (torch.tensor([x, 0.0, x + 8, 6.0], device=DEVICE) * unit for x in (0.0, 4.0))
    assert ty.bbox_iou(a, b, kind=kind).item() == pytest.approx(expected)


@pytest.mark.parametrize(("side", "is_assigned"), [(1e18, True), (1e20, False)])
def test_boxes_whose_overlap_is_no_number_are_not_assigned(side, is_assigned):
    """A prediction that is the box itself; beyond 1e19 the overlap is NaN. Another image keeps its positive."""
    boxes = torch.tensor([[[-side, -side, side, side]], [[0.0, 0, 4, 4]]], device=DEVICE)
    ones, point = torch.ones(2, 1, 1, device=DEVICE), torch.tensor([[2.0, 2.0]], device=DEVICE)
    assigned = ty.TaskAlignedAssigner(num_classes=1)(ones, boxes, point, ones - 1, boxes, ones)
    assert assigned.fg_mask.tolist() == [[is_assigned], [True]]
    assigned = ty.SimOTAAssigner(num_classes=1)(ones, ones[..., 0], boxes, point, 8 * ones[0, :, 0], ones - 1, boxes, ones)
    assert assigned.matched_iou.isfinite().all()
