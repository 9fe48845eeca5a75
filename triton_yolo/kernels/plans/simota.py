"""Launches of SimOTA, to arbitrary points or as a part of YOLOX's criterion."""

import math

import torch
import triton

from ..._signatures import SimOTA, SimOTAAssign, SimOTAAssignment
from ..arguments import Anchors, Grid, Rows, State, Tensor2, compute_type, points_of, targets_of, tensor3
from ..claims import Lists
from ..launch import INTERPRETED, Buffers, Launch, Plan, Run, Workspace, cdiv, new, run
from ..members import Claims, Matches, Members, Predictions, Region, Rule, Tally, _simota_member_kernel, _simota_prepare_kernel
from ..packing import Pack
from ..rows import row_sizes
from ..simota import Objectness, _simota_contest_kernel, _simota_settle_kernel
from ..simota_claims import Split, _simota_claim_kernel, _simota_merge_kernel
from ..simota_cost import Product

_MOST_CELLS = 128  # of a centre region that one program looks at
_IOU_TILES, _IOU_P, _COST_P = 5, 192, 256  # parts of the members: five tiles for their IoUs, one for their costs
_IOU_PROGRAMS, _COST_PROGRAMS = 3, 1  # a row: an H200 starts some 1,500 programs a us, and 42 a row took 53 us at B=64
ONE = 1, 1, 1


def region_sizes(radius: float, num_levels: int) -> tuple[int, int]:
    """``SPAN`` and ``CELLS`` of a rule: an open interval of 2 radii holds at most so many centres."""
    span = math.ceil(2 * radius)
    cells = max(triton.next_power_of_2(num_levels * span**2), 32)
    return (span, cells) if cells <= _MOST_CELLS else (0, 32)


