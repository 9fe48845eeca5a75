"""YOLOX's criterion after its claims: what belongs to positives by ground-truth row, the rest of the gradient in words."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Tensor2, Tensor3
from .boxes import log_product, rounded, sigmoid_of, split_sigmoid
from .decode import Raw, load_raw, raw_corners, store_raw
from .fill import fill
from .grid import Cell, cell_centres, sized
from .members import SPREAD
from .reduce import total
from .rows import load_row_boxes
from .simota import settled, store_matches
from .simota_claims import SLOTS
from .simota_cost import pair_iou
from .yolox import box_gradient, box_losses, store_terms, target_boxes


class Positives(NamedTuple):
    """What a program leaves of its own positives, one after the other, in as many places (N, SLOTS) as its rows have claims."""

    image_ptr: Any
    anchor_ptr: Any
    label_ptr: Any
    iou_ptr: Any


class Gradient(NamedTuple):
    """That of raw boxes (B, A, 4), objectness (B, A) and class logits (B, A, C)."""

    boxes: Tensor3
    obj_logits: Tensor2
    logits: Tensor3


class Results(NamedTuple):
    """Loss (), its terms, () each, and positives per ground truth (); or ``counts`` (3,) of an assignment alone."""

    loss_ptr: Any
    terms: Any
    num_fg_ptr: Any
    counts_ptr: Any


class Product(NamedTuple):
    """Constants of the class terms: positives and classes a tile, and how many tiles' factors are multiplied."""

    BLOCK_P: int
    BLOCK_C: int
    GROUP: int


# ---- positives


@triton.jit
def _count(ptr):
    return tl.sum(tl.load(ptr + tl.arange(0, SPREAD)))


@triton.jit
def _scale(tally, DTYPE: tl.constexpr):
    """What the gradient of a sum over anchors is multiplied by."""
    return 1 / tl.maximum(_count(tally.counts_ptr), 1).to(DTYPE)


