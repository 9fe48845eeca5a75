"""Run what Triton compiles for an NVIDIA GPU, its PTX, on a machine without one.

Triton's interpreter runs the source of a kernel; this runs the compiler's output with its layouts, shuffles, shared memory and
barriers, through Triton's own launch path, on CPU tensors:

    with emulated("cuda:90"):
        loss(...)

Memory is checked as ``compute-sanitizer`` does: ``EmulationError`` at an access outside the tensors of the launch or out of
alignment, at shared memory that nobody wrote, and at accesses of several warps or programs that nothing orders. Programs run
side by side and atomic operations in random order. It says nothing about time, or about what ptxas makes of the PTX.
"""

from .driver import emulated
from .memory import EmulationError

__all__ = ["EmulationError", "emulated"]
