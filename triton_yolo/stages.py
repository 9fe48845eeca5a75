"""The stages of both systems as operations of their own."""

import torch
from torch import Tensor

from . import _checks, _ops
from ._precision import widened
from ._signatures import AlignMetric, BboxIoU, DecodeDFL, DecodeYOLOX, ProbIoU, SelectTopk
from .targets import Targets

_KINDS = ("iou", "giou", "diou", "ciou")


def decode_dfl(pred_dist: Tensor, anchor_points: Tensor, *, reg_max: int = 16, strides: Tensor | None = None) -> Tensor:
    """Decode distance distributions to boxes (Generalized Focal Loss, arXiv 2006.04388, section 3.2).

    Each side (left, top, right, bottom) has ``reg_max`` logits; its distance is the softmax expectation over the bins
    0...reg_max-1, in cells. With ``reg_max=1`` the value is the distance itself. Differentiable by ``pred_dist``.

    Args:
        pred_dist: (B, A, 4 * reg_max) logits, any strides, any float type.
        anchor_points: (A, 2) in cells, as from ``make_anchors``.
        reg_max: number of bins.
        strides: (A,) in pixels. If given, boxes are in pixels.

    Returns:
        (B, A, 4) boxes xyxy in cells or pixels, float32 (float64 for float64).

    Raises:
        ValueError: a size or device does not agree or ``reg_max`` is below 1.
        TypeError: an argument is not a float tensor.

    Example:
        >>> points, strides = ty.make_anchors([(1, 1)], (8,))
        >>> ty.decode_dfl(torch.tensor([[[0.5, 0.5, 1.0, 2.0]]]), points, reg_max=1, strides=strides)
        tensor([[[ 0.,  0., 12., 20.]]])
    """
    reg_max = _checks.whole("reg_max", reg_max)
    _checks.tensor("pred_dist", pred_dist, ("B", "A", 4 * reg_max))
    num_anchors = pred_dist.shape[1]
    _checks.tensor("anchor_points", anchor_points, (num_anchors, 2), like=pred_dist)
    if strides is not None:
        _checks.tensor("strides", strides, (num_anchors,), like=pred_dist)
    return _ops.decode_dfl(DecodeDFL(pred_dist, anchor_points, strides, reg_max)).boxes


