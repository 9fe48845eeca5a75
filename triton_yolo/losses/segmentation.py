"""The criterion of YOLO11-seg and its kin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _ops
from .._precision import widened, working_dtype
from .._signatures import UnpackRows
from ..masks import term_of_rows
from ..targets import Targets
from ._criterion import Criterion, counts_of, rows_of, unless_nan
from .yolo11 import YOLO11Loss


class YOLO11SegmentationLossOutput(NamedTuple):
    """What ``YOLO11SegmentationLoss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), B * (box + cls + dfl + mask).
        box: (), CIoU term with its gain.
        cls: (), classification term with its gain.
        dfl: (), distribution focal term (L1 with ``reg_max=1``) with its gain.
        mask: (), mask term with its gain.
        num_fg: () int64, number of positive anchors on this process.
    """

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    mask: Tensor
    num_fg: Tensor


class YOLO11SegmentationLoss(Criterion):
    """The criterion of YOLO11-seg and YOLOv8-seg: that of the detector, and ``mask_loss`` of its positives.

    What is said of ``YOLO11Loss`` holds here too; a logit of a mask that is not finite inside the box of a positive makes
    everything NaN as well.

    Args:
        num_classes: number of classes C.
        strides: stride of every level in pixels, in the order in which the predictions are concatenated.
        mask_gain: weight of the mask term.
        overlap_mask: whether masks are one image of numbers a picture; otherwise one mask a row, see ``mask_loss``.
        process_group: see ``YOLO11Loss``; positives are counted on all its ranks.
        options: the other arguments of ``YOLO11Loss``. Ultralytics' criterion has ``min_box_side=16``.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> criterion = ty.YOLO11SegmentationLoss(num_classes=3, strides=(8,))
        >>> preds = [torch.zeros(2, 16, channels, requires_grad=True) for channels in (64, 3, 32)]
        >>> prototypes = torch.ones(2, 32, 8, 8, requires_grad=True)
        >>> targets = torch.tensor([[0, 2, 0.5, 0.5, 0.5, 0.5]])  # image, class, cx, cy, w, h
        >>> masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
        >>> masks[0, 2:6, 3:5] = 1  # the first row of image 0
        >>> out = criterion(*preds, prototypes, [(4, 4)], targets, masks)
        >>> out.loss.backward()
        >>> out.mask  # 7.5 * log(2)
        tensor(5.1986)
    """

    _made_with = YOLO11Loss._made_with | {"num_classes", "strides", "reg_max", "class_weights"}

    def __init__(
        self,
        num_classes: int,
        *,
        strides: Sequence[float] = (8, 16, 32),
        mask_gain: float = 7.5,
        overlap_mask: bool = True,
        process_group: dist.ProcessGroup | bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(process_group)
        self.detection = YOLO11Loss(num_classes, strides=strides, process_group=process_group, **options)
        self.mask_gain = _checks.real("mask_gain", mask_gain)
        self.overlap_mask = _checks.boolean("overlap_mask", overlap_mask)

    def forward(
        self,
        pred_dist: Tensor,
        pred_scores: Tensor,
        pred_masks: Tensor,
        prototypes: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Tensor | Targets,
        masks: Tensor,
    ) -> YOLO11SegmentationLossOutput:
        """Assign the targets and compute the loss.

        Args:
            pred_dist: (B, A, 4 * reg_max), see ``YOLO11Loss``.
            pred_scores: (B, A, C), see ``YOLO11Loss``.
            pred_masks: (B, A, M) coefficients of the masks, any strides.
            prototypes: (B, M, h, w), any strides.
            feat_shapes: (height, width) of every level in cells.
            targets: (N, 6) rows or ``Targets``, see ``YOLO11Loss``.
            masks: (B, H, W), or (N, H, W) without ``overlap_mask``, see ``mask_loss``.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for an image index or a label out of range (elsewhere
                such a row is ignored).
            TypeError: predictions or rows are not float tensors.
        """
        preds = {"pred_dist": pred_dist, "pred_scores": pred_scores}
        (pred_dist, pred_scores), levels = self.detection._checked(preds, feat_shapes)
        batch_size, num_anchors, _ = pred_scores.shape
        _checks.tensor("pred_masks", pred_masks, (batch_size, num_anchors, "M"), like=pred_scores)
        _checks.tensor("prototypes", prototypes, (batch_size, pred_masks.shape[2], "h", "w"), like=pred_scores)
        pred_dist, pred_scores, pred_masks, prototypes = widened(pred_dist, pred_scores, pred_masks, prototypes)
        size = levels.imgsz
        rows = rows_of(targets, pred_scores)
        if len(rows) == 1:
            rows = list(_ops.unpack_rows(UnpackRows(rows[0].to(working_dtype(pred_scores.dtype)), size)))
        gt = Targets._make(rows)
        out, row = self.detection._with_rows((pred_dist, pred_scores), levels, gt)
        with torch.no_grad():
            num_fg, images = counts_of(out.num_fg, out.loss, batch_size, self._ranks)
            if images is None:
                num_fg = num_fg.clamp(min=1).to(out.loss.dtype)
            num_images = (batch_size or 1) if images is None else images
            # What is not a number anywhere is one nowhere.
            scale = (self.mask_gain * num_images / num_fg).masked_fill(out.loss.isnan(), torch.nan)
        mask = term_of_rows(pred_masks, prototypes, row, gt, masks, scale, size, overlap_mask=self.overlap_mask)
        with torch.no_grad():
            one = torch.ones_like(mask).masked_fill(mask.isnan(), torch.nan)
        box, cls, dfl, term = unless_nan(mask, out.box, out.cls, out.dfl, mask.detach() / num_images)
        return YOLO11SegmentationLossOutput(one * out.loss + mask, box, cls, dfl, term, out.num_fg)

    def extra_repr(self) -> str:
        return f"mask_gain={self.mask_gain}, overlap_mask={self.overlap_mask}"
