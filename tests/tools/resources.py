"""Compile every kernel ahead of time for every target, as its operator would launch it, and list what it takes.

No GPU is needed: the operators run on meta tensors, and each launch stops after compilation. Another version of Triton comes
first on the path: ``PYTHONPATH=<folder of pip install --target>``.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from bench import results
from bench.host_step import TargetDriver

from .launches import OPERATORS, Operator
from .tables import RESOURCES
from .target import active

BARS = Path(__file__).with_name("resources_bars.json")


@dataclass
class Resources:
    """What one kernel takes in one specialisation.

    Bytes of spills are per thread, of shared memory per program, of code those of the whole binary; loads and stores are the
    widest that are asked of global memory, in bits.
    """

    operator: str
    kernel: str
    target: str
    dtype: str
    layout: str
    num_warps: int
    registers: int
    spill: int
    shared: int
    widest_load: int
    widest_store: int
    code: int
    compile_seconds: float


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    print(f"Triton {triton.__version__}")
    operators = {name: value for name, value in OPERATORS.items() if name.startswith(tuple(arguments.operators))}
    if not operators:
        raise SystemExit(f"--operators: no name begins with {' or '.join(arguments.operators)}")
    rows, failed = [], []
    for target in arguments.targets:
        for dtype in arguments.dtypes:
            found = list(measure(target, dtype, operators))
            for row in found if arguments.verbose else over_the_bar(found):
                print(line(row))
            print(f"{target:10} {dtype:8} {summary(found)}", flush=True)
            rows += found
            failed += over_the_bar(found)
            if len(operators) == len(OPERATORS):
                results.append("resources", {"target": target, "dtype": dtype, **figures(found)}, arguments.out or RESOURCES)
    if arguments.json:
        arguments.json.write_text("\n".join(json.dumps(asdict(row)) for row in rows) + "\n")
    if failed:
        raise SystemExit(f"{len(failed)} kernels spill past the bar")


def over_the_bar(rows: Iterable[Resources]) -> list[Resources]:
    """Kernels that spill more than the committed file allows on their target."""
    bars = json.loads(BARS.read_text())["spill"]
    return [row for row in rows if row.spill > bars.get(row.target, float("inf"))]


def figures(rows: list[Resources]) -> dict[str, Any]:
    """Of one target and type: what is worth keeping of all kernels."""
    return {
        "triton": triton.__version__,
        "specialisations": len(rows),
        "registers": max(row.registers for row in rows),
        "shared": max(row.shared for row in rows),
        "code": sum(row.code for row in rows),
        "compile_seconds": round(sum(row.compile_seconds for row in rows), 1),
        "spilled": {f"{row.operator} {row.layout} {row.kernel}": row.spill for row in rows if row.spill},
    }


def summary(rows: list[Resources]) -> str:
    found = figures(rows)
    spilled = ", ".join(f"{name} {size} B" for name, size in found["spilled"].items()) or "no spill"
    return (
        f"{found['specialisations']} specialisations in {found['compile_seconds']} s, to {found['registers']} registers and "
        f"{found['shared']} B shared; {spilled}"
    )


def line(row: Resources) -> str:
    return (
        f"{row.target:10} {row.dtype:8} {row.layout:13} {row.operator:24} {row.kernel:32} {row.num_warps} warps "
        f"{row.registers:3} registers {row.spill:4} B spilled {row.shared:6} B shared  loads to {row.widest_load:3} bits, "
        f"stores to {row.widest_store:3}  {row.code:6} B code in {row.compile_seconds:.2f} s"
    )


def measure(target: str, dtype: str, operators: Mapping[str, Operator] = OPERATORS) -> Iterator[Resources]:
    """Compile for ``target`` ("cuda:90", "hip:gfx942") and yield one row a kernel and specialisation."""
    seen = set()
    for name, (operator, layouts) in operators.items():
        for layout in layouts:
            for launch in compile_launches(target, lambda o=operator, at=layout: o(getattr(torch, dtype), at)):
                compiled = launch.compiled
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                registers, spill, load, store = _usage(compiled, target)
                yield Resources(
                    name, launch.kernel, target, dtype, layout, compiled.metadata.num_warps, registers, spill,
                    compiled.metadata.shared, load, store, len(compiled.asm[_binary(target)]), round(launch.seconds, 3),
                )  # fmt: skip


def _binary(target: str) -> str:
    return "hsaco" if target.startswith("hip") else "cubin"


# ---- compilation


@dataclass
class Launch:
    kernel: str
    compiled: Any
    seconds: float


def compile_launches(target: str, function: Callable[[], Any]) -> list[Launch]:
    """Run ``function`` and return what its launches compile; none of them runs."""
    launched = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        launched.append(Launch(kernel.__name__, compiled, time.perf_counter() - start))
        return compiled

    with active(TargetDriver(target)), mock.patch.object(triton.JITFunction, "run", compile_only):
        function()
    return launched


# ---- reading what came out


def _usage(compiled: Any, target: str) -> tuple[int, int, int, int]:
    """Registers a thread, bytes spilled a thread, widest global load and store in bits."""
    if target.startswith("hip"):
        asm = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm).group(1))
        spill = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm).group(1))
        return registers, spill, _widest_of_amd("load", asm), _widest_of_amd("store", asm)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm[_binary(target)])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        stack = int(re.search(r"STACK:(\d+)", usage).group(1))
        # To disassemble takes half a second, as long as compilation does: only where a stack may hold what was spilled.
        spill = stack if stack and re.search(r"\b(STL|LDL)\b", _cuobjdump("-sass", file.name)) else 0
    registers, ptx = int(re.search(r"REG:(\d+)", usage).group(1)), compiled.asm["ptx"]
    return registers, spill, _widest_of_ptx("ld", ptx), _widest_of_ptx("st", ptx)


def _widest_of_ptx(name: str, ptx: str) -> int:
    found = re.findall(rf"\b{name}\.global[.:\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(number or 1) * int(bits) for number, bits in found), default=0)


def _widest_of_amd(name: str, assembly: str) -> int:
    found = [0]
    for suffix in re.findall(rf"(?:global|buffer)_{name}_(\w+)", assembly):
        wide = re.search(r"dwordx(\d)|b(128|96|64|32|16)\b", suffix)
        if wide is None:
            found.append(16 if "short" in suffix else 8 if "byte" in suffix else 32)
        else:
            found.append(32 * int(wide[1]) if wide[1] else int(wide[2]))
    return max(found)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    nvdisasm = tool.with_name("nvdisasm")
    command = [str(tool), option, path] if option == "-res-usage" or not nvdisasm.exists() else [str(nvdisasm), "-c", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
