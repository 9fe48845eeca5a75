"""Gradients of interpreted kernels against difference quotients, in float64 and along random directions."""

import functools

import pytest
import torch

import triton_yolo as ty
from tests.gradients import held_weight, held_weight_of_loss
from tests.kernels.cases import (
    SHAPES,
    STRIDES,
    X_SHAPES,
    X_STRIDES,
    assign,
    loss,
    make_case,
    make_yolox_case,
    x_assign,
    x_loss,
)  # fmt: skip
from triton_yolo import _ops
from triton_yolo._signatures import BboxIoU, DecodeDFL, DecodeYOLOX, ProbIoU

pytestmark = pytest.mark.usefixtures("interpreted")
F64 = torch.float64
gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_decode_dfl(layout):
    case = make_case(0, dtype=F64, layout=layout)
    points, strides = ty.make_anchors(SHAPES, STRIDES, dtype=F64)
    assert gradcheck(lambda d: _ops.decode_dfl(DecodeDFL(d, points, strides, 5)).boxes, case.dist.requires_grad_())


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_bbox_iou(kind):
    torch.manual_seed(0)
    low = torch.rand(2, 30, 2, dtype=F64)
    a, b = torch.cat([low, low + 0.3 + torch.rand(2, 30, 2, dtype=F64)], -1)
    correction = held_weight(a, b) if kind == "ciou" else lambda a, b: 0
    inputs = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda a, b: _ops.bbox_iou(BboxIoU(a, b, kind, 1e-7)).overlaps + correction(a, b), inputs)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_prob_iou(floor):
    torch.manual_seed(0)
    a, b = torch.rand(2, 2, 30, 5, dtype=F64) + torch.tensor([0, 0, 0.3, 0.3, 0])
    assert gradcheck(lambda a, b: _ops.prob_iou(ProbIoU(a, b, 1e-7, floor)).overlaps, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("reg_max", [1, 5])
@pytest.mark.parametrize("has_weights", [True, False])
def test_yolo11_loss(reg_max, has_weights):
    case = make_case(2, dtype=F64, reg_max=reg_max)
    weights = torch.tensor([1.0, 2.0, 0.5]) if has_weights else None
    case = case._replace(dist=case.dist.abs() + 0.5)
    assignment = _ops.yolo11_assign(assign(case))
    assert assignment.num_fg > 0
    x = loss(case, assignment, normaliser=assignment.sums.clamp(min=1), weights=weights)
    correction = held_weight_of_loss(x)
    inputs = (case.dist.requires_grad_(), case.scores.requires_grad_())
    assert gradcheck(lambda d, s: _ops.yolo11_loss(x._replace(pred_dist=d, pred_scores=s)).loss + correction(d), inputs)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_decode_yolox(layout):
    case = make_yolox_case(0, dtype=F64, layout=layout)
    points, strides = ty.make_anchors(X_SHAPES, X_STRIDES, dtype=F64)
    assert gradcheck(lambda p: _ops.decode_yolox(DecodeYOLOX(p, points, strides)).boxes, case.preds.requires_grad_())


@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
@pytest.mark.parametrize("use_l1", [True, False])
def test_yolox_loss(iou_loss, use_l1):
    case = make_yolox_case(1, dtype=F64)
    case = case._replace(preds=case.preds + 0.1 * torch.rand_like(case.preds))  # off the boxes' corners, a kink of the overlap
    assignment = _ops.yolox_assign(x_assign(case))
    assert assignment.counts[0] > 0
    x = x_loss(case, assignment, iou_loss=iou_loss, use_l1=use_l1)
    assert gradcheck(lambda p: _ops.yolox_loss(x._replace(preds=p)).loss, case.preds.requires_grad_())