def decode_yolox(preds: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Decode raw YOLOX predictions to boxes (YOLOX, arXiv 2107.08430, section 2.1). Differentiable by ``preds``.

    centre = (anchor point - 0.5 + (dx, dy)) * stride, size = exp(log size) * stride.

    Args:
        preds: (B, A, 4 or more), the first four (dx, dy, log w, log h); any strides, any float type.
        anchor_points: (A, 2) centres of the cells, in cells, as from ``make_anchors``.
        strides: (A,) in pixels.

    Returns:
        (B, A, 4) boxes xyxy in pixels, float32 (float64 for float64). An exponential that overflows gives an infinite side.

    Raises:
        ValueError: a size or device does not agree.
        TypeError: an argument is not a float tensor.

    Example:
        >>> points, strides = ty.make_anchors([(1, 1)], (8,))
        >>> ty.decode_yolox(torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), points, strides)
        tensor([[[0., 0., 8., 8.]]])
    """
    _checks.tensor("preds", preds, ("B", "A", "4 + ..."))
    if preds.shape[2] < 4:
        raise ValueError(f"preds must have at least 4 channels, got {preds.shape[2]}")
    num_anchors = preds.shape[1]
    _checks.tensor("anchor_points", anchor_points, (num_anchors, 2), like=preds)
    _checks.tensor("strides", strides, (num_anchors,), like=preds)
    return _ops.decode_yolox(DecodeYOLOX(preds, anchor_points, strides)).boxes


def bbox_iou(a: Tensor, b: Tensor, *, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """Overlap of boxes, element by element. Differentiable by both.

    ``eps`` is added to the heights, to the union and to the enclosing area or squared diagonal. The height of GIoU's enclosing
    box has that of both boxes: GIoU is between -1 and 1 however flat they are. CIoU's trade-off weight is a constant for the
    gradient. Where sides coincide or boxes touch, the gradient is the mean of those on either side. An inverted box overlaps
    nothing. Areas and squared distances must be numbers of the type: pairs that reach over more than 1e19 in float32, 1e154 in
    float64, have a wrong overlap or NaN, but for GIoU, which has no such limit; assigners take NaN as 0. (GIoU: arXiv
    1902.09630; DIoU, CIoU: arXiv 1911.08287.)

    Args:
        a: (..., 4) in xyxy, any float type.
        b: (..., 4) in xyxy, broadcastable to ``a``.
        kind: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"``.
        eps: guard against empty boxes.

    Returns:
        (...) overlaps, float32 (float64 for float64).

    Raises:
        ValueError: ``kind`` is unknown, or sizes or devices do not agree.
        TypeError: an argument is not a float tensor.

    Example:
        >>> ty.bbox_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[0.0, 0, 2, 4], [2, 2, 4, 4]]))
        tensor([0.5000, 0.0000])
    """
    _checks.one_of("kind", kind, _KINDS)
    eps = _checks.real("eps", eps)
    return _ops.bbox_iou(BboxIoU(*_paired(a, b, 4), kind, eps)).overlaps


def prob_iou(a: Tensor, b: Tensor, *, eps: float = 1e-7, floor: float = 0.0) -> Tensor:
    """Probabilistic IoU of oriented boxes, element by element (arXiv 2106.06072). Differentiable by both.

    A box is a Gaussian with the variances w^2 / 12 and h^2 / 12 along its axes; the overlap is 1 less the Hellinger distance,
    sqrt(1 - exp(-distance) + eps), of the Bhattacharyya distance. It knows no angle of a square, and of no box half a turn.
    That distance is at least ``eps``, so the highest overlap is 1 - sqrt(2 eps), and at most 100; past either the gradient
    is 0. ``eps`` is also added to its denominators and to what its logarithm is of, in units of area squared.

    Args:
        a: (..., 5) as (centre x, centre y, width, height, angle in radians from x towards y), any float type.
        b: (..., 5), broadcastable to ``a``.
        eps: guard against empty boxes.
        floor: added to the variances of both boxes, in units of area. YOLO11-OBB's loss has 0.01 square cells, without which
            ``eps`` outweighs the area of tiny boxes.

    Returns:
        (...) overlaps, float32 (float64 for float64).

    Raises:
        ValueError: ``eps`` or ``floor`` is negative, or sizes or devices do not agree.
        TypeError: an argument is not a float tensor.

    Example:
        >>> a = torch.tensor([3.0, 2, 4, 2, 0.5])
        >>> ty.prob_iou(a, a + torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 3.1416], [0, 0, 0, 0, 1.5708]]))
        tensor([0.6173, 0.9996, 0.5528])
    """
    eps, floor = _checks.real("eps", eps), _checks.real("floor", floor)
    return _ops.prob_iou(ProbIoU(*_paired(a, b, 5), eps, floor)).overlaps


def _paired(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Boxes (..., size) of one shape."""
    _checks.boxes("a", a, size=size)
    _checks.boxes("b", b, like=a, size=size)
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        raise ValueError(f"b must broadcast with a of shape {tuple(a.shape)}, got {tuple(b.shape)}") from None
    return a, b


