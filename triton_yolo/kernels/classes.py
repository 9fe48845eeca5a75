"""One dense pass over class logits as if no anchor had an object: cross entropy and gradient, knowing nothing of rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .boxes import halves, log_product, rounded, scalar, sigmoid_of, softplus, split_sigmoid
from .launch import INTERPRETED


def class_sizes(scores: Tensor) -> dict[str, int]:
    """Logits a step, steps and warps of a program: eight logits a thread and step, loads of 16 bytes, all on their way at once.

    What 8 steps give a thread is joined by eights: at most 64 factors below 2 have a product in float32.
    """
    per_image = scores.shape[1] * scores.shape[2]
    if INTERPRETED:
        return {"BLOCK": min(triton.next_power_of_2(per_image), 2**18), "STEPS": 1, "JOINS": 0, "num_warps": 4}
    return {"BLOCK": 1024, "STEPS": 8, "JOINS": 3, "num_warps": 4}


def class_layout(scores: Tensor, out: Tensor | None = None) -> dict[str, bool]:
    """Which of anchors and classes are next to each other in memory, and whether an image is one piece of it."""
    _, num_anchors, num_classes = scores.shape
    is_last = scores.stride(2) <= scores.stride(1)
    strides = (num_classes, 1) if is_last else (1, num_anchors)
    return {"IS_LAST": is_last, "IS_FLAT": all(x is None or x.stride()[1:] == strides for x in (scores, out))}


class Upstream(NamedTuple):
    """The gradient of the loss (), 1 if it is not given, and the normaliser (2,)."""

    grad_ptr: Any
    normaliser_ptr: Any


@triton.jit
def loss_scale(upstream, DTYPE: tl.constexpr):
    """What every gradient of a sum over anchors is multiplied by."""
    batch_size, normaliser = tl.load(upstream.normaliser_ptr + 1).to(DTYPE), tl.load(upstream.normaliser_ptr).to(DTYPE)
    if upstream.grad_ptr is not None:
        batch_size = tl.load(upstream.grad_ptr).to(DTYPE) * batch_size
    return batch_size / normaliser


@triton.jit
def _places(x, nth, A, C, IS_LAST: tl.constexpr, IS_FLAT: tl.constexpr):
    """Offsets within an image of the ``nth`` of its logits, counted along the dimension that is next to each other first."""
    offs = nth
    if not IS_FLAT:
        label = _label(nth, A, C, IS_LAST)
        anchor = nth // C if IS_LAST else nth - label * A
        offs = anchor.to(tl.int64) * x.anchor + label.to(tl.int64) * x.channel
    return offs


@triton.jit
def _label(nth, A, C, IS_LAST: tl.constexpr):
    return nth % C if IS_LAST else nth // A


@triton.jit
def _yolo11_class_kernel(
    partial_ptr, out, poison_ptr, upstream, logits, weights_ptr, cls_gain: tl.float64, A, C, count,
    IS_LAST: tl.constexpr, IS_FLAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    JOINS: tl.constexpr,
):  # fmt: skip
    """A program reads BLOCK * STEPS of the ``count`` class logits of an image, in the order of memory.

    It writes their cross entropy against 0 to ``partial`` (programs,), and its gradient to ``out``. Where a logit is not
    finite, the sum is NaN, and so becomes what is at ``poison``.
    """
    image = tl.program_id(1).to(tl.int64)
    x_ptr = logits.ptr + image * logits.image
    if out is not None:
        out_ptr = out.ptr + image * out.image
        scale = scalar(cls_gain, DTYPE) * loss_scale(upstream, DTYPE)
    larger = tl.zeros((BLOCK,), DTYPE)  # sum of max(x, 0)
    # The sum of log(1 + e) is the logarithm of a product. Its excess over 1 keeps what is small.
    excess = tl.zeros((BLOCK,), DTYPE)
    first = tl.program_id(0) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    for step in tl.static_range(STEPS):
        nth = first + step * BLOCK
        mask = nth < count
        x = tl.load(x_ptr + _places(logits, nth, A, C, IS_LAST, IS_FLAT), mask=mask, other=-1e4).to(DTYPE)  # a loss of 0
        is_up, e = split_sigmoid(x)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + _label(nth, A, C, IS_LAST), mask=mask, other=0.0).to(DTYPE)
        if partial_ptr is not None:
            if weights_ptr is not None:
                larger += softplus(x) * weight
            else:
                larger = tl.fma(x, tl.where(is_up, 1.0, 0.0).to(DTYPE), larger)  # NaN of -inf
                excess = tl.fma(excess, 1 + e, e)
        if out is not None:
            error = sigmoid_of(is_up, e, out.ptr.dtype.element_ty)
            if weights_ptr is not None:
                error = error * weight
            error = rounded(error * scale, out.ptr.dtype.element_ty)
            tl.store(out_ptr + _places(out, nth, A, C, IS_LAST, IS_FLAT), error, mask=mask)
    if partial_ptr is not None:
        for _ in tl.static_range(JOINS):
            a, b = halves(excess)
            excess = tl.fma(a, b, a + b)
            a, b = halves(larger)
            larger = a + b
        loss = tl.sum(larger + log_product(excess))
        if loss == float("inf"):  # NaN if that comes from a logit, not from a sum that is too large
            for again in range(STEPS):
                offs = first + again * BLOCK
                seen = tl.load(x_ptr + _places(logits, offs, A, C, IS_LAST, IS_FLAT), mask=offs < count, other=0.0)
                loss += tl.sum(seen.to(DTYPE) * 0.0)
        tl.store(partial_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), loss)
        if poison_ptr is not None:
            tl.atomic_add(poison_ptr, loss, mask=loss != loss, sem="relaxed")
