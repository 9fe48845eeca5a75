"""The stages, each beside its twin in ``reference/``."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

import reference
import triton_yolo as ty
from tests.flat import ops
from triton_yolo import Targets

from .cases import STRIDES, Case, least_bytes, yolo11_preds, yolox_preds
from .competitors import OURS, Step, Target, padded

_BOX = 4 * 4  # bytes of a box in float32


def _decode(module: ModuleType, system: str, case: Case, target: Target) -> Step:
    points, strides = (x.to(target.device) for x in ty.make_anchors(case.feat_shapes, STRIDES))
    if system == "yolo11":
        leaf = target.leaf(yolo11_preds(case)[0])
        options = {"reg_max": case.reg_max, "strides": strides}
        least = 3 * leaf.nbytes + 2 * _BOX * case.batch_size * len(points)
        return Step(lambda: module.decode_dfl(leaf.transpose(1, 2), points, **options), (leaf,), target.device, least)
    leaf = target.leaf(yolox_preds(case))
    read = leaf[..., :4].nbytes
    least = 2 * read + leaf.nbytes + 2 * _BOX * case.batch_size * len(points)
    return Step(lambda: module.decode_yolox(leaf, points, strides), (leaf,), target.device, least)


def _align_metric(module: ModuleType, case: Case, target: Target) -> Step:
    x = padded(case, target)
    args = (x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt)
    least = x.boxes.nbytes + 2 * 4 * x.gt[0].numel() * len(x.points)
    return Step(lambda: module.align_metric(*args, alpha=0.5, beta=6.0)[0], (), target.device, least)


def _topk(module: ModuleType, case: Case, target: Target) -> Step:
    x = padded(case, target)
    metric, _ = ty.align_metric(x.cls_logits.sigmoid(), x.boxes, x.points, *x.gt, alpha=0.5, beta=6.0)
    return Step(lambda: module.select_topk_candidates(metric, 10), (), target.device, metric.nbytes + metric.numel())


def _bbox_iou(module: ModuleType, case: Case, target: Target) -> Step:
    boxes = padded(case, target).boxes.flatten(0, 1)
    a, b = target.leaf(boxes), target.leaf(boxes.roll(1, 0))
    least = 3 * (a.nbytes + b.nbytes) + 2 * 4 * len(a)
    return Step(lambda: module.bbox_iou(a, b, kind="ciou"), (a, b), target.device, least)


def _losses_of_assignment(module: ModuleType, system: str, case: Case, target: Target) -> Step:
    rows, options = case.rows.to(target.device), {"strides": STRIDES}
    if system == "yolo11":
        leaves = tuple(map(target.leaf, yolo11_preds(case)))
        preds, options = tuple(x.transpose(1, 2) for x in leaves), {**options, "reg_max": case.reg_max}
    else:
        leaves = preds = (target.leaf(yolox_preds(case)),)
    least = least_bytes(system, case, target.dtype.itemsize)
    if module is reference:
        assign, criterion = getattr(reference, f"{system}_assign"), getattr(reference, f"{system}_loss")
        options["assignment"] = assign(*preds, case.feat_shapes, rows, **options)
        return Step(lambda: criterion(*preds, case.feat_shapes, rows, **options).loss, leaves, target.device, least)
    gt = Targets.from_yolo(rows, case.imgsz)
    levels = ([side for shape in case.feat_shapes for side in shape], [float(stride) for stride in STRIDES])
    with torch.no_grad():
        if system == "yolo11":
            assign = (gt.image_index, gt.labels, gt.boxes_xyxy, *levels, case.reg_max, 10, None, 0.5, 6.0, 0.0)
            target_row, target_score, sums, _ = ops.yolo11_assign(*preds, *assign)
            assignment = target_row, target_score, sums.clamp(min=1)
            tail = (gt.labels, gt.boxes_xyxy, None, *levels, case.reg_max, [7.5, 0.5, 1.5])
            return Step(lambda: ops.yolo11_loss(*preds, *assignment, *tail)[0], leaves, target.device, least)
        x_rows = (gt.image_index, gt.labels, gt.boxes_xyxy, gt.boxes_xywh)
        target_row, matched_iou, counts = ops.yolox_assign(*preds, *x_rows, *levels, "center", 1.5)
        assignment = target_row, matched_iou, counts[0].clamp(min=1).to(matched_iou.dtype)
    tail = (gt.labels, gt.boxes_xywh, *levels, "iou", 5.0, torch.zeros((), device=target.device))
    return Step(lambda: ops.yolox_loss(*preds, *assignment, *tail)[0], leaves, target.device, least)


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
    "BCE, CIoU and DFL of an assignment": _both(_losses_of_assignment, "yolo11"),
    "BCE and IoU of an assignment": _both(_losses_of_assignment, "yolox"),
}
