"""Every operator on meta tensors, as a training launches it: COCO at 640 px, in the head's own layout or not."""

from collections.abc import Callable
from typing import Any

import torch

TARGETS = (*(f"cuda:{arch}" for arch in (75, 80, 86, 89, 90, 100, 120)), "hip:gfx90a", "hip:gfx942")
DTYPES = ("float16", "bfloat16", "float32")

BATCH, SHAPES, STRIDES, CLASSES, REG_MAX, ROWS, SLOTS = 16, (80, 80, 40, 40, 20, 20), (8.0, 16.0, 32.0), 80, 16, 112, 20
ANCHORS = 8400

Operator = tuple[Callable[[torch.dtype, str], Any], tuple[str, ...]]
LAYOUTS = ("channel-first", "channel-last")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _preds(dtype: torch.dtype, layout: str, channels: int) -> torch.Tensor:
    if layout == "channel-last":
        return _empty(BATCH, ANCHORS, channels, dtype=dtype)
    return _empty(BATCH, channels, ANCHORS, dtype=dtype).transpose(1, 2)


def _decode(reg_max: int, has_strides: bool) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        dist, strides = _preds(dtype, layout, 4 * reg_max), _empty(ANCHORS) if has_strides else None
        boxes = kernels.decode_dfl(dist, _empty(ANCHORS, 2), strides, reg_max)
        kernels.decode_dfl_backward(boxes, dist, strides, reg_max)

    return operator


def _bbox_iou(kind: str) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        a, b = _empty(4096, 4, dtype=dtype), _empty(4096, 4, dtype=dtype)
        kernels.bbox_iou_backward(kernels.bbox_iou(a, b, kind, 1e-7), a, b, kind, 1e-7)

    return operator


def _rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty(count, dtype=torch.int64), _empty(count, dtype=torch.int64), _empty(count, 4)


def _unpack_rows(dtype: torch.dtype, layout: str) -> None:
    from tests.flat import kernels

    kernels.unpack_rows(_empty(ROWS, 6, dtype=dtype), 640.0, 640.0)


def _assign(topk2: int | None, min_box_side: float) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        kernels.yolo11_assign(
            _preds(dtype, layout, 4 * REG_MAX), _preds(dtype, layout, CLASSES), *_rows(ROWS), SHAPES, STRIDES, REG_MAX,
            10, topk2, 0.5, 6.0, min_box_side,
        )  # fmt: skip

    return operator


def _loss(reg_max: int, num_classes: int, has_weights: bool) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        dist, scores = _preds(dtype, layout, 4 * reg_max), _preds(dtype, layout, num_classes)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        target_row, target_score = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(BATCH, ANCHORS, dtype=working)
        one, normaliser, (_, labels, boxes) = _empty(dtype=working), _empty(2, dtype=working), _rows(ROWS)
        tail = (labels, boxes, _empty(num_classes) if has_weights else None, SHAPES, STRIDES, reg_max, (7.5, 0.5, 1.5))
        kernels.yolo11_loss(dist, scores, target_row, target_score, normaliser, *tail)
        kernels.yolo11_loss_backward(one, dist, scores, target_row, target_score, normaliser, *tail)

    return operator


def _task_aligned_assign(dtype: torch.dtype, layout: str) -> None:
    from tests.flat import kernels

    boxes, points = _empty(BATCH, ANCHORS, 4, dtype=dtype), _empty(ANCHORS, 2)
    kernels.task_aligned_assign(
        _preds(dtype, layout, CLASSES), boxes, points, *_rows(BATCH * SLOTS), 13, None, 1.0, 6.0, 0.0, 1e-9
    )


def _stages(dtype: torch.dtype, layout: str) -> None:
    from tests.flat import kernels

    _, labels, gt_boxes = _rows(BATCH * SLOTS)
    boxes, points, mask = _empty(BATCH, ANCHORS, 4, dtype=dtype), _empty(ANCHORS, 2), _empty(BATCH, SLOTS, dtype=torch.bool)
    labels, gt_boxes = labels.view(BATCH, SLOTS), gt_boxes.view(BATCH, SLOTS, 4)
    scores = _preds(dtype, layout, CLASSES)
    metric, _ = kernels.align_metric(scores, boxes, points, labels, gt_boxes, mask, 1.0, 6.0, 0.0)
    kernels.select_topk_candidates(metric.to(dtype), 13, mask)