def align_metric(
    pred_scores: Tensor,
    pred_bboxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    alpha: float,
    beta: float,
    min_box_side: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Alignment metric score^alpha * overlap^beta of every ground truth and anchor (TOOD, arXiv 2108.07755, equation 1).

    An anchor is a candidate of a ground truth if its point lies inside the box by more than 1e-9 px; the overlap is the CIoU
    clamped at 0. Both results are 0 outside the candidates, for padding and for a box with a non-positive or non-finite side.
    The result has no gradient, as assignment has none. It is dense, (B, G, A): the criteria never build it.

    Args:
        pred_scores: (B, A, C) class probabilities.
        pred_bboxes: (B, A, 4) xyxy in pixels.
        anchor_points: (A, 2) in pixels.
        gt_labels: (B, G) or (B, G, 1) classes.
        gt_bboxes: (B, G, 4) xyxy in pixels.
        mask_gt: (B, G) or (B, G, 1), true where there is a box.
        alpha: exponent of the score.
        beta: exponent of the overlap.
        min_box_side: sides shorter than this are widened to it for the candidate test, in pixels.

    Returns:
        Metric and overlaps, both (B, G, A), float32 (float64 for float64).

    Raises:
        ValueError: sizes or devices do not agree; on the CPU also for a label out of range (elsewhere it is ignored).
        TypeError: an argument that must be a float tensor is not.

    Example:
        >>> scores, boxes = torch.tensor([[[0.25]]]), torch.tensor([[[0.0, 0, 8, 8]]])
        >>> gt = torch.zeros(1, 1), boxes, torch.ones(1, 1)
        >>> metric, overlaps = ty.align_metric(scores, boxes, torch.tensor([[4.0, 4]]), *gt, alpha=0.5, beta=6.0)
        >>> metric
        tensor([[[0.5000]]])
    """
    targets, _ = padded_targets(pred_scores, pred_bboxes, anchor_points, gt_labels, gt_bboxes, mask_gt)
    scores, boxes, anchor_points, _ = widened(pred_scores.detach(), pred_bboxes.detach(), anchor_points, gt_bboxes)
    exponents = _checks.real("alpha", alpha), _checks.real("beta", beta)
    options = gt_bboxes.shape[1], *exponents, _checks.real("min_box_side", min_box_side)
    metric, overlaps = _ops.align_metric(AlignMetric(scores, boxes, anchor_points, targets, *options))
    return metric, overlaps


def select_topk_candidates(metric: Tensor, topk: int, mask_gt: Tensor | None = None) -> Tensor:
    """Mark the ``topk`` highest metrics of every ground truth.

    Equal metrics go to the lower anchor index. A metric that is not above 0 is never marked, so a ground truth with fewer
    candidates than ``topk`` marks those it has.

    Args:
        metric: (B, G, A), any float type.
        topk: at least 1; may exceed A.
        mask_gt: (B, G) or (B, G, 1); ground truths where it is false mark nothing.

    Returns:
        (B, G, A) bool.

    Raises:
        ValueError: ``topk`` is below 1, or sizes or devices do not agree.
        TypeError: ``metric`` is not a float tensor.

    Example:
        >>> ty.select_topk_candidates(torch.tensor([[[0.2, 0.5, 0.5, 0.0]]]), 2)
        tensor([[[False,  True,  True, False]]])
    """
    _checks.tensor("metric", metric, ("B", "G", "A"))
    topk = _checks.whole("topk", topk)
    if mask_gt is not None:
        mask_gt = _checks.per_slot("mask_gt", mask_gt, metric).bool()
    return _ops.select_topk_candidates(SelectTopk(metric.detach(), topk, mask_gt)).selected


def padded_targets(
    scores: Tensor, boxes: Tensor, points: Tensor, gt_labels: Tensor, gt_bboxes: Tensor, mask_gt: Tensor,
    names: tuple[str, str, str] = ("pred_scores", "pred_bboxes", "anchor_points"), box_size: int = 4,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Check what assigners take; return it as operations take targets, a row a slot, and the labels (B, G) int64."""
    _checks.tensor(names[0], scores, ("B", "A", "C"))
    batch_size, num_anchors, _ = scores.shape
    _checks.tensor(names[1], boxes, (batch_size, num_anchors, box_size), like=scores)
    _checks.tensor(names[2], points, (num_anchors, 2), like=scores)
    _checks.tensor("gt_bboxes", gt_bboxes, (batch_size, "G", box_size), like=scores)
    labels = _checks.per_slot("gt_labels", gt_labels, gt_bboxes)
    _checks.exact("gt_labels", labels, 0, scores.shape[2])
    mask = _checks.per_slot("mask_gt", mask_gt, gt_bboxes).bool()
    return list(Targets._of_slots(labels, gt_bboxes, mask, ("gt_labels", "gt_bboxes"))), labels.long()
