"""Inputs of gradients; and CIoU as its gradient sees it: its weight is a constant there, and changes in a quotient."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from triton_yolo import _signatures as of
from triton_yolo._signatures import YOLO11Loss

EPS = 1e-7


def gradient_of(x: Any, out: Any, grad: Tensor | None = None) -> Any:
    """The inputs of the gradient of an operation's first output, which are its inputs and outputs by their names."""
    kind = getattr(of, f"{type(x).__name__}Backward")
    grad = torch.ones_like(out[0]) if grad is None else grad
    known = {**x._asdict(), **out._asdict(), "grad": grad, "backend": ""}
    return kind(**{name: known[name] for name in kind._fields})


def weight_and_v(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """CIoU's trade-off weight and its measure of unlike aspect ratios, for boxes (..., 4)."""
    (wa, ha), (wb, hb) = ((x[..., 2] - x[..., 0], x[..., 3] - x[..., 1] + EPS) for x in (a, b))
    v = 4 / math.pi**2 * (torch.atan(wb / hb) - torch.atan(wa / ha)) ** 2
    return v / (1 - reference.bbox_iou(a, b, kind="iou", eps=EPS) + v + EPS), v


def held_weight(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What to add to the CIoU of other boxes to give them the weight of ``a`` and ``b``. It is 0 there, and has no gradient."""
    held, _ = weight_and_v(a.detach(), b.detach())

    def correction(a: Tensor, b: Tensor) -> Tensor:
        weight, v = weight_and_v(a.detach(), b.detach())
        return (weight - held) * v

    return correction


def held_weight_of_loss(x: YOLO11Loss) -> Callable[[Tensor], Tensor]:
    """The same for the YOLO11 loss as a function of ``pred_dist``, for a given assignment."""
    shapes, strides = x.levels
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    points, point_strides = reference.make_anchors(pairs, strides, dtype=x.pred_dist.dtype, device=x.pred_dist.device)
    is_pos = x.target_row >= 0
    target = x.gt_boxes.to(x.pred_dist.dtype)[x.target_row[is_pos].long()] / point_strides.expand_as(is_pos)[is_pos][:, None]

    def boxes(dist: Tensor) -> Tensor:
        return reference.decode_dfl(dist.detach(), points, reg_max=x.reg_max)[is_pos]

    correction = held_weight(boxes(x.pred_dist), target)
    scale = x.gains[0] * x.normaliser[1] / x.normaliser[0]
    return lambda dist: -(correction(boxes(dist), target) * x.target_score[is_pos]).sum() * scale
