"""Small kernels that make the compiler use what the emulator must understand."""

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(out_ptr, x_ptr, columns, BLOCK: tl.constexpr):
    """A row a program, reduced over all warps."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * columns + offs, mask=offs < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + tl.program_id(0) * columns + offs, e / tl.sum(e, 0), mask=offs < columns)


@triton.jit
def transpose_kernel(out_ptr, x_ptr, SIDE: tl.constexpr):
    """Loads along one dimension, stores along the other: through shared memory."""
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + tl.trans(i * SIDE + j), tl.load(x_ptr + j * SIDE + i).trans())


@triton.jit
def collatz_kernel(steps_ptr, x_ptr, n, BLOCK: tl.constexpr):
    """Loops that end at different times in different programs, and branches inside."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=1)
    steps = tl.zeros((BLOCK,), tl.int32)
    while tl.max(x, 0) > 1:
        steps += (x > 1).to(tl.int32)
        x = tl.where(x > 1, tl.where(x % 2 == 0, x // 2, 3 * x + 1), x)
    tl.store(steps_ptr + offs, steps, mask=offs < n)


@triton.jit
def claim_kernel(owner_ptr, earlier_ptr, place_ptr, BLOCK: tl.constexpr):
    """Atomic maxima that meet at one address."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(place_ptr + offs)
    tl.store(earlier_ptr + offs, tl.atomic_max(owner_ptr + place, offs, sem="relaxed"))


@triton.jit
def store_kernel(out_ptr, x_ptr, step, BLOCK: tl.constexpr):
    """Programs store ``step`` numbers apart."""
    offs = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + 1.0)
