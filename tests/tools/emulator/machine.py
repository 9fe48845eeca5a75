"""Programs of one launch side by side: registers, control flow, and the memory that they reach.

A value is an array that broadcasts to (programs, threads): what all threads share is computed once. Lanes that diverge are
executed from the lowest block on, so that they meet again where compiled code joins.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .memory import EmulationError, Memory, SharedMemory
from .parser import Program

WARP = 32
WIDTHS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64, "tmp": np.uint32, "_": np.uint32}

_ALL = np.ones((1, 1), np.bool_)


def expand(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``np.broadcast_to`` at a tenth of its cost for arrays of this size."""
    if value.shape == shape:
        return value
    result = np.empty(shape, value.dtype)
    result[...] = value
    return result


def width_of(register: str) -> type:
    """Bits of a register, unsigned; ``tmp`` is the compiler's name for half of what it splits, ``_`` a part that it drops."""
    return WIDTHS[re.match(r"%?[a-z]+|_", register)[0]]


class Registers(dict[str, np.ndarray]):
    """By name. What was never written is full of ones, NaN among them: compiled code may read it where it does not matter."""

    def __missing__(self, register: str) -> np.ndarray:
        return ~np.zeros((1, 1), width_of(register))


class Block(NamedTuple):
    """Instructions as functions of the machine; a branch, the last, returns its target and the lanes that take it.

    The first may be one that all threads of a ``unit`` (warp or program) execute together: it waits for the last of them.
    """

    steps: list[Callable[["Machine"], Any]]
    unit: int


class Machine:
    """Some programs of a launch, from their first instruction to their last.

    Attributes:
        mask: which lanes execute, None for all that are left.
        kept: the same where other lanes go on later, whose registers must not change.
        instructions: how many were issued, by program.
    """

    def __init__(
        self, program: Program, params: Mapping[str, bytes], index: np.ndarray, grid: tuple[int, int, int],
        memory: Memory, shared_bytes: int, rng: np.random.Generator,
    ) -> None:  # fmt: skip
        x, y, _ = grid
        self.program, self.params, self.memory, self.rng = program, params, memory, rng
        self.index = index
        self.shape = (len(index), program.num_threads)
        self.shared = SharedMemory(len(index), shared_bytes, program.num_threads // WARP)
        self.registers = Registers()
        self.instructions = np.zeros(len(index), np.int64)
        self.mask: np.ndarray | None = None
        self.kept: np.ndarray | None = None
        threads = np.arange(program.num_threads, dtype=np.uint32)[None]
        self.special = {
            "%tid.x": threads,
            "%laneid": threads % WARP,
            "%ctaid.x": (index % x)[:, None].astype(np.uint32),
            "%ctaid.y": (index // x % y)[:, None].astype(np.uint32),
            "%ctaid.z": (index // (x * y))[:, None].astype(np.uint32),
            **{f"%nctaid.{axis}": np.full((1, 1), size, np.uint32) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.full((1, 1), program.num_threads, np.uint32),
        }

    def run(self, blocks: Sequence[Block]) -> None:
        pending: dict[int, np.ndarray | None] = {0: None}
        while pending:
            block, mask = self._next(pending, blocks)
            self.mask, self.kept = mask, mask if pending else None
            self.instructions += len(blocks[block].steps) * (1 if mask is None else expand(mask, self.shape).any(1))
            target, taken = block + 1, None
            for step in blocks[block].steps:
                if (branch := step(self)) is not None:
                    target, taken = branch
            for to, lanes in self._split(target, taken, block + 1):
                earlier = pending.get(to, False)
                pending[to] = lanes if earlier is False else None if lanes is None or earlier is None else earlier | lanes

    def _next(self, pending: dict[int, np.ndarray | None], blocks: Sequence[Block]) -> tuple[int, np.ndarray | None]:
        """Take the lowest block that lanes can execute from those where some are, and these lanes."""
        for block in sorted(pending):
            mask, unit = pending.pop(block), blocks[block].unit
            if mask is None or (not pending and mask.all()):
                return block, None
            if unit:
                lanes = expand(mask, self.shape).reshape(len(self.index), -1, unit)
                is_whole = np.broadcast_to(lanes.all(-1, keepdims=True), lanes.shape).reshape(self.shape)
                if (mask & ~is_whole).any():
                    pending[block] = mask & ~is_whole
                mask = is_whole
                if not mask.any():
                    continue
            return block, mask
        raise EmulationError("threads wait for others that never come")

    def _split(self, target: int, taken: np.ndarray | None, following: int) -> list[tuple[int, np.ndarray | None]]:
        """Where the lanes go: those ``taken`` (None: all) to ``target``, -1 for the end, the rest to ``following``."""
        mask = self.mask
        if taken is None or taken.all():
            parts = [(target, mask)]
        elif not taken.any():
            parts = [(following, mask)]
        else:
            alive = np.ones((1, 1), np.bool_) if mask is None else mask
            parts = [(to, lanes) for to, lanes in ((target, alive & taken), (following, alive & ~taken)) if lanes.any()]
        return [part for part in parts if part[0] >= 0]

    # ---- registers

    def write(self, name: str, value: np.ndarray, guard: np.ndarray | None) -> None:
        """Set a register in the lanes that execute and that the guard lets through."""
        mask = self.kept
        if guard is not None:
            mask = guard if mask is None else mask & guard
        if mask is not None and (old := self.registers.get(name)) is not None:
            value = np.where(mask, value, old)
        self.registers[name] = value

    def active(self, guard: np.ndarray | None) -> np.ndarray:
        """Lanes that execute an instruction, as a mask that broadcasts."""
        if self.mask is None:
            return _ALL if guard is None else guard
        return self.mask if guard is None else self.mask & guard

    # ---- warps

    def lanes(self, value: np.ndarray) -> np.ndarray:
        """A value by program, warp and lane."""
        return expand(value, self.shape).reshape(len(self.index), -1, WARP)

    def threads(self, value: np.ndarray) -> np.ndarray:
        """Back from ``lanes``."""
        return value.reshape(self.shape)
