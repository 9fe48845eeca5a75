"""Launches of YOLOX's assignment and of the sums of its losses, from raw predictions."""

from typing import Any

import torch
import triton

from ..._signatures import YOLOX, YOLOXAssign
from ..arguments import Grid, Rows, Tensor2, Tensor3
from ..launch import Launch, Run, cdiv, new
from ..members import Predictions
from ..reduce import TOTAL_SIZES
from ..simota import Objectness
from ..yolox_criterion import Positives, Sums, _yolox_finish_kernel, _yolox_settle_kernel
from .simota import ONE, Matching, few_rows


class YOLOXMatching(Matching):
    """The launches up to the sums, or, of the assignment alone, to its counts."""

    def __init__(self, x: YOLOX | YOLOXAssign, dtype: torch.dtype, num_rows: int, iou_loss: str = "iou") -> None:
        batch_size, num_anchors, num_channels = x.preds.shape
        grid, self.size, num_classes = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size, num_channels - 5
        shape, is_raw = (batch_size, num_anchors, num_classes), len(x.targets) == 1
        super().__init__(x.assigner, shape, grid, x.levels.strides, is_raw, dtype, num_rows)
        self.num_others = cdiv(num_anchors, self.block_a) * batch_size
        self.block_c = min(triton.next_power_of_2(num_classes), 16)
        self.settle_rows = few_rows(num_rows, 16 * self.block_c)
        self.settle = Launch(
            _yolox_settle_kernel, 1, RULE=self.rule, KIND=iou_loss, BLOCK_G=self.settle_rows, BLOCK_C=self.block_c
        )
        self.finish = Launch(_yolox_finish_kernel, DTYPE=self.rule.DTYPE, **TOTAL_SIZES)
        self.launches = *self.launches, self.finish, self.settle if num_rows else self.contest
        self.fixed["objectness"] = dtype, self.num_others
        self.by_row |= {
            "positive_row": (torch.int32, 16), "positive_iou": (dtype, 16), "sums": (dtype, 3),
            "counts_by_row": (torch.int32, 2),
        }  # fmt: skip

    def sum_up(self, run: Run, preds: Predictions, rows: Rows, row: Any, iou: Any, prob: Any, results: tuple[Any, ...]) -> None:
        """Assign, and sum up the losses: ``results`` are what the last kernel takes, but for the sums."""
        b, num_rows = run.buffers, run.num_rows
        objectness, sums = new(Objectness, (prob, b.objectness)), new(Sums, (b.sums, b.counts_by_row))
        state, claims = self(run, preds, rows, self.size, row, iou, objectness, self.num_others)
        if num_rows:
            programs = cdiv(num_rows, self.settle_rows), 1, 1
            self.settle(
                run.stream, programs, sums, self.positives(run), iou, state, claims, preds, rows, self.grid, num_rows,
                self.rule.C,
            )  # fmt: skip
        self.finish(run.stream, ONE, *results[:-2], sums, objectness, *results[-2:], num_rows, self.num_others)

    def positives(self, run: Run) -> Positives:
        return new(Positives, (run.buffers.positive_row, run.buffers.positive_iou))


def predictions(run: Run) -> Predictions:
    """Parts of raw predictions (B, A, 5 + C)."""
    preds = run.x.preds
    image, anchor, channel = preds.stride()
    boxes = new(Tensor3, (run.address(preds), image, anchor, channel))
    obj_logits = new(Tensor2, (run.channels(preds, 4), image, anchor))
    return new(Predictions, (boxes, obj_logits, new(Tensor3, (run.channels(preds, 5), image, anchor, channel)), None))
