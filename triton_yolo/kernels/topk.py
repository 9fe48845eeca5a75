"""Tile functions that keep the K best of a stream of candidates, independent of the order in which they come.

A candidate is a value, not NaN, and an index; of equal values the lower index is better. Its key are the bits of the value,
turned so that they order as the floats do, and its order is the inverted index. The two are compared apart: what a warp finds
of 32-bit numbers takes one instruction. ``pack`` makes one int64 of both, for atomic operations.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(1 << 63))
_LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


def list_sizes(topk: int, num_anchors: int) -> dict[str, int]:
    """K, and the places of a list: not fewer than lanes in a warp, with one each its best and worst are found fastest."""
    k = min(topk, num_anchors)
    return {"K": k, "KP": max(triton.next_power_of_2(max(k, 1)), 32)}


@triton.jit
def bits_of(value):
    """Bits of values, which order as those do where they are not negative."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def ordered(value, index):
    """Key and order of values with an index."""
    value = tl.where(value == 0, 0.0, value).to(value.dtype)  # -0 is 0
    bits = bits_of(value)
    if value.dtype == tl.float64:
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key, (0x7FFFFFFF - index).to(tl.int32)


@triton.jit
def none(key):
    """Lower than the key of any candidate, of the same type."""
    if key.dtype == tl.int64:
        lowest = tl.full((), LOWEST, tl.int64)
    else:
        lowest = tl.full((), -(1 << 31), tl.int32)
    return lowest


@triton.jit
def pack(value, index, IS_WIDE: tl.constexpr):
    """One int64 and the order; in float64, ``IS_WIDE``, the value fills the int64, and only the order tells the index."""
    key, order = ordered(value, index)
    if not IS_WIDE:
        key = (key.to(tl.int64) << 32) | order.to(tl.int64)
    return key, order


@triton.jit
def unpack_index(packed, order, IS_WIDE: tl.constexpr):
    if not IS_WIDE:
        order = (packed & 0xFFFFFFFF).to(tl.int32)
    return 0x7FFFFFFF - order


@triton.jit
def value_of(key):
    """Value of keys of values >= 0."""
    if key.dtype == tl.int64:
        value = key.to(tl.float64, bitcast=True)
    else:
        value = key.to(tl.float32, bitcast=True)
    return value


@triton.jit
def index_of(order):
    return 0x7FFFFFFF - order


@triton.jit
def empty_list(ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """K empty places a row [g, KP]: distinct orders, so that one at a time is the worst; past K never the worst."""
    place = tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, KP)[None, :]
    if tl.float64 == DTYPE:
        best = tl.where(place < K, tl.full((), LOWEST, tl.int64), tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64))
    else:
        best = tl.where(place < K, tl.full((), -(1 << 31), tl.int32), tl.full((), 0x7FFFFFFF, tl.int32))
    return best, -2 - place


@triton.jit
def _best_of(key, order):
    """The best [g, 1] of candidates [g, n]."""
    top = tl.max(key, 1)[:, None]
    return top, tl.max(tl.where(key == top, order, -1), 1)[:, None]


@triton.jit
def _worst_of(best, best_order):
    worst = tl.min(best, 1)[:, None]
    return worst, tl.min(tl.where(best == worst, best_order, _LAST), 1)[:, None]


@triton.jit
def keep_best(best, best_order, key, order):
    """Merge candidates [g, n], ``none`` for what is not one, into the lists [g, KP]."""
    top, top_order = _best_of(key, order)
    worst, worst_order = _worst_of(best, best_order)
    takes = (top > worst) | ((top == worst) & (top_order > worst_order) & (top > none(top)))
    while tl.max(takes.to(tl.int32)) > 0:
        is_worst = takes & (best == worst) & (best_order == worst_order)
        best, best_order = tl.where(is_worst, top, best), tl.where(is_worst, top_order, best_order)
        key = tl.where(takes & (key == top) & (order == top_order), none(key), key)
        top, top_order = _best_of(key, order)
        worst, worst_order = _worst_of(best, best_order)
        takes = (top > worst) | ((top == worst) & (top_order > worst_order) & (top > none(top)))
    return best, best_order


@triton.jit
def best_of(key, order, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """The list [g, KP] of the K best of candidates [g, n], ``none`` for what is not one: as ``keep_best``, but nothing goes."""
    best, best_order = empty_list(key.shape[0], K, KP, DTYPE)
    place = tl.arange(0, KP)[None, :]
    top, top_order = _best_of(key, order)
    nth = 0
    while (tl.max(top) > none(top)) & (nth < K):
        is_nth = (place == nth) & (top > none(top))
        best, best_order = tl.where(is_nth, top, best), tl.where(is_nth, top_order, best_order)
        key = tl.where(order == top_order, none(key), key)
        top, top_order = _best_of(key, order)
        nth += 1
    return best, best_order


@triton.jit
def merged(best, best_order, K: tl.constexpr, KP: tl.constexpr, DTYPE: tl.constexpr):
    """One list [1, KP] of the best in several [parts, KP]."""
    place = tl.zeros((best.shape[0], 1), tl.int32) + tl.arange(0, KP)[None, :]
    key = tl.reshape(tl.where(place < K, best, none(best)), (1, best.numel))
    all_best, all_order = empty_list(1, K, KP, DTYPE)
    return keep_best(all_best, all_order, key, tl.reshape(best_order, (1, best.numel)))


@triton.jit
def is_among(key, order, best, best_order):
    """Whether candidates [g, n] that were merged into the lists [g, KP] are still in them."""
    worst, worst_order = _worst_of(best, best_order)
    return (key > none(key)) & ((key > worst) | ((key == worst) & (order >= worst_order)))


@triton.jit
def is_taken(best, K: tl.constexpr, KP: tl.constexpr):
    """Which places of the lists [g, KP] hold a candidate."""
    return (best > none(best)) & (tl.arange(0, KP) < K)[None, :]


@triton.jit
def rank(best, best_order, K: tl.constexpr, KP: tl.constexpr):
    """How many of its list [g, KP] are better than each of them; K for what is no candidate."""
    other, own = best[:, None, :], best[:, :, None]
    is_better = (other > own) | ((other == own) & (best_order[:, None, :] > best_order[:, :, None]))
    result = tl.sum((is_better & (tl.arange(0, KP) < K)[None, None, :]).to(tl.int32), 2)
    return tl.where(is_taken(best, K, KP), result, K)
