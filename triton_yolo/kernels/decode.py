"""From what a head puts out to boxes: distance distributions (arXiv 2006.04388) and YOLOX's, forward and backward."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._signatures import Boxes, DecodeDFL, DecodeDFLBackward, DecodeYOLOX, DecodeYOLOXBackward, GradDist, GradPreds
from .arguments import compute_type, points_of, tensor3
from .boxes import box_columns, box_rows, expectation, rounded
from .grid import load_points
from .launch import INTERPRETED, Launch, Plan, Run, Workspace, cdiv, run
from .rows import Box


def decode_sizes(num_anchors: int, reg_max: int, logits: int = 2048) -> tuple[int, int]:
    """Anchors a program and warps of a kernel over the box logits, which holds so many ``logits`` of a side at a time.

    One warp with 64 logits of a side a thread: every load is 16 bytes, the softmax exchanges values between two threads at
    most, and there are no spills. Twice as many spilled backward in bfloat16.
    """
    bins = triton.next_power_of_2(reg_max)
    if INTERPRETED:
        return min(triton.next_power_of_2(num_anchors), max(1, 2**18 // bins)), 1
    return max(32, min(128, logits // bins)), 1


@triton.jit
def side_logits(dist, image, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Load the logits [RP, n] of one side of anchors ``offs_a`` of one image."""
    bins = tl.arange(0, RP)
    mask = mask_a[None, :]
    if R != RP:
        mask = mask & (bins < R)[:, None]
    offs = bins.to(tl.int64)[:, None] * dist.channel + offs_a.to(tl.int64)[None, :] * dist.anchor  # the same for every side
    ptr = dist.ptr + image * dist.image + tl.full((), side * R, tl.int64) * dist.channel
    logits = tl.load(ptr + offs, mask=mask, other=0.0).to(DTYPE)
    if R != RP:
        logits = tl.where((bins < R)[:, None], logits, float("-inf"))
    return logits


