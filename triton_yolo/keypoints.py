"""The loss of keypoints alone, for an assignment from elsewhere."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _levels, _ops
from ._precision import working_dtype
from ._signatures import KeypointLoss

_COCO_SIGMAS = tuple(
    sigma / 1000 for sigma in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
)  # fmt: skip


class KeypointLossOutput(NamedTuple):
    """What ``keypoint_loss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), B * (pose + kobj).
        pose: (), similarity term with its gain.
        kobj: (), visibility term with its gain, 0 where predictions have no visibility.
    """

    loss: Tensor
    pose: Tensor
    kobj: Tensor


def keypoint_loss(
    pred_keypoints: Tensor,
    target_row: Tensor,
    gt_keypoints: Tensor,
    gt_boxes: Tensor,
    feat_shapes: Sequence[Sequence[int]],
    *,
    strides: Sequence[float] = (8, 16, 32),
    sigmas: Sequence[float] | None = None,
    pose_gain: float = 12.0,
    kobj_gain: float = 1.0,
) -> KeypointLossOutput:
    """Compute the loss of raw keypoints for a given assignment, as YOLOv8-pose and YOLO11-pose have it.

    Object keypoint similarity (OKS), a measure of COCO's, became a loss in YOLO-Pose (arXiv 2204.06806). A raw keypoint
    (x, y) of the cell in column i and row j lies at (2 x + i, 2 y + j) cells. One that is d cells off, in a box of a square
    cells, has the similarity exp(-d^2 / (8 sigma^2 a)); a positive anchor costs 1 less its mean over the visible keypoints of
    its ground truth, nothing if none is. The cross entropy of the visibility logits is a mean over all keypoints. Both are
    means over the positives of the batch; without any they are 0. Differentiable by ``pred_keypoints``.

    Computed in float32 (float64 for float64); sums have a fixed order, so that results repeat to the bit. A number of a
    positive anchor that is not finite makes the loss, its terms and the whole gradient NaN; those of background are not read.

    Args:
        pred_keypoints: (B, A, K * D) raw numbers, K times (x, y) or (x, y, visibility logit); any strides, any float type.
        target_row: (B, A) int32 or int64, row of the ground truth that every anchor is matched with, -1 for background.
        gt_keypoints: (N, K, 2) places in pixels, or (N, K, 3) with a flag: a keypoint is visible unless that is 0. Without
            it all are. One that is not finite never is.
        gt_boxes: (N, 4) xyxy in pixels, whose areas scale the distances.
        feat_shapes: (height, width) of every level in cells.
        strides: stride of every level in pixels.
        sigmas: K numbers, how far off people are in shares of an object's size. By default those of COCO for 17 keypoints
            with visibility, else 1 / K each.
        pose_gain: weight of the similarity term.
        kobj_gain: weight of the visibility term.

    Returns:
        The loss, B times the sum of both weighted terms, and these; float32 (float64 for float64).

    Raises:
        ValueError: sizes or devices do not agree, or a sigma or gain is out of range; on the CPU also for a row that there
            is not (elsewhere its anchor is background).
        TypeError: a type is wrong.

    Warns:
        UserWarning: most keypoints are shares of an image (on the CPU).

    Example:
        >>> target_row = torch.tensor([[-1, 0, -1, -1]])  # of four cells the second has an object
        >>> keypoints = torch.tensor([[[10.0, 6.0, 2.0], [14.0, 4.0, 0.0]]])  # one of two is visible
        >>> pred = torch.zeros(1, 4, 6, requires_grad=True)
        >>> boxes = torch.tensor([[8.0, 0.0, 16.0, 8.0]])
        >>> out = ty.keypoint_loss(pred, target_row, keypoints, boxes, [(2, 2)], strides=(8,))
        >>> out.pose, out.kobj
        (tensor(3.2206), tensor(0.6931))
    """
    _checks.tensor("pred_keypoints", pred_keypoints, ("B", "A", "K * D"))
    sigmas = sigmas_of(pred_keypoints, "gt_keypoints", gt_keypoints, sigmas)
    _checks.keypoint_places("gt_keypoints", gt_keypoints, False)
    num_rows = gt_keypoints.shape[0]
    _checks.tensor("gt_boxes", gt_boxes, (num_rows, 4), like=pred_keypoints)
    _checks.target_row("target_row", target_row, pred_keypoints)
    levels = _levels.of(feat_shapes, _checks.reals("strides", strides), pred_keypoints.shape[1])
    gains = _checks.real("pose_gain", pose_gain), _checks.real("kobj_gain", kobj_gain)
    _checks.rows_below("target_row", target_row, num_rows)
    is_fg = (target_row >= 0) & (target_row < num_rows)
    row = target_row.where(is_fg, -1).int().contiguous()
    nothing = torch.zeros((), dtype=working_dtype(pred_keypoints.dtype), device=pred_keypoints.device)
    wants_grad = torch.is_grad_enabled() and pred_keypoints.requires_grad
    x = KeypointLoss(
        pred_keypoints, nothing, row, is_fg.sum(), None, gt_keypoints.detach(), (gt_boxes[:, 2:] - gt_boxes[:, :2]).detach(),
        False, levels, sigmas, gains, wants_grad,
    )  # fmt: skip
    out = _ops.keypoint_loss(x)
    return KeypointLossOutput(out.loss, *out.terms)


def sigmas_of(pred_keypoints: Tensor, argument: str, gt_keypoints: Tensor, sigmas: Sequence[float] | None) -> tuple[float, ...]:
    """The sigmas, or the default ones, for predictions (B, A, K * D) and ground truth (N, K, 2 or 3) of as many keypoints."""
    _checks.tensor(argument, gt_keypoints, ("N", "K", "2 or 3"), like=pred_keypoints)
    _, num_keypoints, num_dims = gt_keypoints.shape
    if num_dims not in (2, 3) or num_keypoints < 1:
        raise ValueError(f"{argument} must have shape (N, K, 2) or (N, K, 3), got {tuple(gt_keypoints.shape)}")
    channels = pred_keypoints.shape[2]
    if channels not in (2 * num_keypoints, 3 * num_keypoints):
        raise ValueError(f"pred_keypoints must have 2 or 3 channels for each of {num_keypoints} keypoints, got {channels}")
    if sigmas is None:
        is_coco = num_keypoints == len(_COCO_SIGMAS) and channels == 3 * num_keypoints
        return _COCO_SIGMAS if is_coco else (1 / num_keypoints,) * num_keypoints
    numbers = _checks.reals("sigmas", sigmas)
    if len(numbers) != num_keypoints:
        raise ValueError(f"sigmas must be one for each of {num_keypoints} keypoints, got {len(numbers)}")
    return numbers
