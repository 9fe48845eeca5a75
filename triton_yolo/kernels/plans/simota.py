"""Launches of SimOTA, to arbitrary points or as a part of YOLOX's criterion."""

from typing import Any, NamedTuple

import torch

from ..._signatures import YOLOX, SimOTA, SimOTAAssign, SimOTAAssignment, YOLOXAssign
from ..arguments import Anchors, Grid, Points, Rows, State, Tensor2, Tensor3, compute_type, points_of, targets_of, tensor3
from ..decode import channel_sizes
from ..launch import Buffers, Launch, Plan, Run, Workspace, cdiv, new, run
from ..rows import (
    Pack,
    claim_sizes,
    row_sizes,
)
from ..simota import (
    Counts,
    Members,
    Rule,
    Table,
    _simota_claim_kernel,
    _simota_contest_kernel,
    _simota_member_kernel,
    _simota_prepare_kernel,
    _simota_settle_kernel,
)


class Predictions(NamedTuple):
    """Raw boxes or boxes (B, A, 4), objectness (B, A) and class logits (B, A, C)."""

    boxes: Tensor3
    obj_logits: Tensor2
    logits: Tensor3


class Matching:
    """The launches of SimOTA: on a grid if it has ``strides``."""

    def __init__(
        self, assigner: SimOTA, shape: tuple[int, int, int], grid: Grid, strides: tuple[float, ...] | None, is_raw: bool,
        channel_stride: int, dtype: torch.dtype, num_rows: int,
    ) -> None:  # fmt: skip
        self.batch_size, num_anchors, num_classes = shape
        self.grid, self.dtype = grid, dtype
        kind, cells = compute_type(dtype), self.batch_size * num_anchors
        rule = Rule(assigner.radius, assigner.candidates == "box_and_center", strides or (1.0,), strides is not None, kind)
        block_a, block_c, num_warps = channel_sizes(num_anchors, num_classes, channel_stride)
        self.programs = cdiv(num_anchors, block_a), self.batch_size, 1
        self.prepare = Launch(
            _simota_prepare_kernel, num_warps, RULE=rule, PACK=Pack(num_classes, is_raw, True, 32), BLOCK_A=block_a,
            BLOCK_C=block_c,
        )  # fmt: skip
        self.block_g, block_p, row_warps = row_sizes(num_rows, num_anchors, 64, 2)
        tiles: dict[str, Any] = {"RULE": rule, "num_warps": row_warps, "BLOCK_G": self.block_g, "BLOCK_P": block_p}
        self.member = Launch(_simota_member_kernel, **tiles)
        self.claim = Launch(_simota_claim_kernel, RULE=rule, **claim_sizes(num_rows, num_anchors, 128, 1))
        self.contests = [
            Launch(_simota_contest_kernel, IS_TIE_BREAK=is_tie_break, **tiles)
            for is_tie_break in ((False, True) if dtype == torch.float64 else (False,))
        ]
        self.settle = Launch(_simota_settle_kernel, num_warps, DTYPE=kind, BLOCK_A=block_a)
        self.launches = self.prepare, self.settle, *((self.member, self.claim, *self.contests) if num_rows else ())
        self.fixed: Buffers = {
            "boxes": (dtype, 4 * cells), "cost": (dtype, cells), "obj": (dtype, cells), "best": (torch.int64, cells),
            "words": (torch.int32, self.batch_size * cdiv(num_anchors, 32)),
            "broken": (torch.int32, self.programs[0] * self.batch_size),
            "members": (torch.int32, cells), "num_members": (torch.int32, self.batch_size),
            "contested": (torch.int32, cells), "num_contested": (torch.int32, self.batch_size),
        }  # fmt: skip
        self.by_row: Buffers = {"image": (torch.int32, 1), "xyxy": (dtype, 4)}

    def __call__(
        self, run: Run, preds: Predictions, points: Points | None, size: tuple[float, float], row: Any, iou: Any, counts: Any,
        rows: Rows,
    ) -> None:  # fmt: skip
        stream, b, grid, num_rows = run.stream, run.buffers, self.grid, run.num_rows
        boxes = new(Tensor3, (b.boxes, 4 * grid.A, 1, grid.A))
        table, state = new(Table, (b.cost, b.obj)), new(State, (row, b.best, new(Anchors, (b.contested, b.num_contested))))
        members, tally = new(Members, (new(Anchors, (b.members, b.num_members)), b.words)), new(Counts, (counts, b.broken))
        targets = targets_of(run.address, run.x.targets)
        self.prepare(
            stream, self.programs, boxes, table, state, members, tally, *preds, rows, targets, grid, *size, num_rows,
            self.batch_size,
        )  # fmt: skip
        if num_rows:
            programs = cdiv(num_rows, self.block_g), 1, 1
            self.member(stream, programs, members, tally, state, points, rows, grid, num_rows)
            pairs = boxes, table, preds.logits, points, rows, grid, num_rows
            self.claim(stream, programs, state, members.anchors, *pairs)
            for contest in self.contests:
                contest(stream, programs, state, *pairs)
        self.settle(stream, self.programs, state, iou, tally, boxes, rows.xyxy_ptr, grid.A)


