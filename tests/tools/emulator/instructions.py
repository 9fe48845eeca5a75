"""What each PTX instruction does, as a function of the machine."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import COMPARISONS, OPERATIONS, TYPES, convert, from_bfloat16, in_pairs
from .machine import WARP, Block, Machine, expand, width_of
from .memory import EmulationError
from .parser import COLLECTIVE, Instruction

Step = Callable[[Machine], Any]
Read = Callable[[Machine], np.ndarray]


def compile_block(instructions: tuple[Instruction, ...], labels: dict[str, int], num_threads: int) -> Block:
    unit = 0
    if instructions and instructions[0].opcode[0] in COLLECTIVE:
        unit = num_threads if instructions[0].opcode[:2] == ("bar", "sync") else WARP
    return Block([_step(instruction, labels) for instruction in instructions], unit)


def _step(instruction: Instruction, labels: dict[str, int]) -> Step:
    name, *modifiers = instruction.opcode
    if name in COLLECTIVE and instruction.guard:
        raise EmulationError(f"{name} for some threads only")
    guard = _guard(instruction.guard)
    if name in ("bra", "ret"):
        target = labels[instruction.operands[0]] if name == "bra" else -1
        return lambda machine: (target, guard(machine))
    build = BUILDERS.get(name, _operation)
    return build(name, modifiers, instruction.operands, guard)


def _guard(guard: tuple[str, bool] | None) -> Callable[[Machine], np.ndarray | None]:
    if guard is None:
        return lambda machine: None
    name, is_wanted = guard
    return (lambda machine: machine.registers[name]) if is_wanted else lambda machine: ~machine.registers[name]


# ---- operands


def _is_register(operand: str) -> bool:
    return operand[0] == "%" or operand in ("tmp", "_")


def _read(operand: str, kind: str) -> Read:
    """A value of type ``kind``; a register may be wider."""
    dtype = TYPES[kind]
    bits = np.dtype(f"u{dtype().itemsize}") if dtype is not np.bool_ else np.dtype(np.bool_)
    if operand.count(".") == 1 and operand[0] == "%":
        return lambda machine: machine.special[operand].view(dtype)
    if not _is_register(operand):
        constant = _immediate(operand, bits).view(dtype)
        return lambda machine: constant
    if bits == width_of(operand):
        return lambda machine: machine.registers[operand].view(dtype)
    return lambda machine: machine.registers[operand].astype(bits).view(dtype)


def _immediate(text: str, bits: np.dtype) -> np.ndarray:
    if text == "global_smem":
        value = 0  # where a program's shared memory begins
    elif text.startswith(("0f", "0d")):
        value = int(text[2:], 16)
    else:
        value = int(text.rstrip("U"), 0)
    if bits == np.bool_:
        return np.array([[value != 0]])
    return np.array([[value & (2 ** (8 * bits.itemsize) - 1)]], bits)


def _write(register: str, kind: str) -> Callable[[Machine, np.ndarray, np.ndarray | None], None]:
    """Set a register, which may be wider than the type."""
    if register == "_":
        return lambda machine, value, guard: None
    width, dtype = np.dtype(width_of(register)), np.dtype(TYPES[kind])
    signed = np.dtype(f"i{width.itemsize}") if kind[0] == "s" else width

    def write(machine: Machine, value: np.ndarray, guard: np.ndarray | None) -> None:
        if value.dtype.itemsize == width.itemsize:
            bits = value.view(width)
        elif dtype.kind == "i":
            bits = value.astype(signed).view(width)
        else:
            bits = value.view(f"u{value.dtype.itemsize}").astype(width)
        machine.write(register, bits, guard)

    return write


def _parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _address(operand: str) -> Read:
    base, _, offset = operand.strip("[] ").partition("+")
    base, offset = base.strip(), int(offset or 0)
    if not _is_register(base):
        return lambda machine: np.full((1, 1), offset, np.int64)
    return lambda machine: machine.registers[base].astype(np.int64) + offset


# ---- arithmetic


def _operation(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    kind = modifiers[-1]
    operation = OPERATIONS.get((name, *(m for m in modifiers[:-1] if m in ("lo", "wide", "hi", "relu"))))
    if operation is None or set(modifiers[:-1]) - {"lo", "hi", "wide", "relu", "rn", "ftz", "approx", "full", "b32"}:
        raise EmulationError(f"unknown instruction {'.'.join((name, *modifiers))}")
    if kind == "f32x2":
        operation = in_pairs(operation)
    out = kind[0] + str(2 * int(kind[1:])) if "wide" in modifiers else kind
    kinds = [kind] * (len(operands) - 1)
    if name in ("shl", "shr", "bfe"):
        kinds[1:] = ["u32"] * (len(kinds) - 1)
    elif name == "selp":
        kinds[-1] = "pred"
    elif name in ("mad",) and "wide" in modifiers:
        kinds[-1] = out
    reads = [_read(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
    write, flush = _write(operands[0], "b32" if name == "popc" else out), "ftz" in modifiers
    dtype = TYPES[out]

    def step(machine: Machine) -> None:
        values = [read(machine) for read in reads]
        if flush:
            values = [_flushed(value) for value in values]
        result = np.asarray(operation(*values), dtype if name != "popc" else np.uint32)
        write(machine, _flushed(result) if flush else result, guard(machine))

    return step


def _flushed(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, np.copysign(value.dtype.type(0), value), value)


def _compare(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    how, kind = modifiers[0], modifiers[-1]
    a, b = (_read(operand, kind) for operand in operands[1:])
    write, compare = _write(operands[0], "pred"), COMPARISONS[how]
    wide = from_bfloat16 if kind == "bf16" else lambda value: value
    return lambda machine: write(machine, compare(wide(a(machine)), wide(b(machine))), guard(machine))


def _move(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    kind, (to, source) = modifiers[-1], operands
    if to.startswith("{"):  # the lowest bits come first
        read, half = _read(source, kind), f"b{int(kind[1:]) // 2}"
        writes = [_write(part, half) for part in _parts(to)]
        dtype = np.dtype(TYPES[half])

        def step(machine: Machine) -> None:
            value = read(machine)
            for i, write in enumerate(writes):
                write(machine, (value >> value.dtype.type(8 * dtype.itemsize * i)).astype(dtype), guard(machine))

        return step
    write = _write(to, kind)
    if source.startswith("{"):
        half, dtype = f"b{int(kind[1:]) // 2}", TYPES[kind]
        low, high = (_read(part, half) for part in _parts(source))
        shift = dtype(4 * np.dtype(dtype).itemsize)
        return lambda machine: write(machine, low(machine).astype(dtype) | high(machine).astype(dtype) << shift, guard(machine))
    read = _read(source, kind)
    return lambda machine: write(machine, read(machine), guard(machine))


def _convert(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    *how, to, source = modifiers
    reads, write = [_read(operand, source) for operand in operands[1:]], _write(operands[0], to)
    return lambda machine: write(machine, convert([read(machine) for read in reads], how, to, source), guard(machine))


# ---- memory


def _load(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    space, kind = modifiers[0], modifiers[-1]
    if space == "param":
        return _load_param(kind, operands, guard)
    writes, address = [_write(part, kind) for part in _parts(operands[0])], _address(operands[1])
    dtype = np.dtype(TYPES[kind])

    def step(machine: Machine) -> None:
        allowed = guard(machine)
        access = _Access(machine, address(machine), allowed, dtype.itemsize * len(writes))
        for i, write in enumerate(writes):
            write(machine, access.load(space, i * dtype.itemsize, dtype), allowed)

    return step


def _load_param(kind: str, operands: tuple[str, ...], guard: Any) -> Step:
    write, name = _write(operands[0], kind), operands[1].strip("[]")
    dtype = np.dtype(TYPES[kind])

    def step(machine: Machine) -> None:
        write(machine, np.frombuffer(machine.params[name], dtype, 1)[:, None], guard(machine))

    return step


def _store(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    space, kind = modifiers[0], modifiers[-1]
    reads, address = [_read(part, kind) for part in _parts(operands[1])], _address(operands[0])
    dtype = np.dtype(TYPES[kind])

    def step(machine: Machine) -> None:
        access = _Access(machine, address(machine), guard(machine), dtype.itemsize * len(reads))
        for i, read in enumerate(reads):
            access.store(space, i * dtype.itemsize, read(machine))

    return step


class _Access:
    """The lanes of a load or store, and who they are."""

    def __init__(self, machine: Machine, address: np.ndarray, guard: np.ndarray | None, size: int) -> None:
        self.machine, active = machine, machine.active(guard)
        self.shape = machine.shape
        self.lanes = np.nonzero(expand(active, self.shape))
        self.address = expand(address, self.shape)[self.lanes]
        if (self.address % size).any():
            raise EmulationError(
                f"{size} bytes at {self.address[self.address % size != 0][0]:#x}, which is no multiple of that"
            )

    def load(self, space: str, offset: int, dtype: np.dtype) -> np.ndarray:
        programs, threads = self.lanes
        if space == "global":
            bits = self.machine.memory.load(self.address + offset, dtype.itemsize, self.machine.index[programs])
        else:
            bits = self.machine.shared.load(programs, self.address + offset, dtype.itemsize, threads // WARP)
        result = np.zeros(self.shape, dtype)
        result[self.lanes] = bits
        return result

    def store(self, space: str, offset: int, value: np.ndarray) -> None:
        programs, threads = self.lanes
        bits = expand(value, self.shape)[self.lanes].view(f"u{value.dtype.itemsize}")
        if space == "global":
            self.machine.memory.store(self.address + offset, bits, self.machine.index[programs])
        else:
            self.machine.shared.store(programs, self.address + offset, bits, threads // WARP)


def _atomic(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    how, kind = modifiers[-2:]
    write, address, read = _write(operands[0], kind), _address(operands[1]), _read(operands[2], kind)
    operation = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}[how]

    def step(machine: Machine) -> None:
        allowed = guard(machine)
        access = _Access(machine, address(machine), allowed, np.dtype(TYPES[kind]).itemsize)
        value = expand(read(machine), access.shape)
        result = np.zeros(access.shape, value.dtype)
        order = machine.rng.permutation(len(access.address))
        result[access.lanes] = machine.memory.update(access.address, value[access.lanes], operation, order)
        write(machine, result, allowed)

    return step


def _reduction(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    """An atomic operation whose result nobody takes."""
    return _atomic(name, modifiers, ("_", *operands), guard)


# ---- threads together


def _barrier(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    if "warp" in modifiers:
        return lambda machine: None
    return lambda machine: machine.shared.barrier(expand(machine.active(None), machine.shape)[:, 0])


def _shuffle(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    _, how, kind = modifiers
    write, read, lane = _write(operands[0], kind), _read(operands[1], kind), _read(operands[2], "u32")
    if operands[3:] != ("0" if how == "up" else "31", "-1"):
        raise EmulationError(f"unknown shuffle {operands}")

    def step(machine: Machine) -> None:
        source = machine.lanes(lane(machine)).astype(np.int64) % WARP
        if how == "bfly":
            source = source ^ np.arange(WARP)
        elif how == "up":
            source = np.arange(WARP) - source
            source = np.where(source < 0, np.arange(WARP), source)  # none that far below: its own
        elif how != "idx":
            raise EmulationError(f"unknown instruction shfl.{how}")
        value = np.take_along_axis(machine.lanes(read(machine)), source, -1)
        write(machine, machine.threads(value), guard(machine))

    return step


def _reduce(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    _, how, kind = modifiers
    write, read = _write(operands[0], kind), _read(operands[1], kind)
    operation = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}[how]

    def step(machine: Machine) -> None:
        value = machine.lanes(read(machine))
        result = operation.reduce(value, -1, keepdims=True, dtype=value.dtype)
        write(machine, machine.threads(expand(result, value.shape)), guard(machine))

    return step


def _matrix(name: str, modifiers: list[str], operands: tuple[str, ...], guard: Any) -> Step:
    """``ldmatrix`` and ``stmatrix``: 8 x 8 matrices of 16 bits, whose rows lie where lanes 0 to 7, 8 to 15 ... say."""
    vector, pointer = operands if name == "ldmatrix" else operands[::-1]
    registers, address = _parts(vector), _address(pointer)
    lane = np.arange(WARP)
    pairs = [(lane // 4, 2 * (lane % 4) + half) for half in (0, 1)]  # row and column of the two elements of a lane
    if "trans" in modifiers:
        pairs = [(column, row) for row, column in pairs]

    def places(machine: Machine, matrix: int, half: int) -> np.ndarray:
        row, column = pairs[half]
        rows = machine.lanes(address(machine))[..., 8 * matrix + row]
        return machine.threads(rows + 2 * column)

    def load(machine: Machine) -> None:
        for matrix, register in enumerate(registers):
            low, high = (_Access(machine, places(machine, matrix, half), guard(machine), 2) for half in (0, 1))
            bits = [part.load("shared", 0, np.dtype(np.uint16)).astype(np.uint32) for part in (low, high)]
            _write(register, "b32")(machine, bits[0] | bits[1] << np.uint32(16), guard(machine))

    def store(machine: Machine) -> None:
        for matrix, register in enumerate(registers):
            value = machine.registers[register]
            for half, bits in enumerate((value.astype(np.uint16), (value >> np.uint32(16)).astype(np.uint16))):
                _Access(machine, places(machine, matrix, half), guard(machine), 2).store("shared", 0, bits)

    return load if name == "ldmatrix" else store


BUILDERS: dict[str, Callable[..., Step]] = {
    "setp": _compare, "mov": _move, "cvt": _convert, "ld": _load, "st": _store, "atom": _atomic, "red": _reduction,
    "bar": _barrier, "shfl": _shuffle, "redux": _reduce, "ldmatrix": _matrix, "stmatrix": _matrix,
}  # fmt: skip
