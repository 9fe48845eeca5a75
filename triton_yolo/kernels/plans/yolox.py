"""Launches of YOLOX's criterion: whole, and in parts."""

from typing import Any

import torch
import triton
from torch import Tensor

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
from ..fill import Fill
from ..launch import INTERPRETED, Launch, Plan, RoomyLaunch, Run, Workspace, cdiv, new, run
from ..members import Matches, Tally
from ..reduce import TOTAL_SIZES
from ..yolox import Matched, _yolox_grad_kernel, _yolox_loss_kernel, _yolox_total_kernel, positive_sizes
from ..yolox_criterion import Gradient, Results, _yolox_background_kernel, _yolox_words_kernel
from .simota import ONE
from .yolox_assign import YOLOXMatching, predictions

_NOBODY = Matches(None, None)  # wants the assignment of all anchors


class _AssignPlan(Plan):
    def __init__(self, x: YOLOXAssign, out: YOLOXAssignment, num_rows: int) -> None:
        self.assign = YOLOXMatching(x, out.matched_iou.dtype, num_rows)
        super().__init__(Workspace(self.assign.fixed, self.assign.by_row), *self.assign.launches)

    def launch(self, run: Run) -> None:
        row, iou, counts, label, xywh = map(run.address, run.out)
        rows = new(Rows, (run.buffers.image, label, run.buffers.xyxy, xywh, None))
        preds, matches, gains = predictions(run, run.x.preds), new(Matches, (row, iou)), (None, 0.0)
        matched = self.assign.match(run, preds, rows, matches, None)
        self.assign.settle(run, matched, preds, rows, None, None, matches, gains)
        self.assign.sum_up(run, new(Results, (None, None, None, counts)), gains)


class _Background:
    """The launch of the gradient of background: of whole words where the channels of an anchor are neighbours."""

    def __init__(self, x: YOLOX, grad: Tensor) -> None:
        self.batch_size, self.num_anchors, self.num_channels = x.preds.shape
        kind, each = compute_type(grad.dtype), 8 // grad.element_size()
        self.has_words = grad.is_contiguous() and grad.numel() % each == 0
        if self.has_words:
            self.words, block = grad.numel() // each, 2**16 if INTERPRETED else 2048
            self.programs = cdiv(self.words, block), 1, 1
            self.launch = Launch(_yolox_words_kernel, 4, CHANNELS=self.num_channels, DTYPE=kind, BLOCK=block)
        else:
            block = max(32, triton.next_power_of_2(self.num_anchors)) if INTERPRETED else 1024
            self.programs = cdiv(self.num_anchors, block), self.batch_size, 1
            self.launch = Launch(_yolox_background_kernel, 4, DTYPE=kind, BLOCK_A=block)

    def __call__(self, run: Run, out: Tensor3, prob: Any, tally: Tally) -> None:
        if self.has_words:
            self.launch(run.stream, self.programs, out.ptr, prob, tally, self.words)
        else:
            self.launch(run.stream, self.programs, out, prob, tally, self.num_anchors, self.num_channels)


class _CriterionPlan(Plan):
    def __init__(self, x: YOLOX, out: YOLOXOutputs, num_rows: int) -> None:
        dtype = out.loss.dtype
        self.assign = assign = YOLOXMatching(x, dtype, num_rows, x.iou_loss)
        self.wants_grad = out.grad_preds.numel() > 0
        launches = assign.launches
        if self.wants_grad:
            self.background = _Background(x, out.grad_preds)
            launches = *launches, self.background.launch
        by_row = {**assign.by_row, "label": (torch.int64, 1), "xywh": (dtype, 4)}
        super().__init__(Workspace(assign.fixed, by_row), *launches)

    def launch(self, run: Run) -> None:
        x, out, b, address = run.x, run.out, run.buffers, run.address
        preds, rows = predictions(run, x.preds), new(Rows, (b.image, b.label, b.xyxy, b.xywh, None))
        prob = b.boxes if self.wants_grad else None  # nobody reads the members' boxes any more
        matched = self.assign.match(run, preds, rows, _NOBODY, prob)
        grad, spoilt, gains = None, None, (address(x.l1_gain), x.iou_gain)
        if self.wants_grad:
            grad, spoilt = (
                new(Gradient, predictions(run, out.grad_preds)[:3]),
                new(Fill, (address(out.grad_preds), out.grad_preds.numel())),
            )
            self.background(run, grad.boxes, prob, self.assign.tally(run))
        self.assign.settle(run, matched, preds, rows, grad, prob, _NOBODY, gains)
        results = address(out.loss), tuple(map(address, out.terms)), address(out.num_fg), None
        self.assign.sum_up(run, new(Results, results), gains, spoilt)


class _LossPlan(Plan):
    """The loss of a given assignment."""

    def __init__(self, x: YOLOXLoss, out: YOLOXLossOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, num_channels), dtype = x.preds.shape, out.loss.dtype
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
        launches = self.total, *((self.loss,) if self.num_programs else ())
        super().__init__(Workspace({"partial": (dtype, 4 * self.num_programs)}), *launches)

    def launch(self, run: Run) -> None:
        x, address, partial = run.x, run.address, run.buffers.partial
        if self.num_programs:
            matched = _matched(run)
            self.loss(run.stream, self.programs, partial, *predictions(run, x.preds)[:3], matched, self.grid, self.num_classes)
        loss, terms = address(run.out.loss), tuple(map(address, run.out.terms))
        self.total(
            run.stream, ONE, loss, terms, address(x.normaliser), partial, address(x.l1_gain), x.iou_gain, self.num_programs
        )


class _GradientPlan(Plan):
    """The gradient for a given assignment."""

    def __init__(self, x: YOLOXLossBackward, out: GradPreds, num_rows: int) -> None:
        batch_size, num_anchors, self.num_channels = x.preds.shape
        self.grid = Grid(x.levels.feat_shapes, num_anchors)
        block_a, block_c, num_warps = channel_sizes(num_anchors, self.num_channels, x.preds.stride(2))
        self.programs = cdiv(num_anchors, block_a), batch_size, 1
        self.gradient = RoomyLaunch(
            _yolox_grad_kernel, num_warps, STRIDES=x.levels.strides, KIND=x.iou_loss, DTYPE=compute_type(x.matched_iou.dtype),
            BLOCK_A=block_a, BLOCK_C=block_c,
        )  # fmt: skip
        super().__init__(Workspace(), self.gradient)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        self.gradient(
            run.stream, self.programs, tensor3(address, run.out.grad_preds), address(x.grad), address(x.normaliser),
            tensor3(address, x.preds), _matched(run), address(x.l1_gain), self.grid, x.iou_gain, self.num_channels,
        )  # fmt: skip


def _matched(run: Run) -> Matched:
    x, address = run.x, run.address
    return new(Matched, (address(x.target_row), address(x.matched_iou), address(x.gt_labels), address(x.gt_boxes)))


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
        for scalar in (out.loss, *out.terms, out.num_fg):
            scalar.zero_()
    return out


def yolox_loss_backward(x: YOLOXLossBackward) -> GradPreds:
    out = x.allocate()
    if out.grad_preds.numel():
        run(_GradientPlan, x, out)
    return out
