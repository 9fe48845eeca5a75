"""What criteria with a task-aligned assigner share: settings, and the way from predictions to the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _levels
from .._operation import Operation
from .._precision import widened, working_dtype
from .._rows import is_matched
from .._signatures import Levels, TaskAligned
from ..targets import Targets
from ._criterion import Criterion, normaliser_of, rows_of, writable

Computed = tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor | None]
"""The loss (), its terms (), the number of positives, and the row of every anchor (B, A) where it is known."""


class TaskAlignedCriterion(Criterion):
    """A criterion whose arguments are those of ``YOLO11Loss``, gains by their names. Predictions go by name, distances first.

    A subclass has three operations: the whole for one process, and the assignment and the loss of one.
    """

    class_weights: Tensor | None
    _whole: ClassVar[Operation]
    _assign: ClassVar[Operation]
    _loss: ClassVar[Operation]
    _box_size: ClassVar[int] = 4
    _made_with = frozenset({
        "topk", "topk2", "alpha", "beta", "min_box_side", "box_gain", "cls_gain", "dfl_gain", "angle_gain",
    })  # fmt: skip

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float],
        reg_max: int,
        topk: int,
        topk2: int | None,
        alpha: float,
        beta: float,
        min_box_side: float,
        class_weights: Tensor | None,
        process_group: dist.ProcessGroup | bool | None,
        **gains: float,
    ) -> None:
        super().__init__(process_group)
        self.num_classes = _checks.whole("num_classes", num_classes)
        self.strides, self.reg_max = _checks.reals("strides", strides), _checks.whole("reg_max", reg_max)
        self.assigner = TaskAligned(
            _checks.whole("topk", topk), None if topk2 is None else _checks.whole("topk2", topk2),
            _checks.real("alpha", alpha), _checks.real("beta", beta), _checks.real("min_box_side", min_box_side), 1e-9,
        )  # fmt: skip
        self.gains = tuple(_checks.real(name, gain) for name, gain in gains.items())
        if class_weights is not None:
            _checks.class_weights("class_weights", class_weights, self.num_classes)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self._last_weights = class_weights  # with values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Criterion:
        if self.class_weights is not None and not self.class_weights.is_meta:
            self._last_weights = self.class_weights
        return super()._apply(fn, recurse)

    def reset_parameters(self) -> None:
        if self._last_weights is not None and self.class_weights is not None and not self.class_weights.is_meta:
            self.class_weights = writable(self.class_weights)
            with torch.no_grad():
                self.class_weights.copy_(self._last_weights)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, strides={self.strides}, reg_max={self.reg_max}, topk={self.assigner.topk}"

    def _checked(self, preds: Mapping[str, Tensor], feat_shapes: Sequence[Sequence[int]]) -> tuple[tuple[Tensor, ...], Levels]:
        """Predictions of one type, and the levels."""
        angle = (1,) if self._box_size == 5 else ()
        levels = _levels.of_head(preds, (4 * self.reg_max, *angle, self.num_classes), feat_shapes, self.strides)
        return widened(*preds.values()), levels

    def _compute(self, given: tuple[Tensor, ...], levels: Levels, targets: Tensor | Targets, *others: Any) -> Computed:
        """Assign the targets to checked predictions and compute the loss; ``others`` only some have as inputs of the whole."""
        rows = rows_of(targets, given[-1], box_size=self._box_size)
        is_half = wants_grad = False
        for x in given:
            is_half, wants_grad = is_half or x.dtype == torch.float16, wants_grad or x.requires_grad
        wants_grad = wants_grad and torch.is_grad_enabled()
        # Gradients are written before the loss's own is known, but for float16: its loss scale keeps small ones above 0.
        if self._ranks.given is None and not (is_half and wants_grad):
            # A module looks for its attribute in three places first. Weights may have been made a parameter.
            is_buffer = "class_weights" in self._buffers
            class_weights = self._buffers["class_weights"] if is_buffer else self.class_weights
            options = class_weights, levels, self.reg_max, self.assigner, self.gains, wants_grad, *others
            out = self._whole(self._whole.inputs(*given, rows, *options))
            return out.loss, out.terms, out.num_fg, out.target_row if others else None
        with torch.no_grad():
            assigned = self._assign(self._assign.inputs(*given, rows, levels, self.reg_max, self.assigner))
            normaliser = normaliser_of(assigned.sums, self._ranks)
        assignment = assigned.target_row, assigned.target_score, normaliser, assigned.gt_labels, assigned.gt_boxes
        return self._of_assignment(given, assignment, levels, assigned.num_fg)

    def _compute_of(
        self, preds: Mapping[str, Tensor], feat_shapes: Sequence[Sequence[int]], targets: Targets, target_row: Tensor,
        target_score: Tensor, normaliser: Tensor,
    ) -> Computed:  # fmt: skip
        """Compute the loss of an assignment that another assigner made."""
        given, levels = self._checked(preds, feat_shapes)
        pred_dist, batch_size, dtype = given[0], given[0].shape[0], working_dtype(given[0].dtype)
        _checks.ground_truth(targets, Targets._fields, pred_dist, self._box_size)
        _checks.target_row("target_row", target_row, pred_dist)
        _checks.tensor("target_score", target_score, pred_dist.shape[:2], like=pred_dist)
        _checks.tensor("normaliser", normaliser, (), like=pred_dist)
        is_fg = is_matched(target_row, targets.image_index, targets.labels, self.num_classes)
        _checks.matched_rows("target_row", target_row, is_fg)
        row = target_row.where(is_fg, -1).int().contiguous()
        score = target_score.detach().to(dtype).where(is_fg, 0).contiguous()
        scale = torch.stack([normaliser.detach().to(dtype), normaliser.new_full((), batch_size, dtype=dtype)])
        boxes = targets.boxes_xyxy if self._box_size == 4 else targets.boxes_xywh
        assignment = row, score, scale, targets.labels.contiguous(), boxes.to(dtype).contiguous()
        return self._of_assignment(given, assignment, levels, is_fg.sum())

    def _of_assignment(
        self, preds: tuple[Tensor, ...], assignment: tuple[Tensor, ...], levels: Levels, num_fg: Tensor
    ) -> Computed:
        out = self._loss(self._loss.inputs(*preds, *assignment, self.class_weights, levels, self.reg_max, self.gains))
        return out.loss, out.terms, num_fg, assignment[0]
