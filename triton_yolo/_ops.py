"""The operations as PyTorch sees them: custom operators with fakes and gradients, run by the backend of the device.

Ground truth arrives as rows: ``image_index`` (N,), negative for padding, ``labels`` (N,), ``gt_boxes`` (N, 4) in pixels. An
assignment is ``target_row`` (B, A) int32, the row of every anchor or -1, with one number an anchor beside it. ``feat_shapes``
is (h0, w0, h1, w1, ...). An assignment and the loss that it leads to are two operators, so that several processes can agree
on the normaliser in between, and so that the assignment can be held fixed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._backend import implementation
from ._precision import working_dtype


def _operator(function: Callable[..., Any]) -> Any:
    """Register ``function`` as ``triton_yolo::<its name>``; inside it autocast is off, since types are explicit there."""

    @functools.wraps(function)
    def without_autocast(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return torch.library.custom_op(f"triton_yolo::{function.__name__}", without_autocast, mutates_args=())


def _assignment_like(preds: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = preds.shape[:2]
    return preds.new_empty(shape, dtype=torch.int32), preds.new_empty(shape, dtype=dtype)


# ---- targets


@_operator
def unpack_rows(rows: Tensor, width: float, height: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image index, label, box as corners and as centre and size in pixels, of rows (N, 6) in the YOLO convention."""
    _checks.normalised_rows(rows)
    return implementation(rows.device).unpack_rows(rows, width, height)


