"""Gradients of interpreted kernels against difference quotients, in float64 and along random directions."""

import functools

import pytest
import torch

import triton_yolo as ty
from tests.flat import ops as _ops
from tests.gradients import held_weight, held_weight_of_loss
from tests.kernels.cases import (
    FLAT_SHAPES,
    SHAPES,
    STRIDES,
    X_LEVELS,
    X_SHAPES,
    X_STRIDES,
    make_case,
    make_yolox_case,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("interpreted")
F64 = torch.float64
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_decode_dfl(layout):
    case = make_case(0, dtype=F64, layout=layout)
    points, strides = ty.make_anchors(SHAPES, STRIDES, dtype=F64)
    assert gradcheck(lambda d: _ops.decode_dfl(d, points, strides, 5), case.dist.requires_grad_())


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_bbox_iou(kind):
    torch.manual_seed(0)
    low = torch.rand(2, 30, 2, dtype=F64)
    a, b = torch.cat([low, low + 0.3 + torch.rand(2, 30, 2, dtype=F64)], -1)
    correction = held_weight(a, b) if kind == "ciou" else lambda a, b: 0
    inputs = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda a, b: _ops.bbox_iou(a, b, kind, 1e-7) + correction(a, b), inputs)


@pytest.mark.parametrize("reg_max", [1, 5])
@pytest.mark.parametrize("has_weights", [True, False])
def test_yolo11_loss(reg_max, has_weights):
    case = make_case(2, dtype=F64, reg_max=reg_max)
    weights = torch.tensor([1.0, 2.0, 0.5]) if has_weights else None
    dist = case.dist.abs() + 0.5
    levels = (FLAT_SHAPES, STRIDES, reg_max)
    row, score, sums, _ = _ops.yolo11_assign(dist, *case[1:], *levels, 10, None, 0.5, 6.0, 0.0)
    assert (row >= 0).any()
    normaliser = sums.clamp(min=1)
    tail = (row, score, normaliser, *case[3:], weights, *levels, [7.5, 0.5, 1.5])
    correction = held_weight_of_loss(dist, row, score, normaliser, case.gt_boxes, *levels, 7.5)
    inputs = (dist.requires_grad_(), case.scores.requires_grad_())
    assert gradcheck(lambda d, s: _ops.yolo11_loss(d, s, *tail)[0] + correction(d), inputs)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_decode_yolox(layout):
    case = make_yolox_case(0, dtype=F64, layout=layout)
    points, strides = ty.make_anchors(X_SHAPES, X_STRIDES, dtype=F64)
    assert gradcheck(lambda p: _ops.decode_yolox(p, points, strides), case.preds.requires_grad_())


@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
@pytest.mark.parametrize("use_l1", [True, False])
def test_yolox_loss(iou_loss, use_l1):
    case = make_yolox_case(1, dtype=F64)
    preds = case.preds + 0.1 * torch.rand_like(case.preds)  # off the boxes' corners, where the overlap has a kink
    *assignment, counts = _ops.yolox_assign(preds, *case[1:], *X_LEVELS, "center", 1.5)
    assert counts[0] > 0
    tail = (*assignment, counts[0].double(), case.labels, case.gt_xywh, *X_LEVELS, iou_loss, 5.0, torch.tensor(float(use_l1)))
    assert gradcheck(lambda p: _ops.yolox_loss(p, *tail)[0], preds.requires_grad_())
