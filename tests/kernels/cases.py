"""Inputs of the kernels' tests."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import triton_yolo as ty

SHAPES, STRIDES = [(5, 4), (3, 2)], (8.0, 16.0)
FLAT_SHAPES = [5, 4, 3, 2]
ANCHORS = 26


class Case(NamedTuple):
    dist: Tensor
    scores: Tensor
    image_index: Tensor
    labels: Tensor
    gt_boxes: Tensor


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
X_LEVELS = ([18, 16, 9, 8], X_STRIDES)
X_ANCHORS = 360


class YOLOXCase(NamedTuple):
    preds: Tensor
    image_index: Tensor
    labels: Tensor
    gt_boxes: Tensor
    gt_xywh: Tensor


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
