"""Instructions that the kernels of whole criteria issue, counted by the emulator of what Triton compiles. Deterministic.

They are PTX, of which ptxas makes somewhat more or fewer; what a program waits for is not in them. Two figures matter: all
that the warps of a launch issue, which a GPU spreads over its schedulers, and what one warp of the longest program issues, for
which every launch waits.
"""

import argparse
from pathlib import Path

import torch

import triton_yolo as ty
from bench.cases import has_coco, make_case
from bench.systems import SYSTEMS

HEADER = (
    "| kernel | programs | warps | issued by all, thousands | by a warp of the longest | of the median |\n"
    "|---|--:|--:|--:|--:|--:|"
)


def run(arguments: argparse.Namespace) -> None:
    from .emulator import emulated

    data = Path(arguments.data) if arguments.data else None
    boxes = "coco" if has_coco(data) else "lognormal"
    case = make_case(boxes, batch_size=arguments.batch_size, imgsz=arguments.imgsz, num_classes=80, data=data)
    print(
        f"{arguments.target}, {arguments.dtype}, B={case.batch_size}, {case.imgsz} px, C=80, {len(case.rows)} boxes ({boxes}), "
        "channels first\n"
    )
    for system in arguments.systems or SYSTEMS:
        call = SYSTEMS[system].call(case, getattr(torch, arguments.dtype))
        with emulated(arguments.target) as launches, ty.backend("triton"):
            call().loss.backward()
        print(f"{system}\n\n{HEADER}")
        for launch in launches:
            issued = sorted(launch.instructions.tolist())
            total = launch.num_warps * sum(issued)
            print(
                f"| {launch.kernel} | {len(issued)} | {launch.num_warps} | {total / 1e3:.0f} | {issued[-1]} "
                f"| {issued[len(issued) // 2]} |"
            )
        print(f"| all | | | {sum(x.num_warps * x.instructions.sum() for x in launches) / 1e3:.0f} | | |\n", flush=True)
