"""Tile functions that keep the K best of a stream of candidates, independent of the order of programs.

A candidate is a metric above 0 and an index; of equal metrics the lower index is better. In float32 both are packed in one
int64, the bits of the metric (which order as the positive floats do) above the inverted index. In float64 the bits fill the
int64, and the inverted index goes beside it. ``IS_WIDE`` says which. A key of 0 is no candidate.
"""

import triton
import triton.language as tl

_LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def pack(value, index, IS_WIDE: tl.constexpr):
    """Key and order of values >= 0 with an index; a value of 0 still has an index."""
    order = _LAST - index
    if IS_WIDE:
        key = value.to(tl.int64, bitcast=True)
    else:
        key = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | order.to(tl.int64)
    return key, order


@triton.jit
def unpack_index(key, order, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        index = _LAST - order
    else:
        index = _LAST - (key & 0xFFFFFFFF).to(tl.int32)
    return index


@triton.jit
def empty_list(BLOCK_G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """K empty slots a row [g, KP]: distinct negative keys, so that one at a time is the worst; past K never the worst."""
    slot = tl.zeros((BLOCK_G, 1), tl.int64) + tl.arange(0, KP)[None, :]
    best = tl.where(slot < K, -1 - slot, 0x7FFFFFFFFFFFFFFF)
    return best, tl.zeros((BLOCK_G, KP), tl.int32)


@triton.jit
def keep_best(best, best_order, key, order, IS_WIDE: tl.constexpr):
    """Merge candidates [g, n] into the lists [g, KP]. Their indices must be higher than those of all earlier ones."""
    worst, top = tl.maximum(tl.min(best, 1), 0), tl.max(key, 1)
    while tl.max((top > worst).to(tl.int32)) > 0:
        takes = (top > worst)[:, None]
        is_top = key == top[:, None]
        is_worst = best == tl.min(best, 1)[:, None]
        if IS_WIDE:
            top_order = tl.max(tl.where(is_top, order, -1), 1)[:, None]
            is_top = is_top & (order == top_order)
            is_worst = is_worst & (best_order == tl.min(tl.where(is_worst, best_order, _LAST), 1)[:, None])
            best_order = tl.where(takes & is_worst, top_order, best_order)
        best = tl.where(takes & is_worst, top[:, None], best)
        key = tl.where(takes & is_top, 0, key)
        worst, top = tl.maximum(tl.min(best, 1), 0), tl.max(key, 1)
    return best, best_order


@triton.jit
def is_among(key, order, best, best_order, IS_WIDE: tl.constexpr):
    """Whether candidates [g, n] that were merged into the lists [g, KP] are still in them."""
    worst = tl.min(best, 1)[:, None]
    if IS_WIDE:
        worst_order = tl.min(tl.where(best == worst, best_order, _LAST), 1)[:, None]
        result = (key > worst) | ((key == worst) & (order >= worst_order))
    else:
        result = key >= worst
    return (key > 0) & result
