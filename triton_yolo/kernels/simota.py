"""SimOTA assignment (YOLOX, arXiv 2107.08430): one program a ground-truth row, no tensor of pairs.

The anchors that take part in an image, its ``members``, are listed. A bit an anchor in ``words`` (B, ceil(A / 32)) keeps each
in the list once. Anchors are cells of a grid (``IS_GRID``), or any points, each with its stride.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import working_dtype
from .boxes import log_not, log_rest, overlap, sigmoid
from .decode import channel_sizes, load_raw_boxes, raw_corners
from .grid import anchor_points, cell_centres, rectangle_cells, rectangle_size
from .launching import FIXED, compute_type, on_device
from .rows import (
    CONTESTED,
    append,
    claim,
    claim_sizes,
    contest,
    empty_boxes,
    gt_rows,
    list_length,
    load_anchor_boxes,
    load_listed,
    load_rows,
    new_list,
    places,
    row_sizes,
    store_anchor_boxes,
    winner,
)
from .topk import empty_list, index_of, is_taken, keep_best, merged, none, ordered, rank, value_of

_INFEASIBLE_COST: tl.constexpr = tl.constexpr(1e6)
_MAX_DYNAMIC_K: tl.constexpr = tl.constexpr(10)
_LIST: tl.constexpr = tl.constexpr(32)  # a place a lane
_BROKEN: tl.constexpr = tl.constexpr(-2)
"""State of an anchor whose box or class logits are not finite: background otherwise."""
_UNIT: tl.constexpr = tl.constexpr(float(1 << 52))

# ---- tiles


@triton.jit
def _points_and_stride(
    anchor, mask, points, points_stride, shapes, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr
):
    """Point (x, y) and stride of anchors [g, n], in pixels."""
    x, y = anchor_points(anchor, mask, points[0], points_stride, shapes, STRIDES, IS_GRID, DTYPE)
    if IS_GRID:
        stride = cell_centres(anchor, shapes, STRIDES, DTYPE)[2]
    else:
        stride = tl.load(points[1] + anchor.to(tl.int64) * points_stride[2], mask=mask, other=0.0).to(DTYPE)
    return x, y, stride


@triton.jit
def _in_regions(point, box, centre, RADIUS: tl.constexpr):
    """Whether points [g, n] are in the centre regions and in the boxes of rows [g, 1]."""
    x, y, stride = point[0], point[1], point[2]
    reach = tl.full(stride.shape, RADIUS, stride.dtype) * stride
    in_centre = (tl.abs(x - centre[0]) < reach) & (tl.abs(y - centre[1]) < reach)
    in_box = (x - box[0] > 0) & (y - box[1] > 0) & (box[2] - x > 0) & (box[3] - y > 0)
    return in_centre, in_box


@triton.jit
def _load_centres(gt, gt_stride, offs_g, N, DTYPE: tl.constexpr):
    ptr = gt[3] + offs_g.to(tl.int64)[:, None] * gt_stride[4]
    mask = (offs_g < N)[:, None]
    return tl.load(ptr, mask=mask, other=0.0).to(DTYPE), tl.load(ptr + gt_stride[5], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _joint_probability(cls_logits, obj_probs):
    return tl.sqrt(sigmoid(cls_logits) * obj_probs)


@triton.jit
def _clamped(logs):
    """Not below -100; NaN stays."""
    return tl.where(logs < -100, -100.0, logs).to(logs.dtype)


@triton.jit
def _iou(box, boxes):
    """IoU, 0 where it is undefined."""
    iou = overlap(box[0], box[1], box[2], box[3], boxes[0], boxes[1], boxes[2], boxes[3], "iou", 0.0)
    return tl.where(iou > 0, iou, 0.0).to(iou.dtype)


@triton.jit
def _pair_costs(
    info, box, centre, anchor, mask, boxes_ptr, boxes_stride, table, cls_ptr, cls_stride, points, points_stride, shapes, A,
    RADIUS: tl.constexpr, HAS_BOX: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Cost, infinite rather than NaN, and IoU of rows [g, 1] with anchors [g, n] that take part."""
    image, label = info[0], info[1]
    iou = _iou(box, load_anchor_boxes(image, anchor, mask, boxes_ptr, boxes_stride, DTYPE))
    cell = image * A + anchor
    cost = tl.load(table[0] + cell, mask=mask, other=0.0)
    obj_probs = tl.load(table[1] + cell, mask=mask, other=0.0)
    offs = image * cls_stride[0] + anchor.to(tl.int64) * cls_stride[1] + label * cls_stride[2]
    probs = _joint_probability(tl.load(cls_ptr + offs, mask=mask, other=0.0).to(DTYPE), obj_probs)
    # BCE against the one-hot class differs from that against no class by two terms.
    cost = cost + _clamped(log_not(probs)) - _clamped(tl.log(probs))
    cost = cost + 3 * -tl.log(iou + tl.full(iou.shape, 1e-8, DTYPE))
    point = _points_and_stride(anchor, mask, points, points_stride, shapes, STRIDES, IS_GRID, DTYPE)
    in_centre, in_box = _in_regions(point, box, centre, RADIUS)
    is_feasible = in_centre
    if HAS_BOX:
        is_feasible = in_centre & in_box
    cost = tl.where(is_feasible, cost, cost + _INFEASIBLE_COST)
    return tl.where(cost < float("inf"), cost, float("inf")).to(DTYPE), iou


