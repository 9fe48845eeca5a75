"""The criterion of YOLO11 and its kin."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .. import _ops
from .._signatures import Levels
from ..targets import Targets
from ._task_aligned import TaskAlignedCriterion


class YOLO11LossOutput(NamedTuple):
    """What ``YOLO11Loss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), B * (box + cls + dfl).
        box: (), CIoU term with its gain.
        cls: (), classification term with its gain.
        dfl: (), distribution focal term (L1 with ``reg_max=1``) with its gain.
        num_fg: () int64, number of positive anchors on this process.
    """

    loss: Tensor
    box: Tensor
    cls: Tensor
    dfl: Tensor
    num_fg: Tensor


class YOLO11Loss(TaskAlignedCriterion):
    """The criterion of YOLO11 and of YOLOv8, v9, v10, 12 and 26: task-aligned assignment, BCE, CIoU and DFL.

    TOOD (arXiv 2108.07755), Generalized Focal Loss (arXiv 2006.04388), CIoU (arXiv 1911.08287).

    Everything is computed in float32 whatever the type of the predictions, also under autocast (in float64 if one is float64).
    A logit that is NaN or infinite makes the loss, its terms and every gradient NaN, and changes the assignment of no other
    image. A finite one never does, however large: a class masked with ``torch.finfo(dtype).min`` costs nothing.

    Args:
        num_classes: number of classes C.
        strides: stride of every level in pixels, in the order in which the predictions are concatenated.
        reg_max: bins of the distance distribution R; 1 means plain distances and an L1 term instead of DFL.
        topk: candidates a ground truth claims.
        topk2: if given, a ground truth keeps only so many of them after the conflicts (one-to-one heads: 1).
        alpha: exponent of the score in the alignment metric.
        beta: exponent of the overlap.
        box_gain: weight of the CIoU term.
        cls_gain: weight of the classification term.
        dfl_gain: weight of the DFL term.
        min_box_side: sides shorter than this count as this long when candidates are sought, in pixels.
        class_weights: (C,) weight, not negative, of every class in the classification term; no part of ``state_dict``.
        process_group: if given, the loss is normalised over its ranks, so that gradients averaged over them, as
            DistributedDataParallel does, equal those of one process on the whole batch. True stands for all ranks, which are
            looked up at every step. A copy of the criterion shares the group, a pickle drops it and says so at use.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> criterion = ty.YOLO11Loss(num_classes=3, strides=(8,), reg_max=16)
        >>> pred_dist, pred_scores = (torch.zeros(2, 16, channels, requires_grad=True) for channels in (64, 3))
        >>> targets = torch.tensor([[0, 2, 0.5, 0.5, 0.6, 0.4]])  # image, class, cx, cy, w, h
        >>> out = criterion(pred_dist, pred_scores, [(4, 4)], targets)
        >>> out.loss.backward()
        >>> out.num_fg
        tensor(4)
    """

    _whole, _assign, _loss = _ops.yolo11_criterion, _ops.yolo11_assign, _ops.yolo11_loss

    def __init__(
        self,
        num_classes: int,
        *,
        strides: Sequence[float] = (8, 16, 32),
        reg_max: int = 16,
        topk: int = 10,
        topk2: int | None = None,
        alpha: float = 0.5,
        beta: float = 6.0,
        box_gain: float = 7.5,
        cls_gain: float = 0.5,
        dfl_gain: float = 1.5,
        min_box_side: float = 0.0,
        class_weights: Tensor | None = None,
        process_group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__(
            num_classes, strides, reg_max, topk, topk2, alpha, beta, min_box_side, class_weights, process_group,
            box_gain=box_gain, cls_gain=cls_gain, dfl_gain=dfl_gain,
        )  # fmt: skip

    def forward(
        self,
        pred_dist: Tensor,
        pred_scores: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Tensor | Targets,
    ) -> YOLO11LossOutput:
        """Assign the targets and compute the loss.

        Args:
            pred_dist: (B, A, 4 * reg_max) logits of the distances. Any strides: pass channel-first as ``x.transpose(1, 2)``.
            pred_scores: (B, A, C) class logits, any strides.
            feat_shapes: (height, width) of every level in cells.
            targets: (N, 6) rows of (image index, class, cx, cy, w, h), boxes normalised to 0-1 of the image, whose size is
                that of the first level times its stride; or ``Targets``, in pixels.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for an image index or a label out of range (elsewhere
                such a row is ignored).
            TypeError: predictions or rows are not float tensors.
        """
        preds = {"pred_dist": pred_dist, "pred_scores": pred_scores}
        loss, terms, num_fg, _ = self._compute(*self._checked(preds, feat_shapes), targets, False)
        box, cls, dfl = terms
        return YOLO11LossOutput(loss, box, cls, dfl, num_fg)

    def _with_rows(
        self, given: tuple[Tensor, ...], levels: Levels, targets: Tensor | Targets
    ) -> tuple[YOLO11LossOutput, Tensor]:
        """What ``forward`` returns of checked predictions, and the row of every anchor (B, A) int32, -1 for background."""
        loss, terms, num_fg, row = self._compute(given, levels, targets, True)
        assert row is not None
        box, cls, dfl = terms
        return YOLO11LossOutput(loss, box, cls, dfl, num_fg), row

    def loss_of(
        self,
        pred_dist: Tensor,
        pred_scores: Tensor,
        feat_shapes: Sequence[Sequence[int]],
        targets: Targets,
        target_row: Tensor,
        target_score: Tensor,
        normaliser: Tensor,
    ) -> YOLO11LossOutput:
        """Compute the loss of an assignment that another assigner made.

        Args:
            pred_dist: (B, A, 4 * reg_max), see ``forward``.
            pred_scores: (B, A, C), see ``forward``.
            feat_shapes: (height, width) of every level in cells.
            targets: ground truth in pixels.
            target_row: (B, A) int32 or int64, the row of ``targets`` that every anchor is matched with, -1 for background.
                The row is one of the anchor's image.
            target_score: (B, A), target of the matched class, which also weights the box terms; not read at background.
            normaliser: () number that the terms are divided by, as it is: ``target_score`` summed over the batch and at least
                1, or whatever takes its place.

        Returns:
            The loss, B times the sum of the weighted terms, and what ``forward`` returns beside it.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for a row that there is not, or that has another image or
                no class (elsewhere its anchor is background).
            TypeError: a type is wrong.
        """
        preds = {"pred_dist": pred_dist, "pred_scores": pred_scores}
        loss, terms, num_fg, _ = self._compute_of(preds, feat_shapes, targets, target_row, target_score, normaliser)
        box, cls, dfl = terms
        return YOLO11LossOutput(loss, box, cls, dfl, num_fg)
