"""The implementations of a criterion, each on predictions in the layout native to it."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
import triton_yolo as ty
from tests import peers

from .cases import REG_MAX, STRIDES, Case, yolo11_preds, yolox_preds

OURS = "triton_yolo"
MIN_BOX_SIDE = float(STRIDES[1])  # as in Ultralytics


class Step(NamedTuple):
    """What is timed: ``forward`` returns a tensor; if there are ``leaves``, a gradient of ones goes back to them."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    device: torch.device

    def backward(self, out: Tensor) -> None:
        if self.leaves:
            out.backward(torch.ones((), dtype=out.dtype, device=out.device).expand_as(out))


class Target(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    def leaf(self, preds: Tensor) -> Tensor:
        return preds.to(self.device, self.dtype).contiguous().requires_grad_()


def _yolo11(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    dist, scores = (x.transpose(1, 2) for x in leaves)
    rows = case.rows.to(target.device)
    return Step(lambda: criterion(dist, scores, case.feat_shapes, rows).loss, leaves, target.device)


def _yolo11_ours(case: Case, target: Target) -> Step:
    return _yolo11(ty.YOLO11Loss(case.num_classes, strides=STRIDES, min_box_side=MIN_BOX_SIDE), case, target)


def _yolo11_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = torch.compile(reference.yolo11_loss) if is_compiled else reference.yolo11_loss
    return _yolo11(partial(criterion, strides=STRIDES, min_box_side=MIN_BOX_SIDE), case, target)


def _yolo11_ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n.yaml", case.num_classes).to(target.device).init_criterion()
    leaves = tuple(map(target.leaf, yolo11_preds(case)))
    batch = peers.ultralytics_batch(case.rows.to(target.device))
    preds = peers.ultralytics_preds(*leaves, case.feat_shapes)
    return Step(lambda: criterion(preds, batch)[0].sum(), leaves, target.device)


def _yolox(criterion: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    preds, rows = target.leaf(yolox_preds(case)), case.rows.to(target.device)
    return Step(lambda: criterion(preds, case.feat_shapes, rows).loss, (preds,), target.device)


def _yolox_ours(case: Case, target: Target) -> Step:
    return _yolox(ty.YOLOXLoss(case.num_classes, strides=STRIDES), case, target)


def _yolox_reference(case: Case, target: Target, *, is_compiled: bool = False) -> Step:
    criterion = torch.compile(reference.yolox_loss) if is_compiled else reference.yolox_loss
    return _yolox(partial(criterion, strides=STRIDES), case, target)


def _yolox_peer(case: Case, target: Target) -> Step:
    head = peers.yolox_head(case.num_classes, STRIDES).to(target.device)
    preds = target.leaf(yolox_preds(case))
    labels = peers.yolox_labels(case.rows, case.batch_size, (case.imgsz, case.imgsz)).to(target.device)
    return Step(lambda: peers.yolox_losses(head, preds, case.feat_shapes, labels)[0], (preds,), target.device)


CRITERIA: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "yolo11": {
        OURS: _yolo11_ours,
        "ultralytics": _yolo11_ultralytics,
        "reference": _yolo11_reference,
        "torch.compile(reference)": partial(_yolo11_reference, is_compiled=True),
    },
    "yolox": {
        OURS: _yolox_ours,
        "pixeltable-yolox": _yolox_peer,
        "reference": _yolox_reference,
        "torch.compile(reference)": partial(_yolox_reference, is_compiled=True),
    },
}


def _decode(module: ModuleType, system: str, case: Case, target: Target) -> Step:
    points, strides = (x.to(target.device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    if system == "yolo11":
        leaf = target.leaf(yolo11_preds(case)[0])
        return Step(
            lambda: module.decode_dfl(leaf.transpose(1, 2), points, reg_max=REG_MAX, strides=strides), (leaf,), target.device
        )
    leaf = target.leaf(yolox_preds(case))
    return Step(lambda: module.decode_yolox(leaf, points, strides), (leaf,), target.device)


class _Padded(NamedTuple):
    """What an assigner takes, with the predictions of a network that has learnt something."""

    cls_logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    gt: tuple[Tensor, Tensor, Tensor]


def _padded(case: Case, target: Target) -> _Padded:
    dist, logits = (x.to(target.device, target.dtype).transpose(1, 2) for x in yolo11_preds(case))
    points, strides = (x.to(target.device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    boxes = ty.decode_dfl(dist, points, reg_max=REG_MAX, strides=strides)
    labels, xywh, mask = reference.pad_targets(case.rows.to(target.device), case.batch_size, (case.imgsz, case.imgsz))
    gt = (labels[..., None], reference.xywh_to_xyxy(xywh), mask[..., None])
    return _Padded(logits, boxes, points * strides[:, None], strides, gt)


def _align_metric(module: ModuleType, case: Case, target: Target) -> Step:
    x = _padded(case, target)
    args = (x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt)
    return Step(lambda: module.align_metric(*args, alpha=0.5, beta=6.0)[0], (), target.device)


def _topk(module: ModuleType, case: Case, target: Target) -> Step:
    x = _padded(case, target)
    metric, _ = ty.align_metric(x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt, alpha=0.5, beta=6.0)
    return Step(lambda: module.select_topk_candidates(metric, 10), (), target.device)


def _bbox_iou(module: ModuleType, case: Case, target: Target) -> Step:
    boxes = _padded(case, target).boxes.flatten(0, 1)
    a, b = target.leaf(boxes), target.leaf(boxes.roll(1, 0))
    return Step(lambda: module.bbox_iou(a, b, kind="ciou"), (a, b), target.device)


def _task_aligned(assigner: Callable[..., tuple[Tensor, ...]], case: Case, target: Target) -> Step:
    x = _padded(case, target)
    args = (x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt)
    return Step(lambda: assigner(*args)[2], (), target.device)


def _task_aligned_ours(case: Case, target: Target) -> Step:
    return _task_aligned(ty.TaskAlignedAssigner(10, case.num_classes, 0.5, 6.0, min_box_side=MIN_BOX_SIDE), case, target)


def _task_aligned_reference(case: Case, target: Target) -> Step:
    return _task_aligned(
        partial(reference.task_aligned_assign, topk=10, alpha=0.5, beta=6.0, min_box_side=MIN_BOX_SIDE), case, target
    )


def _task_aligned_ultralytics(case: Case, target: Target) -> Step:
    return _task_aligned(peers.ultralytics_assigner(case.num_classes, topk=10, alpha=0.5, beta=6.0), case, target)


def _simota(assigner: Callable[..., NamedTuple], case: Case, target: Target) -> Step:
    x = _padded(case, target)
    args = (x.cls_logits, x.cls_logits.amax(-1), x.boxes, x.points, x.strides, *x.gt)
    return Step(lambda: assigner(*args).matched_iou, (), target.device)


def _simota_ours(case: Case, target: Target) -> Step:
    return _simota(ty.SimOTAAssigner(case.num_classes), case, target)


def _simota_reference(case: Case, target: Target) -> Step:
    return _simota(reference.simota_assign, case, target)


def _both(build: Callable[..., Step], *args: str) -> dict[str, Callable[[Case, Target], Step]]:
    return {name: partial(_of_module, build, name, *args) for name in (OURS, "reference")}


def _of_module(build: Callable[..., Step], name: str, *args: Any) -> Step:
    return build(ty if name == OURS else reference, *args)


STAGES: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "decode_dfl": _both(_decode, "yolo11"),
    "decode_yolox": _both(_decode, "yolox"),
    "align_metric": _both(_align_metric),
    "select_topk_candidates": _both(_topk),
    "bbox_iou (CIoU)": _both(_bbox_iou),
}
ASSIGNERS: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "TaskAlignedAssigner": {
        OURS: _task_aligned_ours,
        "ultralytics": _task_aligned_ultralytics,
        "reference": _task_aligned_reference,
    },
    "SimOTAAssigner": {OURS: _simota_ours, "reference": _simota_reference},
}


def label(name: str) -> str:
    """The name with the version if it is a package."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
