"""How the time of the criteria grows with one size at a time, and the exponent that fits best, against what is expected."""

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import results
from .cases import Case, make_case
from .competitors import CRITERIA, OURS, Target
from .loss import case_of, sizes
from .measure import spread, time_interleaved

SWEEPS: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 4, 16, 64, 256),
    "imgsz": (320, 640, 1024, 1536),
    "num_classes": (1, 20, 80, 320, 1203),
    "boxes an image": (0, 5, 50, 500, 5000),
}
NOISE = 0.15


class Expectation(NamedTuple):
    """Largest exponent that a size may have between two of its values."""

    size: str
    first: int
    last: int
    exponent: dict[str, float]


EXPECTED = (
    Expectation("batch_size", 1, 256, {"yolo11": 1, "yolox": 1}),
    Expectation("imgsz", 320, 1536, {"yolo11": 2, "yolox": 2}),  # linear in anchors
    Expectation("num_classes", 1, 1203, {"yolo11": 1, "yolox": 1}),
    Expectation("boxes an image", 5, 50, {"yolo11": 0.25, "yolox": 0.25}),
    # A box of YOLOX looks at every anchor that takes part in its image, and a crowd makes more of them take part.
    Expectation("boxes an image", 50, 5000, {"yolo11": 1, "yolox": 1.5}),
)


def run(arguments: argparse.Namespace) -> None:
    boxes, base = case_of(arguments)
    target = Target(torch.device(arguments.device), getattr(torch, arguments.dtype))
    rounds = 3 if arguments.quick else arguments.rounds
    failed = []
    for system in arguments.what or CRITERIA:
        for size, values in SWEEPS.items():
            points = {}
            for value, case in _cases(size, values[:3] if arguments.quick else values, base):
                timing = time_interleaved({OURS: CRITERIA[system][OURS](case, target)}, rounds)[OURS]
                points[value] = spread(timing.total)[0]
                row = {"what": system, "size": size, "value": value, "seconds": timing.total}
                results.append("scaling", {**sizes(case, boxes, arguments), **row}, arguments.out)
                print(f"{system:8} {size:15} {value:6} {1e3 * points[value]:9.3f} ms", flush=True)
            for expected in (e for e in EXPECTED if e.size == size and {e.first, e.last} <= points.keys()):
                found = exponent([(v, t) for v, t in points.items() if expected.first <= v <= expected.last])
                text = f"{system:8} {size} {expected.first}-{expected.last}: exponent {found:.2f}, expected at most "
                text += f"{expected.exponent[system]}"
                print(text, flush=True)
                if found > expected.exponent[system] + NOISE:
                    failed.append(text)
    if failed:
        raise SystemExit("grows faster than expected:\n" + "\n".join(failed))


def _cases(size: str, values: tuple[int, ...], base: Case) -> Iterator[tuple[int, Case]]:
    for value in values:
        if size == "boxes an image":
            crowd = make_case("crowded", batch_size=1, imgsz=base.imgsz, num_classes=base.num_classes, reg_max=base.reg_max)
            yield value, crowd._replace(rows=crowd.rows[:value])
            continue
        case = base._replace(**{size: value})
        image = base.rows[base.rows[:, 0] == 0]
        rows = torch.cat([image.index_fill(1, torch.tensor([0]), i) for i in range(case.batch_size)])
        yield value, case._replace(rows=torch.cat([rows[:, :1], rows[:, 1:2] % case.num_classes, rows[:, 2:]], 1))


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of the least squares line through the logarithms."""
    x, y = ([math.log(p[axis]) for p in points] for axis in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
