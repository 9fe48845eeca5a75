"""Bytes that the kernels of whole criteria ask for, against the fewest that the job allows. Deterministic: a bar for CI."""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import triton_yolo as ty
from bench.cases import Case, make_case
from bench.systems import LAYOUTS, SYSTEMS, least_bytes

if TYPE_CHECKING:
    from .meter import Meter

BARS = Path(__file__).with_name("traffic_bars.json")


class Figures(NamedTuple):
    """Launches forward and backward; requested bytes over the least possible; bytes an anchor beside predictions and gradients.

    The last is the largest of all launches: a few numbers an anchor and a row, never a tensor of pairs.
    """

    forward: int
    backward: int
    ratio: float
    spare: float


def run(arguments: argparse.Namespace) -> None:
    demand_interpreter()
    bars, failed = json.loads(BARS.read_text()), []
    for name, measure in CASES.items():
        figures, table = measure()
        bar = Figures(**bars[name])
        print(f"{name}: {figures.forward} + {figures.backward} launches, {figures.ratio:.3f} of the limit", end=", ")
        print(f"{figures.spare} bytes an anchor beside the predictions\n{table}\n")
        if any(have > most for have, most in zip(figures, bar, strict=True)):
            failed.append(f"{name}: {figures}, bar {bar}")
    if failed:
        raise SystemExit("past the bar:\n" + "\n".join(failed))


def demand_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("this command meters interpreted kernels: set TRITON_INTERPRET=1")


def measure_step(system: str, dtype: torch.dtype, layout: str) -> tuple[Figures, str]:
    case = make_case("lognormal", batch_size=2, imgsz=256, num_classes=80)
    return measure(system, case._replace(rows=case.rows[::4]), dtype, layout)  # seven boxes an image


def measure_small_step(system: str) -> tuple[Figures, str]:
    """Of criteria that have most of their kernels from others."""
    case = make_case("lognormal", batch_size=1, imgsz=128, num_classes=80)
    return measure(system, case._replace(rows=case.rows[::8]), torch.bfloat16, LAYOUTS[0])


def measure(system: str, case: Case, dtype: torch.dtype, layout: str) -> tuple[Figures, str]:
    meter, forward, given = metered_step(system, case, dtype, layout)
    spare = max(sum(end - start for start, end in t.storages if start not in given) for t in meter.launches[:forward])
    ratio = meter.requested / least_bytes(system, case, dtype.itemsize)
    return Figures(forward, len(meter.launches) - forward, round(ratio, 3), round(spare / case.num_anchors, 1)), meter.table()


def metered_step(system: str, case: Case, dtype: torch.dtype, layout: str) -> "tuple[Meter, int, set[int]]":
    """The launches of a criterion forward and backward, how many are forward, where predictions and gradients begin."""
    from .meter import Meter, shipped_sizes

    call = SYSTEMS[system].call(case, dtype, layout)
    with shipped_sizes(), Meter() as meter, ty.backend("triton"):
        loss = call().loss
        forward = len(meter.launches)
        loss.backward()
    return meter, forward, {x.untyped_storage().data_ptr() for leaf in call.leaves for x in (leaf, leaf.grad)}


CASES = {
    f"{system} {str(dtype).removeprefix('torch.')} {layout}": partial(measure_step, system, dtype, layout)
    for system in ("yolo11", "yolox")
    for dtype in (torch.bfloat16, torch.float32)
    for layout in LAYOUTS
} | {
    f"{system} bfloat16 {LAYOUTS[0]}, 128 px": partial(measure_small_step, system)
    for system in ("yolo11-obb", "yolo11-seg", "yolo11-pose")
}
