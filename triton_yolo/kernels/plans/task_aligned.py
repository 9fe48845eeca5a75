"""Launches of task-aligned assignment, to arbitrary points or as a part of YOLO11's criterion."""

from typing import Any

import torch
import triton

from ..._signatures import (
    MIN_SIDE_PX,
    YOLO11,
    YOLO11OBB,
    TaskAligned,
    TaskAlignedAssign,
    TaskAlignedAssignment,
    YOLO11Assign,
    YOLO11OBBAssign,
)
from ..arguments import NO_HEAD, Anchors, Grid, Head, Points, Rows, State, Tensor3, compute_type, points_of, targets_of, tensor3
from ..claims import Lists, part_sizes, split_sizes
from ..decode import decode_sizes
from ..fill import Fill
from ..launch import INTERPRETED, Buffers, FusedLaunch, Launch, Plan, Run, Workspace, cdiv, new, run
from ..packing import Pack
from ..pairs import Rule
from ..reduce import TOTAL_SIZES
from ..rows import row_sizes
from ..targets import packed_rows
from ..task_aligned import (
    Angles,
    Result,
    _background_kernel,
    _task_aligned_claim_kernel,
    _task_aligned_contest_kernel,
    _task_aligned_merge_kernel,
    _yolo11_prepare_kernel,
    _yolo11_sum_kernel,
)
from ..task_aligned_score import _task_aligned_score_kernel
from ..topk import list_sizes

_FILLING_ROWS = 1 if INTERPRETED else 64
"""For so many there are programs where memory is filled: a few would take long."""

_PROGRAMS, _LEAST_PARTS = 16384, 4
"""Of all rows, and of one: an H200 starts some 1,500 programs a us, and most of these have nothing to do."""