def _decode_yolox(dtype: torch.dtype, layout: str) -> None:
    from tests.flat import kernels

    preds, points, strides = _preds(dtype, layout, 5 + CLASSES), _empty(ANCHORS, 2), _empty(ANCHORS)
    kernels.decode_yolox_backward(kernels.decode_yolox(preds, points, strides), preds, strides)


def _simota_assign(dtype: torch.dtype, layout: str) -> None:
    from tests.flat import kernels

    scores, objectness, boxes = _preds(dtype, layout, CLASSES), _empty(BATCH, ANCHORS, dtype=dtype), _preds(dtype, layout, 4)
    rows = (*_rows(BATCH * SLOTS), _empty(BATCH * SLOTS, 4))
    kernels.simota_assign(scores, objectness, boxes, _empty(ANCHORS, 2), _empty(ANCHORS), *rows, "center", 1.5)


def _yolox_assign(candidates: str, radius: float) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        working = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (*(_empty(ROWS, dtype=torch.int64) for _ in range(2)), *(_empty(ROWS, 4, dtype=working) for _ in range(2)))
        kernels.yolox_assign(_preds(dtype, layout, 5 + CLASSES), *rows, SHAPES, STRIDES, candidates, radius)

    return operator


def _yolox_loss(num_classes: int, iou_loss: str) -> Callable[[torch.dtype, str], Any]:
    def operator(dtype: torch.dtype, layout: str) -> None:
        from tests.flat import kernels

        working = torch.float64 if dtype == torch.float64 else torch.float32
        preds, one = _preds(dtype, layout, 5 + num_classes), _empty(dtype=working)
        target_row, matched_iou = _empty(BATCH, ANCHORS, dtype=torch.int32), _empty(BATCH, ANCHORS, dtype=working)
        gt = (_empty(ROWS, dtype=torch.int64), _empty(ROWS, 4, dtype=working))
        args = (preds, target_row, matched_iou, one, *gt, SHAPES, STRIDES, iou_loss, 5.0, _empty())
        kernels.yolox_loss(*args)
        kernels.yolox_loss_backward(one, *args)

    return operator


OPERATORS: dict[str, Operator] = {
    "decode_dfl": (_decode(16, has_strides=True), LAYOUTS),
    "decode_dfl, R=7": (_decode(7, has_strides=False), LAYOUTS[:1]),
    "decode_dfl, R=32": (_decode(32, has_strides=False), LAYOUTS[:1]),
    "decode_dfl, R=1": (_decode(1, has_strides=False), LAYOUTS[:1]),
    **{f"bbox_iou, {kind}": (_bbox_iou(kind), LAYOUTS[-1:]) for kind in ("iou", "giou", "diou", "ciou")},
    "unpack_rows": (_unpack_rows, LAYOUTS[:1]),
    "yolo11_assign": (_assign(topk2=None, min_box_side=0.0), LAYOUTS),
    "yolo11_assign, topk2": (_assign(topk2=1, min_box_side=16.0), LAYOUTS[:1]),
    "yolo11_loss": (_loss(16, CLASSES, has_weights=False), LAYOUTS),
    "yolo11_loss, weights": (_loss(16, CLASSES, has_weights=True), LAYOUTS[:1]),
    "yolo11_loss, R=1, C=1": (_loss(1, 1, has_weights=False), LAYOUTS[:1]),
    "yolo11_loss, R=32": (_loss(32, 1203, has_weights=False), LAYOUTS[:1]),
    "task_aligned_assign": (_task_aligned_assign, LAYOUTS[-1:]),
    "align_metric, top-k": (_stages, LAYOUTS[-1:]),
    "decode_yolox": (_decode_yolox, LAYOUTS),
    "simota_assign": (_simota_assign, LAYOUTS[-1:]),
    "yolox_assign": (_yolox_assign("center", 1.5), LAYOUTS),
    "yolox_assign, box": (_yolox_assign("box_and_center", 2.5), LAYOUTS[:1]),
    "yolox_loss": (_yolox_loss(CLASSES, "iou"), LAYOUTS),
    "yolox_loss, GIoU": (_yolox_loss(CLASSES, "giou"), LAYOUTS[:1]),
    "yolox_loss, C=1": (_yolox_loss(1, "iou"), LAYOUTS[:1]),
}
