"""Keypoints of YOLO-Pose (arXiv 2204.06806): object keypoint similarity (OKS) and visibility, on the positives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .anchors import make_anchors
from .boxes import working_precision, xywh_to_xyxy
from .finite import poison
from .targets import is_xywh_box, pad_targets
from .task_aligned import TaskAlignedResult
from .yolo11 import yolo11_assign, yolo11_loss

LOSS_OPTIONS = ("box_gain", "cls_gain", "dfl_gain", "class_weights")
"""Of YOLO11's criterion; the others are its assigner's."""

COCO_SIGMAS = tuple(
    sigma / 1000 for sigma in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
)  # fmt: skip
"""How far people are off each of COCO's 17 keypoints, in shares of a person's size."""


class KeypointLossOutput(NamedTuple):
    loss: Tensor
    pose: Tensor
    kobj: Tensor


class YOLO11PoseLossOutput(NamedTuple):
    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    pose: Tensor
    kobj: Tensor
    num_fg: Tensor


def default_sigmas(num_keypoints: int, num_dims: int) -> tuple[float, ...]:
    """Those of COCO for its 17 keypoints with visibility, else 1 / K each."""
    return COCO_SIGMAS if (num_keypoints, num_dims) == (17, 3) else (1 / num_keypoints,) * num_keypoints


def decode_keypoints(raw: Tensor, points: Tensor) -> Tensor:
    """Places (..., K, 2) in cells of raw keypoints (..., K, D) at points (..., 2): twice as far from the cell's corner."""
    return 2 * raw[..., :2] + (points - 0.5)[..., None, :]


def is_visible(keypoints: Tensor) -> Tensor:
    """Which of keypoints (..., K, 2 or 3) are known: flag not 0, all of them without one; never one that is not finite."""
    is_known = keypoints.isfinite().all(-1)
    return is_known if keypoints.shape[-1] == 2 else is_known & (keypoints[..., 2] != 0)


def keypoint_distance(pred: Tensor, target: Tensor, visible: Tensor, area: Tensor, sigmas: Tensor) -> Tensor:
    """1 - OKS of places (M, K, 2) in boxes of ``area`` (M,): the mean over the visible (M, K) ones, 0 without any."""
    squared = (pred - target).where(visible[..., None], 0).square().sum(-1)
    error = squared / ((2 * sigmas) ** 2 * (area[:, None] + 1e-9) * 2)
    return ((1 - torch.exp(-error)) * visible).sum(-1) / visible.sum(-1).clamp(min=1)


def keypoint_loss(
    pred_keypoints: Tensor,
    target_row: Tensor,
    gt_keypoints: Tensor,
    gt_boxes: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    *,
    strides: Sequence[float] = (8, 16, 32),
    sigmas: Sequence[float] | None = None,
    pose_gain: float = 12.0,
    kobj_gain: float = 1.0,
) -> KeypointLossOutput:
    """Loss of raw keypoints (B, A, K * D) for an assignment: rows (B, A) of keypoints (N, K, 2 or 3) and boxes, in pixels."""
    raw = working_precision(pred_keypoints)
    batch_size, num_keypoints = raw.shape[0], gt_keypoints.shape[1]
    raw = raw.unflatten(-1, (num_keypoints, -1))
    points, point_strides = make_anchors(feat_shapes, strides, dtype=raw.dtype, device=raw.device)
    fg = target_row >= 0
    _, anchor = fg.nonzero(as_tuple=True)
    row, stride = target_row[fg].long(), point_strides[anchor]
    positives = raw[fg]
    num_dims = positives.shape[-1]
    sigmas = raw.new_tensor(default_sigmas(num_keypoints, num_dims) if sigmas is None else sigmas)

    target = gt_keypoints.to(raw.dtype)[row]
    visible = is_visible(target)
    area = ((gt_boxes[:, 2:] - gt_boxes[:, :2]).to(raw.dtype)[row] / stride[:, None]).prod(-1)
    pred = decode_keypoints(positives, points[anchor])
    place = target[..., :2] / stride[:, None, None]
    num_fg = fg.sum().clamp(min=1)
    pose = pose_gain * keypoint_distance(pred, place, visible, area, sigmas).sum() / num_fg
    kobj = pose.new_zeros(())
    if num_dims == 3:
        bce = F.binary_cross_entropy_with_logits(positives[..., 2], visible.to(raw.dtype), reduction="none")
        kobj = kobj_gain * bce.mean(-1).sum() / num_fg

    # A prediction of a positive that is not finite shows even where no formula reads it.
    not_finite = poison(positives.isfinite().all(), raw)
    pose, kobj = pose + not_finite, kobj + not_finite
    return KeypointLossOutput(batch_size * (pose + kobj), pose.detach(), kobj.detach())


def rows_of(assignment: TaskAlignedResult, targets: Tensor, imgsz: tuple[float, float]) -> Tensor:
    """Row of ``targets`` (N, 6) that every anchor (B, A) is matched with, -1 for background."""
    numbered = torch.cat([targets, torch.arange(len(targets), device=targets.device).to(targets)[:, None]], 1)
    fg = assignment.fg_mask
    _, slots, _ = pad_targets(numbered, len(fg), imgsz, lambda boxes: is_xywh_box(boxes[..., :4]))
    result = torch.full(fg.shape, -1, device=fg.device)
    image, _ = fg.nonzero(as_tuple=True)
    result[fg] = slots[image, assignment.target_gt_idx[fg], 4].long()
    return result


def yolo11_pose_loss(
    pred_dist: Tensor,
    pred_scores: Tensor,
    pred_keypoints: Tensor,
    feat_shapes: Sequence[tuple[int, int]],
    targets: Tensor,
    keypoints: Tensor,
    *,
    strides: Sequence[float] = (8, 16, 32),
    reg_max: int = 16,
    sigmas: Sequence[float] | None = None,
    pose_gain: float = 12.0,
    kobj_gain: float = 1.0,
    **options: float | Tensor | None,
) -> YOLO11PoseLossOutput:
    """YOLO11's criterion of rows (N, 6), with its ``options``, and that of their keypoints (N, K, 2 or 3), 0-1 of the image."""
    common = {"strides": strides, "reg_max": reg_max}
    of_loss = {name: options.pop(name) for name in LOSS_OPTIONS if name in options}
    assignment = yolo11_assign(pred_dist, pred_scores, feat_shapes, targets, **common, **options)
    detection = yolo11_loss(pred_dist, pred_scores, feat_shapes, targets, assignment=assignment, **common, **of_loss)

    height, width = (side * strides[0] for side in feat_shapes[0])
    size = keypoints.new_tensor([width, height])
    pose = keypoint_loss(
        pred_keypoints,
        rows_of(assignment, targets, (height, width)),
        torch.cat([keypoints[..., :2] * size, keypoints[..., 2:]], -1),
        xywh_to_xyxy(targets[:, 2:] * size.repeat(2)),
        feat_shapes, strides=strides, sigmas=sigmas, pose_gain=pose_gain, kobj_gain=kobj_gain,
    )  # fmt: skip
    # What is not finite in one shows in the gradients of both.
    loss = detection.loss + pose.loss
    loss = loss * torch.ones_like(loss).masked_fill(loss.isnan(), torch.nan)
    return YOLO11PoseLossOutput(loss, *detection[1:4], *pose[1:], detection.num_fg)
