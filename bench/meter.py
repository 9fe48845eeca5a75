"""Measure what interpreted kernels ask of memory, and check that they stay inside it.

Needs ``TRITON_INTERPRET=1``. The figures are exact and the same in every run:

    with Meter() as meter:
        loss(...)
    print(meter.table())

Every address must lie in the storage of a tensor argument of its launch (``OutOfBoundsError``); no two programs of a launch may
store to one address without an atomic operation (``WriteRaceError``).
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, interpreter_builder

SECTOR = 32  # bytes


@contextmanager
def shipped_sizes() -> Iterator[None]:
    """Launch as on a GPU, not with the few large tiles that suit the interpreter."""
    from triton_yolo import kernels

    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith(kernels.__name__ + ".") and hasattr(module, "INTERPRETED"):
                patches.enter_context(mock.patch.object(module, "INTERPRETED", False))
        # Plans are made for the sizes of their time.
        patches.enter_context(mock.patch.object(sys.modules[kernels.__name__ + ".launch"], "_plans", {}))
        yield


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that none of its arguments owns."""


class WriteRaceError(AssertionError):
    """Two programs of one launch stored to one address."""


@dataclass
class Traffic:
    """Memory traffic of one launch, in bytes. ``unique`` counts every byte once, ``sectors`` every 32-byte piece an access
    touches, times 32. ``storages`` (start, end) are those that the launch was given."""

    kernel: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    sectors: int = 0
    unique: int = 0
    storages: list[tuple[int, int]] = field(default_factory=list)

    @property
    def requested(self) -> int:
        return self.loaded + self.stored + self.atomic


@dataclass
class _Launch:
    traffic: Traffic
    starts: list[int]
    ends: list[int]
    touched: list[np.ndarray] = field(default_factory=list)
    stores: list[tuple[int, np.ndarray]] = field(default_factory=list)


class Meter:
    """Record every launch of an interpreted kernel inside the ``with`` block.

    Attributes:
        launches: one ``Traffic`` a launch, in order.
    """

    def __init__(self, *, checks_races: bool = True) -> None:
        self.launches: list[Traffic] = []
        self._checks_races = checks_races
        self._current: _Launch | None = None

    @property
    def requested(self) -> int:
        return sum(launch.requested for launch in self.launches)

    def table(self) -> str:
        lines = [f"{'kernel':32} {'programs':>8} {'loaded':>12} {'stored':>12} {'atomic':>10} {'sectors':>12} {'unique':>12}"]
        for t in self.launches:
            lines.append(
                f"{t.kernel:32} {t.programs:8} {t.loaded:12,} {t.stored:12,} {t.atomic:10,} {t.sectors:12,} {t.unique:12,}"
            )
        return "\n".join(lines)

    def __enter__(self) -> "Meter":
        builder, call = interpreter_builder, GridExecutor.__call__
        load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        meter = self

        def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
            meter._begin(executor, [*args, *kwargs.values()])
            try:
                result = call(executor, *args, **kwargs)
            except InterpreterError as error:
                meter._current = None
                if isinstance(error.__cause__, OutOfBoundsError):
                    raise error.__cause__ from None
                raise
            meter._end()
            return result

        def loaded(ptrs: Any, mask: Any, *rest: Any) -> Any:
            meter._record(ptrs, mask, "loaded")
            return load(ptrs, mask, *rest)

        def stored(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            meter._record(ptrs, mask, "stored")
            return store(ptrs, value, mask, *rest)

        def updated(operation: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            meter._record(ptrs, mask, "atomic")
            return atomic(operation, ptrs, value, mask, *rest)

        self._patches = ExitStack()
        for target, name, replacement in (
            (GridExecutor, "__call__", launched),
            (builder, "create_masked_load", loaded),
            (builder, "create_masked_store", stored),
            (builder, "create_atomic_rmw", updated),
        ):
            self._patches.enter_context(mock.patch.object(target, name, replacement))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _begin(self, executor: Any, arguments: list[Any]) -> None:
        spans = sorted({span for argument in arguments for span in _storages(argument)})
        grid = executor.grid if isinstance(executor.grid, tuple) else (0,)
        traffic = Traffic(executor.fn.__name__, programs=int(np.prod(grid)), storages=spans)
        self.launches.append(traffic)
        self._current = _Launch(traffic, [start for start, _ in spans], [end for _, end in spans])

    def _record(self, ptrs: Any, mask: Any, kind: str) -> None:
        launch = self._current
        if launch is None:
            return
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses, kept = np.broadcast_arrays(ptrs.data, mask.data)
        addresses = addresses[kept.astype(bool)].astype(np.int64)
        if addresses.size == 0:
            return
        traffic = launch.traffic
        setattr(traffic, kind, getattr(traffic, kind) + addresses.size * width)
        low = np.searchsorted(launch.starts, addresses, side="right") - 1
        inside = (low >= 0) & (addresses + width <= np.asarray(launch.ends)[np.maximum(low, 0)])
        if not inside.all():
            first = int(addresses[~inside][0])
            nearest = bisect_right(launch.starts, first) - 1
            behind = first - launch.ends[nearest] if nearest >= 0 else first
            raise OutOfBoundsError(
                f"{traffic.kernel}: {kind} {width} bytes at {first:#x}, {behind} bytes behind the nearest argument"
            )
        traffic.sectors += SECTOR * np.union1d(addresses // SECTOR, (addresses + width - 1) // SECTOR).size
        launch.touched.append(_bytes(addresses, width))
        if kind == "stored":
            x, y, z = interpreter_builder.grid_idx
            launch.stores.append(((x * 2**20 + y) * 2**20 + z, launch.touched[-1]))

    def _end(self) -> None:
        launch, self._current = self._current, None
        assert launch is not None
        if launch.touched:
            launch.traffic.unique = np.unique(np.concatenate(launch.touched)).size
        if self._checks_races and launch.stores:
            address = np.concatenate([bytes_ for _, bytes_ in launch.stores])
            program = np.concatenate([np.full(bytes_.size, program) for program, bytes_ in launch.stores])
            order = np.lexsort((program, address))
            address, program = address[order], program[order]
            is_race = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
            if is_race.any():
                raise WriteRaceError(f"{launch.traffic.kernel}: {is_race.sum()} bytes stored by more than one program")


def _bytes(addresses: np.ndarray, width: int) -> np.ndarray:
    return np.unique((np.unique(addresses)[:, None] + np.arange(width)).reshape(-1))


def _storages(argument: Any) -> Iterator[tuple[int, int]]:
    if isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _storages(part)
