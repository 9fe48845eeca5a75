"""Launches of YOLOX's criterion: whole, and in parts."""

from typing import Any

import torch

from ..._signatures import (
    YOLOX,
    GradPreds,
    YOLOXAssign,
    YOLOXAssignment,
    YOLOXLoss,
    YOLOXLossBackward,
    YOLOXLossOutputs,
    YOLOXOutputs,
)
from ..arguments import Grid, Rows, Tensor3, compute_type, tensor3
from ..decode import channel_sizes
from ..launch import Launch, Plan, Run, Workspace, cdiv, new, run
from ..reduce import TOTAL_SIZES
from ..yolox import Matched, _yolox_grad_kernel, _yolox_loss_kernel, _yolox_total_kernel, positive_sizes
from .simota import Predictions, YOLOXAssigning, predictions


class _Loss:
    """The launches of the loss of an assignment."""

    def __init__(self, x: YOLOX | YOLOXLoss, dtype: torch.dtype) -> None:
        batch_size, num_anchors, num_channels = x.preds.shape
        self.num_classes, self.grid = num_channels - 5, Grid(x.levels.feat_shapes, num_anchors)
        block_a, block_c, num_warps = positive_sizes(num_anchors, self.num_classes, x.preds.stride(2))
        self.programs = cdiv(num_anchors, block_a), batch_size, 1
        self.num_programs = self.programs[0] * batch_size
        kind = compute_type(dtype)
        self.loss = Launch(
            _yolox_loss_kernel, num_warps, STRIDES=x.levels.strides, KIND=x.iou_loss, DTYPE=kind, BLOCK_A=block_a,
            BLOCK_C=block_c,
        )  # fmt: skip
        self.total = Launch(_yolox_total_kernel, DTYPE=kind, **TOTAL_SIZES)
        self.launches = self.total, *((self.loss,) if self.num_programs else ())
        self.fixed = {"partial": (dtype, 4 * self.num_programs)}

    def __call__(
        self, run: Run, preds: Predictions, matched: Matched, loss: Any, terms: Any, num_fg: Any, normaliser: Any, counts: Any
    ) -> None:
        partial = run.buffers.partial
        if self.num_programs:
            self.loss(run.stream, self.programs, partial, *preds, matched, self.grid, self.num_classes)
        l1_gain, iou_gain = run.address(run.x.l1_gain), run.x.iou_gain
        one = 1, 1, 1
        self.total(run.stream, one, loss, terms, num_fg, normaliser, partial, counts, l1_gain, iou_gain, self.num_programs)


class _Gradient:
    """The launch of the gradient for an assignment."""

    def __init__(self, x: YOLOX | YOLOXLossBackward, dtype: torch.dtype) -> None:
        batch_size, num_anchors, self.num_channels = x.preds.shape
        self.grid = Grid(x.levels.feat_shapes, num_anchors)
        block_a, block_c, num_warps = channel_sizes(num_anchors, self.num_channels, x.preds.stride(2))
        self.programs = cdiv(num_anchors, block_a), batch_size, 1
        self.gradient = Launch(
            _yolox_grad_kernel, num_warps, STRIDES=x.levels.strides, KIND=x.iou_loss, DTYPE=compute_type(dtype),
            BLOCK_A=block_a, BLOCK_C=block_c,
        )  # fmt: skip
        self.launches = (self.gradient,)

    def __call__(self, run: Run, grad: Any, preds: Tensor3, matched: Matched, normaliser: Any) -> None:
        out = tensor3(run.address, run.out.grad_preds)
        l1_gain, iou_gain = run.address(run.x.l1_gain), run.x.iou_gain
        self.gradient(
            run.stream, self.programs, out, grad, normaliser, preds, matched, l1_gain, self.grid, iou_gain, self.num_channels
        )