def few_rows(num_rows: int, places: int) -> int:
    """Rows a program, of which each has so many places in its widest tile."""
    return max(1, min(triton.next_power_of_2(num_rows), 2**19 // places)) if INTERPRETED else 1


class Matching:
    """The launches up to the contest: on a grid if it has ``strides``."""

    def __init__(
        self, assigner: SimOTA, shape: tuple[int, int, int], grid: Grid, strides: tuple[float, ...] | None, is_raw: bool,
        dtype: torch.dtype, num_rows: int,
    ) -> None:  # fmt: skip
        self.batch_size, num_anchors, num_classes = shape
        self.grid, self.dtype, kind = grid, dtype, compute_type(dtype)
        self.cells, self.words = self.batch_size * num_anchors, self.batch_size * cdiv(num_anchors, 32)
        has_box = assigner.candidates == "box_and_center"
        span, cells = region_sizes(assigner.radius, len(strides)) if strides else (0, 32)
        is_grid = strides is not None
        self.rule = rule = Rule(num_classes, assigner.radius, has_box, is_grid, strides or (1.0,), span, cells, kind)
        self.walks = walks = has_box or span == 0
        self.parts = (span > 0) + (1 if INTERPRETED else cdiv(num_anchors, cells)) * walks
        self.most_a_row = num_anchors if walks else len(rule.STRIDES) * span**2  # members because of one row

        self.block = 2**14 if INTERPRETED else 1024
        pack = Pack(num_classes, is_raw, True, 32)
        self.prepare = Launch(_simota_prepare_kernel, 4, PACK=pack, DTYPE=kind, BLOCK=self.block)
        product = _product(num_classes, cells)
        self.member_rows = few_rows(num_rows, cells * product.BLOCK_C)
        self.member = Launch(
            _simota_member_kernel, 1 if INTERPRETED else cells // 32, RULE=rule, PRODUCT=product,
            BLOCK_G=self.member_rows, BLOCK_P=cells,
        )  # fmt: skip
        self.block_g, block_p, _ = row_sizes(max(num_rows, 1), num_anchors, 128, 1)
        block_s = block_p if INTERPRETED else 64
        places = block_p if INTERPRETED else 32
        iou_p, cost_p = (block_p, block_p) if INTERPRETED else (_IOU_P, _COST_P)
        iou_parts = cdiv(num_anchors, _IOU_TILES * iou_p)
        depth = min(10, cdiv(10 * iou_parts, places))
        self.split = split = Split(_IOU_TILES * iou_p, iou_parts, depth, cost_p, cdiv(num_anchors, cost_p))
        tiles = {"RULE": rule, "SPLIT": split, "BLOCK_G": self.block_g, "PLACES": places}
        self.claim = Launch(_simota_claim_kernel, 1, BLOCK_P=iou_p, **tiles)
        self.merge = Launch(_simota_merge_kernel, 1, BLOCK_P=block_p, **tiles)
        self.block_a = max(32, triton.next_power_of_2(num_anchors)) if INTERPRETED else 512
        self.contest, *self.tie_break = [
            Launch(
                _simota_contest_kernel, 1, RULE=rule, IS_TIE_BREAK=is_tie_break, BLOCK_G=self.block_g, BLOCK_P=block_s,
                BLOCK_A=self.block_a,
            )
            for is_tie_break in ((False, True) if dtype == torch.float64 else (False,))
        ]  # fmt: skip
        self.is_wide = dtype == torch.float64
        by_rows = self.member, self.claim, self.merge, self.contest, *self.tie_break
        self.launches = self.prepare, *(by_rows if num_rows else ())
        self.fixed: Buffers = {
            "boxes": (dtype, 4 * self.cells), "cost": (dtype, self.cells), "best": (torch.int64, self.cells),
            "target_row": (torch.int32, self.cells), "words": (torch.int32, self.words),
            "members": (torch.int32, self.cells), "num_members": (torch.int32, self.batch_size),
            "contested": (torch.int32, self.cells), "num_contested": (torch.int32, self.batch_size),
        }  # fmt: skip
        if self.is_wide:
            self.fixed["order"] = torch.int32, self.cells
        key = torch.int64 if self.is_wide else torch.int32
        self.by_row: Buffers = {
            "image": (torch.int32, 1), "xyxy": (dtype, 4), "claims": (torch.int32, 16), "region_cost": (dtype, cells),
            "region_anchor": (torch.int32, cells), "sure": (torch.int32, 1), "ious": (key, 10 * split.IOU_PARTS),
            "keys": (key, 10 * split.COST_PARTS), "orders": (torch.int32, 10 * split.COST_PARTS),
        }  # fmt: skip

    def __call__(
        self, run: Run, preds: Predictions, rows: Rows, size: tuple[float, float], matches: Matches,
        tally: Tally, objectness: Objectness, num_others: int,
    ) -> tuple[State, Claims]:  # fmt: skip
        """Claim and contest; ``num_others`` programs read the objectness."""
        stream, b, grid, num_rows = run.stream, run.buffers, self.grid, run.num_rows
        state = new(State, (b.target_row, b.best, new(Anchors, (b.contested, b.num_contested))))
        members = new(Members, (new(Anchors, (b.members, b.num_members)), b.words, b.boxes, b.cost))
        claims = new(Claims, (b.claims, b.order if self.is_wide else None))
        region, lists = new(Region, (b.region_cost, b.region_anchor, b.sure)), new(Lists, (b.keys, b.orders))
        programs = cdiv(max(self.words, self.batch_size, self.cells if matches.row_ptr is not None else 0), self.block), 1, 1
        targets = targets_of(run.address, run.x.targets)
        sizes = num_rows, self.batch_size, self.cells, self.words
        self.prepare(stream, programs, state, matches, members, tally, rows, targets, *size, *sizes)
        row_programs = cdiv(num_rows, self.block_g)
        if num_rows:
            programs = cdiv(num_rows, self.member_rows), self.parts, 1
            self.member(stream, programs, members, state, region, preds, rows, grid, num_rows)
            most = min(grid.A, num_rows * self.most_a_row)
            iou_programs, cost_programs = cdiv(most, self.split.IOU_P), cdiv(most, self.split.COST_P)
            if not self.walks:  # members are few, though nobody knows how few, and costs beside the region's hardly ever wanted
                iou_programs, cost_programs = min(iou_programs, _IOU_PROGRAMS), min(cost_programs, _COST_PROGRAMS)
            programs = row_programs, iou_programs + cost_programs, 1
            self.claim(stream, programs, b.ious, lists, region, members, preds, rows, grid, num_rows, iou_programs)
            programs = row_programs, 1, 1
            self.merge(stream, programs, b.ious, lists, members, state, claims, region, tally, rows, grid, num_rows)
        pairs = objectness, tally, members, state, claims, preds, rows, grid, num_rows, row_programs
        if row_programs + num_others:
            self.contest(stream, (row_programs + num_others, 1, 1), *pairs)
        if num_rows:
            for tie_break in self.tie_break:
                tie_break(stream, (row_programs, 1, 1), *pairs)
        return state, claims


class _SimOTAPlan(Plan):
    """Assignment to arbitrary points."""

    def __init__(self, x: SimOTAAssign, out: SimOTAAssignment, num_rows: int) -> None:
        shape, dtype = x.cls_logits.shape, out.matched_iou.dtype
        self.match = Matching(x.assigner, (shape[0], shape[1], shape[2]), Grid((1, 1), shape[1]), None, False, dtype, num_rows)
        self.rows = few_rows(num_rows, 16)
        self.settle = Launch(_simota_settle_kernel, 1, RULE=self.match.rule, BLOCK_G=self.rows)
        by_row = {**self.match.by_row, "label": (torch.int64, 1), "xywh": (dtype, 4)}
        super().__init__(Workspace(self.match.fixed, by_row), *self.match.launches, *((self.settle,) if num_rows else ()))

    def launch(self, run: Run) -> None:
        x, address, b = run.x, run.address, run.buffers
        obj = new(Tensor2, (address(x.obj_logits), *x.obj_logits.stride()))
        points = points_of(address, x.points, x.strides)
        preds = new(Predictions, (tensor3(address, x.boxes), obj, tensor3(address, x.cls_logits), points))
        matches = new(Matches, tuple(map(address, run.out)))
        rows, tally, nothing = (
            new(Rows, (b.image, b.label, b.xyxy, b.xywh, None)),
            new(Tally, (None, None)),
            new(Objectness, (None, None)),
        )
        state, claims = self.match(run, preds, rows, (0.0, 0.0), matches, tally, nothing, 0)
        if run.num_rows:
            programs = cdiv(run.num_rows, self.rows), 1, 1
            self.settle(run.stream, programs, matches, state, claims, preds, rows, self.match.grid, run.num_rows)


def simota_assign(x: SimOTAAssign) -> SimOTAAssignment:
    out = x.allocate()
    if out.target_row.numel():
        run(_SimOTAPlan, x, out, x.targets[0].shape[0])
    return out


def _product(num_classes: int, cells: int) -> Product:
    """Four logits a thread and tile, or one where cells are many, in at most twenty factors a product."""
    if INTERPRETED:
        return Product(min(triton.next_power_of_2(num_classes), 16), 1)
    block_c = min(triton.next_power_of_2(num_classes), 4 if cells == 32 else 1)
    return Product(block_c, min(20, cdiv(num_classes, block_c)))
