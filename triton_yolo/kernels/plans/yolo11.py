"""Launches of YOLO11's criterion: whole, and in parts."""

from typing import Any

import torch
import triton

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
from ..decode import decode_sizes
from ..launch import Launch, Plan, Run, Workspace, cdiv, new, run
from ..reduce import TOTAL_SIZES
from ..targets import packed_rows
from ..yolo11 import Loss, Matched, _box_grad_kernel, _class_grad_kernel, _yolo11_loss_kernel, _yolo11_total_kernel, dense_sizes
from .task_aligned import YOLO11Assigning


class _Loss:
    """The launches of the loss of an assignment."""

    def __init__(self, x: YOLO11 | YOLO11Loss, dtype: torch.dtype) -> None:
        batch_size, num_anchors, self.num_classes = x.pred_scores.shape
        block_a, block_c, num_warps = dense_sizes(num_anchors, self.num_classes, x.pred_scores.stride(2))
        kind = compute_type(dtype)
        self.programs = cdiv(num_anchors, block_a), batch_size, 1
        self.num_programs = self.programs[0] * batch_size
        self.loss = Launch(
            _yolo11_loss_kernel, num_warps, STRIDES=x.levels.strides, R=x.reg_max, RP=triton.next_power_of_2(x.reg_max),
            HAS_WEIGHTS=x.class_weights is not None, DTYPE=kind, BLOCK_A=block_a, BLOCK_C=block_c,
        )  # fmt: skip
        self.total = Launch(_yolo11_total_kernel, DTYPE=kind, **TOTAL_SIZES)
        self.launches = self.total, *((self.loss,) if self.num_programs else ())
        self.grid, self.size = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size
        self.fixed = {"partial": (dtype, 3 * self.num_programs)}

    def __call__(self, run: Run, dist: Tensor3, scores: Tensor3, matched: Matched, normaliser: Any, loss: Loss) -> None:
        x, partial = run.x, run.buffers.partial
        weights = None if x.class_weights is None else run.address(x.class_weights)
        if self.num_programs:
            self.loss(
                run.stream, self.programs, partial, dist, scores, matched, weights, self.grid, *self.size, self.num_classes
            )
        self.total(run.stream, (1, 1, 1), loss, partial, normaliser, *x.gains, self.num_programs)


class _AssignPlan(Plan):
    def __init__(self, x: YOLO11Assign, out: YOLO11Assignment, num_rows: int) -> None:
        self.assign = YOLO11Assigning(x, out.target_score.dtype, num_rows, is_normaliser=False)
        super().__init__(Workspace(self.assign.fixed, self.assign.by_row), *self.assign.launches)

    def launch(self, run: Run) -> None:
        row, score, sums, num_fg, label, box = map(run.address, run.out)
        dist, scores = tensor3(run.address, run.x.pred_dist), tensor3(run.address, run.x.pred_scores)
        self.assign(run, dist, scores, row, score, sums, num_fg, new(Rows, (run.buffers.image, label, box, None)))


class _LossPlan(Plan):
    def __init__(self, x: YOLO11Loss, out: YOLO11LossOutputs, num_rows: int) -> None:
        self.loss = _Loss(x, out.loss.dtype)
        super().__init__(Workspace(self.loss.fixed), *self.loss.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        dist, scores = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores)
        matched = new(Matched, (address(x.target_row), address(x.target_score), address(x.gt_labels), address(x.gt_boxes)))
        self.loss(run, dist, scores, matched, address(x.normaliser), new(Loss, map(address, run.out)))