# ---- kernels


@triton.jit
def _prepare_kernel(
    boxes_ptr, boxes_stride, table, target_row_ptr, words_ptr, num_members_ptr, num_contested_ptr, counts_ptr, broken_ptr,
    raw_ptr, raw_stride, obj_ptr, obj_stride, cls_ptr, cls_stride, shapes, A, C,
    STRIDES: tl.constexpr, IS_GRID: tl.constexpr, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program reads everything of BLOCK_A anchors of one image, and makes them background that does not take part.

    It writes their boxes, decoded if ``IS_GRID``, and the ``table`` of two (B, A), the cost of no class and the objectness
    probability; to ``broken`` (programs,) 1 if an objectness logit is not finite, else 0. Other logits count where an anchor
    takes part, so its state keeps whether they are finite. It clears what the next launches count in.
    """
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    cell = image * A + offs_a
    raw = load_raw_boxes(raw_ptr + image * raw_stride[0], raw_stride, offs_a, mask_a, DTYPE)
    obj_ptr += image * obj_stride[0]
    obj_logits = tl.load(obj_ptr + offs_a.to(tl.int64) * obj_stride[1], mask=mask_a, other=0.0).to(DTYPE)
    obj_probs = sigmoid(obj_logits)
    poison = raw[0] * 0.0 + raw[1] * 0.0 + raw[2] * 0.0 + raw[3] * 0.0
    boxes = raw
    if IS_GRID:
        x, y, stride = cell_centres(offs_a, shapes, STRIDES, DTYPE)
        boxes = raw_corners(raw, x - 0.5, y - 0.5, stride)
    store_anchor_boxes(image, offs_a, mask_a, boxes_ptr, boxes_stride, boxes[0], boxes[1], boxes[2], boxes[3])

    cls_ptr += image * cls_stride[0]
    cost = tl.zeros((BLOCK_A, BLOCK_C), DTYPE)
    cls_poison = tl.zeros((BLOCK_A, BLOCK_C), DTYPE)
    start = 0
    while start < C:
        # The sum of log(1 - p) is the logarithm of a product; four factors that are not 0 stay above the smallest float32.
        p, rest = tl.zeros((BLOCK_A, BLOCK_C), DTYPE), tl.full((BLOCK_A, BLOCK_C), 1, DTYPE)
        end = tl.minimum(start + 4 * BLOCK_C, C)
        while start < end:
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_a[:, None] & (offs_c < C)[None, :]
            offs = offs_a.to(tl.int64)[:, None] * cls_stride[1] + offs_c.to(tl.int64)[None, :] * cls_stride[2]
            logits = tl.load(cls_ptr + offs, mask=mask, other=-1e4).to(DTYPE)  # a probability of 0
            probs = _joint_probability(logits, obj_probs[:, None])
            cost += tl.where(probs >= 1, 100.0, 0.0)  # the logarithm of 0 counts -100
            probs = tl.where(probs >= 1, 0.0, probs).to(DTYPE)
            p, rest = tl.fma(probs, rest, p), tl.fma(-probs, rest, rest)
            cls_poison += logits * 0.0
            start += BLOCK_C
        cost -= log_rest(p, rest)
    poison += tl.sum(cls_poison, 1)
    tl.store(table[0] + cell, tl.sum(cost, 1), mask=mask_a)
    tl.store(table[1] + cell, obj_probs, mask=mask_a)
    tl.store(target_row_ptr + cell, tl.where(poison == 0, -1, _BROKEN), mask=mask_a)
    num_words = (A + 31) // 32
    word = tl.program_id(0) * (BLOCK_A // 32) + tl.arange(0, BLOCK_A // 32)
    tl.store(words_ptr + image * num_words + word, tl.zeros((BLOCK_A // 32,), tl.int32), mask=word < num_words)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(broken_ptr + program, (tl.sum(obj_logits * 0.0) != 0).to(tl.int32))
    if tl.program_id(0) == 0:
        tl.store(num_members_ptr + image, 0)
        tl.store(num_contested_ptr + image, 0)
    if program == 0:
        tl.store(counts_ptr + tl.arange(0, 4), tl.zeros((4,), tl.int64), mask=tl.arange(0, 4) < 3)


@triton.jit
def _member_kernel(
    words_ptr, members, counts_ptr, target_row_ptr, points, points_stride, gt, gt_stride, shapes, N, B, A,
    C: tl.constexpr, RADIUS: tl.constexpr, HAS_BOX: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program lists the anchors that take part because of BLOCK_G rows, counts those rows, and says if an anchor is broken.

    It walks the cells of a rectangle around the regions, a thousandth wider; the test is exact.
    """
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    centre = _load_centres(gt, gt_stride, offs_g, N, DTYPE)
    tl.atomic_add(counts_ptr + 1, tl.sum(info[2].to(tl.int64)), sem="relaxed")
    x1, y1, x2, y2 = centre[0], centre[1], centre[0], centre[1]
    if HAS_BOX:
        x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
    length = tl.zeros_like(x1).to(tl.int32) + A
    if IS_GRID:
        length = rectangle_size(x1, y1, x2, y2, shapes, STRIDES, 1.001 * RADIUS)
    length = tl.where(info[2], length, 0)
    limit = tl.max(length)
    state = tl.full((), -1, tl.int32)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        mask = nth < length
        if IS_GRID:
            anchor, x, y, stride = rectangle_cells(nth, x1, y1, x2, y2, shapes, STRIDES, DTYPE, 1.001 * RADIUS)
            point = (x, y, stride)
        else:
            anchor = nth + tl.zeros_like(length)
            point = _points_and_stride(anchor, mask, points, points_stride, shapes, STRIDES, IS_GRID, DTYPE)
        in_centre, in_box = _in_regions(point, box, centre, RADIUS)
        takes_part = in_centre
        if HAS_BOX:
            takes_part = in_centre | in_box
        mask = mask & takes_part
        word = tl.where(mask, info[0] * ((A + 31) // 32) + anchor // 32, 0)
        bit = tl.full(anchor.shape, 1, tl.int32) << (anchor % 32)
        is_new = mask & ((tl.atomic_or(words_ptr + word, bit, mask=mask, sem="relaxed") & bit) == 0)
        append(members, info[0], anchor, is_new, A)
        state = tl.minimum(state, tl.min(tl.load(target_row_ptr + info[0] * A + anchor, mask=is_new, other=-1)))
        start += BLOCK_P
    if state == _BROKEN:
        tl.atomic_max(counts_ptr + 2, tl.full((), 1, tl.int64), sem="relaxed")


@triton.jit
def _claim_kernel(
    target_row_ptr, best_ptr, members, contested, boxes_ptr, boxes_stride, table, cls_ptr, cls_stride, points, points_stride,
    gt, gt_stride, shapes, N, B, A,
    C: tl.constexpr, RADIUS: tl.constexpr, HAS_BOX: tl.constexpr, STRIDES: tl.constexpr, IS_GRID: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program finds the dynamic k of BLOCK_G rows and claims their k cheapest anchors in ``target_row``."""
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    centre = _load_centres(gt, gt_stride, offs_g, N, DTYPE)
    cheapest, cheapest_order = empty_list(BLOCK_G * PARTS, _MAX_DYNAMIC_K, _LIST, DTYPE)
    largest, largest_order = empty_list(BLOCK_G * PARTS, _MAX_DYNAMIC_K, _LIST, DTYPE)
    length = list_length(members, info[0], info[2])
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = places(start, PARTS, BLOCK_P)
        mask = nth < length
        anchor = load_listed(members, info[0], nth, mask, A)
        cost, iou = _pair_costs(
            info, box, centre, anchor, mask, boxes_ptr, boxes_stride, table, cls_ptr, cls_stride, points, points_stride,
            shapes, A, RADIUS, HAS_BOX, STRIDES, IS_GRID, DTYPE,
        )  # fmt: skip
        key, order = ordered(-cost, anchor)
        cheapest, cheapest_order = keep_best(cheapest, cheapest_order, tl.where(mask, key, none(key)), order)
        key, order = ordered(iou, anchor)
        key = tl.where(mask & (iou > 0), key, none(key))
        largest, largest_order = keep_best(largest, largest_order, key, order)
        start += PARTS * BLOCK_P
    if PARTS > 1:
        cheapest, cheapest_order = merged(cheapest, cheapest_order, _MAX_DYNAMIC_K, _LIST, DTYPE)
        largest, largest_order = merged(largest, largest_order, _MAX_DYNAMIC_K, _LIST, DTYPE)

    is_overlap = is_taken(largest, _MAX_DYNAMIC_K, _LIST)
    # Added up as integers, since the order of a list is any.
    ious = tl.where(is_overlap, value_of(largest).to(tl.float64) * _UNIT, 0.0).to(tl.int64)
    k = tl.minimum(tl.maximum(tl.sum(ious, 1) >> 52, 1), _MAX_DYNAMIC_K)[:, None]
    is_claim = rank(cheapest, cheapest_order, _MAX_DYNAMIC_K, _LIST) < k
    claim(target_row_ptr, best_ptr, contested, info[0], index_of(cheapest_order), offs_g, is_claim, A)


@triton.jit
def _contest_kernel(
    target_row_ptr, best_ptr, contested, boxes_ptr, boxes_stride, table, cls_ptr, cls_stride, points, points_stride,
    gt, gt_stride, shapes, N, B, A,
    IS_TIE_BREAK: tl.constexpr, C: tl.constexpr, RADIUS: tl.constexpr, HAS_BOX: tl.constexpr, STRIDES: tl.constexpr,
    IS_GRID: tl.constexpr, DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program raises ``best`` of the contested anchors of the images of BLOCK_G rows to their negated cost."""
    IS_WIDE: tl.constexpr = tl.float64 == DTYPE
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    info, box = load_rows(gt, gt_stride, offs_g, N, B, C, DTYPE)
    centre = _load_centres(gt, gt_stride, offs_g, N, DTYPE)
    length = list_length(contested, info[0], info[2])
    limit = tl.max(length)
    start = 0
    while start < limit:
        nth = start + tl.arange(0, BLOCK_P)[None, :]
        mask = nth < length
        anchor = load_listed(contested, info[0], nth, mask, A)
        cost, _ = _pair_costs(
            info, box, centre, anchor, mask, boxes_ptr, boxes_stride, table, cls_ptr, cls_stride, points, points_stride,
            shapes, A, RADIUS, HAS_BOX, STRIDES, IS_GRID, DTYPE,
        )  # fmt: skip
        contest(target_row_ptr, best_ptr, info[0] * A + anchor, -cost, offs_g, mask, IS_TIE_BREAK, IS_WIDE)
        start += BLOCK_P


@triton.jit
def _settle_kernel(
    target_row_ptr, matched_iou_ptr, counts_ptr, best_ptr, boxes_ptr, boxes_stride, broken_ptr, gt, gt_stride, A,
    DTYPE: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program settles BLOCK_A anchors of one image, the same as in ``_prepare_kernel``, and adds to the counts."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    cell = image * A + offs_a
    state = tl.load(target_row_ptr + cell, mask=mask_a, other=-1)
    is_contested = state >= CONTESTED
    row = tl.where(is_contested, winner(cell, state, is_contested, best_ptr, tl.float64 == DTYPE), tl.maximum(state, -1))
    is_pos = row >= 0
    iou = tl.zeros((BLOCK_A,), DTYPE)
    if tl.max(row) >= 0:
        boxes = load_anchor_boxes(image, offs_a, is_pos, boxes_ptr, boxes_stride, DTYPE)
        ptr = gt[2] + row.to(tl.int64) * gt_stride[2]
        x1 = tl.load(ptr, mask=is_pos, other=0.0).to(DTYPE)
        y1 = tl.load(ptr + gt_stride[3], mask=is_pos, other=0.0).to(DTYPE)
        x2 = tl.load(ptr + 2 * gt_stride[3], mask=is_pos, other=0.0).to(DTYPE)
        y2 = tl.load(ptr + 3 * gt_stride[3], mask=is_pos, other=0.0).to(DTYPE)
        iou = tl.where(is_pos, _iou((x1, y1, x2, y2), boxes), 0.0)
    tl.store(target_row_ptr + cell, row, mask=mask_a & (row != state))
    tl.store(matched_iou_ptr + cell, iou, mask=mask_a)
    tl.atomic_add(counts_ptr, tl.sum(is_pos.to(tl.int64)), sem="relaxed")
    broken = tl.load(broken_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.atomic_max(counts_ptr + 2, broken.to(tl.int64), sem="relaxed")


# ---- operations


@on_device
def simota_assign(
    cls_logits: Tensor, obj_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor,
    image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor, candidates: str, radius: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    anchors = ((points, strides), (*points.stride(), strides.stride(0)), (1, 1), (1.0,), False)
    rows = gt_rows(image_index, labels, gt_boxes, gt_xywh)
    return _assign(boxes, obj_logits, cls_logits, anchors, rows, candidates, radius)[:2]


@on_device
def yolox_assign(
    preds: Tensor, image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor,
    feat_shapes: Sequence[int], strides: Sequence[float], candidates: str, radius: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    anchors = ((preds, preds), (0, 0, 0), tuple(feat_shapes), tuple(strides), True)
    rows = gt_rows(image_index, labels, gt_boxes, gt_xywh)
    return _assign(preds, preds[..., 4], preds[..., 5:], anchors, rows, candidates, radius)


def _assign(
    raw: Tensor, obj_logits: Tensor, cls_logits: Tensor, anchors: tuple[Any, Any, tuple[int, ...], tuple[float, ...], bool],
    rows: tuple[Any, Any], candidates: str, radius: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Row and IoU of every anchor; numbers of positives and ground truths, 1 if a prediction is not finite."""
    batch_size, num_anchors, num_classes = cls_logits.shape
    points, points_stride, shapes, strides, is_grid = anchors
    (gt, gt_stride), num_rows = rows, len(rows[0][0])
    dtype, triton_dtype = working_dtype(raw.dtype), compute_type(raw.dtype)
    target_row = raw.new_empty((batch_size, num_anchors), dtype=torch.int32)
    matched_iou = torch.empty_like(target_row, dtype=dtype)
    if target_row.numel() == 0:
        return target_row, matched_iou, raw.new_zeros(3, dtype=torch.int64)
    boxes = empty_boxes(cls_logits, dtype)
    table = (torch.empty_like(matched_iou), torch.empty_like(matched_iou))
    words, best = target_row.new_empty(batch_size, (num_anchors + 31) // 32), torch.empty_like(target_row, dtype=torch.int64)
    members, contested, counts = new_list(target_row), new_list(target_row), best.new_empty(3)
    block_a, block_c, num_warps = channel_sizes(num_anchors, num_classes, cls_logits.stride(2))
    anchor_grid = (triton.cdiv(num_anchors, block_a), batch_size)
    broken = target_row.new_empty(anchor_grid[0] * anchor_grid[1])
    _prepare_kernel[anchor_grid](
        boxes, boxes.stride(), table, target_row, words, members[1], contested[1], counts, broken, raw, raw.stride(),
        obj_logits, obj_logits.stride(), cls_logits, cls_logits.stride(), shapes, num_anchors, num_classes,
        STRIDES=strides, IS_GRID=is_grid, DTYPE=triton_dtype, BLOCK_A=block_a, BLOCK_C=block_c, num_warps=num_warps, **FIXED,
    )  # fmt: skip
    if num_rows:
        block_g, block_p, row_warps = row_sizes(num_rows, num_anchors, 64, 2)
        row_grid = (triton.cdiv(num_rows, block_g),)
        tail = (points, points_stride, gt, gt_stride, shapes, num_rows, batch_size, num_anchors)
        options = {
            "C": num_classes, "RADIUS": radius, "HAS_BOX": candidates == "box_and_center", "STRIDES": strides,
            "IS_GRID": is_grid, "DTYPE": triton_dtype, "BLOCK_G": block_g, "BLOCK_P": block_p, "num_warps": row_warps, **FIXED,
        }  # fmt: skip
        pairs = (boxes, boxes.stride(), table, cls_logits, cls_logits.stride(), *tail)
        _member_kernel[row_grid](words, members, counts, target_row, *tail, **options)
        _claim_kernel[row_grid](
            target_row, best, members, contested, *pairs, **{**options, **claim_sizes(num_rows, num_anchors, 128, 1)}
        )
        for is_tie_break in (False, True) if dtype == torch.float64 else (False,):
            _contest_kernel[row_grid](target_row, best, contested, *pairs, IS_TIE_BREAK=is_tie_break, **options)
    _settle_kernel[anchor_grid](
        target_row, matched_iou, counts, best, boxes, boxes.stride(), broken, gt, gt_stride, num_anchors,
        DTYPE=triton_dtype, BLOCK_A=block_a, num_warps=num_warps, **FIXED,
    )  # fmt: skip
    return target_row, matched_iou, counts
