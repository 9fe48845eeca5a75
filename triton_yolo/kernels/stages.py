"""The dense stages of task-aligned assignment: the metric of all pairs, and its K highest a ground-truth row."""

import triton
import triton.language as tl

from .._signatures import AlignMetric, Metrics, Selected, SelectTopk
from .arguments import Grid, Rows, compute_type, points_of, targets_of, tensor3
from .grid import sized
from .launch import Launch, Plan, Run, Workspace, cdiv, run
from .pairs import Rule, candidate_area, candidates, load_truth, pair_metrics, pair_overlaps, walk_length
from .rows import row_sizes
from .targets import packed_rows, packing
from .topk import empty_list, is_among, keep_best, list_sizes, none, ordered


@triton.jit
def _align_metric_kernel(
    metric_ptr, overlaps_ptr, boxes, scores, points, rows, grid, N, RULE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program writes metric and overlap of BLOCK_G rows with BLOCK_P anchors, both (N, A)."""
    grid = sized(grid)
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    truth = load_truth(rows, offs_g, N, RULE)
    wide = candidate_area(truth.box, RULE)
    nth = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    anchor, mask = candidates(nth, walk_length(rows, offs_g, N, grid, RULE), wide, points, grid, RULE)
    overlaps = pair_overlaps(truth, anchor, mask, boxes, RULE)
    metric = pair_metrics(truth, anchor, mask, overlaps, scores, RULE)
    offs = truth.row.to(tl.int64) * grid.A + nth
    mask = (truth.row < N) & (nth < grid.A)
    tl.store(metric_ptr + offs, metric, mask=mask)
    tl.store(overlaps_ptr + offs, overlaps, mask=mask)


@triton.jit
def _load_metrics(metric, row_ptr, is_gt, anchor, A, DTYPE: tl.constexpr):
    """Key and order of metrics [g, n], ``none`` for what is not above 0."""
    offs = anchor.to(tl.int64) * metric.channel
    value = tl.load(row_ptr + offs, mask=is_gt & (anchor < A), other=0.0).to(DTYPE)
    key, order = ordered(value, anchor)
    return tl.where(value > 0, key, none(key)), order


@triton.jit
def _select_topk_kernel(
    selected_ptr, metric, mask_ptr, mask_image, mask_slot, N, G, A, K: tl.constexpr, KP: tl.constexpr, HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK_G rows (of N = B * G) of the metric twice and writes which are among the K highest."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    image, slot = (offs_g // G).to(tl.int64), (offs_g % G).to(tl.int64)
    is_gt = offs_g < N
    if HAS_MASK:
        is_gt = is_gt & (tl.load(mask_ptr + image * mask_image + slot * mask_slot, mask=is_gt, other=0) != 0)
    row_ptr = metric.ptr + image * metric.image + slot * metric.anchor
    best, best_order = empty_list(BLOCK_G, K, KP, DTYPE)
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        key, order = _load_metrics(metric, row_ptr, is_gt, anchor, A, DTYPE)
        best, best_order = keep_best(best, best_order, key, order)
        start += BLOCK_P
    start = 0
    while start < A:
        anchor = start + tl.arange(0, BLOCK_P)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
        key, order = _load_metrics(metric, row_ptr, is_gt, anchor, A, DTYPE)
        offs = offs_g.to(tl.int64) * A + anchor
        tl.store(selected_ptr + offs, is_among(key, order, best, best_order), mask=(offs_g < N) & (anchor < A))
        start += BLOCK_P


class _AlignMetric(Plan):
    def __init__(self, x: AlignMetric, out: Metrics, num_rows: int) -> None:
        num_anchors = x.scores.shape[1]
        self.block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, 512, 4)
        self.tiles = cdiv(num_anchors, block_p)
        dtype = out.metric.dtype
        self.pack = packing(x.targets, x.scores.shape[2], dtype)
        rule = Rule(x.alpha, x.beta, x.min_box_side, 1e-9, (1.0,), False, False, compute_type(dtype))
        self.align = Launch(_align_metric_kernel, num_warps, RULE=rule, BLOCK_G=self.block_g, BLOCK_P=block_p)
        super().__init__(Workspace({}, packed_rows(dtype)), self.pack, self.align)

    def launch(self, run: Run) -> None:
        x, address, num_rows = run.x, run.address, run.num_rows
        rows = Rows(run.buffers.image, run.buffers.label, run.buffers.xyxy, None, None)
        self.pack(run.stream, (cdiv(num_rows, 128), 1, 1), rows, targets_of(address, x.targets), num_rows, len(x.scores))
        # Rows come first: CUDA takes 2^31 programs in that dimension, 65,535 in the others.
        self.align(
            run.stream, (cdiv(num_rows, self.block_g), self.tiles, 1), address(run.out.metric),
            address(run.out.overlaps), tensor3(address, x.boxes), tensor3(address, x.scores),
            points_of(address, x.points, None), rows, Grid((1, 1), x.scores.shape[1]), num_rows,
        )  # fmt: skip


class _SelectTopk(Plan):
    def __init__(self, x: SelectTopk, out: Selected, num_rows: int) -> None:
        batch_size, num_slots, num_anchors = x.metric.shape
        block_g, block_p, num_warps = row_sizes(batch_size * num_slots, num_anchors, 512, 4)
        self.grid = cdiv(batch_size * num_slots, block_g), 1, 1
        self.select = Launch(
            _select_topk_kernel, num_warps, **list_sizes(x.topk, num_anchors), HAS_MASK=x.mask_gt is not None,
            DTYPE=compute_type(x.metric.dtype), BLOCK_G=block_g, BLOCK_P=block_p,
        )  # fmt: skip
        super().__init__(Workspace(), self.select)

    def launch(self, run: Run) -> None:
        x, (batch_size, num_slots, num_anchors) = run.x, run.x.metric.shape
        mask = (None, 0, 0) if x.mask_gt is None else (run.address(x.mask_gt), *x.mask_gt.stride())
        self.select(
            run.stream, self.grid, run.address(run.out.selected), tensor3(run.address, x.metric), *mask,
            batch_size * num_slots, num_slots, num_anchors,
        )  # fmt: skip


def align_metric(x: AlignMetric) -> Metrics:
    out = x.allocate()
    if out.metric.numel():
        run(_AlignMetric, x, out, x.targets[0].shape[0])
    return out


def select_topk_candidates(x: SelectTopk) -> Selected:
    out = x.allocate()
    if out.selected.numel():
        run(_SelectTopk, x, out)
    return out