@triton.jit
def _box_terms(out, prob_ptr, own, raw, cell, scale, rows, l1_gain_ptr, iou_gain, A, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Sums of box and L1 loss, and NaN if a box logit is not finite, of which the formulas may make nothing, else 0.

    Writes the gradient of boxes and objectness, if there is one.
    """
    gt, target = target_boxes(own.row, own.is_pos, rows.xywh_ptr, cell.x, cell.y, cell.stride, DTYPE)
    box, l1 = box_losses(raw, gt, target, own.is_pos, cell.stride, KIND)
    if out is not None:
        d_raw = box_gradient(raw, gt, target, own.is_pos, cell.stride, tl.load(l1_gain_ptr) > 0, iou_gain, KIND)
        d_raw = Raw(d_raw.dx * scale, d_raw.dy * scale, d_raw.log_w * scale, d_raw.log_h * scale)
        store_raw(out.boxes, own.image, d_raw, own.anchor, own.is_pos)
        prob = tl.load(prob_ptr + own.image * A + own.anchor, mask=own.is_pos, other=0.0)
        obj = out.obj_logits
        ptr = obj.ptr + own.image * obj.row + own.anchor.to(tl.int64) * obj.column
        tl.store(ptr, rounded((prob - 1) * scale, obj.ptr.dtype.element_ty), mask=own.is_pos)
    return tl.sum(box), tl.sum(l1), tl.sum(raw.dx * 0.0 + raw.dy * 0.0 + raw.log_w * 0.0 + raw.log_h * 0.0)


@triton.jit
def _leave(positives, own, label, iou):
    """Leave the positives among claims [n] without gaps, from the program's first place on."""
    nth = tl.cumsum(own.is_pos.to(tl.int32), 0) - 1
    place = tl.program_id(0) * own.slot.shape[0] + nth
    tl.store(positives.image_ptr + place, own.image.to(tl.int32), mask=own.is_pos)
    tl.store(positives.anchor_ptr + place, own.anchor, mask=own.is_pos)
    tl.store(positives.label_ptr + place, label, mask=own.is_pos)
    tl.store(positives.iou_ptr + place, iou, mask=own.is_pos)
    tl.debug_barrier()


@triton.jit
def _class_terms(
    out, logits, positives, first, number, scale, C: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum of the class losses of ``number`` positives from the ``first`` place on; writes the gradient, if there is one.

    The sum of softplus is the logarithm of a product of factors 1 + e, kept as its excess over 1.
    """
    total = tl.zeros((BLOCK_P, BLOCK_C), DTYPE)
    hits = tl.zeros((BLOCK_P,), DTYPE)
    start = 0
    while start < number:
        place = start + tl.arange(0, BLOCK_P)
        mask = place < number
        image = tl.load(positives.image_ptr + first + place, mask=mask, other=0).to(tl.int64)
        anchor = tl.load(positives.anchor_ptr + first + place, mask=mask, other=0).to(tl.int64)
        label = tl.load(positives.label_ptr + first + place, mask=mask, other=-1)
        score = tl.load(positives.iou_ptr + first + place, mask=mask, other=0.0)
        offs = image * logits.image + anchor * logits.anchor
        at_label = tl.load(logits.ptr + offs + label.to(tl.int64) * logits.channel, mask=mask, other=0.0).to(DTYPE)
        hits += at_label * score
        for first_c in range(0, C, GROUP * BLOCK_C):
            excess = tl.zeros((BLOCK_P, BLOCK_C), DTYPE)
            for i in tl.static_range(GROUP):
                offs_c = first_c + i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
                is_logit = mask[:, None] & (offs_c < C)
                ptr = logits.ptr + offs[:, None] + offs_c.to(tl.int64) * logits.channel
                x = tl.load(ptr, mask=is_logit, other=-1e4).to(DTYPE)  # a softplus of 0
                is_up, e = split_sigmoid(x)
                total = tl.fma(x, tl.where(is_up, 1.0, 0.0).to(DTYPE), tl.fma(x, 0.0, total))  # NaN of infinity
                excess = tl.fma(excess, 1 + e, e)
                if out is not None:
                    error = sigmoid_of(is_up, e, DTYPE) - tl.where(offs_c == label[:, None], score[:, None], 0.0)
                    ptr = out.ptr + (image * out.image + anchor * out.anchor)[:, None] + offs_c.to(tl.int64) * out.channel
                    tl.store(ptr, rounded(error * scale, out.ptr.dtype.element_ty), mask=is_logit)
            total += log_product(excess)
        start += BLOCK_P
    return tl.sum(total) - tl.sum(hits)


@triton.jit(do_not_specialize=["N"])
def _yolox_positive_kernel(
    out, prob_ptr, matches, sums_ptr, positives, state, claims, tally, preds, rows, grid, l1_gain_ptr, iou_gain: tl.float64, N,
    RULE: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program settles the anchors that BLOCK_G rows own, and sums their losses into ``sums`` (3, programs): box, class, L1.

    It writes their gradient, if there is ``out``, and their rows and IoU, if those are wanted.
    """
    grid = sized(grid)
    STRIDES: tl.constexpr = RULE.STRIDES
    own = settled(state, claims, rows, N, grid, tl.float64 == RULE.DTYPE, BLOCK_G)
    number = tl.sum(own.is_pos.to(tl.int32))
    box, cls, l1 = tl.zeros((), RULE.DTYPE), tl.zeros((), RULE.DTYPE), tl.zeros((), RULE.DTYPE)
    if number > 0:
        x, y, stride = cell_centres(own.anchor, grid, STRIDES, RULE.DTYPE)
        cell = Cell(own.anchor, x - 0.5, y - 0.5, stride)
        raw = load_raw(preds.boxes, own.image, own.anchor, own.is_pos, RULE.DTYPE)
        gt = load_row_boxes(rows.xyxy_ptr, 4, 1, own.row, own.is_pos, RULE.DTYPE)
        iou = pair_iou(gt, raw_corners(raw, cell.x, cell.y, stride))
        if matches.row_ptr is not None:
            store_matches(matches, own, iou, grid.A)
        label = tl.load(rows.label_ptr + own.row, mask=own.is_pos, other=-1).to(tl.int32)
        _leave(positives, own, label, iou)
        scale = _scale(tally, RULE.DTYPE)
        box, l1, poison = _box_terms(
            out, prob_ptr, own, raw, cell, scale, rows, l1_gain_ptr, iou_gain, grid.A, KIND, RULE.DTYPE
        )
        first = tl.program_id(0) * BLOCK_G * SLOTS
        class_out = None if out is None else out.logits
        cls = poison + _class_terms(
            class_out, preds.logits, positives, first, number, scale, RULE.C, RULE.DTYPE, PRODUCT.BLOCK_P, PRODUCT.BLOCK_C,
            PRODUCT.GROUP,
        )  # fmt: skip
    programs = tl.num_programs(0)
    tl.store(sums_ptr + tl.program_id(0), box)
    tl.store(sums_ptr + programs + tl.program_id(0), cls)
    tl.store(sums_ptr + 2 * programs + tl.program_id(0), l1)
    tl.atomic_add(tally.poison_ptr, cls, mask=cls != cls, sem="relaxed")


@triton.jit(do_not_specialize=["programs", "others"])
def _yolox_finish_kernel(
    results, spoilt, sums_ptr, tally, objectness, l1_gain_ptr, iou_gain: tl.float64, programs, others, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up what others found, and writes the results.

    After a prediction that takes part and is not finite all programs make every gradient NaN: ``spoilt``, if there is one.
    """
    poison = tl.load(tally.poison_ptr)
    is_broken = poison != poison
    if spoilt is not None:
        size = tl.where(is_broken, spoilt.size, 0)
        fill(spoilt.ptr, float("nan"), size, tl.program_id(0), tl.num_programs(0), BLOCK)
    if tl.program_id(0) == 0:
        positives, num_gt = _count(tally.counts_ptr), _count(tally.counts_ptr + SPREAD)
        if results.counts_ptr is not None:
            tl.store(results.counts_ptr, positives.to(tl.int64))
            tl.store(results.counts_ptr + 1, num_gt.to(tl.int64))
            tl.store(results.counts_ptr + 2, is_broken.to(tl.int64))
        else:
            obj = total(objectness.sum_ptr, others, DTYPE, BLOCK)
            box, cls = total(sums_ptr, programs, DTYPE, BLOCK), total(sums_ptr + programs, programs, DTYPE, BLOCK)
            l1 = total(sums_ptr + 2 * programs, programs, DTYPE, BLOCK)
            normaliser = tl.where(is_broken, float("nan"), tl.maximum(positives, 1).to(DTYPE)).to(DTYPE)
            num_gt = tl.maximum(num_gt, 1).to(DTYPE)
            if tl.float32 == DTYPE:
                tl.store(results.num_fg_ptr, tl.div_rn(positives.to(DTYPE), num_gt))
            else:
                tl.store(results.num_fg_ptr, positives.to(DTYPE) / num_gt)
            store_terms(results.loss_ptr, results.terms, box, obj, cls, l1, normaliser, l1_gain_ptr, iou_gain)


# ---- background


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
    out_ptr, prob_ptr, tally, words: tl.int64, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program writes BLOCK words of eight bytes of the gradient of background: zeros, and the objectness of each anchor.

    The channels of an anchor are neighbours, and at least as many as a word holds.
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    BITS: tl.constexpr = OUT.primitive_bitwidth
    EACH: tl.constexpr = 64 // BITS
    scale = _scale(tally, DTYPE)
    first_word = tl.program_id(0).to(tl.int64) * BLOCK
    word = tl.arange(0, BLOCK)
    mask = first_word + word < words
    first_anchor = first_word * EACH // CHANNELS
    channel = (first_word * EACH - first_anchor * CHANNELS).to(tl.int32) + word * EACH  # of the word's first number
    anchor = (channel + CHANNELS - 5) // CHANNELS  # whose objectness comes next
    at = anchor * CHANNELS + 4 - channel
    has_obj = mask & (at < EACH)
    prob = tl.load(prob_ptr + first_anchor + anchor, mask=has_obj, other=0.0)
    value = tl.where(has_obj, _bits(prob * scale, OUT) << (at * BITS).to(tl.int64), 0)
    tl.store(out_ptr.to(tl.pointer_type(tl.int64)) + first_word + word, value, mask=mask)


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
def _yolox_background_kernel(out, prob_ptr, tally, A, CHANNELS, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """The same for BLOCK_A anchors of one image, in any layout; neighbours in memory if possible."""
    OUT: tl.constexpr = out.ptr.dtype.element_ty
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = offs_a < A
    scale = _scale(tally, DTYPE)
    prob = tl.load(prob_ptr + image * A + offs_a, mask=mask, other=0.0)
    zero = tl.zeros((BLOCK_A,), OUT)
    offs = offs_a.to(tl.int64) * out.anchor
    ptr = _fill(out.ptr + image * out.image, offs, out.channel, 4, zero, mask)
    tl.store(ptr + offs, rounded(prob * scale, OUT), mask=mask)
    _fill(ptr + out.channel, offs, out.channel, CHANNELS - 5, zero, mask)
