"""Ground-truth rows in one launch: unpacked for the caller, or packed for kernels where no other one does it on its way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._signatures import GroundTruth, UnpackRows
from .arguments import Rows, compute_type, targets_of
from .launch import INTERPRETED, Buffers, Launch, Plan, Run, Workspace, cdiv, run
from .packing import Pack, pack_rows
from .packing import unpack_rows as _unpack


@triton.jit(do_not_specialize=["N"])
def _unpack_kernel(
    rows, targets, height: tl.float64, width: tl.float64, N, IS_ORIENTED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program reads BLOCK rows of (image index, class, cx, cy, w, h) in shares of the image, and writes boxes in pixels.

    Oriented boxes have an angle as it is.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _unpack(rows, targets, height, width, offs, offs < N, IS_ORIENTED, DTYPE)


@triton.jit(do_not_specialize=["N", "B"])
def _pack_kernel(rows, targets, N, B, PACK: tl.constexpr, DTYPE: tl.constexpr):
    """Programs write what counts as ground truth, and what does not, PACK.BLOCK rows at a time."""
    pack_rows(rows, targets, 0.0, 0.0, N, B, PACK, DTYPE)


def packing(targets: list[Tensor], num_classes: int, dtype: torch.dtype) -> Launch:
    return Launch(_pack_kernel, 4, PACK=Pack(num_classes, len(targets) == 1, False, 128), DTYPE=compute_type(dtype))


def packed_rows(dtype: torch.dtype, is_oriented: bool = False) -> Buffers:
    """What ``Rows`` take of a workspace a row, boxes in one form."""
    boxes: Buffers = {"xywh": (dtype, 5)} if is_oriented else {"xyxy": (dtype, 4)}
    return {"image": (torch.int32, 1), "label": (torch.int64, 1), **boxes}


class _UnpackPlan(Plan):
    def __init__(self, x: UnpackRows, out: GroundTruth, num_rows: int) -> None:
        self.block = min(triton.next_power_of_2(num_rows), 2**14) if INTERPRETED else 128
        self.unpack = Launch(
            _unpack_kernel,
            4,
            IS_ORIENTED=out.boxes_xywh.shape[1] == 5,
            DTYPE=compute_type(out.boxes_xyxy.dtype),
            BLOCK=self.block,
        )
        super().__init__(Workspace(), self.unpack)

    def launch(self, run: Run) -> None:
        image, label, xyxy, xywh = map(run.address, run.out)
        rows = Rows(image, label, xyxy, xywh, None)
        grid = cdiv(run.num_rows, self.block), 1, 1
        self.unpack(run.stream, grid, rows, targets_of(run.address, [run.x.rows]), *run.x.imgsz.pixels, run.num_rows)


def unpack_rows(x: UnpackRows) -> GroundTruth:
    out = x.allocate()
    if len(x.rows):
        run(_UnpackPlan, x, out, x.rows.shape[0])
    return out
