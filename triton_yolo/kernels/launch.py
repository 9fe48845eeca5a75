"""The only place that launches kernels: at first through Triton's own path, then bound to what that compiled.

A ``Plan`` holds what an operation needs beside its tensors: sizes, grids, constants and the layout of its workspace. It is made
once for a key, which tells everything that Triton compiles for. Its first run passes tensors to Triton, whose binder looks at
their types and addresses and compiles; later runs pass addresses to what was compiled.
"""

from collections import namedtuple
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from .._signatures import BY_ROW

new = tuple.__new__
"""Make a named tuple, ``new(Kind, values)``, without the Python call that its own constructor is: a step makes twenty."""

INTERPRETED = isinstance(tl.sum, InterpretedFunction)
"""Whether kernels run in Triton's interpreter, where few programs with large tiles are fast."""

_ALIGNMENT = 16  # bytes, which Triton looks for in an address
_MAX_PLANS = 256

Grid = tuple[int, int, int]
Buffers = dict[str, tuple[torch.dtype, int]]


class Launch:
    """A kernel with its constants.

    No contraction to fused multiply-adds: two kernels that evaluate one formula get the same bits.
    """

    _is_fused = False

    def __init__(self, kernel: Any, num_warps: int, **constants: Any) -> None:
        self._kernel, self._constants = kernel, constants
        self._options = {"num_warps": num_warps, "enable_fp_fusion": self._is_fused}
        self._bound: tuple[Any, Any, Any, tuple[Any, ...]] | None = None

    def __call__(self, stream: int | None, grid: Grid, *args: Any) -> None:
        """Launch what is bound on ``stream``, with addresses for tensors; or, if that is None, let Triton launch and bind."""
        if stream is None:
            compiled = self._kernel[grid](*args, **self._constants, **self._options, **self._limits())
            self._bound = _bound(compiled, self._trailing(len(args)))
        else:
            assert self._bound is not None
            run, function, metadata, constants = self._bound
            run(*grid, stream, function, metadata, None, None, None, *args, *constants)

    def _limits(self) -> dict[str, int]:
        """What the compiler is told beside the options that every target has."""
        return {}

    def _trailing(self, num_args: int) -> tuple[Any, ...]:
        return tuple(self._constants[name] for name in self._kernel.arg_names[num_args:])

    @property
    def is_bound(self) -> bool:
        return self._bound is not None


class FusedLaunch(Launch):
    """A kernel whose formulas no other evaluates, with contraction."""

    _is_fused = True


class RoomyLaunch(Launch):
    """A kernel that may take all registers. Where nobody says so, ptxas may spill a value to keep to 48 or 72 of them."""

    _most = 255  # registers a thread

    def _limits(self) -> dict[str, int]:
        is_compiled = isinstance(self._kernel, triton.JITFunction)
        is_cuda = is_compiled and triton.runtime.driver.active.get_current_target().backend == "cuda"
        return {"maxnreg": self._most} if is_cuda else {}


class RoomyFusedLaunch(RoomyLaunch):
    """Both."""

    _is_fused = True


class TightFusedLaunch(RoomyFusedLaunch):
    """The same with 128 registers, for ptxas loads all factors of a product of matrices at once where it has room for them."""

    _most = 128


def _bound(compiled: Any, constants: tuple[Any, ...]) -> tuple[Any, Any, Any, tuple[Any, ...]] | None:
    """What a launch of a compiled kernel takes; None if this version of Triton, or its interpreter, has something else."""
    try:
        return compiled.run, compiled.function, compiled.packed_metadata, constants
    except AttributeError:
        return None


