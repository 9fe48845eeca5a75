"""The criterion of YOLO11-pose and YOLOv8-pose."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _ops
from .._precision import widened
from .._signatures import KeypointLoss
from ..keypoints import sigmas_of
from ..targets import Targets
from ._criterion import Criterion, counts_of, unless_nan
from .yolo11 import YOLO11Loss


class YOLO11PoseLossOutput(NamedTuple):
    """What ``YOLO11PoseLoss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), B * (box + cls + dfl + pose + kobj).
        box: (), CIoU term with its gain.
        cls: (), classification term with its gain.
        dfl: (), distribution focal term (L1 with ``reg_max=1``) with its gain.
        pose: (), keypoint similarity term with its gain.
        kobj: (), keypoint visibility term with its gain.
        num_fg: () int64, number of positive anchors on this process.
    """

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    pose: Tensor
    kobj: Tensor
    num_fg: Tensor


class YOLO11PoseLoss(Criterion):
    """The criterion of YOLO11-pose and YOLOv8-pose: that of the boxes, ``YOLO11Loss``, and ``keypoint_loss`` on its positives.

    YOLO-Pose (arXiv 2204.06806), and see both. What is said of ``YOLO11Loss`` holds here too; a raw number of a positive's
    keypoints that is not finite makes everything NaN as well.

    Args:
        num_classes: number of classes C.
        strides: stride of every level in pixels, in the order in which the predictions are concatenated.
        sigmas: K numbers, see ``keypoint_loss``.
        pose_gain: weight of the similarity term.
        kobj_gain: weight of the visibility term.
        process_group: see ``YOLO11Loss``; positives are counted on all its ranks.
        options: the other arguments of ``YOLO11Loss``. Ultralytics' criterion has ``min_box_side=16``.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> criterion = ty.YOLO11PoseLoss(num_classes=1, strides=(8,))
        >>> preds = [torch.zeros(2, 16, channels, requires_grad=True) for channels in (64, 1, 17 * 3)]
        >>> targets = torch.tensor([[0, 0, 0.5, 0.5, 0.6, 0.4]])  # image, class, cx, cy, w, h
        >>> keypoints = torch.rand(1, 17, 3)  # x and y in 0-1 of the image, 0 where not visible
        >>> out = criterion(*preds, [(4, 4)], targets, keypoints)
        >>> out.loss.backward()
        >>> out.num_fg
        tensor(4)
    """

    _made_with = YOLO11Loss._made_with | {"num_classes", "strides", "reg_max", "class_weights", "pose_gain", "kobj_gain"}

    def __init__(
        self,
        num_classes: int,
        *,
        strides: Sequence[float] = (8, 16, 32),
        sigmas: Sequence[float] | None = None,
        pose_gain: float = 12.0,
        kobj_gain: float = 1.0,
        process_group: dist.ProcessGroup | bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(process_group)
        self.detection = YOLO11Loss(num_classes, strides=strides, process_group=process_group, **options)
        self.sigmas = None if sigmas is None else _checks.reals("sigmas", sigmas)
        self.keypoint_gains = _checks.real("pose_gain", pose_gain), _checks.real("kobj_gain", kobj_gain)

    def forward(
        self,
        pred_dist: Tensor,
        pred_scores: Tensor,
        pred_keypoints: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Tensor | Targets,
        keypoints: Tensor,
    ) -> YOLO11PoseLossOutput:
        """Assign the targets and compute the loss.

        Args:
            pred_dist: (B, A, 4 * reg_max) logits of the distances. Any strides: pass channel-first as ``x.transpose(1, 2)``.
            pred_scores: (B, A, C) class logits, any strides.
            pred_keypoints: (B, A, K * D) raw keypoints, D 2 or 3, any strides; see ``keypoint_loss``.
            feat_shapes: (height, width) of every level in cells.
            targets: (N, 6) rows of (image index, class, cx, cy, w, h), boxes normalised to 0-1 of the image, whose size is
                that of the first level times its stride; or ``Targets``, in pixels.
            keypoints: (N, K, 2 or 3) of the same rows, in the same units as ``targets``; see ``keypoint_loss``.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for an image index or a label out of range (elsewhere
                such a row is ignored).
            TypeError: predictions or rows are not float tensors.

        Warns:
            UserWarning: most keypoints are in other units than the boxes (on the CPU).
        """
        preds = {"pred_dist": pred_dist, "pred_scores": pred_scores}
        (pred_dist, pred_scores), levels = self.detection._checked(preds, feat_shapes)
        _checks.tensor("pred_keypoints", pred_keypoints, (*pred_dist.shape[:2], "K * D"), like=pred_dist)
        pred_dist, pred_scores, pred_keypoints = widened(pred_dist, pred_scores, pred_keypoints)
        found, row = self.detection._with_rows((pred_dist, pred_scores), levels, targets)
        sigmas = sigmas_of(pred_keypoints, "keypoints", keypoints, self.sigmas)
        sizes = targets[:, 4:].detach() if isinstance(targets, Tensor) else targets.boxes_xywh[:, 2:]
        if sizes.shape[0] != keypoints.shape[0]:
            raise ValueError(f"keypoints must be those of {sizes.shape[0]} rows of targets, got {keypoints.shape[0]}")
        _checks.keypoint_places("keypoints", keypoints, isinstance(targets, Tensor))
        counts = counts_of(found.num_fg, found.loss, pred_dist.shape[0], self._ranks)
        wants_grad = torch.is_grad_enabled() and (found.loss.requires_grad or pred_keypoints.requires_grad)
        x = KeypointLoss(
            pred_keypoints, found.loss, row, *counts, keypoints.detach(), sizes, isinstance(targets, Tensor), levels, sigmas,
            self.keypoint_gains, wants_grad,
        )  # fmt: skip
        out = _ops.keypoint_loss(x)
        terms = found.box, found.cls, found.dfl, *out.terms
        box, cls, dfl, pose, kobj = unless_nan(out.loss, *terms)
        return YOLO11PoseLossOutput(out.loss, box, cls, dfl, pose, kobj, found.num_fg)

    def extra_repr(self) -> str:
        return f"sigmas={self.sigmas}, gains={self.keypoint_gains}"