class _SimOTAPlan(Plan):
    """Assignment to arbitrary points."""

    def __init__(self, x: SimOTAAssign, out: SimOTAAssignment, num_rows: int) -> None:
        grid, dtype = Grid((1, 1), x.cls_logits.shape[1]), out.matched_iou.dtype
        shape = x.cls_logits.shape[0], x.cls_logits.shape[1], x.cls_logits.shape[2]
        self.match = Matching(x.assigner, shape, grid, None, False, x.cls_logits.stride(2), dtype, num_rows)
        by_row = {**self.match.by_row, "label": (torch.int64, 1), "xywh": (dtype, 4)}
        super().__init__(Workspace({**self.match.fixed, "counts": (torch.int64, 3)}, by_row), *self.match.launches)

    def launch(self, run: Run) -> None:
        x, address, b = run.x, run.address, run.buffers
        obj = new(Tensor2, (address(x.obj_logits), *x.obj_logits.stride()))
        preds = new(Predictions, (tensor3(address, x.boxes), obj, tensor3(address, x.cls_logits)))
        row, iou = map(address, run.out)
        rows = new(Rows, (b.image, b.label, b.xyxy, b.xywh))
        self.match(run, preds, points_of(address, x.points, x.strides), (0.0, 0.0), row, iou, b.counts, rows)


def simota_assign(x: SimOTAAssign) -> SimOTAAssignment:
    out = x.allocate()
    if out.target_row.numel():
        run(_SimOTAPlan, x, out, x.targets[0].shape[0])
    return out


class YOLOXAssigning(Matching):
    """The launches of YOLOX's assignment, from raw predictions."""

    def __init__(self, x: YOLOX | YOLOXAssign, dtype: torch.dtype, num_rows: int) -> None:
        batch_size, num_anchors, num_channels = x.preds.shape
        grid, self.size = Grid(x.levels.feat_shapes, num_anchors), x.levels.image_size
        shape = batch_size, num_anchors, num_channels - 5
        is_raw = len(x.targets) == 1
        super().__init__(x.assigner, shape, grid, x.levels.strides, is_raw, x.preds.stride(2), dtype, num_rows)

    def assign(self, run: Run, preds: Predictions, row: Any, iou: Any, counts: Any, rows: Rows) -> None:
        self(run, preds, None, self.size, row, iou, counts, rows)


def predictions(run: Run) -> Predictions:
    """Parts of raw predictions (B, A, 5 + C)."""
    preds = run.x.preds
    image, anchor, channel = preds.stride()
    boxes = new(Tensor3, (run.address(preds), image, anchor, channel))
    return new(
        Predictions,
        (
            boxes,
            new(Tensor2, (run.channels(preds, 4), image, anchor)),
            new(Tensor3, (run.channels(preds, 5), image, anchor, channel)),
        ),
    )
