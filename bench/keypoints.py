"""Keypoints, the term alone and in its criterion."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

import triton_yolo as ty
from triton_yolo import make_anchors

from . import peers
from .cases import STRIDES, Case, keypoints_of, yolo11_preds
from .competitors import MIN_BOX_SIDE, OURS, Step, Target, ours
from .systems import target_row


@lru_cache(maxsize=2)
def _assignment(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Row of every anchor (B, A), boxes of the rows (N, 4), anchor points (A, 2) in cells with their strides (A, 1) behind."""
    row = target_row(case, min_box_side=MIN_BOX_SIDE)
    points, strides = make_anchors(case.feat_shapes, STRIDES)
    return row, ty.Targets.from_yolo(case.rows, case.imgsz).boxes_xyxy, torch.cat([points, strides[:, None]], 1)


def _term_ours(case: Case, target: Target) -> Step:
    raw, keypoints = keypoints_of(case)
    leaf, scale = target.leaf(raw), keypoints.new_tensor([case.imgsz, case.imgsz, 1])
    row, boxes, _ = (x.to(target.device) for x in _assignment(case))
    gt = (keypoints * scale).to(target.device)

    def forward() -> Tensor:
        return ty.keypoint_loss(leaf.transpose(1, 2), row, gt, boxes, case.feat_shapes, strides=STRIDES).loss

    return Step(forward, (leaf,), target.device)


def _criterion(case: Case, target: Target) -> Callable:
    model = peers.ultralytics_pose_model("yolo11n-pose.yaml", case.num_classes, keypoints_of(case)[1].shape[1])
    return model.to(target.device).init_criterion()


def _term_ultralytics(case: Case, target: Target) -> Step:
    criterion, (raw, keypoints) = _criterion(case, target), keypoints_of(case)
    leaf, rows = target.leaf(raw), case.rows.to(target.device)
    row, boxes, anchors = (x.to(target.device) for x in _assignment(case))
    points, strides = anchors.split([2, 1], 1)
    firsts = torch.searchsorted(rows[:, 0].contiguous(), torch.arange(case.batch_size, dtype=rows.dtype, device=target.device))
    slot = torch.where(row >= 0, row - firsts[:, None], 0)
    target_boxes = boxes[row.clamp(min=0).long()]
    size = keypoints.new_tensor([case.imgsz, case.imgsz]).to(target.device)
    batch = {"batch_idx": rows[:, 0], "keypoints": keypoints.to(target.device)}
    gains = criterion.hyp.pose, criterion.hyp.kobj

    def forward() -> Tensor:
        places = criterion.kpts_decode(points, leaf.transpose(1, 2).unflatten(2, keypoints.shape[1:]))
        padded = criterion._batch_keypoints(batch, case.batch_size, size)
        terms = criterion.calculate_keypoints_loss(row >= 0, slot, padded, strides, target_boxes.clone(), places)  # in place
        return case.batch_size * sum(gain * term for gain, term in zip(gains, terms, strict=True))

    return Step(forward, (leaf,), target.device)


def _pose_ultralytics(case: Case, target: Target) -> Step:
    criterion = _criterion(case, target)
    leaves = tuple(map(target.leaf, (*yolo11_preds(case), keypoints_of(case)[0])))
    batch = {**peers.ultralytics_batch(case.rows), "keypoints": keypoints_of(case)[1]}
    batch = {name: x.to(target.device) for name, x in batch.items()}
    preds = peers.ultralytics_preds(*leaves[:2], case.feat_shapes, kpts=leaves[2])
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves, target.device)


KEYPOINTS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "keypoint_loss": {OURS: _term_ours, "ultralytics": _term_ultralytics},
    "yolo11-pose": {OURS: partial(ours, "yolo11-pose"), "ultralytics": _pose_ultralytics},
}
