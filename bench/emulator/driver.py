"""A driver of Triton whose device is the emulator, and whose binaries are PTX."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from triton_yolo import _backend

from .instructions import compile_block
from .machine import Machine
from .memory import EmulationError, Memory
from .parser import Program, parse

_LANES = 2**15  # of programs that run side by side
# A row writes its number where it is the owner, and others take that for the same answer as the contest's.
_MAY_MEET = ("_score_kernel",)
_SCALARS = {"u1": "?", "i1": "?", "fp32": "f4", "fp64": "f8", "fp16": "f2", **{f"{s}{8 * n}": f"{s}{n}" for s in "iu" for n in (1, 2, 4, 8)}}


@contextmanager
def emulated(target: str, *, seed: int = 0) -> Iterator[None]:
    """Launch kernels on CPU tensors as compiled for ``target`` ("cuda:90"); ``seed`` orders atomic operations."""
    with ExitStack() as patches:
        folder = Path(tempfile.gettempdir()) / f"triton_yolo_ptx_{triton.__version__}"
        patches.enter_context(mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(folder)))
        patches.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()))
        patches.enter_context(mock.patch.object(_backend, "_is_interpreted", lambda: True))
        emulator = _Emulator(int(target.removeprefix("cuda:")), seed)
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", emulator))
        patches.callback(_forget_binaries)
        _forget_binaries()
        yield


def _forget_binaries() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("triton_yolo.kernels"):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()


class _Emulator(DriverBase):
    def __init__(self, arch: int, seed: int) -> None:
        self.target, self.rng = GPUTarget("cuda", arch, 32), np.random.default_rng(seed)
        self.utils = SimpleNamespace(
            load_binary=lambda name, ptx, shared, device: (ptx, (ptx.decode(), shared), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 48 * 1024},
        )
        self.launcher_cls = self._launcher

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = tuple(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            arguments = list(_flat(types, rest[3:]))  # after the launch's metadata and two hooks
            _launch(*function, (x, y, z), arguments, self.rng)

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Arguments that a binary takes: those that are no constants, tuples one after another."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


@lru_cache(maxsize=512)
def _load(ptx: str) -> tuple[Program, list[list[Any]]]:
    program = parse(ptx)
    return program, [compile_block(block, program.labels) for block in program.blocks]


def _launch(ptx: str, shared: int, grid: tuple[int, int, int], arguments: list[tuple[str, Any]], rng: Any) -> None:
    program, blocks = _load(ptx)
    packed = [_packed(kind, value) for kind, value in arguments]
    packed += [bytes(8)] * (len(program.params) - len(packed))  # scratch memory that none of these kernels takes
    params = dict(zip(program.params, packed, strict=True))
    tensors = [value for _, value in arguments if isinstance(value, torch.Tensor)]
    memory = Memory((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors)
    index = rng.permutation(grid[0] * grid[1] * grid[2])
    with np.errstate(all="ignore"):
        for start in range(0, len(index), max(1, _LANES // program.num_threads)):
            chunk = index[start : start + max(1, _LANES // program.num_threads)]
            Machine(program, params, chunk, grid, memory, shared, rng).run(blocks)
    memory.check_races(may_meet=program.name in _MAY_MEET)


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return np.uint64(value.data_ptr()).tobytes()
    if kind not in _SCALARS:
        raise EmulationError(f"unknown type of an argument: {kind}")
    return np.array(value, _SCALARS[kind]).tobytes().ljust(8, b"\0")
