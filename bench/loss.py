"""Time, ratio and peak memory of whole operations, each implementation of them beside the others."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from . import results
from .cases import Case, has_coco, make_case
from .compare import HEADER, Builder, ComparisonError, compare, markdown
from .competitors import ASSIGNERS, CRITERIA
from .keypoints import KEYPOINTS
from .measure import copy_bandwidth
from .oriented import ORIENTED
from .stages import STAGES
from .tasks import TASKS

OPERATIONS: dict[str, Mapping[str, Mapping[str, Builder]]] = {
    "loss": CRITERIA, "stages": STAGES, "assign": ASSIGNERS, "tasks": {**ORIENTED, **TASKS, **KEYPOINTS},
}  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    boxes, case = case_of(arguments)
    print(describe(case, boxes, arguments))
    arguments.copy_bandwidth = copy_bandwidth(torch.device(arguments.device))
    print(f"A copy moves {arguments.copy_bandwidth / 1e9:.1f} GB/s.\n\n{HEADER}")
    failures = []
    for what, builders in OPERATIONS[arguments.command].items():
        if arguments.what and what not in arguments.what:
            continue
        try:
            rows = compare(what, builders, case, arguments)
        except ComparisonError as error:
            failures.append(str(error))
            continue
        for row in rows:
            print(markdown(row), flush=True)
            results.append(arguments.command, {**sizes(case, boxes, arguments), **row}, arguments.out)
    if failures:
        raise SystemExit("\n".join(failures))


def case_of(arguments: argparse.Namespace) -> tuple[str, Case]:
    """The kind of boxes, and the batch."""
    data = Path(arguments.data) if arguments.data else None
    boxes = arguments.boxes or ("coco" if has_coco(data) else "lognormal")
    return boxes, make_case(
        boxes, batch_size=arguments.batch_size, imgsz=arguments.imgsz, num_classes=arguments.classes,
        reg_max=arguments.reg_max, data=data,
    )  # fmt: skip


def describe(case: Case, boxes: str, arguments: argparse.Namespace) -> str:
    """The machine, and what is measured on it."""
    return (
        ", ".join(f"{key} {value}" for key, value in results.machine().items())
        + f"\nB={case.batch_size}, {case.imgsz} px, C={case.num_classes}, {len(case.rows)} boxes ({boxes}), "
        f"{arguments.dtype} on {arguments.device}\n"
    )


def sizes(case: Case, boxes: str, arguments: argparse.Namespace) -> dict[str, int | str]:
    found = {"boxes": boxes, "num_boxes": len(case.rows), "device": arguments.device, "dtype": arguments.dtype}
    return {**found, **{name: value for name, value in case._asdict().items() if name != "rows"}}