@unpack_rows.register_fake
def _(rows: Tensor, width: float, height: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = rows.shape[0]  # len() would make a constant of it, and every number of rows a new compile
    integers = rows.new_empty(num_rows, dtype=torch.int64)
    boxes = rows.new_empty((num_rows, 4), dtype=working_dtype(rows.dtype))
    return integers, torch.empty_like(integers), boxes, torch.empty_like(boxes)


# ---- decoding


@_operator
def decode_dfl(pred_dist: Tensor, anchor_points: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    return implementation(pred_dist.device).decode_dfl(pred_dist, anchor_points, strides, reg_max)


@decode_dfl.register_fake
def _(pred_dist: Tensor, anchor_points: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    return pred_dist.new_empty((*pred_dist.shape[:2], 4), dtype=working_dtype(pred_dist.dtype))


@_operator
def decode_dfl_backward(grad: Tensor, pred_dist: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    return implementation(grad.device).decode_dfl_backward(grad, pred_dist, strides, reg_max)


@decode_dfl_backward.register_fake
def _(grad: Tensor, pred_dist: Tensor, strides: Tensor | None, reg_max: int) -> Tensor:
    return torch.empty_like(pred_dist)


def _decode_dfl_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred_dist, _, strides, ctx.reg_max = inputs
    ctx.save_for_backward(pred_dist, strides)


def _decode_dfl_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return decode_dfl_backward(grad, *ctx.saved_tensors, ctx.reg_max), None, None, None


decode_dfl.register_autograd(_decode_dfl_grad, setup_context=_decode_dfl_context)


@_operator
def decode_yolox(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    return implementation(preds.device).decode_yolox(preds, anchor_points, strides)


@decode_yolox.register_fake
def _(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    return preds.new_empty((*preds.shape[:2], 4), dtype=working_dtype(preds.dtype))


@_operator
def decode_yolox_backward(grad: Tensor, preds: Tensor, strides: Tensor) -> Tensor:
    return implementation(grad.device).decode_yolox_backward(grad, preds, strides)


@decode_yolox_backward.register_fake
def _(grad: Tensor, preds: Tensor, strides: Tensor) -> Tensor:
    return torch.empty_like(preds)


def _decode_yolox_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    preds, _, strides = inputs
    ctx.save_for_backward(preds, strides)


def _decode_yolox_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return decode_yolox_backward(grad, *ctx.saved_tensors), None, None


decode_yolox.register_autograd(_decode_yolox_grad, setup_context=_decode_yolox_context)


# ---- overlap


@_operator
def bbox_iou(a: Tensor, b: Tensor, kind: str, eps: float) -> Tensor:
    return implementation(a.device).bbox_iou(a, b, kind, eps)


@bbox_iou.register_fake
def _(a: Tensor, b: Tensor, kind: str, eps: float) -> Tensor:
    return a.new_empty(a.shape[:-1], dtype=torch.promote_types(working_dtype(a.dtype), working_dtype(b.dtype)))


@_operator
def bbox_iou_backward(grad: Tensor, a: Tensor, b: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    return implementation(grad.device).bbox_iou_backward(grad, a, b, kind, eps)


@bbox_iou_backward.register_fake
def _(grad: Tensor, a: Tensor, b: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _bbox_iou_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(a, b)


def _bbox_iou_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *bbox_iou_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.eps), None, None


bbox_iou.register_autograd(_bbox_iou_grad, setup_context=_bbox_iou_context)


# ---- task-aligned assignment


@_operator
def align_metric(
    scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gt_boxes: Tensor, mask: Tensor,
    alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(scores.device).align_metric(scores, boxes, points, labels, gt_boxes, mask, alpha, beta, min_box_side)


@align_metric.register_fake
def _(
    scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gt_boxes: Tensor, mask: Tensor,
    alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*labels.shape, scores.shape[1])
    return scores.new_empty(shape, dtype=working_dtype(boxes.dtype)), scores.new_empty(shape, dtype=working_dtype(boxes.dtype))


@_operator
def select_topk_candidates(metric: Tensor, topk: int, mask_gt: Tensor | None) -> Tensor:
    return implementation(metric.device).select_topk_candidates(metric, topk, mask_gt)


@select_topk_candidates.register_fake
def _(metric: Tensor, topk: int, mask_gt: Tensor | None) -> Tensor:
    return metric.new_empty(metric.shape, dtype=torch.bool)


@_operator
def task_aligned_assign(
    scores: Tensor, boxes: Tensor, points: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Target row and target score of every anchor, from class probabilities and boxes in pixels."""
    _checks.rows_in_range(image_index, labels, scores.shape[0], scores.shape[2])
    return implementation(scores.device).task_aligned_assign(
        scores, boxes, points, image_index, labels, gt_boxes, topk, topk2, alpha, beta, min_box_side, eps
    )


@task_aligned_assign.register_fake
def _(
    scores: Tensor, boxes: Tensor, points: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _assignment_like(scores, working_dtype(boxes.dtype))


@_operator
def yolo11_assign(
    pred_dist: Tensor, pred_scores: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Target row and target score of every anchor, from raw logits; sums (2,); the number of positives.

    The sums are that of the scores and the batch size: what the ranks of a process group add up. The first is NaN if any of
    ``pred_dist`` is not finite: this is the pass that reads all of it.
    """
    _checks.rows_in_range(image_index, labels, pred_scores.shape[0], pred_scores.shape[2])
    return implementation(pred_dist.device).yolo11_assign(
        pred_dist, pred_scores, image_index, labels, gt_boxes, feat_shapes, strides, reg_max,
        topk, topk2, alpha, beta, min_box_side,
    )  # fmt: skip


@yolo11_assign.register_fake
def _(
    pred_dist: Tensor, pred_scores: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int,
    topk: int, topk2: int | None, alpha: float, beta: float, min_box_side: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = working_dtype(pred_dist.dtype)
    row, score = _assignment_like(pred_dist, dtype)
    return row, score, pred_dist.new_empty(2, dtype=dtype), labels.new_empty((), dtype=torch.int64)


@_operator
def yolo11_loss(
    pred_dist: Tensor, pred_scores: Tensor, target_row: Tensor, target_score: Tensor, normaliser: Tensor,
    labels: Tensor, gt_boxes: Tensor, class_weights: Tensor | None,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int, gains: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss () and its weighted terms box, cls, dfl (3,), for a given assignment. Only the loss has a gradient.

    ``normaliser`` (2,) is used as it is: every term is divided by the first, and the loss is their sum times the second, the
    batch size. The third result is what the backward pass takes for it: NaN if a class logit is not finite.
    """
    return implementation(pred_dist.device).yolo11_loss(
        pred_dist, pred_scores, target_row, target_score, normaliser, labels, gt_boxes, class_weights,
        feat_shapes, strides, reg_max, gains,
    )  # fmt: skip


@yolo11_loss.register_fake
def _(
    pred_dist: Tensor, pred_scores: Tensor, target_row: Tensor, target_score: Tensor, normaliser: Tensor,
    labels: Tensor, gt_boxes: Tensor, class_weights: Tensor | None,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int, gains: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = working_dtype(pred_dist.dtype)
    return pred_dist.new_empty((), dtype=dtype), pred_dist.new_empty(3, dtype=dtype), pred_dist.new_empty(2, dtype=dtype)


@_operator
def yolo11_loss_backward(
    grad: Tensor, pred_dist: Tensor, pred_scores: Tensor, target_row: Tensor, target_score: Tensor, normaliser: Tensor,
    labels: Tensor, gt_boxes: Tensor, class_weights: Tensor | None,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int, gains: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(grad.device).yolo11_loss_backward(
        grad, pred_dist, pred_scores, target_row, target_score, normaliser, labels, gt_boxes, class_weights,
        feat_shapes, strides, reg_max, gains,
    )  # fmt: skip


@yolo11_loss_backward.register_fake
def _(
    grad: Tensor, pred_dist: Tensor, pred_scores: Tensor, target_row: Tensor, target_score: Tensor, normaliser: Tensor,
    labels: Tensor, gt_boxes: Tensor, class_weights: Tensor | None,
    feat_shapes: Sequence[int], strides: Sequence[float], reg_max: int, gains: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(pred_dist), torch.empty_like(pred_scores)


def _yolo11_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, terms, normaliser = output
    ctx.save_for_backward(*inputs[:4], normaliser, *inputs[5:8])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(terms, normaliser)


def _yolo11_loss_grad(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *yolo11_loss_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 10


yolo11_loss.register_autograd(_yolo11_loss_grad, setup_context=_yolo11_loss_context)


# ---- SimOTA


@_operator
def simota_assign(
    cls_logits: Tensor, obj_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor,
    image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor, candidates: str, radius: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Target row and matched IoU of every anchor, from logits and boxes in pixels."""
    _checks.rows_in_range(image_index, labels, cls_logits.shape[0], cls_logits.shape[2])
    return implementation(cls_logits.device).simota_assign(
        cls_logits, obj_logits, boxes, points, strides, image_index, labels, gt_boxes, gt_xywh, candidates, radius
    )


@simota_assign.register_fake
def _(
    cls_logits: Tensor, obj_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor,
    image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor, candidates: str, radius: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _assignment_like(cls_logits, working_dtype(boxes.dtype))


@_operator
def yolox_assign(
    preds: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], candidates: str, radius: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Target row and matched IoU of every anchor, from raw predictions; counts (3,) int64.

    The counts are the positives, the ground truths, and 1 if a prediction is not finite, else 0.
    """
    _checks.rows_in_range(image_index, labels, preds.shape[0], preds.shape[2] - 5)
    return implementation(preds.device).yolox_assign(
        preds, image_index, labels, gt_boxes, gt_xywh, feat_shapes, strides, candidates, radius
    )


@yolox_assign.register_fake
def _(
    preds: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], candidates: str, radius: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *_assignment_like(preds, working_dtype(preds.dtype)), preds.new_empty(3, dtype=torch.int64)


@_operator
def yolox_loss(
    preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor, labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss () and its weighted terms iou, obj, cls, l1 for a given assignment; only the loss has a gradient.

    Every term is divided by ``normaliser`` () as it is. ``l1_gain`` () is 0 or 1, a tensor so that a compiled graph takes
    either.
    """
    return implementation(preds.device).yolox_loss(
        preds, target_row, matched_iou, normaliser, labels, gt_xywh,
        feat_shapes, strides, iou_loss, iou_gain, l1_gain,
    )  # fmt: skip


@yolox_loss.register_fake
def _(
    preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor, labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = working_dtype(preds.dtype)
    return preds.new_empty((), dtype=dtype), preds.new_empty(4, dtype=dtype)


@_operator
def yolox_loss_backward(
    grad: Tensor, preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor,
    labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> Tensor:  # fmt: skip
    return implementation(grad.device).yolox_loss_backward(
        grad, preds, target_row, matched_iou, normaliser, labels, gt_xywh,
        feat_shapes, strides, iou_loss, iou_gain, l1_gain,
    )  # fmt: skip


@yolox_loss_backward.register_fake
def _(
    grad: Tensor, preds: Tensor, target_row: Tensor, matched_iou: Tensor, normaliser: Tensor,
    labels: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], iou_loss: str, iou_gain: float, l1_gain: Tensor,
) -> Tensor:  # fmt: skip
    return torch.empty_like(preds)


def _yolox_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], inputs[10])
    ctx.options = inputs[6:10]
    ctx.mark_non_differentiable(output[1])


def _yolox_loss_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, l1_gain = ctx.saved_tensors
    return yolox_loss_backward(grad, *saved, *ctx.options, l1_gain), *[None] * 10


yolox_loss.register_autograd(_yolox_loss_grad, setup_context=_yolox_loss_context)