class Workspace:
    """Memory of one run, cut into named buffers.

    Args:
        fixed: type and number of elements of every buffer.
        by_row: type and number of elements a ground-truth row.
    """

    def __init__(self, fixed: Buffers | None = None, by_row: Buffers | None = None) -> None:
        fixed, by_row = fixed or {}, by_row or {}
        self._fixed, self._by_row = list(fixed.values()), list(by_row.values())
        self._buffers: Any = namedtuple("Memory", [*fixed, *by_row])  # type: ignore[misc]
        *starts, self._end = accumulate((_aligned(n * dtype.itemsize) for dtype, n in self._fixed), initial=0)
        *row_starts, self._row_end = accumulate((n * dtype.itemsize for dtype, n in self._by_row), initial=0)
        self._starts, self._row_starts = starts, row_starts
        self._offsets: dict[int, list[int]] = {}  # by the number of rows

    def tensors(self, device: torch.device, num_rows: int) -> Any:
        """One tensor a buffer: an access past its end is one past the end of its memory."""
        counts = [*self._fixed, *((dtype, n * num_rows) for dtype, n in self._by_row)]
        return self._buffers._make(torch.empty(n, dtype=dtype, device=device) for dtype, n in counts)

    def addresses(self, device: torch.device, num_rows: int) -> tuple[Tensor | None, Any]:
        """One tensor for all of them; and where in it each begins."""
        if not self._fixed and not self._by_row:
            return None, ()
        num_rows += -num_rows % _ALIGNMENT  # keeps every buffer aligned
        memory = torch.empty(self._end + num_rows * self._row_end, dtype=torch.uint8, device=device)
        base, offsets = memory.data_ptr(), self._offsets.get(num_rows)
        if offsets is None:
            if len(self._offsets) >= _MAX_PLANS:
                self._offsets.clear()
            offsets = [*self._starts, *[self._end + num_rows * start for start in self._row_starts]]
            self._offsets[num_rows] = offsets
        return memory, new(self._buffers, [base + offset for offset in offsets])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Run(NamedTuple):
    """One run of a plan: ``address`` gives what kernels take for a tensor, ``buffers`` are those of its workspace."""

    stream: int | None
    address: Callable[[Tensor], Any]
    x: Any
    out: Any
    buffers: Any
    num_rows: int

    def channels(self, x: Tensor, *firsts: int) -> list[Any]:
        """What kernels take for the channels of ``x`` (B, A, C) from each of some on."""
        if self.stream is None:
            return [x[..., first:] for first in firsts]
        start, step = x.data_ptr(), x.stride(2) * x.element_size()
        return [start + first * step for first in firsts]


class Plan:
    """What an operation needs beside its tensors; a subclass works it out from the inputs and outputs of the first run.

    Args:
        workspace: memory of a run.
        launches: all launches that ``launch`` makes.
    """

    def __init__(self, workspace: Workspace, *launches: Launch) -> None:
        self._workspace, self._launches, self._is_bound = workspace, launches, False

    def launch(self, run: Run) -> None:
        raise NotImplementedError

    def __call__(self, x: Any, out: Any, num_rows: int) -> None:
        device, driver = out[0].device, triton.runtime.driver
        if device.index is not None and device.index != driver.active.get_current_device():
            with torch.get_device_module(device).device(device):
                self(x, out, num_rows)
            return
        addresses = 0
        for tensor in out:
            addresses |= tensor.data_ptr()
        is_watched = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
        if self._is_bound and addresses % _ALIGNMENT == 0 and not is_watched:
            stream = driver.active.get_current_stream(device.index or 0)
            memory, buffers = self._workspace.addresses(device, num_rows)
            self.launch(new(Run, (stream, Tensor.data_ptr, x, out, buffers, num_rows)))
            del memory  # not before: what is launched next on this stream may get it
        else:
            self.launch(Run(None, _itself, x, out, self._workspace.tensors(device, num_rows), num_rows))
            self._is_bound = all(launch.is_bound for launch in self._launches)


_plans: dict[Any, Plan] = {}


def run(make: Callable[[Any, Any, int], Plan], x: Any, out: Any, num_rows: int = 0, key: Any = None) -> None:
    """Run the plan that ``make`` makes, once for all inputs that differ in nothing but numbers and rows of ground truth.

    Or once for a ``key`` of one's own, that leaves out what does not matter.
    """
    if key is None:
        key = _key(make, x, num_rows)
    plan = _plans.get(key)
    if plan is None:
        while len(_plans) >= _MAX_PLANS:
            _plans.pop(next(iter(_plans)), None)
        plan = _plans[key] = make(x, out, num_rows)
    plan(x, out, num_rows)


def place_of(x: Tensor) -> tuple[torch.device, int]:
    """The device, and what Triton tells addresses apart by."""
    return x.device, x.data_ptr() % _ALIGNMENT


def _key(make: Any, x: Any, num_rows: int) -> tuple[Any, ...]:
    """All that Triton compiles for, and sizes depend on."""
    parts = [make, triton.next_power_of_2(num_rows) if INTERPRETED else num_rows > 0, x[0].device]
    for place, value in enumerate(x):
        if isinstance(value, Tensor):
            shape = value.shape[1:] if x._fields[place] in BY_ROW else value.shape
            parts += (value.dtype, shape, value.stride(), value.data_ptr() % _ALIGNMENT)
        elif type(value) is list:  # as the schema of an operation has several tensors
            for part in value:
                parts += (part.dtype, part.stride(), part.data_ptr() % _ALIGNMENT)
        else:
            parts.append(value)
    return tuple(parts)


def cdiv(size: int, step: int) -> int:
    """How many steps a size takes; ``triton.cdiv`` takes ten times the time."""
    return -(-size // step)


def _itself(x: Tensor) -> Tensor:
    return x
