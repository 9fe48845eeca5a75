"""Launches of YOLOX's assignment and of what follows from its claims, from raw predictions."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..._signatures import YOLOX, YOLOXAssign
from ..arguments import Grid, Rows, State, Tensor2, Tensor3
from ..fill import Fill
from ..launch import INTERPRETED, Launch, Run, cdiv, new
from ..members import Claims, Matches, Predictions, Tally
from ..reduce import TOTAL_SIZES
from ..simota import Objectness
from ..yolox_criterion import Gradient, Positives, Product, Results, _yolox_finish_kernel, _yolox_positive_kernel
from .simota import Matching, few_rows

Gains = tuple[Any, float]  # of L1, and of the box term
_FILLERS = 8  # programs that make all gradients NaN, if they must


class YOLOXMatching(Matching):
    """All launches but that of the gradient of background."""

    def __init__(self, x: YOLOX | YOLOXAssign, dtype: torch.dtype, num_rows: int, iou_loss: str = "iou") -> None:
        batch_size, num_anchors, num_channels = x.preds.shape
        grid, self.size, num_classes = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size, num_channels - 5
        shape, is_raw = (batch_size, num_anchors, num_classes), len(x.targets) == 1
        super().__init__(x.assigner, shape, grid, x.levels.strides, is_raw, dtype, num_rows)
        self.num_others = cdiv(num_anchors, self.block_a) * batch_size
        product = _product(num_classes)
        self.owners = few_rows(num_rows, 16 * product.BLOCK_C) if INTERPRETED else 2
        self.positive = Launch(_yolox_positive_kernel, 1, RULE=self.rule, KIND=iou_loss, PRODUCT=product, BLOCK_G=self.owners)
        self.finish = Launch(_yolox_finish_kernel, DTYPE=self.rule.DTYPE, **TOTAL_SIZES)
        self.launches = *self.launches, self.finish, self.positive if num_rows else self.contest
        self.fixed |= {"objectness": (dtype, self.num_others), "tally": (torch.int32, 64), "poison": (dtype, 1)}
        self.by_row |= {
            "positive_image": (torch.int32, 16), "positive_label": (torch.int32, 16), "sums": (dtype, 3),
        }  # fmt: skip

    def match(self, run: Run, preds: Predictions, rows: Rows, matches: Matches, prob: Any) -> tuple[State, Claims, Tally]:
        """Claim and contest, and sum up the loss of the objectness."""
        b = run.buffers
        tally, objectness = new(Tally, (b.tally, b.poison)), new(Objectness, (prob, b.objectness))
        return *self(run, preds, rows, self.size, matches, tally, objectness, self.num_others), tally

    def settle(
        self, run: Run, matched: tuple[State, Claims, Tally], preds: Predictions, rows: Rows, out: Gradient | None, prob: Any,
        matches: Matches, gains: Gains,
    ) -> None:  # fmt: skip
        """Sum up the losses of the positives, and write their gradient, if there is one, and their rows and IoU, if wanted."""
        if run.num_rows:
            b, programs = run.buffers, (cdiv(run.num_rows, self.owners), 1, 1)
            # Nobody reads what the cells of a region cost any more.
            positives = new(Positives, (b.positive_image, b.region_anchor, b.positive_label, b.region_cost))
            self.positive(
                run.stream, programs, out, prob, matches, b.sums, positives, *matched, preds, rows, self.grid, *gains,
                run.num_rows,
            )  # fmt: skip

    def sum_up(self, run: Run, tally: Tally, results: Results, gains: Gains, spoilt: Fill | None = None) -> None:
        objectness, programs = new(Objectness, (None, run.buffers.objectness)), cdiv(run.num_rows, self.owners)
        grid = 1 if spoilt is None else _FILLERS, 1, 1
        self.finish(run.stream, grid, results, spoilt, run.buffers.sums, tally, objectness, *gains, programs, self.num_others)


def _product(num_classes: int) -> Product:
    """Eight positives, four to a warp's lane; ten factors a product."""
    if INTERPRETED:
        return Product(64, min(triton.next_power_of_2(num_classes), 16), 1)
    block_c = min(triton.next_power_of_2(num_classes), 4)
    return Product(32 // block_c, block_c, min(10, cdiv(num_classes, block_c)))


def predictions(run: Run, preds: Tensor) -> Predictions:
    """Parts of raw predictions (B, A, 5 + C), or of their gradient."""
    strides = image, anchor, _ = preds.stride()
    boxes, obj_logits, cls_logits = run.channels(preds, 0, 4, 5)
    obj = new(Tensor2, (obj_logits, image, anchor))
    return new(Predictions, (new(Tensor3, (boxes, *strides)), obj, new(Tensor3, (cls_logits, *strides)), None))
