"""Launches of YOLO11's criterion: whole, and in parts."""

from typing import Any

import torch
from torch import Tensor

from ..._signatures import (
    YOLO11,
    GradDistScores,
    YOLO11Assign,
    YOLO11Assignment,
    YOLO11Loss,
    YOLO11LossBackward,
    YOLO11LossOutputs,
    YOLO11Outputs,
)
from ..arguments import Grid, Rows, Tensor3, compute_type, tensor3
from ..classes import Upstream, _yolo11_class_kernel, class_layout, class_sizes
from ..fill import Fill
from ..launch import INTERPRETED, Buffers, Launch, Plan, RoomyLaunch, Run, Workspace, cdiv, new, run
from ..reduce import TOTAL_SIZES
from ..targets import packed_rows
from ..yolo11 import (
    FILL_BLOCK,
    Claims,
    Gradients,
    Loss,
    Matched,
    Sizes,
    _fill_kernel,
    _yolo11_positives_kernel,
    _yolo11_total_kernel,
    slot_sizes,
)
from .task_aligned import YOLO11Assigning


class _Criterion:
    """The launches of loss and gradients of an assignment, either or both.

    Args:
        grads: what the gradients are written to.
        num_claims: of a row, in the whole criterion, where claims are the slots of positives; elsewhere all anchors are.
    """

    def __init__(
        self, x: YOLO11 | YOLO11Loss | YOLO11LossBackward, grads: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
        *, has_loss: bool = True, num_claims: int = 0, num_rows: int = 0,
    ) -> None:  # fmt: skip
        batch_size, num_anchors, num_classes = x.pred_scores.shape
        kind, self.num_claims, self.num_cells = compute_type(dtype), num_claims, batch_size * num_anchors
        self.per_image = num_anchors, num_classes, num_anchors * num_classes
        sizes = class_sizes(x.pred_scores)
        self.class_grid = cdiv(self.per_image[2], sizes["BLOCK"] * sizes["STEPS"]), batch_size, 1
        layout = class_layout(x.pred_scores, grads[1] if grads else None)
        self.classes = Launch(_yolo11_class_kernel, DTYPE=kind, **layout, **sizes)
        sizes = slot_sizes(self._num_slots(num_rows))
        self.slots = sizes["SLOTS"]
        self.positives = RoomyLaunch(
            _yolo11_positives_kernel, STRIDES=x.levels.strides, R=x.reg_max, CLAIMS=num_claims, DTYPE=kind, **sizes
        )
        self.total = Launch(_yolo11_total_kernel, DTYPE=kind, **TOTAL_SIZES)
        self.fill = Launch(_fill_kernel, 4, DTYPE=kind, BLOCK=FILL_BLOCK)
        self.counts = Sizes(*(x.numel() for x in grads)) if grads else Sizes(0, 0)
        self.num_dense = self.class_grid[0] * batch_size
        self.has_fill = grads is not None and not num_claims
        used = {
            self.total: has_loss, self.classes: self.num_cells, self.positives: self._num_slots(num_rows),
            self.fill: self.num_cells and self.has_fill,
        }  # fmt: skip
        self.launches = [launch for launch, is_used in used.items() if is_used]
        self.grid, self.size = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size
        self.fixed: Buffers = {}
        self.by_row: Buffers = {}
        if has_loss:
            self.fixed["dense"] = dtype, self.num_dense
            held, of = (self.by_row, num_claims) if num_claims else (self.fixed, self.num_cells)
            held["partial"] = dtype, 3 * cdiv(of, self.slots)

    def _num_slots(self, num_rows: int) -> int:
        return num_rows * self.num_claims if self.num_claims else self.num_cells

    def __call__(
        self, run: Run, grads: Gradients | None, grad: Any, poison: Any, dist: Tensor3, scores: Tensor3, matched: Matched,
        claims: Claims | None, normaliser: Any,
    ) -> int:  # fmt: skip
        """Launch them, and return the number of partial sums."""
        x, num_slots = run.x, self._num_slots(run.num_rows)
        num_partial = cdiv(num_slots, self.slots)
        weights = None if x.class_weights is None else run.address(x.class_weights)
        upstream = new(Upstream, (grad, normaliser))
        dense, partial = (run.buffers.dense, run.buffers.partial) if self.fixed else (None, None)
        if self.num_cells:
            self.classes(
                run.stream, self.class_grid, dense, None if grads is None else grads.scores, poison, upstream, scores,
                weights, x.gains[1], *self.per_image,
            )  # fmt: skip
            if grads is not None and self.has_fill:
                programs = cdiv(self.counts.dist, FILL_BLOCK), 1, 1
                self.fill(run.stream, programs, grads.dist.ptr, upstream, self.counts.dist)
            if num_slots:
                self.positives(
                    run.stream, (num_partial, 1, 1), partial, grads, upstream, dist, scores, matched,
                    claims, weights, self.grid, *self.size, *x.gains, num_slots,
                )  # fmt: skip
        return num_partial

    def add_up(self, run: Run, grads: Gradients | None, normaliser: Any, loss: Loss, num_partial: int) -> None:
        programs = 1 if grads is None or INTERPRETED else 8, 1, 1
        self.total(
            run.stream, programs, loss, grads, self.counts, run.buffers.dense, run.buffers.partial, normaliser, *run.x.gains,
            self.num_dense, num_partial,
        )  # fmt: skip


