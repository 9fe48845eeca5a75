"""Launches of YOLO11's criterion, of axis-aligned and of oriented boxes: whole, and in parts."""

from typing import Any

import torch
from torch import Tensor

from ..._signatures import (
    YOLO11,
    YOLO11OBB,
    GradDistAngleScores,
    GradDistScores,
    YOLO11Assign,
    YOLO11Assignment,
    YOLO11Loss,
    YOLO11LossBackward,
    YOLO11LossOutputs,
    YOLO11OBBAssign,
    YOLO11OBBLoss,
    YOLO11OBBLossBackward,
    YOLO11OBBLossOutputs,
    YOLO11OBBOutputs,
    YOLO11Outputs,
)
from ..arguments import NO_HEAD, Grid, Head, Rows, compute_type, tensor3
from ..classes import Upstream, _yolo11_class_kernel, class_layout, class_sizes
from ..launch import INTERPRETED, Buffers, Launch, Plan, RoomyLaunch, Run, Workspace, cdiv, new, run
from ..positives import Claims, Matched, slot_sizes
from ..reduce import TOTAL_SIZES
from ..targets import packed_rows
from ..yolo11 import FILL_BLOCK, Loss, Sizes, _fill_kernel, _yolo11_positives_kernel, _yolo11_total_kernel
from ..yolo11_obb import _yolo11_obb_positives_kernel
from .task_aligned import YOLO11Assigning, has_angle


class _Criterion:
    """The launches of loss and gradients of an assignment, either or both.

    Args:
        grads: what the gradients are written to, as ``Head``.
        num_claims: of a row, in the whole criterion, where claims are the slots of positives; elsewhere all anchors are.
    """

    def __init__(
        self, x: Any, grads: tuple[Tensor, Tensor | None, Tensor] | None, dtype: torch.dtype, *, has_loss: bool = True,
        num_claims: int = 0, num_rows: int = 0,
    ) -> None:  # fmt: skip
        batch_size, num_anchors, num_classes = x.pred_scores.shape
        kind, self.num_claims, self.num_cells = compute_type(dtype), num_claims, batch_size * num_anchors
        self.per_image = num_anchors, num_classes, num_anchors * num_classes
        sizes = class_sizes(x.pred_scores)
        self.class_grid = cdiv(self.per_image[2], sizes["BLOCK"] * sizes["STEPS"]), batch_size, 1
        layout = class_layout(x.pred_scores, grads[2] if grads else None)
        self.classes = Launch(_yolo11_class_kernel, DTYPE=kind, **layout, **sizes)
        sizes = slot_sizes(self._num_slots(num_rows))
        self.slots, is_oriented = sizes["SLOTS"], has_angle(x)
        kernel = _yolo11_obb_positives_kernel if is_oriented else _yolo11_positives_kernel
        self.positives = RoomyLaunch(kernel, STRIDES=x.levels.strides, R=x.reg_max, CLAIMS=num_claims, DTYPE=kind, **sizes)
        self.total = Launch(_yolo11_total_kernel, HAS_ANGLE=is_oriented, DTYPE=kind, **TOTAL_SIZES)
        self.total_gains = x.gains if is_oriented else (*x.gains, 0.0)
        self.counts = Sizes(*(0 if grad is None else grad.numel() for grad in grads or (None, None, None)))
        self.num_dense = self.class_grid[0] * batch_size
        filled = [place for place, count in enumerate(self.counts[:2]) if count and not num_claims]  # not those of classes
        self.fills = {place: Launch(_fill_kernel, 4, DTYPE=kind, BLOCK=FILL_BLOCK) for place in filled}
        used = {self.total: has_loss, self.classes: self.num_cells, self.positives: self._num_slots(num_rows)}
        self.launches = [*[launch for launch, is_used in used.items() if is_used], *self.fills.values()]
        self.grid, self.size = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size
        self.fixed: Buffers = {}
        self.by_row: Buffers = {}
        if has_loss:
            self.fixed["dense"] = dtype, self.num_dense
            held, of = (self.by_row, num_claims) if num_claims else (self.fixed, self.num_cells)
            held["partial"] = dtype, len(x.gains) * cdiv(of, self.slots)

    def _num_slots(self, num_rows: int) -> int:
        return num_rows * self.num_claims if self.num_claims else self.num_cells

    def __call__(
        self, run: Run, grads: Head, grad: Any, poison: Any, preds: Head, matched: Matched, claims: Claims | None,
        normaliser: Any,
    ) -> int:  # fmt: skip
        """Launch them, and return the number of partial sums."""
        x, num_slots = run.x, self._num_slots(run.num_rows)
        num_partial = cdiv(num_slots, self.slots)
        weights = None if x.class_weights is None else run.address(x.class_weights)
        upstream = new(Upstream, (grad, normaliser))
        dense, partial = (run.buffers.dense, run.buffers.partial) if self.fixed else (None, None)
        if self.num_cells:
            self.classes(
                run.stream, self.class_grid, dense, grads.scores, poison, upstream,
                preds.scores, weights, x.gains[1], *self.per_image,
            )  # fmt: skip
            for place, launch in self.fills.items():
                count = self.counts[place]
                launch(run.stream, (cdiv(count, FILL_BLOCK), 1, 1), grads[place].ptr, upstream, count)
            if num_slots:
                self.positives(
                    run.stream, (num_partial, 1, 1), partial, grads, upstream, preds, matched, claims, weights, self.grid,
                    *self.size, *x.gains, num_slots,
                )  # fmt: skip
        return num_partial

    def add_up(self, run: Run, grads: Head, normaliser: Any, loss: Loss, num_partial: int) -> None:
        programs = 1 if grads.dist is None or INTERPRETED else 8, 1, 1
        self.total(
            run.stream, programs, loss, grads, self.counts, run.buffers.dense, run.buffers.partial, normaliser,
            *self.total_gains, self.num_dense, num_partial,
        )  # fmt: skip