class _Gradient:
    """The launches of the gradients for an assignment."""

    def __init__(self, x: YOLO11 | YOLO11LossBackward, dtype: torch.dtype) -> None:
        batch_size, num_anchors, num_classes = x.pred_scores.shape
        block_a, block_c, num_warps = dense_sizes(num_anchors, num_classes, x.pred_scores.stride(2))
        kind = compute_type(dtype)
        self.class_programs = cdiv(num_anchors, block_a), cdiv(num_classes, block_c), batch_size
        self.class_grad = Launch(
            _class_grad_kernel, num_warps, C=num_classes, HAS_WEIGHTS=x.class_weights is not None, DTYPE=kind,
            BLOCK_A=block_a, BLOCK_C=block_c,
        )  # fmt: skip
        block_a, num_warps = decode_sizes(num_anchors, x.reg_max, 512)  # CIoU's derivative needs the other registers
        self.box_programs = cdiv(num_anchors, block_a), batch_size, 1
        self.box_grad = Launch(
            _box_grad_kernel, num_warps, STRIDES=x.levels.strides, R=x.reg_max, RP=triton.next_power_of_2(x.reg_max),
            DTYPE=kind, BLOCK_A=block_a,
        )  # fmt: skip
        self.launches = self.class_grad, self.box_grad
        self.grid, self.size = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size

    def __call__(self, run: Run, grad: Any, dist: Tensor3, scores: Tensor3, matched: Matched, normaliser: Any) -> None:
        x, out, address = run.x, run.out, run.address
        weights = None if x.class_weights is None else address(x.class_weights)
        box_gain, cls_gain, dfl_gain = x.gains
        self.class_grad(
            run.stream, self.class_programs, tensor3(address, out.grad_pred_scores), grad, normaliser, scores, matched,
            weights, cls_gain, self.grid.A,
        )  # fmt: skip
        self.box_grad(
            run.stream, self.box_programs, tensor3(address, out.grad_pred_dist), grad, normaliser, dist, matched, self.grid,
            *self.size, box_gain, dfl_gain,
        )  # fmt: skip


class _CriterionPlan(Plan):
    def __init__(self, x: YOLO11, out: YOLO11Outputs, num_rows: int) -> None:
        (batch_size, num_anchors, _), dtype = x.pred_scores.shape, out.loss.dtype
        self.assign = YOLO11Assigning(x, dtype, num_rows, is_normaliser=True)
        self.loss = _Loss(x, dtype)
        self.gradient = _Gradient(x, dtype) if out.grad_pred_dist.numel() else None
        fixed = {
            **self.assign.fixed, **self.loss.fixed, "target_row": (torch.int32, batch_size * num_anchors),
            "target_score": (dtype, batch_size * num_anchors), "normaliser": (dtype, 2), "held": (dtype, 2),
        }  # fmt: skip
        launches = *self.assign.launches, *self.loss.launches, *(self.gradient.launches if self.gradient else ())
        super().__init__(Workspace(fixed, {**self.assign.by_row, **packed_rows(dtype)}), *launches)

    def launch(self, run: Run) -> None:
        x, out, buffers, address = run.x, run.out, run.buffers, run.address
        dist, scores = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores)
        rows = new(Rows, (buffers.image, buffers.label, buffers.xyxy, None))
        matched = new(Matched, (buffers.target_row, buffers.target_score, buffers.label, buffers.xyxy))
        normaliser, held = buffers.normaliser, buffers.held
        self.assign(run, dist, scores, buffers.target_row, buffers.target_score, normaliser, address(out.num_fg), rows)
        self.loss(run, dist, scores, matched, normaliser, new(Loss, (address(out.loss), address(out.terms), held)))
        if self.gradient is not None:
            self.gradient(run, None, dist, scores, matched, held)


class _GradientPlan(Plan):
    def __init__(self, x: YOLO11LossBackward, out: GradDistScores, num_rows: int) -> None:
        self.gradient = _Gradient(x, x.target_score.dtype)
        super().__init__(Workspace(), *self.gradient.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        matched = new(Matched, (address(x.target_row), address(x.target_score), address(x.gt_labels), address(x.gt_boxes)))
        dist, scores = tensor3(address, x.pred_dist), tensor3(address, x.pred_scores)
        self.gradient(run, address(x.grad), dist, scores, matched, address(x.held))


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
