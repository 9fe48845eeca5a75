"""Launches of the mask term."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..._signatures import MaskLoss, MaskLossOutputs
from ..arguments import compute_type, tensor3
from ..launch import INTERPRETED, FusedLaunch, Launch, Plan, RoomyFusedLaunch, Run, Workspace, cdiv, new, run
from ..masks import (
    Parts,
    Positives,
    Sizes,
    Tensor4,
    Truth,
    _mask_list_kernel,
    _mask_merge_kernel,
    _mask_positive_kernel,
    _mask_prototype_kernel,
    _mask_total_kernel,
    pixel_sizes,
)
from ..reduce import TOTAL_SIZES

_PROGRAMS = 3  # for as many tiles as an image has: each takes a share of those of all positives


class _MaskLossPlan(Plan):
    def __init__(self, x: MaskLoss, out: MaskLossOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, channels), (height, width) = x.coefficients.shape, x.prototypes.shape[2:]
        dtype, cells = out.loss.dtype, batch_size * num_anchors
        self.sizes, kind = Sizes(num_anchors, channels, height, width), compute_type(dtype)
        options = {"OVERLAP": x.overlap_mask, "DTYPE": kind}
        self.num_filled = x.coefficients.numel() if x.wants_grad else 0
        block = min(triton.next_power_of_2(max(num_anchors, 1)), 2**14) if INTERPRETED else 1024
        shared = pixel_sizes(channels, height * width, 1024)
        num_programs = 1 if INTERPRETED else cdiv(_PROGRAMS * height * width, shared["PIXELS"])
        self.programs = min(num_anchors, 1) * num_programs, batch_size, 1
        self.list = RoomyFusedLaunch(_mask_list_kernel, 8, DTYPE=kind, BLOCK=block, PIXELS=shared["PIXELS"])
        self.positive = RoomyFusedLaunch(_mask_positive_kernel, **options, **shared)
        self.merge = FusedLaunch(_mask_merge_kernel, DTYPE=kind, **{**shared, "num_warps": 1})
        tile = pixel_sizes(channels, height * triton.next_power_of_2(width), 2048)
        columns = min(triton.next_power_of_2(width) if INTERPRETED else 8, tile["PIXELS"])
        self.tiles = cdiv(width, columns) * cdiv(height, tile["PIXELS"] // columns), batch_size, 1
        self.prototype = RoomyFusedLaunch(
            _mask_prototype_kernel, **options, COLUMNS=columns, LISTED=block if INTERPRETED else 128, **tile
        )  # fmt: skip
        self.total = FusedLaunch(_mask_total_kernel, DTYPE=kind, **TOTAL_SIZES)
        launches: list[Launch] = [self.list, self.total]
        self.has_positives, self.has_pixels = cells > 0, x.wants_grad and batch_size > 0
        if self.has_positives:
            launches += [self.positive, *([self.merge] if x.wants_grad else [])]
        if self.has_pixels:
            launches.append(self.prototype)
        self.filling = max(batch_size, cdiv(self.num_filled, 16 * block), 1), 1, 1
        self.num_partial = self.programs[0] * batch_size
        fixed = {
            "poison": (dtype, 1), "partial": (dtype, self.num_partial), "anchors": (torch.int32, cells),
            "count": (torch.int32, batch_size), "pixels": (torch.int64, cells), "weight": (dtype, cells),
            "first": (torch.int64, cells), "tiles": (torch.int64, batch_size), "left": (torch.int32, self.num_partial),
            "sums": (dtype, 2 * shared["CHANNELS"] * self.num_partial if x.wants_grad else 0),
        }  # fmt: skip
        super().__init__(Workspace(fixed), *launches)

    def launch(self, run: Run) -> None:
        x, out, stream, buffers, address = run.x, run.out, run.stream, run.buffers, run.address
        row, scale, loss = address(x.target_row), address(x.scale), address(out.loss)
        coefficients, prototypes = tensor3(address, x.coefficients), _tensor4(address, x.prototypes)
        grad, grad_ptr = None, None
        if x.wants_grad:
            grad = tensor3(address, out.grad_coefficients)
            grad_ptr = grad.ptr
        mask = address(x.masks), *x.masks.stride()
        truth = new(Truth, (address(x.gt_boxes), *mask, address(x.mask_number)))
        positives = new(Positives, buffers[2:8])
        parts = new(Parts, (buffers.sums, buffers.left))
        batch_size, sizes, poison = len(x.coefficients), self.sizes, buffers.poison
        self.list(
            stream, self.filling, positives, grad_ptr, poison, row, truth, sizes, *x.pixels_a_px, batch_size,
            self.num_filled,
        )  # fmt: skip
        if self.has_positives:
            self.positive(
                stream, self.programs, buffers.partial, poison, grad, parts, coefficients, prototypes, positives, row, truth,
                scale, sizes,
            )  # fmt: skip
            if x.wants_grad:
                self.merge(stream, self.programs, grad, parts, positives, row, scale, sizes)
        if self.has_pixels:
            self.prototype(
                stream, self.tiles, _tensor4(address, out.grad_prototypes), coefficients, prototypes, positives, row,
                truth, scale, poison, sizes,
            )  # fmt: skip
        programs = self.filling if x.wants_grad else (1, 1, 1)
        self.total(stream, programs, loss, grad_ptr, buffers.partial, scale, poison, self.num_partial, self.num_filled)


def _tensor4(address: Any, x: Tensor) -> Tensor4:
    return new(Tensor4, (address(x), *x.stride()))


def mask_loss(x: MaskLoss) -> MaskLossOutputs:
    out = x.allocate()
    run(_MaskLossPlan, x, out, len(x.gt_boxes))
    return out
