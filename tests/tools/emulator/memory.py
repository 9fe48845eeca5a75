"""Global and shared memory with the checks of ``compute-sanitizer``."""

from collections.abc import Iterable

import numpy as np

_PROGRAM_BITS = 20
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class EmulationError(AssertionError):
    """A kernel did what no order of its threads makes right, or what the emulator does not know."""


class Memory:
    """The storages (address, bytes) that a launch was given, and who accessed them."""

    def __init__(self, storages: Iterable[tuple[int, int]]) -> None:
        import ctypes

        spans = sorted({span for span in storages if span[1]})
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.array([start + size for start, size in spans], np.int64)
        arrays = [np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start)) for start, size in spans]
        self._views = {width: [a[: len(a) // width * width].view(t) for a in arrays] for width, t in _BITS.items()}
        self._stored: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._loaded: list[tuple[np.ndarray, np.ndarray, int]] = []

    def load(self, address: np.ndarray, width: int, programs: np.ndarray) -> np.ndarray:
        """Bits at addresses (n,), read by ``programs`` (n,)."""
        self._loaded.append((address, programs, width))
        result = np.empty(address.shape, _BITS[width])
        for storage, part, at in self._locate(address, width):
            result[part] = self._views[width][storage][at]
        return result

    def store(self, address: np.ndarray, bits: np.ndarray, programs: np.ndarray) -> None:
        width = bits.dtype.itemsize
        self._stored.append((address, programs, width))
        for storage, part, at in self._locate(address, width):
            self._views[width][storage][at] = bits[part]

    def update(self, address: np.ndarray, value: np.ndarray, operation: np.ufunc, order: np.ndarray) -> np.ndarray:
        """Apply an atomic operation one lane after another, in this order; return what each found."""
        width, found = value.dtype.itemsize, np.empty_like(value)
        for storage, part, at in self._locate(address, width):
            view = self._views[width][storage].view(value.dtype)
            lanes = np.arange(len(address))[part]
            at = dict(zip(lanes.tolist(), at.tolist(), strict=True))
            for lane in order.tolist():
                if lane in at:
                    found[lane] = view[at[lane]]
                    view[at[lane]] = operation(found[lane], value[lane])
        return found

    def _locate(self, address: np.ndarray, width: int) -> Iterable[tuple[int, np.ndarray | slice, np.ndarray]]:
        """Storages with the accesses that lie in them and their places, in units of ``width``."""
        address = address.astype(np.int64)
        if address.size == 0:
            return
        storage = np.searchsorted(self._starts, address, side="right") - 1
        inside = (storage >= 0) & (address + width <= self._ends[np.maximum(storage, 0)])
        if not inside.all():
            raise EmulationError(f"{width} bytes at {address[~inside][0]:#x}, outside of every argument")
        first = storage[0]
        if (storage == first).all():
            yield first, slice(None), (address - self._starts[first]) // width
            return
        for which in np.unique(storage):
            part = storage == which
            yield which, part, (address[part] - self._starts[which]) // width

    def check_races(self, *, may_meet: bool) -> None:
        """No two programs store to one address, nor, unless they ``may_meet``, does one read what another stores."""
        stored, writers = self._bytes(self._stored)
        if ((stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1])).any():
            raise EmulationError("two programs store to one address")
        loaded, readers = self._bytes(self._loaded)
        if len(stored) and len(loaded) and not may_meet:
            at = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
            if ((stored[at] == loaded) & (writers[at] != readers)).any():
                raise EmulationError("a program reads what another one stores")

    def _bytes(self, accesses: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Places of bytes in order, and programs, each pair once."""
        keys = [np.empty(0, np.int64)]
        for address, programs, width in accesses:
            first = np.unique((address.astype(np.int64) - self._starts[0]) << _PROGRAM_BITS | programs)
            keys.append((first[:, None] + (np.arange(width) << _PROGRAM_BITS)).ravel())
        both = np.unique(np.concatenate(keys))
        return both >> _PROGRAM_BITS, both & (1 << _PROGRAM_BITS) - 1


class SharedMemory:
    """One array of bytes a program; every byte knows which warp wrote and which read it since the program's last barrier."""

    _NOBODY, _SEVERAL = -1, -2

    def __init__(self, num_programs: int, num_bytes: int, num_warps: int) -> None:
        num_bytes = (num_bytes + 15) // 16 * 16
        self._bytes = np.zeros((num_programs, num_bytes), np.uint8)
        self._is_written = np.zeros((num_programs, num_bytes), np.bool_)
        self._writer = np.full((num_programs, num_bytes), self._NOBODY, np.int16)
        self._reader = np.full((num_programs, num_bytes), self._NOBODY, np.int16)

    def barrier(self, programs: np.ndarray) -> None:
        """Order what came before with what comes after."""
        if self._bytes.size:
            self._writer[programs] = self._reader[programs] = self._NOBODY

    def load(self, program: np.ndarray, address: np.ndarray, width: int, warp: np.ndarray) -> np.ndarray:
        """Bits at addresses (n,) of the memory of ``program`` (n,), read by ``warp`` (n,)."""
        at = self._places(program, address, width)
        if not self._is_written[at].all():
            raise EmulationError("shared memory is read that nobody wrote")
        writer, reader = self._writer[at], self._reader[at]
        if ((writer != self._NOBODY) & (writer != warp[:, None])).any():
            raise EmulationError("shared memory is read that another warp wrote since the last barrier")
        self._reader[at] = np.where((reader == self._NOBODY) | (reader == warp[:, None]), warp[:, None], self._SEVERAL)
        self._reader[at] = np.where(self._reader[at] == warp[:, None], warp[:, None], self._SEVERAL)  # of this instruction
        return self._bytes.view(_BITS[width])[program, address // width]

    def store(self, program: np.ndarray, address: np.ndarray, bits: np.ndarray, warp: np.ndarray) -> None:
        width = bits.dtype.itemsize
        at = self._places(program, address, width)
        for earlier in (self._writer[at], self._reader[at]):
            if ((earlier != self._NOBODY) & (earlier != warp[:, None])).any():
                raise EmulationError("shared memory is written that another warp used since the last barrier")
        self._writer[at], self._is_written[at] = warp[:, None], True
        self._writer[at] = np.where(self._writer[at] == warp[:, None], warp[:, None], self._SEVERAL)
        words = self._bytes.view(_BITS[width])
        words[program, address // width] = bits
        if (words[program, address // width] != bits).any():
            raise EmulationError("two threads write different numbers to one place in shared memory")

    def _places(self, program: np.ndarray, address: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        if address.size and (address.max() + width > self._bytes.shape[1] or (address % width).any()):
            raise EmulationError(f"{width} bytes of shared memory at {address.max()}, of {self._bytes.shape[1]}")
        return program[:, None], address[:, None].astype(np.int64) + np.arange(width)