def heads(run: Run, is_oriented: bool, has_grad: bool) -> tuple[Head, Head]:
    """Predictions and, if wanted, their gradients."""
    x, out, address = run.x, run.out, run.address
    angle = tensor3(address, x.pred_angle) if is_oriented else None
    preds = new(Head, (tensor3(address, x.pred_dist), angle, tensor3(address, x.pred_scores)))
    if not has_grad:
        return preds, NO_HEAD
    angle = tensor3(address, out.grad_pred_angle) if is_oriented else None
    return preds, new(Head, (tensor3(address, out.grad_pred_dist), angle, tensor3(address, out.grad_pred_scores)))


def tensors_of_gradients(out: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    return out.grad_pred_dist, getattr(out, "grad_pred_angle", None), out.grad_pred_scores


class _AssignPlan(Plan):
    def __init__(self, x: YOLO11Assign | YOLO11OBBAssign, out: YOLO11Assignment, num_rows: int) -> None:
        self.is_oriented = has_angle(x)
        self.assign = YOLO11Assigning(x, out.target_score.dtype, num_rows, is_whole=False, is_final=True, fills=False)
        super().__init__(Workspace(self.assign.fixed, self.assign.by_row), *self.assign.launches)

    def launch(self, run: Run) -> None:
        row, score, sums, num_fg, label, box = map(run.address, run.out)
        boxes = (None, box) if self.is_oriented else (box, None)
        rows, (preds, _) = new(Rows, (run.buffers.image, label, *boxes, run.buffers.walk)), heads(run, self.is_oriented, False)
        self.assign(run, preds, row, score, sums, num_fg, rows)


class _LossPlan(Plan):
    def __init__(self, x: YOLO11Loss | YOLO11OBBLoss, out: YOLO11LossOutputs | YOLO11OBBLossOutputs, num_rows: int) -> None:
        self.criterion, self.is_oriented = _Criterion(x, None, out.loss.dtype), has_angle(x)
        super().__init__(Workspace(self.criterion.fixed), *self.criterion.launches)

    def launch(self, run: Run) -> None:
        normaliser = run.address(run.x.normaliser)
        preds, grads = heads(run, self.is_oriented, False)
        num_partial = self.criterion(run, grads, None, None, preds, matched(run), None, normaliser)
        address, out = run.address, run.out
        loss = new(Loss, (address(out.loss), tuple(map(address, out.terms)), address(out.held)))
        self.criterion.add_up(run, grads, normaliser, loss, num_partial)


class _GradientPlan(Plan):
    def __init__(
        self, x: YOLO11LossBackward | YOLO11OBBLossBackward, out: GradDistScores | GradDistAngleScores, num_rows: int
    ) -> None:
        self.criterion = _Criterion(x, tensors_of_gradients(out), x.target_score.dtype, has_loss=False)
        self.is_oriented = has_angle(x)
        super().__init__(Workspace(), *self.criterion.launches)

    def launch(self, run: Run) -> None:
        grad, held = run.address(run.x.grad), run.address(run.x.held)
        preds, grads = heads(run, self.is_oriented, True)
        self.criterion(run, grads, grad, None, preds, matched(run), None, held)


def matched(run: Run) -> Matched:
    x, address = run.x, run.address
    return new(Matched, map(address, (x.target_row, x.target_score, x.gt_labels, x.gt_boxes)))


class _CriterionPlan(Plan):
    def __init__(self, x: YOLO11 | YOLO11OBB, out: YOLO11Outputs | YOLO11OBBOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, _), dtype = x.pred_scores.shape, out.loss.dtype
        self.has_grad = x.wants_grad and batch_size * num_anchors > 0
        self.wants_row, self.is_oriented = getattr(x, "wants_row", False), has_angle(x)
        grads = tensors_of_gradients(out) if self.has_grad else None
        self.fills = self.has_grad and not self.wants_row
        self.assign = YOLO11Assigning(x, dtype, num_rows, is_whole=True, is_final=self.wants_row, fills=self.fills)
        num_claims = 0 if self.wants_row else self.assign.matching.num_claims
        self.criterion = _Criterion(x, grads, dtype, num_claims=num_claims, num_rows=num_rows)
        fixed = {
            **self.assign.fixed, **self.criterion.fixed, "target_score": (dtype, batch_size * num_anchors),
            "normaliser": (dtype, 2), "held": (dtype, 2),
            "target_row": (torch.int32, 0 if self.wants_row else batch_size * num_anchors),
        }  # fmt: skip
        memory = Workspace(fixed, {**self.assign.by_row, **self.criterion.by_row, **packed_rows(dtype, self.is_oriented)})
        super().__init__(memory, *self.assign.launches, *self.criterion.launches)

    def launch(self, run: Run) -> None:
        out, buffers, address = run.out, run.buffers, run.address
        row = address(out.target_row) if self.wants_row else buffers.target_row
        score, normaliser = buffers.target_score, buffers.normaliser
        boxes = (None, buffers.xywh) if self.is_oriented else (buffers.xyxy, None)
        rows = new(Rows, (buffers.image, buffers.label, *boxes, buffers.walk))
        order = buffers.order if self.assign.matching.is_wide else None
        preds, grads = heads(run, self.is_oriented, self.has_grad)
        poison = normaliser if self.has_grad else None
        zeros = grads if self.fills else NO_HEAD
        state = self.assign(run, preds, row, score, normaliser, address(out.num_fg), rows, zeros)
        matched = new(Matched, (row, score, buffers.label, boxes[self.is_oriented]))
        claims = None if self.wants_row else new(Claims, (buffers.claims, buffers.image, state, order))
        num_partial = self.criterion(run, grads, None, poison, preds, matched, claims, normaliser)
        loss = new(Loss, (address(out.loss), tuple(map(address, out.terms)), buffers.held))
        self.criterion.add_up(run, grads, normaliser, loss, num_partial)


def yolo11_assign(x: YOLO11Assign | YOLO11OBBAssign) -> YOLO11Assignment:
    out = x.allocate()
    run(_AssignPlan, x, out, x.targets[0].shape[0])
    return out


def yolo11_loss(x: YOLO11Loss | YOLO11OBBLoss) -> YOLO11LossOutputs | YOLO11OBBLossOutputs:
    out = x.allocate()
    run(_LossPlan, x, out)
    return out


def yolo11_criterion(x: YOLO11 | YOLO11OBB) -> YOLO11Outputs | YOLO11OBBOutputs:
    out = x.allocate()
    run(_CriterionPlan, x, out, x.targets[0].shape[0])
    return out


def yolo11_loss_backward(x: YOLO11LossBackward | YOLO11OBBLossBackward) -> GradDistScores | GradDistAngleScores:
    out = x.allocate()
    if x.target_row.numel():
        run(_GradientPlan, x, out)
    return out


# Plans are the same: what has no angle has no part.
yolo11_obb_assign, yolo11_obb_loss = yolo11_assign, yolo11_loss
yolo11_obb_criterion, yolo11_obb_loss_backward = yolo11_criterion, yolo11_loss_backward
