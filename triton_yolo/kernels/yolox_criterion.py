"""YOLOX's criterion after its claims: what belongs to positives by ground-truth row, the rest of the gradient in words."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .boxes import rounded
from .decode import Raw, load_raw, store_raw
from .grid import cell_centres
from .reduce import total
from .simota import SLOTS, load_claims, settled
from .yolox import box_gradient, box_losses, class_losses, store_logit_gradient, store_terms, target_boxes


class Positives(NamedTuple):
    """Of the claims (N, SLOTS) that a row owns: the row that they are matched with, -1 for others, and the IoU."""

    row_ptr: Any
    iou_ptr: Any


class Sums(NamedTuple):
    """Sums (3, N) of box, class and L1 loss of the positives that each row owns; (2, N) their number, and 1 if a row counts."""

    ptr: Any
    count_ptr: Any


@triton.jit
def _by_row(x):
    """Sums [g] over the claims [n] of each row."""
    return tl.sum(tl.reshape(x, (x.shape[0] // SLOTS, SLOTS)), 1)


@triton.jit
def _sum_losses(sums, own, preds, rows, g, grid, N, C, RULE: tl.constexpr, KIND: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the sums of the losses of the positives that rows ``g`` own.

    Box logits that are not finite, of which the formulas may make nothing, show in the class loss.
    """
    STRIDES: tl.constexpr = RULE.STRIDES
    x, y, stride = cell_centres(own.anchor, grid, STRIDES, RULE.DTYPE)
    raw = load_raw(preds.boxes, own.image, own.anchor, own.is_pos, RULE.DTYPE)
    gt, target = target_boxes(own.row, own.is_pos, rows.xywh_ptr, x - 0.5, y - 0.5, stride, RULE.DTYPE)
    box, l1 = box_losses(raw, gt, target, own.is_pos, stride, KIND)
    label = tl.load(rows.label_ptr + own.row, mask=own.is_pos, other=-1).to(tl.int32)
    offs = own.image * preds.logits.image + own.anchor.to(tl.int64) * preds.logits.anchor
    cls = class_losses(preds.logits, offs, own.is_pos, label, own.iou, C, RULE.DTYPE, BLOCK_C)
    cls += raw.dx * 0.0 + raw.dy * 0.0 + raw.log_w * 0.0 + raw.log_h * 0.0
    tl.store(sums.ptr + g, _by_row(box), mask=g < N)
    tl.store(sums.ptr + N + g, _by_row(cls), mask=g < N)
    tl.store(sums.ptr + 2 * N + g, _by_row(l1), mask=g < N)


