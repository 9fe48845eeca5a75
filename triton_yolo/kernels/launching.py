"""What every launch shares."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED = isinstance(tl.sum, InterpretedFunction)
"""Whether kernels run in Triton's interpreter, where few programs with large tiles are fast."""

_IS_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

FIXED: dict[str, bool] = {"enable_fp_fusion": False}
"""No contraction to fused multiply-adds: two kernels that evaluate one formula get the same bits."""


TOTAL_SIZES: dict[str, int] = {"BLOCK": 2048, "num_warps": 4}
"""16 values a thread: 64 images at 640 px have some 2,000 partial sums. With eight values, ptxas keeps to 32 registers on sm_90
and spills, whatever the warps."""


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Cast to a type to store, rounding to the nearest; the interpreter's own cast to bfloat16 truncates."""
    if _IS_INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(tl.abs(x) < float("inf"), (bits & -0x10000).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A number among a kernel's arguments, annotated ``tl.float64`` there: Triton passes float32 otherwise."""
    return tl.full((), x, DTYPE)


@triton.jit
def total(ptr, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``count`` values by one program, in a fixed order."""
    result = tl.zeros((BLOCK,), DTYPE)
    start = 0
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        result += tl.load(ptr + offs, mask=offs < count, other=0)
        start += BLOCK
    return tl.sum(result)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Everything is computed in float32, or in float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, which need not be the current one."""

    @functools.wraps(operation)
    def guarded(first: Tensor, *args: Any) -> Any:
        with _device_guard(first.device):
            return operation(first, *args)

    return guarded


def _device_guard(device: torch.device) -> AbstractContextManager[Any]:
    if device.type not in ("cuda", "xpu"):
        return nullcontext()
    return torch.get_device_module(device).device(device)
