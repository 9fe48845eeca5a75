"""Inputs of the kernels' tests."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import triton_yolo as ty
from triton_yolo._signatures import (
    YOLO11,
    YOLOX,
    Levels,
    SimOTA,
    TaskAligned,
    YOLO11Assign,
    YOLO11Assignment,
    YOLO11Loss,
    YOLOXAssign,
    YOLOXAssignment,
    YOLOXLoss,
)

SHAPES, STRIDES = [(5, 4), (3, 2)], (8.0, 16.0)
LEVELS = Levels((5, 4, 3, 2), STRIDES)
ANCHORS = 26
GAINS = (7.5, 0.5, 1.5)


class Case(NamedTuple):
    dist: Tensor
    scores: Tensor
    image_index: Tensor
    labels: Tensor
    gt_boxes: Tensor

    @property
    def targets(self) -> list[Tensor]:
        low, high = self.gt_boxes.split(2, -1)
        return [*self[2:], torch.cat([(low + high) / 2, high - low], -1)]

    @property
    def reg_max(self) -> int:
        return self.dist.shape[2] // 4


def assign(case: Case, *, topk: int = 10, topk2: int | None = None, min_box_side: float = 0.0) -> YOLO11Assign:
    rule = TaskAligned(topk, topk2, 0.5, 6.0, min_box_side, 1e-9)
    return YOLO11Assign(case.dist, case.scores, case.targets, LEVELS, case.reg_max, rule)


def loss(
    case: Case, assignment: YOLO11Assignment, *, normaliser: Tensor | None = None, weights: Tensor | None = None
) -> YOLO11Loss:
    """The loss of an assignment, normalised by its sums as they are."""
    row, score, sums, _, labels, boxes = assignment
    normaliser = sums if normaliser is None else normaliser
    return YOLO11Loss(
        case.dist, case.scores, row, score, normaliser, labels, boxes, weights, LEVELS, case.reg_max, GAINS
    )  # fmt: skip


def criterion(x: YOLO11Assign, *, weights: Tensor | None = None, wants_grad: bool = True, wants_row: bool = False) -> YOLO11:
    """The whole criterion with that assignment."""
    options = x.levels, x.reg_max, x.assigner, GAINS, wants_grad, wants_row
    return YOLO11(x.pred_dist, x.pred_scores, x.targets, weights, *options)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` (B, A, C) in memory as "first" (B, C, A), "last", "split" (part of a wider head) or "spread" (no unit stride)."""
    if layout == "first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "last":
        return x.contiguous()
    batch_size, num_anchors, channels = x.shape
    if layout == "split":
        wider = x.new_full((batch_size, channels + 3, num_anchors), torch.nan)
        wider[:, 1:-2] = x.transpose(1, 2)
        return wider[:, 1:-2].transpose(1, 2)
    spread = x.new_full((batch_size, num_anchors, channels, 2), torch.nan)
    spread[..., 0] = x
    return spread[..., 0]


def far_memory() -> Tensor:
    """2^32 numbers and some more; the system provides the pages that are used."""
    return torch.from_numpy(np.empty(2**32 + 2**20, dtype=np.float16))


def make_case(seed: int, *, dtype=torch.float32, layout="first", reg_max=5, num_classes=3, batch_size=2, num_rows=7) -> Case:
    generator = torch.Generator().manual_seed(seed)
    dist = torch.randn(batch_size, ANCHORS, 4 * reg_max, generator=generator)
    scores = torch.randn(batch_size, ANCHORS, num_classes, generator=generator)
    image_index = torch.randint(-1, batch_size, (num_rows,), generator=generator)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    centre, size = torch.rand(2, num_rows, 2, generator=generator) * torch.tensor([32.0, 40.0])
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Case(laid_out(dist.to(dtype), layout), laid_out(scores.to(dtype), layout), image_index, labels, boxes)


def points_and_boxes(case: Case, reg_max: int) -> tuple[Tensor, Tensor]:
    """Anchor points and predicted boxes, in pixels."""
    points, strides = ty.make_anchors(SHAPES, STRIDES)
    return points * strides[:, None], ty.decode_dfl(case.dist, points, reg_max=reg_max, strides=strides)


X_SHAPES, X_STRIDES = [(18, 16), (9, 8)], (8.0, 16.0)
X_LEVELS = Levels((18, 16, 9, 8), X_STRIDES)
X_ANCHORS = 360


class YOLOXCase(NamedTuple):
    preds: Tensor
    image_index: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_xywh: Tensor

    @property
    def targets(self) -> list[Tensor]:
        return list(self[1:])


def x_assign(case: YOLOXCase, candidates: str = "center", radius: float = 1.5) -> YOLOXAssign:
    return YOLOXAssign(case.preds, case.targets, X_LEVELS, SimOTA(candidates, radius))


def x_loss(
    case: YOLOXCase, assignment: YOLOXAssignment, *, normaliser: float | None = None, iou_loss: str = "iou",
    use_l1: bool = False,
) -> YOLOXLoss:  # fmt: skip
    """The loss of an assignment, normalised by its positives as they are."""
    row, iou, counts, labels, boxes = assignment
    divisor = counts[0].to(iou.dtype) if normaliser is None else iou.new_tensor(normaliser)
    return YOLOXLoss(
        case.preds, row, iou, divisor, labels, boxes, torch.tensor(float(use_l1)), X_LEVELS, iou_loss, 5.0
    )  # fmt: skip


def x_criterion(x: YOLOXAssign, *, iou_loss: str = "iou", use_l1: bool = False, wants_grad: bool = True) -> YOLOX:
    """The whole criterion with that assignment."""
    gain = torch.tensor(float(use_l1))
    return YOLOX(x.preds, x.targets, gain, x.levels, x.assigner, iou_loss, 5.0, wants_grad)


def make_yolox_case(seed: int, *, dtype=torch.float32, layout="first", num_classes=3, batch_size=2, num_rows=14) -> YOLOXCase:
    """Many anchors are alike, some rows too; anchors lie on the edge of centre regions, and one region has none."""
    generator = torch.Generator().manual_seed(seed)
    preds = torch.randn(batch_size, X_ANCHORS, 5 + num_classes, generator=generator)
    preds[..., 4:] = preds[..., 4:].round()
    preds[:, ::3, :4] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    image_index = torch.randint(-1, batch_size, (num_rows,), generator=generator)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    boxes = torch.rand(num_rows, 4, generator=generator) * torch.tensor([128.0, 144.0, 60.0, 60.0])
    boxes[::2, :2] = 8 * (boxes[::2, :2] / 8).round()
    boxes[:1] = torch.tensor([-40.0, 40.0, 96.0, 50.0])
    image_index[:1] = 0
    twins = num_rows // 4
    for x in (boxes, labels, image_index):
        x[num_rows - twins :] = x[:twins].clone()
    boxes = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
    return YOLOXCase(laid_out(preds.to(dtype), layout), image_index, labels, corners, boxes)