@triton.jit(do_not_specialize=["N"])
def _yolox_settle_kernel(
    sums, positives, iou_ptr, state, claims, preds, rows, grid, N, C, RULE: tl.constexpr, KIND: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program settles the anchors that BLOCK_G rows own, and sums their losses. It writes ``iou`` (B, A) if it is wanted."""
    own = settled(state, claims, preds, rows, tl.program_id(0), N, grid, RULE, BLOCK_G)
    tl.store(positives.row_ptr + own.slot, own.row, mask=own.slot < N * SLOTS)
    tl.store(positives.iou_ptr + own.slot, own.iou, mask=own.slot < N * SLOTS)
    if iou_ptr is not None:
        tl.store(iou_ptr + own.image * grid.A + own.anchor, own.iou, mask=own.is_pos)
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_gt = tl.load(rows.image_ptr + g, mask=g < N, other=-1) >= 0
    tl.store(sums.count_ptr + g, _by_row(own.is_pos.to(tl.int32)), mask=g < N)
    tl.store(sums.count_ptr + N + g, is_gt.to(tl.int32), mask=g < N)
    if tl.max(own.row) >= 0:
        _sum_losses(sums, own, preds, rows, g, grid, N, C, RULE, KIND, BLOCK_C)
    else:
        nothing = tl.zeros((BLOCK_G,), RULE.DTYPE)
        tl.store(sums.ptr + g, nothing, mask=g < N)
        tl.store(sums.ptr + N + g, nothing, mask=g < N)
        tl.store(sums.ptr + 2 * N + g, nothing, mask=g < N)


@triton.jit(do_not_specialize=["N", "programs"])
def _yolox_finish_kernel(
    loss_ptr, terms_ptr, num_fg_ptr, normaliser_ptr, counts_ptr, sums, objectness, l1_gain_ptr, iou_gain: tl.float64, N,
    programs, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up what rows and the programs of the objectness found.

    It writes the loss, its terms, the normaliser and positives per ground truth; or ``counts`` (3,) alone, if they are wanted.
    """
    positives, num_gt = total(sums.count_ptr, N, tl.int32, BLOCK), total(sums.count_ptr + N, N, tl.int32, BLOCK)
    obj, cls = total(objectness.sum_ptr, programs, DTYPE, BLOCK), total(sums.ptr + N, N, DTYPE, BLOCK)
    is_broken = obj + cls != obj + cls
    if counts_ptr is not None:
        tl.store(counts_ptr, positives.to(tl.int64))
        tl.store(counts_ptr + 1, num_gt.to(tl.int64))
        tl.store(counts_ptr + 2, is_broken.to(tl.int64))
    else:
        box, l1 = total(sums.ptr, N, DTYPE, BLOCK), total(sums.ptr + 2 * N, N, DTYPE, BLOCK)
        normaliser = tl.where(is_broken, float("nan"), tl.maximum(positives, 1).to(DTYPE)).to(DTYPE)
        tl.store(normaliser_ptr, normaliser)
        num_gt = tl.maximum(num_gt, 1).to(DTYPE)
        if tl.float32 == DTYPE:
            tl.store(num_fg_ptr, tl.div_rn(positives.to(DTYPE), num_gt))
        else:
            tl.store(num_fg_ptr, positives.to(DTYPE) / num_gt)
        store_terms(loss_ptr, terms_ptr, box, obj, cls, l1, normaliser, l1_gain_ptr, iou_gain)


# ---- gradient


@triton.jit
def _bits(x, DTYPE: tl.constexpr):
    """The bits of ``x``, rounded to a type, as int64."""
    if DTYPE.primitive_bitwidth == 64:
        bits = x.to(tl.int64, bitcast=True)
    elif DTYPE.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    else:
        bits = rounded(x, DTYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return bits


@triton.jit
def _yolox_words_kernel(
    out_ptr, prob_ptr, normaliser_ptr, words: tl.int64, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program writes BLOCK words of eight bytes of the gradient of background: zeros, and the objectness of each anchor.

    The channels of an anchor are neighbours, and at least as many as a word holds.
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    BITS: tl.constexpr = OUT.primitive_bitwidth
    EACH: tl.constexpr = 64 // BITS
    scale = 1 / tl.load(normaliser_ptr).to(DTYPE)
    first_word = tl.program_id(0).to(tl.int64) * BLOCK
    word = tl.arange(0, BLOCK)
    mask = first_word + word < words
    first_anchor = first_word * EACH // CHANNELS
    channel = (first_word * EACH - first_anchor * CHANNELS).to(tl.int32) + word * EACH  # of the word's first number
    anchor = (channel + CHANNELS - 5) // CHANNELS  # whose objectness comes next
    at = anchor * CHANNELS + 4 - channel
    has_obj = mask & (at < EACH)
    prob = tl.load(prob_ptr + first_anchor + anchor, mask=has_obj, other=0.0)
    zero = _bits(scale * 0.0, OUT)  # NaN if the normaliser is
    zeros = zero
    for i in tl.static_range(1, EACH):
        zeros = zeros | (zero << (i * BITS))
    value = tl.where(has_obj, _bits(prob * scale, OUT) << (at * BITS).to(tl.int64), 0)
    tl.store(out_ptr.to(tl.pointer_type(tl.int64)) + first_word + word, zeros | value, mask=mask)


@triton.jit
def _fill(ptr, offs, step, number, value, mask):
    """Write ``value`` [n] at ``offs`` in ``number`` channels, ``step`` apart, from ``ptr`` on; where the next one begins."""
    i = 0
    while i < number:
        tl.store(ptr + offs, value, mask=mask)
        ptr += step
        i += 1
    return ptr


@triton.jit
def _yolox_background_kernel(out, prob_ptr, normaliser_ptr, A, CHANNELS, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """The same for BLOCK_A anchors of one image, in any layout; neighbours in memory if possible."""
    OUT: tl.constexpr = out.ptr.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = offs_a < A
    scale = 1 / tl.load(normaliser_ptr).to(DTYPE)
    prob = tl.load(prob_ptr + image * A + offs_a, mask=mask, other=0.0)
    zero = rounded(tl.zeros((BLOCK_A,), DTYPE) * scale, OUT)  # NaN if the normaliser is
    offs = offs_a.to(tl.int64) * out.anchor
    ptr = _fill(out.ptr + image * out.image, offs, out.channel, 4, zero, mask)
    tl.store(ptr + offs, rounded(prob * scale, OUT), mask=mask)
    _fill(ptr + out.channel, offs, out.channel, CHANNELS - 5, zero, mask)


@triton.jit(do_not_specialize=["N"])
def _yolox_positive_kernel(
    out, normaliser_ptr, positives, claims, preds, rows, l1_gain_ptr, grid, iou_gain: tl.float64, N, RULE: tl.constexpr,
    KIND: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient of all channels of the positives that BLOCK_G rows own."""
    STRIDES: tl.constexpr = RULE.STRIDES
    slot = tl.program_id(0) * BLOCK_G * SLOTS + tl.arange(0, BLOCK_G * SLOTS)
    row = tl.load(positives.row_ptr + slot, mask=slot < N * SLOTS, other=-1)
    is_pos = row >= 0
    if tl.max(row) >= 0:
        image, anchor, _, _ = load_claims(claims, rows, slot, N)
        scale = 1 / tl.load(normaliser_ptr).to(RULE.DTYPE)
        x, y, stride = cell_centres(anchor, grid, STRIDES, RULE.DTYPE)
        raw = load_raw(preds, image, anchor, is_pos, RULE.DTYPE)
        gt, target = target_boxes(row, is_pos, rows.xywh_ptr, x - 0.5, y - 0.5, stride, RULE.DTYPE)
        d_raw = box_gradient(raw, gt, target, is_pos, stride, tl.load(l1_gain_ptr) > 0, iou_gain, KIND)
        d_raw = Raw(d_raw.dx * scale, d_raw.dy * scale, d_raw.log_w * scale, d_raw.log_h * scale)
        store_raw(out, image, d_raw, anchor, is_pos)
        label = tl.load(rows.label_ptr + row, mask=is_pos, other=-1).to(tl.int32)
        score = tl.load(positives.iou_ptr + slot, mask=is_pos, other=0.0)
        store_logit_gradient(out, preds, image, anchor, is_pos, is_pos, label, score, scale, 5 + RULE.C, RULE.DTYPE, BLOCK_C)
