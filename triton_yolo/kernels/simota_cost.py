"""Costs of SimOTA (arXiv 2107.08430), of pairs of rows and the anchors that take part in their image: tile functions."""

from typing import NamedTuple

import triton
import triton.language as tl

from .boxes import log_not, log_rest, overlap

_INFEASIBLE_COST: tl.constexpr = tl.constexpr(1e6)
_LEAST_PRODUCT: tl.constexpr = tl.constexpr(1e-30)
"""A product of probabilities below it may have lost factors: they are multiplied again, fewer at a time."""


class Product(NamedTuple):
    """Constants of the cost of no class: classes a tile, and how many tiles' factors are multiplied before the logarithm."""

    BLOCK_C: int
    GROUP: int


@triton.jit
def pair_iou(gt, box):
    """IoU, 0 where it is undefined."""
    iou = overlap(gt.x1, gt.y1, gt.x2, gt.y2, box.x1, box.y1, box.x2, box.y2, "iou", 0.0)
    return tl.where(iou > 0, iou, 0.0).to(iou.dtype)


@triton.jit
def _root(logits):
    """Square root of the probability."""
    if logits.dtype == tl.float64:
        root = 1 / tl.sqrt(1 + tl.exp(-logits))
    else:
        root = tl.math.rsqrt(1 + tl.exp2(logits * -1.4426950408889634))
    return root


@triton.jit
def _clamped(logs):
    """Not below -100; NaN stays."""
    return tl.where(logs < -100, -100.0, logs).to(logs.dtype)


@triton.jit
def _obj_root(preds, image, anchor, mask, DTYPE: tl.constexpr):
    ptr = preds.obj_logits.ptr + image * preds.obj_logits.row + anchor.to(tl.int64) * preds.obj_logits.column
    return _root(tl.load(ptr, mask=mask, other=0.0).to(DTYPE))


@triton.jit
def _no_class(
    logits,
    offs,
    mask,
    root,
    C: tl.constexpr,
    IS_SAFE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum of -log(1 - p) over the classes [n, 1], as the logarithm of products, and the least product [n, 1].

    ``IS_SAFE`` treats classes whose p is 1: their logarithm counts -100.
    """
    cost = tl.zeros((mask.shape[0], BLOCK_C), DTYPE)
    least = tl.full((mask.shape[0], BLOCK_C), 1, DTYPE)
    for first in range(0, C, GROUP * BLOCK_C):
        p, rest = tl.zeros((mask.shape[0], BLOCK_C), DTYPE), tl.full((mask.shape[0], BLOCK_C), 1, DTYPE)
        for i in tl.static_range(GROUP):
            offs_c = first + i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            ptr = logits.ptr + offs + offs_c.to(tl.int64) * logits.channel
            x = tl.load(ptr, mask=mask & (offs_c < C), other=-1e4).to(DTYPE)  # a probability of 0
            probs = _root(x) * root
            if IS_SAFE:
                cost += tl.where(probs >= 1, 100.0, 0.0).to(DTYPE)
                probs = tl.where(probs >= 1, 0.0, probs).to(DTYPE)
            p, rest = tl.fma(probs, rest, p), tl.fma(-probs, rest, rest)
        least = tl.minimum(least, rest)
        cost -= log_rest(p, rest)
    return tl.sum(cost, 1)[:, None], tl.min(least, 1)[:, None]


@triton.jit
def background_cost(preds, image, anchor, mask, C: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr):
    """Cost of no class [g, n] of anchors of images [g, 1]."""
    logits, obj = preds.logits, preds.obj_logits
    offs = tl.reshape(image * logits.image + anchor.to(tl.int64) * logits.anchor, (anchor.numel, 1))
    obj_offs = tl.reshape(image * obj.row + anchor.to(tl.int64) * obj.column, (anchor.numel, 1))
    is_asked = tl.reshape(mask, (anchor.numel, 1))
    # Objectness in the layout of the classes: broadcast from another, Triton 3.6 makes invalid code.
    root = _root(tl.load(obj.ptr + obj_offs, mask=is_asked, other=0.0).to(DTYPE))
    cost, least = _no_class(logits, offs, is_asked, root, C, False, DTYPE, PRODUCT.BLOCK_C, PRODUCT.GROUP)
    if tl.max((least < _LEAST_PRODUCT).to(tl.int32)) > 0:
        safe, _ = _no_class(logits, offs, is_asked, root, C, True, DTYPE, PRODUCT.BLOCK_C, 1)
        cost = tl.where(least < _LEAST_PRODUCT, safe, cost)
    return tl.reshape(cost, anchor.shape)


@triton.jit
def pair_costs(background, preds, truth, anchor, mask, iou, is_feasible, DTYPE: tl.constexpr):
    """Cost of rows [g, 1] with anchors [g, n], infinite rather than NaN."""
    offs = truth.image * preds.logits.image + anchor.to(tl.int64) * preds.logits.anchor + truth.label * preds.logits.channel
    logits = tl.load(preds.logits.ptr + offs, mask=mask, other=0.0).to(DTYPE)
    p = _root(logits) * _obj_root(preds, truth.image, anchor, mask, DTYPE)
    p = tl.where(p > 1, 1.0, p).to(DTYPE)
    # Cross entropy against the one-hot class differs from that against no class by two terms.
    cost = background + _clamped(log_not(p)) - _clamped(tl.log(p))
    cost = cost + 3 * -tl.log(iou + tl.full(iou.shape, 1e-8, DTYPE))
    cost = tl.where(is_feasible, cost, cost + _INFEASIBLE_COST)
    return tl.where(cost < float("inf"), cost, float("inf")).to(DTYPE)