@triton.jit
def side_distance(dist, image, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Expected distance [n] of one side in cells."""
    logits = side_logits(dist, image, offs_a, mask_a, side, R, RP, DTYPE)
    return expectation(logits, tl.arange(0, RP)[:, None].to(DTYPE), R)[1]


@triton.jit
def store_side(out, image, values, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr):
    """Store what belongs to the logits [RP, n] of one side of anchors ``offs_a`` of one image."""
    bins = tl.arange(0, RP)
    mask = mask_a[None, :]
    if R != RP:
        mask = mask & (bins < R)[:, None]
    offs = (side * R + bins).to(tl.int64)[:, None] * out.channel + offs_a.to(tl.int64)[None, :] * out.anchor
    tl.store(out.ptr + image * out.image + offs, rounded(values, out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_boxes(boxes, image, offs_a, mask_a, DTYPE: tl.constexpr):
    """Boxes of anchors [n] of one image, from (B, A, 4) of any layout."""
    offs = offs_a.to(tl.int64)[:, None] * boxes.anchor + tl.arange(0, 4)[None, :] * boxes.channel
    return tl.load(boxes.ptr + image * boxes.image + offs, mask=mask_a[:, None], other=0.0).to(DTYPE)


@triton.jit
def load_angles(angles, image, anchor, mask, DTYPE: tl.constexpr):
    """Angles [...] of anchors [...], of one image or of an image each, from (B, A, 1) of any layout."""
    ptr = angles.ptr + image * angles.image + anchor.to(tl.int64) * angles.anchor
    return tl.load(ptr, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_strides(points, offs_a, mask_a, DTYPE: tl.constexpr):
    return tl.load(points.strides_ptr + offs_a * points.step, mask=mask_a, other=0.0).to(DTYPE)


@triton.jit
def _decode_dfl_kernel(
    boxes_ptr, dist, points, A, R: tl.constexpr, RP: tl.constexpr, HAS_STRIDES: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program reads the 4R logits of BLOCK_A anchors of one image once and writes their boxes (B, A, 4)."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    left = side_distance(dist, image, offs_a, mask_a, 0, R, RP, DTYPE)
    top = side_distance(dist, image, offs_a, mask_a, 1, R, RP, DTYPE)
    right = side_distance(dist, image, offs_a, mask_a, 2, R, RP, DTYPE)
    bottom = side_distance(dist, image, offs_a, mask_a, 3, R, RP, DTYPE)
    x, y = load_points(offs_a, mask_a, points, DTYPE)
    boxes = box_rows(x - left, y - top, x + right, y + bottom)
    if HAS_STRIDES:
        boxes = boxes * load_strides(points, offs_a, mask_a, DTYPE)[:, None]
    offs = (image * A + offs_a)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(boxes_ptr + offs, boxes, mask=mask_a[:, None])


@triton.jit
def _side_backward(out, dist, image, grad, offs_a, mask_a, side, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Write the gradient of one side's logits from that of its distance [n]."""
    bins = tl.arange(0, RP)[:, None].to(DTYPE)
    if R == 1:
        result = grad[None, :]
    else:
        probs, value = expectation(side_logits(dist, image, offs_a, mask_a, side, R, RP, DTYPE), bins, R)
        result = probs * (bins - value[None, :]) * grad[None, :]
    store_side(out, image, result, offs_a, mask_a, side, R, RP)


@triton.jit
def _decode_dfl_backward_kernel(
    out, grad_boxes, dist, points, A, R: tl.constexpr, RP: tl.constexpr, HAS_STRIDES: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A program reads the box gradients and logits of BLOCK_A anchors of one image and writes the gradient of the logits."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    grad = load_boxes(grad_boxes, image, offs_a, mask_a, DTYPE)
    if HAS_STRIDES:
        grad = grad * load_strides(points, offs_a, mask_a, DTYPE)[:, None]
    left, top, right, bottom = box_columns(grad)
    _side_backward(out, dist, image, -left, offs_a, mask_a, 0, R, RP, DTYPE)
    _side_backward(out, dist, image, -top, offs_a, mask_a, 1, R, RP, DTYPE)
    _side_backward(out, dist, image, right, offs_a, mask_a, 2, R, RP, DTYPE)
    _side_backward(out, dist, image, bottom, offs_a, mask_a, 3, R, RP, DTYPE)


class _DFLPlan(Plan):
    """Decode, or its gradient: ``kernel`` takes what it writes, tensors (B, A, ...) and the points."""

    def __init__(self, kernel: Any, x: DecodeDFL | DecodeDFLBackward) -> None:
        batch_size, num_anchors, _ = x.pred_dist.shape
        block, num_warps = decode_sizes(num_anchors, x.reg_max)
        self.grid = cdiv(num_anchors, block), batch_size, 1
        self.kernel = Launch(
            kernel, num_warps, R=x.reg_max, RP=triton.next_power_of_2(x.reg_max), HAS_STRIDES=x.strides is not None,
            DTYPE=compute_type(x.pred_dist.dtype), BLOCK_A=block,
        )  # fmt: skip
        super().__init__(Workspace(), self.kernel)


class _DecodeDFL(_DFLPlan):
    def __init__(self, x: DecodeDFL, out: Boxes, num_rows: int) -> None:
        super().__init__(_decode_dfl_kernel, x)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        points = points_of(address, x.anchor_points, x.strides)
        self.kernel(run.stream, self.grid, address(run.out.boxes), tensor3(address, x.pred_dist), points, x.pred_dist.shape[1])


class _DecodeDFLBackward(_DFLPlan):
    def __init__(self, x: DecodeDFLBackward, out: GradDist, num_rows: int) -> None:
        super().__init__(_decode_dfl_backward_kernel, x)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        self.kernel(
            run.stream, self.grid, tensor3(address, run.out.grad_pred_dist), tensor3(address, x.grad),
            tensor3(address, x.pred_dist), points_of(address, None, x.strides), x.pred_dist.shape[1],
        )  # fmt: skip


def decode_dfl(x: DecodeDFL) -> Boxes:
    out = x.allocate()
    if out.boxes.numel():
        run(_DecodeDFL, x, out)
    return out


def decode_dfl_backward(x: DecodeDFLBackward) -> GradDist:
    out = x.allocate()
    if out.grad_pred_dist.numel():
        run(_DecodeDFLBackward, x, out)
    return out


# ---- YOLOX


def channel_sizes(num_anchors: int, num_channels: int, stride_c: int) -> tuple[int, int, int]:
    """Anchors and channels a tile, and warps, of a pass over all channels: 16 a thread along whichever is contiguous."""
    channels = triton.next_power_of_2(num_channels)
    if INTERPRETED:
        block_a = min(max(triton.next_power_of_2(num_anchors), 32), 2**14)
        return block_a, min(channels, max(1, 2**20 // block_a)), 1
    if stride_c == 1:
        return 32, min(channels, 32), 4
    return 256, min(channels, 8), 4


class Raw(NamedTuple):
    """Raw boxes [n] of a YOLOX head."""

    dx: Any
    dy: Any
    log_w: Any
    log_h: Any


@triton.jit
def load_raw_at(preds, offs, mask, DTYPE: tl.constexpr):
    """The first four channels [...] of what begins ``offs`` [...] from the start."""
    # One channel after the other: 3 * channel can pass 2^31.
    ptr = preds.ptr + offs
    dx = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    ptr += preds.channel
    dy = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    ptr += preds.channel
    log_w = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    ptr += preds.channel
    log_h = tl.load(ptr, mask=mask, other=0.0).to(DTYPE)
    return Raw(dx, dy, log_w, log_h)


@triton.jit
def load_raw(preds, image, offs_a, mask_a, DTYPE: tl.constexpr):
    """The first four channels of anchors [n] of one image, or of an image each."""
    return load_raw_at(preds, image * preds.image + offs_a.to(tl.int64) * preds.anchor, mask_a, DTYPE)


@triton.jit
def store_raw(out, image, raw, offs_a, mask_a):
    offs = (image * out.image + offs_a.to(tl.int64) * out.anchor)[:, None]
    offs = offs + tl.arange(0, 4).to(tl.int64)[None, :] * out.channel
    boxes = rounded(box_rows(raw.dx, raw.dy, raw.log_w, raw.log_h), out.ptr.dtype.element_ty)
    tl.store(out.ptr + offs, boxes, mask=mask_a[:, None])


@triton.jit
def raw_corners(raw, x, y, stride):
    """Corners in pixels of raw boxes whose cells begin at (x, y) in cells."""
    x, y = (x + raw.dx) * stride, (y + raw.dy) * stride
    w, h = tl.exp(raw.log_w) * stride, tl.exp(raw.log_h) * stride
    return Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2)


@triton.jit
def raw_grad(corners, raw, stride):
    """Gradient of raw boxes from that of their corners."""
    x1, y1, x2, y2 = corners.x1 * stride, corners.y1 * stride, corners.x2 * stride, corners.y2 * stride
    return Raw(x1 + x2, y1 + y2, (x2 - x1) / 2 * tl.exp(raw.log_w), (y2 - y1) / 2 * tl.exp(raw.log_h))


@triton.jit
def _decode_yolox_kernel(boxes_ptr, preds, points, A, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr):
    """A program reads the four box channels of BLOCK_A anchors of one image and writes their boxes (B, A, 4)."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    raw = load_raw(preds, image, offs_a, mask_a, DTYPE)
    x, y = load_points(offs_a, mask_a, points, DTYPE)
    box = raw_corners(raw, x - 0.5, y - 0.5, load_strides(points, offs_a, mask_a, DTYPE))
    offs = (image * A + offs_a)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(boxes_ptr + offs, box_rows(box.x1, box.y1, box.x2, box.y2), mask=mask_a[:, None])


@triton.jit
def _decode_yolox_backward_kernel(
    out, grad_boxes, preds, points, A, CHANNELS, DTYPE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A program writes the gradient of all channels of BLOCK_A anchors of one image."""
    image = tl.program_id(1).to(tl.int64)
    offs_a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    raw = load_raw(preds, image, offs_a, mask_a, DTYPE)
    grad = load_raw(grad_boxes, image, offs_a, mask_a, DTYPE)
    corners = Box(grad.dx, grad.dy, grad.log_w, grad.log_h)
    stride = load_strides(points, offs_a, mask_a, DTYPE)
    store_raw(out, image, raw_grad(corners, raw, stride), offs_a, mask_a)
    start = 4
    while start < CHANNELS:
        offs_c = start + tl.arange(0, BLOCK_C)
        offs = offs_a.to(tl.int64)[:, None] * out.anchor + offs_c.to(tl.int64)[None, :] * out.channel
        mask = mask_a[:, None] & (offs_c < CHANNELS)[None, :]
        zeros = tl.zeros((BLOCK_A, BLOCK_C), out.ptr.dtype.element_ty)
        tl.store(out.ptr + image * out.image + offs, zeros, mask=mask)
        start += BLOCK_C


class _DecodeYOLOX(Plan):
    def __init__(self, x: DecodeYOLOX, out: Boxes, num_rows: int) -> None:
        batch_size, num_anchors, _ = x.preds.shape
        block, _, num_warps = channel_sizes(num_anchors, 4, x.preds.stride(2))
        self.grid = cdiv(num_anchors, block), batch_size, 1
        self.kernel = Launch(_decode_yolox_kernel, num_warps, DTYPE=compute_type(x.preds.dtype), BLOCK_A=block)
        super().__init__(Workspace(), self.kernel)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        points = points_of(address, x.anchor_points, x.strides)
        self.kernel(run.stream, self.grid, address(run.out.boxes), tensor3(address, x.preds), points, x.preds.shape[1])


class _DecodeYOLOXBackward(Plan):
    def __init__(self, x: DecodeYOLOXBackward, out: GradPreds, num_rows: int) -> None:
        batch_size, num_anchors, num_channels = x.preds.shape
        block_a, block_c, num_warps = channel_sizes(num_anchors, num_channels, x.preds.stride(2))
        self.grid = cdiv(num_anchors, block_a), batch_size, 1
        self.kernel = Launch(
            _decode_yolox_backward_kernel, num_warps, DTYPE=compute_type(x.preds.dtype), BLOCK_A=block_a, BLOCK_C=block_c
        )
        super().__init__(Workspace(), self.kernel)

    def launch(self, run: Run) -> None:
        x, address = run.x, run.address
        self.kernel(
            run.stream, self.grid, tensor3(address, run.out.grad_preds), tensor3(address, x.grad), tensor3(address, x.preds),
            points_of(address, None, x.strides), *x.preds.shape[1:],
        )  # fmt: skip


def decode_yolox(x: DecodeYOLOX) -> Boxes:
    out = x.allocate()
    if out.boxes.numel():
        run(_DecodeYOLOX, x, out)
    return out


def decode_yolox_backward(x: DecodeYOLOXBackward) -> GradPreds:
    out = x.allocate()
    if out.grad_preds.numel():
        run(_DecodeYOLOXBackward, x, out)
    return out
