"""How the time of the criteria grows with one size at a time, and the exponent that fits best."""

import argparse
import math
from collections.abc import Iterator

import torch

from . import results
from .cases import Case, make_case
from .competitors import CRITERIA, OURS, Target
from .loss import case_of, sizes
from .measure import spread, time_interleaved

SWEEPS: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 4, 16, 64),
    "imgsz": (320, 640, 960, 1280),
    "num_classes": (1, 20, 80, 320, 1203),
    "boxes an image": (0, 5, 50, 500, 5000),
}
EXPECTED = {"batch_size": 1.0, "imgsz": 2.0, "num_classes": 1.0, "boxes an image": 1.0}
"""Largest exponents: linear in anchors, at most linear in classes and boxes."""


def run(arguments: argparse.Namespace) -> None:
    boxes, base = case_of(arguments)
    target = Target(torch.device(arguments.device), getattr(torch, arguments.dtype))
    rounds = 3 if arguments.quick else arguments.rounds
    for system in arguments.what or CRITERIA:
        for size, values in SWEEPS.items():
            points = []
            for value, case in _cases(size, values[:3] if arguments.quick else values, base):
                timing = time_interleaved({OURS: CRITERIA[system][OURS](case, target)}, rounds)[OURS]
                points.append((value, spread(timing.total)[0]))
                row = {"what": system, "size": size, "value": value, "seconds": timing.total}
                results.append("scaling", {**sizes(case, boxes, arguments), **row}, arguments.out)
                print(f"{system:8} {size:15} {value:6} {1e3 * points[-1][1]:9.2f} ms", flush=True)
            slope = exponent([p for p in points if p[0] > 0])
            print(f"{system:8} {size:15} grows with exponent {slope:.2f}, at most {EXPECTED[size]} expected\n", flush=True)


def _cases(size: str, values: tuple[int, ...], base: Case) -> Iterator[tuple[int, Case]]:
    for value in values:
        options = {"batch_size": base.batch_size, "imgsz": base.imgsz, "num_classes": base.num_classes}
        if size != "boxes an image":
            rows = base.rows[: len(base.rows) // base.batch_size]
            rows = torch.cat([rows.index_fill(1, torch.tensor([0]), i) for i in range({**options, size: value}["batch_size"])])
            case = Case(rows, **{**options, size: value})
            yield value, case._replace(rows=torch.cat([rows[:, :1], rows[:, 1:2] % case.num_classes, rows[:, 2:]], 1))
        else:
            crowd = make_case("crowded", **{**options, "batch_size": 1})
            yield value, crowd._replace(rows=crowd.rows[:value])


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of the least squares line through the logarithms."""
    x, y = ([math.log(p[axis]) for p in points] for axis in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
