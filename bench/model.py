"""A bracket around the time of the kernels on a GPU that nobody measured, from bytes, sectors, launches and registers."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .meter import Traffic

from . import results
from .cases import make_case
from .measure import spread
from .traffic import demand_interpreter, metered_step

METERED = 2  # images; what every launch moves grows with the images
LATENCY = 7e-7  # seconds from a load to its value, under load
LAUNCH = 2.5e-6, 5e-6  # seconds between launches: replayed in a graph, and from Python


class GPU(NamedTuple):
    """Figures of the data sheets: bytes a second, multiprocessors, and what Triton calls the architecture."""

    bandwidth: float
    processors: int
    target: str
    registers: int = 65536
    warps: int = 64


GPUS = {
    "H100-SXM": GPU(3.35e12, 132, "cuda:90"),
    "A100-80GB": GPU(2.039e12, 108, "cuda:80"),
    "RTX-4090": GPU(1.008e12, 128, "cuda:89", warps=48),
    "L4": GPU(0.3e12, 58, "cuda:89", warps=48),
}


def run(arguments: argparse.Namespace) -> None:
    demand_interpreter()
    gpu, dtype = GPUS[arguments.gpu], getattr(torch, arguments.dtype)
    case = make_case("lognormal", batch_size=METERED, imgsz=arguments.imgsz, num_classes=arguments.classes)
    in_flight = bytes_in_flight(gpu, arguments.dtype)
    print(
        f"{arguments.gpu}: {gpu.bandwidth / 1e9:.0f} GB/s by its data sheet; B={arguments.batch_size}, {arguments.imgsz} px, "
        f"C={arguments.classes}, {len(case.rows) // METERED} boxes an image, {arguments.dtype}, channels first.\n"
        f"Assumed at best: requested bytes at full bandwidth, {1e6 * LAUNCH[0]} us a launch.\n"
        f"Assumed at worst: whole sectors at a third of it, or as slowly as the loads that registers let be in flight arrive\n"
        f"({1e9 * LATENCY:.0f} ns each); {1e6 * LAUNCH[1]} us a launch.\n"
        f"In both, arithmetic and waiting for other programs are free. Metered with {METERED} images.\n"
    )
    for system in ("yolo11", "yolox"):
        meter, forward, _ = metered_step(system, case, dtype, "channels first")
        times = [bracket(t, gpu, arguments.batch_size / METERED, in_flight[t.kernel]) for t in meter.launches]
        print(f"| {system}: kernel | at best us | at worst us |\n|---|--:|--:|")
        for launch, (best, worst) in zip(meter.launches, times, strict=True):
            print(f"| {launch.kernel} | {1e6 * best:.1f} | {1e6 * worst:.1f} |")
        for name, part in (("forward", times[:forward]), ("backward", times[forward:]), ("both", times)):
            best, worst = (1e3 * sum(side) for side in zip(*part, strict=True))
            print(f"| **{name}** | {best:.3f} ms | {worst:.3f} ms |")
        print(measured(system, arguments), flush=True)


def bracket(launch: "Traffic", gpu: GPU, scale: float, in_flight: float) -> tuple[float, float]:
    """Seconds of a launch at best and at worst."""
    worst_bandwidth = min(gpu.bandwidth / 3, gpu.processors * in_flight / LATENCY)
    return LAUNCH[0] + scale * launch.requested / gpu.bandwidth, LAUNCH[1] + scale * launch.sectors / worst_bandwidth


def bytes_in_flight(gpu: GPU, dtype: str) -> dict[str, float]:
    """Of every kernel: bytes that the threads of a multiprocessor wait for if each has one load, of a sector a warp or more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resources.jsonl"
        options = ["--targets", gpu.target, "--dtypes", dtype, "--operators", "unpack_rows", "yolo", "--json", str(file)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "bench", "resources", *options]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    found: dict[str, float] = {}
    for row in rows:
        warps = min(gpu.warps, gpu.registers // (32 * max(row["registers"], 1)))
        loads = warps * max(32 * row["widest_load"] // 8, 32)
        found[row["kernel"]] = min(found.get(row["kernel"], float("inf")), loads)
    return found


def measured(system: str, arguments: argparse.Namespace) -> str:
    """What the saved results say of this very case."""
    sizes = {"what": system, "dtype": arguments.dtype, "batch_size": arguments.batch_size, "imgsz": arguments.imgsz}
    for row in results.latest("loss"):
        is_ours = row["name"].startswith("triton_yolo") and row["device"].startswith("cuda")
        if is_ours and sizes.items() <= row.items():
            both = spread([f + b for f, b in zip(row["forward"], row["backward"], strict=True)])[0]
            return f"\nMeasured on {row['machine']['gpu']}, commit {row['commit']}: {1e3 * both:.3f} ms.\n"
    return "\nNot measured: no saved result of this case is from a GPU.\n"