def gradients(run: Run) -> Gradients:
    out, address = run.out, run.address
    return new(Gradients, (tensor3(address, out.grad_pred_dist), tensor3(address, out.grad_pred_scores)))


class _AssignPlan(Plan):
    def __init__(self, x: YOLO11Assign, out: YOLO11Assignment, num_rows: int) -> None:
        self.assign = YOLO11Assigning(x, out.target_score.dtype, num_rows, is_whole=False, is_final=True, fills=False)
        super().__init__(Workspace(self.assign.fixed, self.assign.by_row), *self.assign.launches)

    def launch(self, run: Run) -> None:
        row, score, sums, num_fg, label, box = map(run.address, run.out)
        dist, scores = tensor3(run.address, run.x.pred_dist), tensor3(run.address, run.x.pred_scores)
        self.assign(run, dist, scores, row, score, sums, num_fg, new(Rows, (run.buffers.image, label, box, None)))


class _LossPlan(Plan):
    def __init__(self, x: YOLO11Loss, out: YOLO11LossOutputs, num_rows: int) -> None:
        self.criterion = _Criterion(x, None, out.loss.dtype)
        super().__init__(Workspace(self.criterion.fixed), *self.criterion.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        dist, scores, normaliser = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores), address(x.normaliser)
        num_partial = self.criterion(run, None, None, None, dist, scores, matched(run), None, normaliser)
        self.criterion.add_up(run, None, normaliser, new(Loss, map(address, run.out)), num_partial)


class _GradientPlan(Plan):
    def __init__(self, x: YOLO11LossBackward, out: GradDistScores, num_rows: int) -> None:
        self.criterion = _Criterion(x, (out.grad_pred_dist, out.grad_pred_scores), x.target_score.dtype, has_loss=False)
        super().__init__(Workspace(), *self.criterion.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        dist, scores = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores)
        self.criterion(run, gradients(run), address(x.grad), None, dist, scores, matched(run), None, address(x.held))


def matched(run: Run) -> Matched:
    x, address = run.x, run.address
    return new(Matched, map(address, (x.target_row, x.target_score, x.gt_labels, x.gt_boxes)))


class _CriterionPlan(Plan):
    def __init__(self, x: YOLO11, out: YOLO11Outputs, num_rows: int) -> None:
        (batch_size, num_anchors, _), dtype = x.pred_scores.shape, out.loss.dtype
        self.has_grad = x.wants_grad and batch_size * num_anchors > 0
        grads = (out.grad_pred_dist, out.grad_pred_scores) if self.has_grad else None
        fills = self.has_grad and not x.wants_row
        self.assign = YOLO11Assigning(x, dtype, num_rows, is_whole=True, is_final=x.wants_row, fills=fills)
        num_claims = 0 if x.wants_row else self.assign.matching.num_claims
        self.criterion = _Criterion(x, grads, dtype, num_claims=num_claims, num_rows=num_rows)
        fixed = {
            **self.assign.fixed, **self.criterion.fixed, "target_score": (dtype, batch_size * num_anchors),
            "normaliser": (dtype, 2), "held": (dtype, 2),
            "target_row": (torch.int32, 0 if x.wants_row else batch_size * num_anchors),
        }  # fmt: skip
        memory = Workspace(fixed, {**self.assign.by_row, **self.criterion.by_row, **packed_rows(dtype)})
        super().__init__(memory, *self.assign.launches, *self.criterion.launches)

    def launch(self, run: Run) -> None:
        x, out, buffers, address = run.x, run.out, run.buffers, run.address
        dist, scores = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores)
        row = address(out.target_row) if x.wants_row else buffers.target_row
        score, normaliser = buffers.target_score, buffers.normaliser
        rows = new(Rows, (buffers.image, buffers.label, buffers.xyxy, None))
        order = buffers.order if self.assign.matching.is_wide else None
        grads, zeros, poison = None, None, None
        if self.has_grad:
            grads, poison = gradients(run), normaliser
        if grads is not None and not x.wants_row:
            zeros = new(Fill, (grads.dist.ptr, out.grad_pred_dist.numel()))
        state = self.assign(run, dist, scores, row, score, normaliser, address(out.num_fg), rows, zeros)
        matched = new(Matched, (row, score, buffers.label, buffers.xyxy))
        claims = None if x.wants_row else new(Claims, (buffers.claims, buffers.image, state, order))
        num_partial = self.criterion(run, grads, None, poison, dist, scores, matched, claims, normaliser)
        loss = new(Loss, (address(out.loss), address(out.terms), buffers.held))
        self.criterion.add_up(run, grads, normaliser, loss, num_partial)


def yolo11_assign(x: YOLO11Assign) -> YOLO11Assignment:
    out = x.allocate()
    run(_AssignPlan, x, out, x.targets[0].shape[0])
    return out


def yolo11_loss(x: YOLO11Loss) -> YOLO11LossOutputs:
    out = x.allocate()
    run(_LossPlan, x, out)
    return out


def yolo11_criterion(x: YOLO11) -> YOLO11Outputs:
    out = x.allocate()
    run(_CriterionPlan, x, out, x.targets[0].shape[0])
    return out


def yolo11_loss_backward(x: YOLO11LossBackward) -> GradDistScores:
    out = x.allocate()
    if x.target_row.numel():
        run(_GradientPlan, x, out)
    return out
