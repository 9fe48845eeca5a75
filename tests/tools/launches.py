"""Every operation on meta tensors, as a training launches it: COCO at 640 px, in the head's own layout or not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.gradients import gradient_of
from triton_yolo import _ops
from triton_yolo import _signatures as of
from triton_yolo._operation import Operation
from triton_yolo._precision import working_dtype

TARGETS = (*(f"cuda:{arch}" for arch in (75, 80, 86, 89, 90, 100, 120)), "hip:gfx90a", "hip:gfx942")
DTYPES = ("float16", "bfloat16", "float32")

BATCH, CLASSES, REG_MAX, ROWS, SLOTS, ANCHORS = 16, 80, 16, 112, 20, 8400
LEVELS = of.Levels((80, 80, 40, 40, 20, 20), (8.0, 16.0, 32.0))
TASK_ALIGNED, SIMOTA = of.TaskAligned(10, None, 0.5, 6.0, 0.0, 1e-9), of.SimOTA("center", 1.5)
GAINS = (7.5, 0.5, 1.5)

Operator = tuple[Callable[[torch.dtype, str], Any], tuple[str, ...]]
LAYOUTS = ("channel-first", "channel-last")
FIRST, LAST = (LAYOUTS[:1], LAYOUTS[1:])

_NAMES = {value.inputs: value.name for value in vars(_ops).values() if isinstance(value, Operation)}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _preds(dtype: torch.dtype, layout: str, channels: int) -> Tensor:
    if layout == "channel-last":
        return _empty(BATCH, ANCHORS, channels, dtype=dtype)
    return _empty(BATCH, channels, ANCHORS, dtype=dtype).transpose(1, 2)


def _rows(count: int = ROWS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(of.new_ground_truth([_empty(count, 6, dtype=dtype)], working_dtype(dtype)))


def _points() -> tuple[Tensor, Tensor]:
    return _empty(ANCHORS, 2), _empty(ANCHORS)


def _decode_dfl(dtype: torch.dtype, layout: str, *, reg_max: int = REG_MAX, has_strides: bool = False) -> of.DecodeDFL:
    points, strides = _points()
    return of.DecodeDFL(_preds(dtype, layout, 4 * reg_max), points, strides if has_strides else None, reg_max)


def _decode_yolox(dtype: torch.dtype, layout: str) -> of.DecodeYOLOX:
    return of.DecodeYOLOX(_preds(dtype, layout, 5 + CLASSES), *_points())


def _bbox_iou(dtype: torch.dtype, layout: str, *, kind: str) -> of.BboxIoU:
    return of.BboxIoU(_empty(4096, 4, dtype=dtype), _empty(4096, 4, dtype=dtype), kind, 1e-7)


def _prob_iou(dtype: torch.dtype, layout: str, *, floor: float) -> of.ProbIoU:
    return of.ProbIoU(_empty(4096, 5, dtype=dtype), _empty(4096, 5, dtype=dtype), 1e-7, floor)


def _unpack_rows(dtype: torch.dtype, layout: str) -> of.UnpackRows:
    return of.UnpackRows(_empty(ROWS, 6, dtype=dtype), of.ImageSize((640, 640)))


def _align_metric(dtype: torch.dtype, layout: str) -> of.AlignMetric:
    scores, boxes = _preds(dtype, layout, CLASSES), _preds(dtype, layout, 4)
    return of.AlignMetric(scores, boxes, _points()[0], _rows(BATCH * SLOTS), SLOTS, 1.0, 6.0, 0.0)


def _select_topk(dtype: torch.dtype, layout: str) -> of.SelectTopk:
    return of.SelectTopk(_empty(BATCH, SLOTS, ANCHORS, dtype=dtype), 13, _empty(BATCH, SLOTS, dtype=torch.bool))


def _task_aligned_assign(dtype: torch.dtype, layout: str) -> of.TaskAlignedAssign:
    scores, boxes = _preds(dtype, layout, CLASSES), _preds(dtype, layout, 4)
    rule = of.TaskAligned(13, None, 1.0, 6.0, 0.0, 1e-9)
    return of.TaskAlignedAssign(scores, boxes, _points()[0], _rows(BATCH * SLOTS), rule)


def _rotated_task_aligned_assign(dtype: torch.dtype, layout: str) -> of.TaskAlignedAssign:
    x = _task_aligned_assign(dtype, layout)
    oriented = _empty(BATCH * SLOTS, 5, dtype=working_dtype(dtype))
    return x._replace(boxes=_preds(dtype, layout, 5), targets=[*x.targets[:3], oriented])


def _yolo11_assign(
    dtype: torch.dtype, layout: str, *, reg_max: int = REG_MAX, num_classes: int = CLASSES, rule: of.TaskAligned = TASK_ALIGNED
) -> of.YOLO11Assign:
    preds = _preds(dtype, layout, 4 * reg_max), _preds(dtype, layout, num_classes)
    return of.YOLO11Assign(*preds, _rows(dtype=dtype), LEVELS, reg_max, rule)


def _yolo11_loss(dtype: torch.dtype, layout: str, *, has_weights: bool = False, **sizes: int) -> of.YOLO11Loss:
    x = _yolo11_assign(dtype, layout, **sizes)
    row, score, sums, _, *gt = x.allocate()
    weights = _empty(x.pred_scores.shape[2]) if has_weights else None
    return of.YOLO11Loss(x.pred_dist, x.pred_scores, row, score, sums, *gt, weights, LEVELS, x.reg_max, GAINS)


def _yolo11_criterion(dtype: torch.dtype, layout: str, *, wants_grad: bool, wants_row: bool = False) -> of.YOLO11:
    x = _yolo11_assign(dtype, layout)
    return of.YOLO11(
        x.pred_dist, x.pred_scores, [_empty(ROWS, 6)], None, LEVELS, x.reg_max, x.assigner, GAINS, wants_grad, wants_row
    )  # fmt: skip


def _yolo11_obb_assign(
    dtype: torch.dtype, layout: str, *, reg_max: int = REG_MAX, rule: of.TaskAligned = TASK_ALIGNED
) -> of.YOLO11OBBAssign:
    preds = (_preds(dtype, layout, channels) for channels in (4 * reg_max, 1, CLASSES))
    rows = list(of.new_ground_truth([_empty(ROWS, 7)], working_dtype(dtype)))
    return of.YOLO11OBBAssign(*preds, rows, LEVELS, reg_max, rule)


def _yolo11_obb_loss(dtype: torch.dtype, layout: str, *, reg_max: int = REG_MAX) -> of.YOLO11OBBLoss:
    x = _yolo11_obb_assign(dtype, layout, reg_max=reg_max)
    row, score, sums, _, *gt = x.allocate()
    return of.YOLO11OBBLoss(*x[:3], row, score, sums, *gt, None, LEVELS, reg_max, (*GAINS, 1.0))


def _yolo11_obb_criterion(dtype: torch.dtype, layout: str, *, wants_grad: bool) -> of.YOLO11OBB:
    x = _yolo11_obb_assign(dtype, layout)
    return of.YOLO11OBB(*x[:3], [_empty(ROWS, 7)], None, LEVELS, REG_MAX, x.assigner, (*GAINS, 1.0), wants_grad)


def _simota_assign(dtype: torch.dtype, layout: str) -> of.SimOTAAssign:
    preds = _preds(dtype, layout, CLASSES), _empty(BATCH, ANCHORS, dtype=dtype), _preds(dtype, layout, 4)
    return of.SimOTAAssign(*preds, *_points(), _rows(BATCH * SLOTS), SIMOTA)


def _yolox_assign(dtype: torch.dtype, layout: str, *, num_classes: int = CLASSES, rule: of.SimOTA = SIMOTA) -> of.YOLOXAssign:
    return of.YOLOXAssign(_preds(dtype, layout, 5 + num_classes), _rows(dtype=dtype), LEVELS, rule)


def _yolox_loss(dtype: torch.dtype, layout: str, *, num_classes: int = CLASSES, iou_loss: str = "iou") -> of.YOLOXLoss:
    x = _yolox_assign(dtype, layout, num_classes=num_classes)
    row, iou, _, *gt = x.allocate()
    return of.YOLOXLoss(x.preds, row, iou, _empty(dtype=iou.dtype), *gt, _empty(), LEVELS, iou_loss, 5.0)


def _yolox_criterion(dtype: torch.dtype, layout: str, *, wants_grad: bool) -> of.YOLOX:
    x = _yolox_assign(dtype, layout)
    return of.YOLOX(x.preds, [_empty(ROWS, 6)], _empty(), LEVELS, SIMOTA, "iou", 5.0, wants_grad)


def _keypoint_loss(
    dtype: torch.dtype, layout: str, *, wants_grad: bool, num_keypoints: int = 17, num_dims: int = 3
) -> of.KeypointLoss:
    preds, other = _preds(dtype, layout, num_keypoints * num_dims), _empty(dtype=working_dtype(dtype))
    row, number = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(dtype=torch.int64)
    gt, sigmas = (_empty(ROWS, num_keypoints, 3), _empty(ROWS, 6)[:, 4:]), (1 / num_keypoints,) * num_keypoints
    return of.KeypointLoss(preds, other, row, number, None, *gt, True, LEVELS, sigmas, (12.0, 1.0), wants_grad)


def _mask_loss(dtype: torch.dtype, layout: str, *, overlap_mask: bool = True, wants_grad: bool = True) -> of.MaskLoss:
    masks = _empty(BATCH if overlap_mask else ROWS, 160, 160, dtype=torch.uint8)
    rows = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(ROWS, 4), masks, _empty(ROWS, dtype=torch.int64)
    protos = _empty(BATCH, 32, 160, 160, dtype=dtype)
    return of.MaskLoss(
        _preds(dtype, layout, 32), protos, *rows, _empty(), of.ImageSize((640, 640)), overlap_mask, wants_grad
    )  # fmt: skip


def _launch(make: Callable[..., Any], dtype: torch.dtype, layout: str, *, has_gradient: bool, **options: Any) -> None:
    from triton_yolo import kernels

    x = make(dtype, layout, **options)
    out = getattr(kernels, _NAMES[type(x)])(x)
    if has_gradient:
        backward = gradient_of(x, out)
        getattr(kernels, _NAMES[type(backward)])(backward)


def _operator(make: Callable[..., Any], layouts: tuple[str, ...] = LAYOUTS, **options: Any) -> Operator:
    return partial(_launch, make, has_gradient=False, **options), layouts


def _with_gradient(make: Callable[..., Any], layouts: tuple[str, ...] = LAYOUTS, **options: Any) -> Operator:
    return partial(_launch, make, has_gradient=True, **options), layouts


OPERATORS: dict[str, Operator] = {
    "decode_dfl": _with_gradient(_decode_dfl, has_strides=True),
    "decode_dfl, R=7": _with_gradient(_decode_dfl, FIRST, reg_max=7),
    "decode_dfl, R=32": _with_gradient(_decode_dfl, FIRST, reg_max=32),
    "decode_dfl, R=1": _with_gradient(_decode_dfl, FIRST, reg_max=1),
    **{f"bbox_iou, {kind}": _with_gradient(_bbox_iou, LAST, kind=kind) for kind in ("iou", "giou", "diou", "ciou")},
    "prob_iou": _with_gradient(_prob_iou, LAST, floor=0.0),
    "prob_iou, floor": _with_gradient(_prob_iou, LAST, floor=0.01),
    "unpack_rows": _operator(_unpack_rows, FIRST),
    "yolo11_assign": _operator(_yolo11_assign),
    "yolo11_assign, topk2": _operator(_yolo11_assign, FIRST, rule=of.TaskAligned(10, 1, 0.5, 6.0, 16.0, 1e-9)),
    "yolo11_loss": _with_gradient(_yolo11_loss),
    "yolo11_loss, weights": _with_gradient(_yolo11_loss, FIRST, has_weights=True),
    "yolo11_loss, R=1, C=1": _with_gradient(_yolo11_loss, FIRST, reg_max=1, num_classes=1),
    "yolo11_loss, R=32": _with_gradient(_yolo11_loss, FIRST, reg_max=32, num_classes=1203),
    "yolo11_criterion": _operator(_yolo11_criterion, wants_grad=True),
    "yolo11_criterion, rows": _operator(_yolo11_criterion, FIRST, wants_grad=True, wants_row=True),
    "yolo11_criterion, no gradient": _operator(_yolo11_criterion, FIRST, wants_grad=False),
    "yolo11_obb_assign": _operator(_yolo11_obb_assign, FIRST, rule=of.TaskAligned(10, 1, 0.5, 6.0, 16.0, 1e-9)),
    "yolo11_obb_loss": _with_gradient(_yolo11_obb_loss, FIRST),
    "yolo11_obb_loss, R=1": _with_gradient(_yolo11_obb_loss, FIRST, reg_max=1),
    "yolo11_obb_criterion": _operator(_yolo11_obb_criterion, FIRST, wants_grad=True),
    "yolo11_obb_criterion, no gradient": _operator(_yolo11_obb_criterion, FIRST, wants_grad=False),
    "task_aligned_assign": _operator(_task_aligned_assign, LAST),
    "task_aligned_assign, oriented": _operator(_rotated_task_aligned_assign, LAST),
    "align_metric": _operator(_align_metric, LAST),
    "select_topk_candidates": _operator(_select_topk, LAST),
    "decode_yolox": _with_gradient(_decode_yolox),
    "simota_assign": _operator(_simota_assign, LAST),
    "yolox_assign": _operator(_yolox_assign),
    "yolox_assign, box": _operator(_yolox_assign, FIRST, rule=of.SimOTA("box_and_center", 2.5)),
    "yolox_loss": _with_gradient(_yolox_loss),
    "yolox_loss, GIoU": _with_gradient(_yolox_loss, FIRST, iou_loss="giou"),
    "yolox_loss, C=1": _with_gradient(_yolox_loss, FIRST, num_classes=1),
    "keypoint_loss": _operator(_keypoint_loss, wants_grad=True),
    "keypoint_loss, no gradient": _operator(_keypoint_loss, FIRST, wants_grad=False),
    "keypoint_loss, K=133, D=2": _operator(_keypoint_loss, FIRST, wants_grad=True, num_keypoints=133, num_dims=2),
    "yolox_criterion": _operator(_yolox_criterion, wants_grad=True),
    "yolox_criterion, no gradient": _operator(_yolox_criterion, FIRST, wants_grad=False),
    "mask_loss": _operator(_mask_loss),
    "mask_loss, a mask a row": _operator(_mask_loss, FIRST, overlap_mask=False),
    "mask_loss, no gradient": _operator(_mask_loss, FIRST, wants_grad=False),
}
