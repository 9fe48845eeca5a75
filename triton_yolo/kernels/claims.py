"""Claims of ground-truth rows. The walk of a row is split over programs, whose lists of the best are merged by row."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED, cdiv
from .rows import CONTESTED, append, row_sizes
from .topk import LOWEST, best_of, keep_best, list_sizes, none

_TILES = 2  # of a part, if a row walks over all anchors


def split_sizes(num_rows: int, num_anchors: int, block_p: int) -> dict[str, int]:
    """Rows a program, parts of a row's walk, anchors a tile, and warps: a warp a part, so that no reduction leaves it."""
    block_g, block_p, num_warps = row_sizes(num_rows, num_anchors, block_p, 1)
    parts = 1 if INTERPRETED else max(1, cdiv(num_anchors, _TILES * block_p))
    return {"BLOCK_G": block_g, "PARTS": parts, "BLOCK_P": block_p, "num_warps": num_warps}


def part_sizes(topk: int, num_anchors: int, sizes: dict[str, int]) -> dict[str, int]:
    """K and places of the list of a part, which holds no more than the part has anchors."""
    block_p = sizes["BLOCK_P"]
    return list_sizes(topk, min(num_anchors, cdiv(cdiv(num_anchors, block_p), sizes["PARTS"]) * block_p))


class Lists(NamedTuple):
    """The best of every part of a row: keys and orders (N, PARTS, K)."""

    key_ptr: Any
    order_ptr: Any


@triton.jit
def store_part(lists, row, mask, part, best, best_order, PARTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Leave the list [g, KP] of one part of rows [g, 1]."""
    place = tl.arange(0, KP)[None, :]
    at = (row.to(tl.int64) * PARTS + part) * K + place
    tl.store(lists.key_ptr + at, best, mask=mask & (place < K))
    tl.store(lists.order_ptr + at, best_order, mask=mask & (place < K))


@triton.jit
def merge_parts(
    lists, row, num_parts, PARTS: tl.constexpr, PART_K: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One list [g, KP] of the best in the lists of the first parts, ``num_parts`` [g, 1], of rows [g, 1]."""
    limit = tl.max(num_parts) * PART_K
    nth = tl.zeros(row.shape, tl.int32) + tl.arange(0, BLOCK_P)[None, :]
    key, order = _load_listed(lists, row, nth, num_parts, PARTS, PART_K)
    best, best_order = best_of(key, order, K, KP, DTYPE)
    start = BLOCK_P
    while start < limit:
        key, order = _load_listed(lists, row, start + nth, num_parts, PARTS, PART_K)
        best, best_order = keep_best(best, best_order, key, order)
        start += BLOCK_P
    return best, best_order


@triton.jit
def _load_listed(lists, row, nth, num_parts, PARTS: tl.constexpr, PART_K: tl.constexpr):
    """The ``nth`` keys and orders [g, n] in the lists of rows [g, 1], ``none`` past the last."""
    mask = nth < num_parts * PART_K
    at = row.to(tl.int64) * (PARTS * PART_K) + nth
    key = tl.load(lists.key_ptr + at, mask=mask, other=0)
    return tl.where(mask, key, none(key)), tl.load(lists.order_ptr + at, mask=mask, other=0)


@triton.jit
def claim_owned(state, order_ptr, truth, anchor, is_claim, A):
    """Claim anchors [g, k] for rows [g, 1], and tell which nobody claimed before.

    A contested state is CONTESTED and the largest row that claims the anchor.
    So each anchor with claims belongs to one of them, whoever wins it. The second claim lists a contested anchor, and clears
    its place in ``best`` and, if there is one, in ``order``, which nobody set before.
    """
    cell = tl.where(is_claim, truth.image * A + anchor, 0)
    # Not tl.broadcast_to: with one row, Triton 3.7's interpreter reads past the end of what an atomic operation broadcasts.
    row = truth.row + tl.zeros(cell.shape, tl.int32)
    before = tl.atomic_max(state.row_ptr + cell, row, mask=is_claim, sem="relaxed")
    is_late = is_claim & (before >= 0)
    owner = tl.maximum(row, tl.where(is_late & (before < CONTESTED), before, 0))
    earlier = tl.atomic_max(state.row_ptr + cell, owner + CONTESTED, mask=is_late, sem="relaxed")
    is_second = is_late & (earlier < CONTESTED)  # of one claim only, whatever came in between
    tl.store(state.best_ptr + cell, tl.full(cell.shape, LOWEST, tl.int64), mask=is_second)
    if order_ptr is not None:
        tl.store(order_ptr + cell, tl.zeros(cell.shape, tl.int32), mask=is_second)
    append(state.contested, truth.image, anchor, is_second, A)
    return is_claim & ~is_late


@triton.jit
def owner_of(state):
    """The claiming row that states [...] name; negative for background."""
    return tl.where(state >= CONTESTED, state - CONTESTED, state)
