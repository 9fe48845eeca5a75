"""Tile functions that keep the K best of a stream of candidates, independent of the order of programs.

A candidate is a value, not NaN, and an index; of equal values the lower index is better. In float32 both are packed in one
int64, the bits of the value, turned so that they order as the floats do, above the inverted index. In float64 the bits fill
the int64, and the inverted index goes beside it. ``IS_WIDE`` says which. ``NONE`` is lower than the key of any candidate.
"""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(-0x7FFFFFFF00000000)
_LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


def list_sizes(topk: int, num_anchors: int) -> dict[str, int]:
    k = min(topk, num_anchors)
    return {"K": k, "KP": triton.next_power_of_2(max(k, 1))}


@triton.jit
def pack(value, index, IS_WIDE: tl.constexpr):
    """Key and order of values with an index."""
    order = _LAST - index
    value = tl.where(value == 0, 0.0, value).to(value.dtype)  # -0 is 0
    if IS_WIDE:
        bits = value.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (bits.to(tl.int64) << 32) | order.to(tl.int64)
    return key, order


@triton.jit
def unpack_positive(key, IS_WIDE: tl.constexpr):
    """Value of keys of values >= 0."""
    if IS_WIDE:
        value = key.to(tl.float64, bitcast=True)
    else:
        value = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return value


@triton.jit
def unpack_index(key, order, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        index = _LAST - order
    else:
        index = _LAST - (key & 0xFFFFFFFF).to(tl.int32)
    return index


@triton.jit
def empty_list(BLOCK_G: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """K empty slots a row [g, KP]: distinct keys below NONE, so that one at a time is the worst; past K never the worst."""
    slot = tl.zeros((BLOCK_G, 1), tl.int64) + tl.arange(0, KP)[None, :]
    best = tl.where(slot < K, NONE - 1 - slot, 0x7FFFFFFFFFFFFFFF)
    return best, tl.zeros((BLOCK_G, KP), tl.int32)


@triton.jit
def keep_best(best, best_order, key, order, IS_WIDE: tl.constexpr):
    """Merge candidates [g, n] into the lists [g, KP]. Their indices must be higher than those of all earlier ones."""
    worst, top = tl.maximum(tl.min(best, 1), NONE), tl.max(key, 1)
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
        key = tl.where(takes & is_top, NONE, key)
        worst, top = tl.maximum(tl.min(best, 1), NONE), tl.max(key, 1)
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
    return (key > NONE) & result


@triton.jit
def rank(best, best_order, K: tl.constexpr, KP: tl.constexpr, IS_WIDE: tl.constexpr):
    """How many of its list [g, KP] are better than each of them; K for what is no candidate."""
    slot = tl.arange(0, KP)[None, :]
    other, own = best[:, None, :], best[:, :, None]
    is_better = other > own
    if IS_WIDE:
        is_better = is_better | ((other == own) & (best_order[:, None, :] > best_order[:, :, None]))
    result = tl.sum((is_better & (slot < K)[:, None, :]).to(tl.int32), 2)
    return tl.where((best > NONE) & (slot < K), result, K)
