"""Launches of the mask term."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._signatures import MaskLoss, MaskLossOutputs
from ..arguments import compute_type, tensor3
from ..launch import INTERPRETED, FusedLaunch, Launch, Plan, RoomyFusedLaunch, Run, TightFusedLaunch, Workspace, cdiv, new, run
from ..mask_groups import (
    GROUP,
    Groups,
    Listed,
    Sizes,
    Truth,
    _mask_group_kernel,
    _mask_list_kernel,
    _mask_sort_kernel,
)
from ..masks import (
    Parts,
    Tensor4,
    _mask_merge_kernel,
    _mask_positive_kernel,
    _mask_prototype_kernel,
    _mask_total_kernel,
    pixel_sizes,
)
from ..reduce import TOTAL_SIZES

_PROGRAMS = 2112  # that share the tiles of all images: four times as many as a GPU of 132 multiprocessors holds at once


class _MaskLossPlan(Plan):
    def __init__(self, x: MaskLoss, out: MaskLossOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, channels), (height, width) = x.coefficients.shape, x.prototypes.shape[2:]
        dtype, cells = out.loss.dtype, batch_size * num_anchors
        self.sizes, kind = Sizes(num_anchors, channels, height, width), compute_type(dtype)
        sums = {"DTYPE": kind, "OFFSET": _offset_type(x.coefficients, x.prototypes, x.masks, *out[1:])}
        self.num_filled = x.coefficients.numel() if x.wants_grad else 0
        block = min(triton.next_power_of_2(max(num_anchors, 1)), 2**14) if INTERPRETED else 1024
        shared = pixel_sizes(channels, height * width, 1024, 4)
        num_programs = 1 if INTERPRETED else min(cdiv(_PROGRAMS, max(batch_size, 1)), cdiv(height * width, shared["PIXELS"]))
        self.programs = min(num_anchors, 1) * num_programs, batch_size, 1
        self.list = RoomyFusedLaunch(_mask_list_kernel, 8, DTYPE=kind, BLOCK=block)
        some = 64 if INTERPRETED else 32
        self.sort = RoomyFusedLaunch(_mask_sort_kernel, 4, BLOCK=some, OTHERS=block if INTERPRETED else some)
        self.sorts = 1 if INTERPRETED else min(cdiv(num_anchors, some), 64), batch_size, 1
        self.group = RoomyFusedLaunch(_mask_group_kernel, 8, DTYPE=kind, BLOCK=min(block, 512), PIXELS=shared["PIXELS"])
        self.positive = TightFusedLaunch(_mask_positive_kernel, OVERLAP=x.overlap_mask, **sums, **shared)
        self.merge = FusedLaunch(_mask_merge_kernel, **sums, **{**shared, "num_warps": 1})
        tile = pixel_sizes(channels, height * triton.next_power_of_2(width), 1024, 8)
        columns = min(triton.next_power_of_2(width) if INTERPRETED else 8, tile["PIXELS"])
        self.tiles = cdiv(width, columns) * cdiv(height, tile["PIXELS"] // columns), batch_size, 1
        self.prototype = TightFusedLaunch(
            _mask_prototype_kernel, OVERLAP=x.overlap_mask, COLUMNS=columns, LISTED=block if INTERPRETED else 128, **sums,
            **tile,
        )  # fmt: skip
        self.total = FusedLaunch(_mask_total_kernel, DTYPE=kind, **TOTAL_SIZES)
        launches: list[Launch] = [self.list, self.total]
        self.has_positives, self.has_pixels = cells > 0, x.wants_grad and batch_size > 0
        if batch_size > 0:
            launches += [self.sort, self.group]
        if self.has_positives:
            launches += [self.positive, *([self.merge] if x.wants_grad else [])]
        if self.has_pixels:
            launches.append(self.prototype)
        self.filling = max(batch_size, cdiv(self.num_filled, 16 * block), 1), 1, 1
        self.num_partial = self.programs[0] * batch_size
        part = 2 * GROUP.value * shared["CHANNELS"] if x.wants_grad else 0
        fixed = {
            "poison": (dtype, 1), "partial": (dtype, self.num_partial), "left": (torch.int32, self.num_partial),
            "sums": (dtype, part * self.num_partial),
            "listed_anchor": (torch.int32, cells), "listed_row": (torch.int32, cells), "listed": (torch.int32, batch_size),
            "anchor": (torch.int32, cells), "nth": (torch.int32, cells), "start": (torch.int32, cells + batch_size),
            "row": (torch.int32, cells), "weight": (dtype, cells), "pixels": (torch.int64, cells),
            "first": (torch.int64, cells), "groups": (torch.int32, batch_size), "tiles": (torch.int64, batch_size),
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
        listed, groups = new(Listed, buffers[4:7]), new(Groups, buffers[7:16])
        parts = new(Parts, (buffers.sums, buffers.left))
        batch_size, sizes, poison = len(x.coefficients), self.sizes, buffers.poison
        self.list(
            stream, self.filling, listed, grad_ptr, poison, row, truth, sizes, *x.pixels_a_px, batch_size, self.num_filled
        )
        if batch_size > 0:
            self.sort(stream, self.sorts, groups, listed, sizes.A)
            self.group(stream, (batch_size, 1, 1), groups, listed, row, truth, sizes, *x.pixels_a_px)
        if self.has_positives:
            self.positive(
                stream, self.programs, buffers.partial, poison, grad, parts, coefficients, prototypes, groups, truth, scale,
                sizes,
            )  # fmt: skip
            if x.wants_grad:
                self.merge(stream, self.programs, grad, parts, groups, scale, sizes)
        if self.has_pixels:
            grad_prototypes = _tensor4(address, out.grad_prototypes)
            self.prototype(
                stream, self.tiles, grad_prototypes, coefficients, prototypes, groups, truth, scale, poison, sizes
            )  # fmt: skip
        programs = self.filling if x.wants_grad else (1, 1, 1)
        self.total(stream, programs, loss, grad_ptr, buffers.partial, scale, poison, self.num_partial, self.num_filled)


def _tensor4(address: Any, x: Tensor) -> Tensor4:
    return new(Tensor4, (address(x), *x.stride()))


def _offset_type(*tensors: Tensor) -> Any:
    """The type of offsets inside an image: 32 bits unless one of its tensors takes more."""
    spans = [sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors]
    return tl.int64 if max(spans) >= 2**31 else tl.int32


def mask_loss(x: MaskLoss) -> MaskLossOutputs:
    out = x.allocate()
    run(_MaskLossPlan, x, out, len(x.gt_boxes))
    return out
