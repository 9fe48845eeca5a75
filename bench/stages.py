"""The stages, each beside its twin in ``reference/``."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import reference
import triton_yolo as ty
from triton_yolo import Targets, _ops
from triton_yolo import _signatures as of

from .cases import STRIDES, Case, yolo11_preds, yolox_preds
from .competitors import OURS, Step, Target, padded
from .systems import least_bytes

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
    loss, given = (_yolo11_loss if system == "yolo11" else _yolox_loss)(preds, list(Targets.from_yolo(rows, case.imgsz)), case)
    return Step(lambda: loss(given).loss, leaves, target.device, least)


def _yolo11_loss(preds: tuple[Tensor, ...], targets: list[Tensor], case: Case) -> tuple[Any, of.YOLO11Loss]:
    x = of.YOLO11Assign(*preds, targets, _levels(case), case.reg_max, of.TaskAligned(10, None, 0.5, 6.0, 0.0, 1e-9))
    with torch.no_grad():
        row, score, sums, _, *gt = _ops.yolo11_assign(x)
    given = of.YOLO11Loss(*preds, row, score, sums.clamp(min=1), *gt, None, x.levels, case.reg_max, (7.5, 0.5, 1.5))
    return _ops.yolo11_loss, given


def _yolox_loss(preds: tuple[Tensor, ...], targets: list[Tensor], case: Case) -> tuple[Any, of.YOLOXLoss]:
    x = of.YOLOXAssign(*preds, targets, _levels(case), of.SimOTA("center", 1.5))
    with torch.no_grad():
        row, iou, counts, *gt = _ops.yolox_assign(x)
    normaliser, no_l1 = counts[0].clamp(min=1).to(iou.dtype), torch.zeros((), device=iou.device)
    return _ops.yolox_loss, of.YOLOXLoss(*preds, row, iou, normaliser, *gt, no_l1, x.levels, "iou", 5.0)


def _levels(case: Case) -> of.Levels:
    return of.Levels(tuple(side for shape in case.feat_shapes for side in shape), tuple(map(float, STRIDES)))


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
