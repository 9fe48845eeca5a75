"""PTX text of one kernel as basic blocks of instructions."""

import re
from typing import NamedTuple

COLLECTIVE = ("bar", "shfl", "redux", "ldmatrix", "stmatrix")  # what threads execute together


class Instruction(NamedTuple):
    """``@guard opcode operands``; the opcode is split at its dots, a guard is a register and the value that it must have."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None


class Program(NamedTuple):
    """A kernel: its name, its parameters' names, threads a program, and blocks.

    Only the last instruction of a block branches, and only the first is collective.
    """

    name: str
    params: tuple[str, ...]
    num_threads: int
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)[^{]*\{(.*?)^\}", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*")


def parse(ptx: str) -> Program:
    """Parse the only kernel of a module."""
    name, params, threads, body = _ENTRY.search(ptx).groups()
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = re.sub(r"^\{ (.*) \}$", r"\1", line.partition("//")[0].strip())  # a scope for a register of its own
        for statement in filter(None, map(str.strip, line.split(";"))):
            if statement.endswith(":"):
                if blocks[-1]:
                    blocks.append([])
                labels[statement[:-1]] = len(blocks) - 1
            elif not statement.startswith("."):
                instruction = _instruction(statement)
                if instruction.opcode[0] in COLLECTIVE and blocks[-1]:
                    blocks.append([])
                blocks[-1].append(instruction)
                if instruction.opcode[0] in ("bra", "ret"):
                    blocks.append([])
    return Program(name, tuple(re.findall(r"\w+_param_\d+", params)), int(threads), tuple(map(tuple, blocks)), labels)


def _instruction(text: str) -> Instruction:
    if not (found := _STATEMENT.fullmatch(text)):
        raise ValueError(f"cannot read {text!r}")
    negated, guard, opcode, rest = found.groups()
    operands = tuple(operand.strip() for operand in _OPERAND.findall(rest))
    return Instruction(tuple(opcode.split(".")), operands, (guard, not negated) if guard else None)