class _Matching:
    """The launches that match rows with anchors which are background yet.

    What they leave is final or, for the criterion, the states of ``claims``, with scores at positive anchors only.
    """

    def __init__(
        self, assigner: TaskAligned, dtype: torch.dtype, num_anchors: int, strides: tuple[float, ...] | None, N: int,
        *, is_final: bool, is_proper: bool = False, is_oriented: bool = False,
    ) -> None:  # fmt: skip
        self.rule = rule = Rule(
            assigner.alpha, assigner.beta, assigner.min_box_side, assigner.eps, strides or (1.0,), strides is not None,
            is_proper, compute_type(dtype), is_oriented,
        )  # fmt: skip
        self.is_wide = dtype == torch.float64
        self.block_g, block_p, num_warps = row_sizes(max(N, 1), num_anchors, 64, 1)
        tiles: dict[str, Any] = {"RULE": rule, "num_warps": num_warps, "BLOCK_G": self.block_g, "BLOCK_P": block_p}
        split, claimed = split_sizes(max(N, 1), num_anchors, 128), list_sizes(assigner.topk, num_anchors)
        merged = {"PARTS": split["PARTS"], "PART_P": split["BLOCK_P"], **claimed}
        of_part = part_sizes(assigner.topk, num_anchors, split)
        self.split_g, self.num_parts, self.part_claims = split["BLOCK_G"], split["PARTS"], of_part["K"]
        self.num_claims = claimed["K"]
        # A part of twice as many anchors has as many of the best.
        self.least_parts = min(_LEAST_PARTS if self.part_claims == self.num_claims else self.num_parts, self.num_parts)
        self.claim = Launch(_task_aligned_claim_kernel, RULE=rule, **of_part, **split)
        self.merge = Launch(
            _task_aligned_merge_kernel, PART_K=self.part_claims, **merged, **{**tiles, "BLOCK_P": max(block_p, 128)}
        )
        self.contests = [
            Launch(_task_aligned_contest_kernel, IS_TIE_BREAK=is_tie_break, **tiles)
            for is_tie_break in ((False, True) if self.is_wide else (False,))
        ]
        # With a list of the best beside it, two anchors a thread spill.
        score_p = min(block_p, 32) if assigner.topk2 and not INTERPRETED else block_p
        self.score = Launch(
            _task_aligned_score_kernel, IS_FINAL=is_final, CLAIMS=self.num_claims,
            **list_sizes(assigner.topk2 or 0, num_anchors), **{**tiles, "BLOCK_P": score_p},
        )  # fmt: skip
        self.launches = self.claim, *((self.merge, *self.contests, self.score) if N else ())

    def fixed(self, batch_size: int, num_anchors: int) -> Buffers:
        cells = batch_size * num_anchors
        ties = {"order": (torch.int32, cells)} if self.is_wide else {}
        return {
            "best": (torch.int64, cells), "contested": (torch.int32, cells), "num_contested": (torch.int32, batch_size), **ties
        }  # fmt: skip

    def by_row(self, dtype: torch.dtype) -> Buffers:
        in_parts = self.num_parts * self.part_claims
        return {
            "claims": (torch.int32, self.num_claims), "keys": (torch.int64 if self.is_wide else torch.int32, in_parts),
            "orders": (torch.int32, in_parts), "row_sum": (dtype, 1), "row_count": (torch.int32, 1),
        }  # fmt: skip

    def __call__(
        self, run: Run, result: Result, state: State, boxes: Tensor3, scores: Tensor3, points: Points | None,
        rows: Rows, grid: Grid, zeros: Fill | None = None,
    ) -> None:  # fmt: skip
        """Launch them; ``zeros`` are filled on the way."""
        stream, num_rows, buffers = run.stream, run.num_rows, run.buffers
        least = 0 if zeros is None else _FILLING_ROWS
        row_programs = cdiv(max(num_rows, least), self.split_g)
        parts = min(max(_PROGRAMS // row_programs, self.least_parts), self.num_parts)
        programs = row_programs, parts, 1
        lists, order = new(Lists, (buffers.keys, buffers.orders)), buffers.order if self.is_wide else None
        self.claim(stream, programs, lists, zeros, boxes, scores, points, rows, grid, num_rows)
        if num_rows:
            programs = cdiv(num_rows, self.block_g), 1, 1
            self.merge(stream, programs, buffers.claims, lists, state, order, rows, grid, num_rows, parts)
            for contest in self.contests:
                contest(stream, programs, state, order, boxes, points, rows, grid, num_rows)
            self.score(stream, programs, result, state, order, buffers.claims, boxes, scores, rows, grid, num_rows)


def state_of(run: Run, target_row: Any) -> State:
    """The state that an assignment keeps in its target rows and its workspace."""
    return new(State, (target_row, run.buffers.best, new(Anchors, (run.buffers.contested, run.buffers.num_contested))))


class TaskAlignedPlan(Plan):
    """Assignment to arbitrary points."""

    def __init__(self, x: TaskAlignedAssign, out: TaskAlignedAssignment, num_rows: int) -> None:
        batch_size, num_anchors, num_classes = x.scores.shape
        dtype, self.is_oriented = out.target_score.dtype, x.boxes.shape[2] == 5
        block = min(triton.next_power_of_2(num_anchors), 2**14) if INTERPRETED else 1024
        self.programs = cdiv(num_anchors, block), batch_size, 1
        self.clear = Launch(
            _background_kernel, 4, PACK=Pack(num_classes, False, self.is_oriented, 128, self.is_oriented),
            DTYPE=compute_type(dtype), BLOCK_A=block,
        )  # fmt: skip
        self.matching = _Matching(x.assigner, dtype, num_anchors, None, num_rows, is_final=True, is_oriented=self.is_oriented)
        fixed, by_row = self.matching.fixed(batch_size, num_anchors), self.matching.by_row(dtype)
        launches = self.matching.launches if num_rows else ()
        super().__init__(Workspace(fixed, {**by_row, **packed_rows(dtype, self.is_oriented)}), self.clear, *launches)

    def launch(self, run: Run) -> None:
        x, address, buffers = run.x, run.address, run.buffers
        grid = Grid((1, 1), x.scores.shape[1])
        row = address(run.out.target_row)
        result = new(Result, (row, address(run.out.target_score), buffers.row_sum, buffers.row_count))
        truth = (None, buffers.xywh) if self.is_oriented else (buffers.xyxy, None)
        state, rows = state_of(run, row), new(Rows, (buffers.image, buffers.label, *truth, None))
        targets = targets_of(address, x.targets)
        self.clear(run.stream, self.programs, result, state, rows, targets, grid.A, run.num_rows, len(x.scores))
        if run.num_rows:
            boxes, scores, points = tensor3(address, x.boxes), tensor3(address, x.scores), points_of(address, x.points, None)
            self.matching(run, result, state, boxes, scores, points, rows, grid)


def task_aligned_assign(x: TaskAlignedAssign) -> TaskAlignedAssignment:
    out = x.allocate()
    if out.target_row.numel():
        run(TaskAlignedPlan, x, out, x.targets[0].shape[0])
    return out


Assigned = YOLO11 | YOLO11Assign | YOLO11OBB | YOLO11OBBAssign


def has_angle(x: Any) -> bool:
    """Whether the inputs of an operation are of oriented boxes."""
    return "pred_angle" in x._fields


class YOLO11Assigning:
    """The launches of YOLO11's assignment, from raw predictions: as an operation, or as part of the whole criterion.

    Args:
        is_whole: whether the sum of the scores becomes the normaliser.
        is_final: whether rows and scores of all anchors are wanted, and not claims alone.
        fills: whether gradients are zeroed on the way.
    """

    def __init__(self, x: Assigned, dtype: torch.dtype, num_rows: int, *, is_whole: bool, is_final: bool, fills: bool) -> None:
        is_oriented = has_angle(x)
        batch_size, num_anchors, num_classes = x.pred_scores.shape
        kind = compute_type(dtype)
        self.matching = _Matching(
            x.assigner, dtype, num_anchors, x.levels.strides, num_rows, is_final=is_final, is_proper=x.reg_max > 1,
            is_oriented=is_oriented,
        )  # fmt: skip
        block, num_warps = decode_sizes(num_anchors, x.reg_max, 1024)  # 2048 spilled in float32 with the logits last
        self.programs = cdiv(num_anchors, block), batch_size, 1
        self.num_poisons = self.programs[0] * batch_size
        self.prepare = FusedLaunch(
            _yolo11_prepare_kernel, num_warps, RULE=self.matching.rule, R=x.reg_max, RP=triton.next_power_of_2(x.reg_max),
            IS_FINAL=is_final, BLOCK_A=block,
            PACK=Pack(num_classes, len(x.targets) == 1, is_oriented, 32, is_oriented, MIN_SIDE_PX if is_oriented else 0.0),
        )  # fmt: skip
        self.sum = Launch(_yolo11_sum_kernel, IS_NORMALISER=is_whole, DTYPE=kind, **TOTAL_SIZES)
        self.launches = self.sum, *((self.prepare,) if self.num_poisons else ())
        if (num_rows or fills) and self.num_poisons:
            self.launches += self.matching.launches
        self.grid = Grid(x.levels.feat_shapes, num_anchors)
        self.size = x.levels.image_size
        self.box_size = 5 if is_oriented else 4
        self.fixed = {
            "boxes": (dtype, self.box_size * batch_size * num_anchors), "poison": (dtype, self.num_poisons),
            **self.matching.fixed(batch_size, num_anchors),
        }  # fmt: skip
        self.by_row = {"image": (torch.int32, 1), "walk": (torch.int32, 1), **self.matching.by_row(dtype)}

    def __call__(
        self, run: Run, preds: Head, row: Any, score: Any, sums: Any, num_fg: Any, rows: Rows, grads: Head = NO_HEAD
    ) -> State:
        """Launch them; ``grads`` are zeroed on the way, but for class logits."""
        stream, buffers, grid = run.stream, run.buffers, self.grid
        # One coordinate after another: a warp reads neighbours of each at once.
        boxes = new(Tensor3, (buffers.boxes, self.box_size * grid.A, 1, grid.A))
        angles = new(Angles, (preds.angle, grads.angle))
        result, state = new(Result, (row, score, buffers.row_sum, buffers.row_count)), state_of(run, row)
        batch_size, targets = self.programs[1], targets_of(run.address, run.x.targets)
        num_rows = run.num_rows if self.num_poisons else 0
        if self.num_poisons:
            self.prepare(
                stream, self.programs, boxes, result, state, buffers.poison, preds.dist, angles, rows, targets, grid,
                *self.size, num_rows, batch_size,
            )  # fmt: skip
        if num_rows or grads.dist is not None:
            zeros = None if grads.dist is None else new(Fill, (grads.dist.ptr, run.out.grad_pred_dist.numel()))
            self.matching(run, result, state, boxes, preds.scores, None, rows, grid, zeros)
        self.sum(stream, (1, 1, 1), sums, num_fg, result, buffers.poison, num_rows, batch_size, self.num_poisons)
        return state