class _AssignPlan(Plan):
    def __init__(self, x: YOLOXAssign, out: YOLOXAssignment, num_rows: int) -> None:
        self.assign = YOLOXAssigning(x, out.matched_iou.dtype, num_rows)
        super().__init__(Workspace(self.assign.fixed, self.assign.by_row), *self.assign.launches)

    def launch(self, run: Run) -> None:
        row, iou, counts, label, xywh = map(run.address, run.out)
        self.assign.assign(
            run, predictions(run), row, iou, counts, new(Rows, (run.buffers.image, label, run.buffers.xyxy, xywh))
        )


class _LossPlan(Plan):
    def __init__(self, x: YOLOXLoss, out: YOLOXLossOutputs, num_rows: int) -> None:
        self.loss = _Loss(x, out.loss.dtype)
        super().__init__(Workspace(self.loss.fixed), *self.loss.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        matched = new(Matched, (address(x.target_row), address(x.matched_iou), address(x.gt_labels), address(x.gt_boxes)))
        loss, terms = map(address, run.out)
        self.loss(run, predictions(run), matched, loss, terms, None, address(x.normaliser), None)


class _CriterionPlan(Plan):
    def __init__(self, x: YOLOX, out: YOLOXOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, _), dtype = x.preds.shape, out.loss.dtype
        self.assign, self.loss = YOLOXAssigning(x, dtype, num_rows), _Loss(x, dtype)
        self.gradient = _Gradient(x, dtype) if out.grad_preds.numel() else None
        cells = batch_size * num_anchors
        fixed = {
            **self.assign.fixed, **self.loss.fixed, "target_row": (torch.int32, cells), "matched_iou": (dtype, cells),
            "counts": (torch.int64, 3), "normaliser": (dtype, 1),
        }  # fmt: skip
        by_row = {**self.assign.by_row, "label": (torch.int64, 1), "xywh": (dtype, 4)}
        launches = *self.assign.launches, *self.loss.launches, *(self.gradient.launches if self.gradient else ())
        super().__init__(Workspace(fixed, by_row), *launches)

    def launch(self, run: Run) -> None:
        out, b, address = run.out, run.buffers, run.address
        preds = predictions(run)
        self.assign.assign(run, preds, b.target_row, b.matched_iou, b.counts, new(Rows, (b.image, b.label, b.xyxy, b.xywh)))
        matched = new(Matched, (b.target_row, b.matched_iou, b.label, b.xywh))
        self.loss(run, preds, matched, address(out.loss), address(out.terms), address(out.num_fg), b.normaliser, b.counts)
        if self.gradient is not None:
            self.gradient(run, None, preds.boxes, matched, b.normaliser)


class _GradientPlan(Plan):
    def __init__(self, x: YOLOXLossBackward, out: GradPreds, num_rows: int) -> None:
        self.gradient = _Gradient(x, x.matched_iou.dtype)
        super().__init__(Workspace(), *self.gradient.launches)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        matched = new(Matched, (address(x.target_row), address(x.matched_iou), address(x.gt_labels), address(x.gt_boxes)))
        self.gradient(run, address(x.grad), tensor3(address, x.preds), matched, address(x.normaliser))


def yolox_assign(x: YOLOXAssign) -> YOLOXAssignment:
    out = x.allocate()
    if out.target_row.numel():
        run(_AssignPlan, x, out, x.targets[0].shape[0])
    else:
        out.counts.zero_()
    return out


def yolox_loss(x: YOLOXLoss) -> YOLOXLossOutputs:
    out = x.allocate()
    run(_LossPlan, x, out)
    return out


def yolox_criterion(x: YOLOX) -> YOLOXOutputs:
    out = x.allocate()
    if x.preds.shape[:2].numel():
        run(_CriterionPlan, x, out, x.targets[0].shape[0])
    else:
        for scalars in out[:3]:
            scalars.zero_()
    return out


def yolox_loss_backward(x: YOLOXLossBackward) -> GradPreds:
    out = x.allocate()
    if out.grad_preds.numel():
        run(_GradientPlan, x, out)
    return out
