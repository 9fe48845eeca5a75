"""A driver of Triton whose device is the emulator, and whose binaries are PTX."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.host_step import TargetDriver, without_machine_code
from tests.tools.target import active
from triton_yolo import _backend
from triton_yolo.kernels import launch as kernels_launch

from .instructions import compile_block
from .machine import Block, Machine
from .memory import EmulationError, Memory
from .parser import Program, parse

_LANES = 2**15  # of programs that run side by side
# A row writes its number where it is the owner, and others take that for the same answer as the contest's.
_MAY_MEET = ("_task_aligned_score_kernel",)
_SCALARS = {"u1": "?", "i1": "?", "i32": "i4", "i64": "i8", "u64": "u8", "fp32": "f4", "fp64": "f8"}


@dataclass
class Launch:
    """What ran: ``instructions`` (programs,) is how many a warp of each program issued."""

    kernel: str
    num_warps: int
    instructions: np.ndarray = field(repr=False)


@contextmanager
def emulated(target: str, *, seed: int = 0) -> Iterator[list[Launch]]:
    """Launch kernels on CPU tensors as compiled for ``target`` ("cuda:90").

    ``seed`` decides in which order programs and atomic operations run. Yields the list of launches.
    """
    driver = _Emulator(target, seed)
    with (
        without_machine_code(),
        mock.patch.object(_backend, "_is_interpreted", return_value=True),
        # Always through Triton: what is bound takes addresses, of which nobody knows where they end.
        mock.patch.object(kernels_launch, "_plans", {}),
        mock.patch.object(kernels_launch, "_bound", return_value=None),
        active(driver),
    ):
        yield driver.launches


class _Emulator(TargetDriver):
    def __init__(self, target: str, seed: int) -> None:
        super().__init__(target)
        self.launches: list[Launch] = []
        self._rng = np.random.default_rng(seed)
        self.launcher_cls = self._launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, ptx, shared, device: (ptx, (ptx.decode(), shared), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 48 * 1024},
        )

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = tuple(source.signature.values())

        def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            arguments = list(_flat(types, rest[3:]))  # after the launch's metadata and two hooks
            self.launches.append(_launch(*function, (x, y, z), arguments, self._rng))

        return launch


def _flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Arguments that a binary takes: those that are no constants, tuples one after another."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _launch(
    ptx: str, shared_bytes: int, grid: tuple[int, int, int], arguments: list[tuple[str, Any]], rng: np.random.Generator
) -> Launch:
    program, blocks = _load(ptx)
    packed = [_packed(kind, value) for kind, value in arguments]
    packed += [bytes(8)] * (len(program.params) - len(packed))  # scratch memory that none of these kernels takes
    params = dict(zip(program.params, packed, strict=True))
    storages = [value.untyped_storage() for _, value in arguments if isinstance(value, torch.Tensor)]
    memory = Memory((storage.data_ptr(), storage.nbytes()) for storage in storages)
    order, at_once = rng.permutation(grid[0] * grid[1] * grid[2]), max(1, _LANES // program.num_threads)
    instructions = np.zeros(len(order), np.int64)
    with np.errstate(all="ignore"):
        for start in range(0, len(order), at_once):
            machine = Machine(program, params, order[start : start + at_once], grid, memory, shared_bytes, rng)
            machine.run(blocks)
            instructions[machine.index] = machine.instructions
    memory.check_races(may_meet=program.name in _MAY_MEET)
    return Launch(program.name, program.num_threads // 32, instructions)


@lru_cache(maxsize=512)
def _load(ptx: str) -> tuple[Program, list[Block]]:
    program = parse(ptx)
    return program, [compile_block(block, program.labels, program.num_threads) for block in program.blocks]


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return np.uint64(value.data_ptr()).tobytes()
    if kind not in _SCALARS:
        raise EmulationError(f"unknown type of an argument: {kind}")
    return np.array(value, _SCALARS[kind]).tobytes().ljust(8, b"\0")
