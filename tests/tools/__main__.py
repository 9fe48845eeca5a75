"""What the kernels ask of memory, take on a target and issue, proven on a machine without a GPU; and trainings side by side."""

import argparse
import os
from pathlib import Path

from bench.options import image_side, positive
from bench.systems import SYSTEMS

from . import instructions, launches, parity, small_step, tables, times, traffic


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.run(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.tools", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add = commands.add_parser("traffic", help="bytes and launches of the kernels, in the interpreter; fails past the bar")
    add.set_defaults(run=traffic.run)
    _add_resources(commands.add_parser("resources", help="compile every kernel for every target; fails at spills past the bar"))
    add = commands.add_parser("instructions", help="what the compiled kernels issue, counted by an emulator of PTX")
    add.add_argument("--systems", nargs="+", choices=SYSTEMS, help="only these criteria")
    add.add_argument("--target", default="cuda:90", help="architecture; default: %(default)s")
    add.add_argument("--dtype", choices=launches.DTYPES, default="bfloat16")
    add.add_argument("--batch-size", type=positive, default=2)
    add.add_argument("--imgsz", type=image_side, default=640)
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.set_defaults(run=instructions.run)
    add = commands.add_parser("times", help="what every kernel takes on a CUDA device, as a CUDA graph")
    add.add_argument("--systems", nargs="+", choices=SYSTEMS, help="only these criteria")
    add.add_argument("--dtype", choices=launches.DTYPES, default="bfloat16")
    add.add_argument("--batch-size", type=positive, default=64)
    add.add_argument("--imgsz", type=image_side, default=640)
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.set_defaults(run=times.run)
    add = commands.add_parser("small-step", help="every operation once, for tools that watch memory")
    add.set_defaults(run=lambda _: small_step.main())
    _add_parity(commands.add_parser("parity", help="train with a real trainer, stock and patched, and compare every step"))
    add = commands.add_parser("tables", help="write the tables of docs/benchmarks.md that the others have figures for")
    add.set_defaults(run=tables.run)
    return parser


def _add_resources(add: argparse.ArgumentParser) -> None:
    add.add_argument("--targets", nargs="+", default=launches.TARGETS)
    add.add_argument("--dtypes", nargs="+", choices=launches.DTYPES, default=launches.DTYPES)
    add.add_argument("--operators", nargs="+", default=[""], metavar="PREFIX", help="only those; nothing is saved")
    add.add_argument("--verbose", action="store_true", help="a line for every kernel")
    add.add_argument("--json", type=Path, help="write every kernel's figures as JSON lines")
    add.add_argument("--out", type=Path, help="append a line a target and type here instead of tests/tools/resources.jsonl")
    add.set_defaults(run=_compile_everything)


def _compile_everything(arguments: argparse.Namespace) -> None:
    from . import resources  # needs Triton, which the others do without

    resources.run(arguments)


def _add_parity(add: argparse.ArgumentParser) -> None:
    add.add_argument("trainer", choices=["ultralytics"])
    add.add_argument("--model", default="yolo11n", help="name of a model that Ultralytics builds, e.g. yolo26n")
    add.add_argument("--epochs", type=positive, default=2)
    add.add_argument("--images", type=positive, default=64, help="of training and of validation, at most")
    add.add_argument("--imgsz", type=image_side, default=320)
    add.add_argument("--batch-size", type=positive, default=8)
    add.add_argument("--threads", type=positive, default=1)
    add.add_argument("--double", action="store_true", help="train in float64: rounding grows too little to be seen")
    add.add_argument("--perturb", type=float, default=1e-7, help="noise on the weights of a third run, stock too; 0: none")
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with bccd/")
    add.add_argument("--out", type=Path, help="append to this file instead of bench/results/<machine>.jsonl")
    add.set_defaults(run=parity.run)


if __name__ == "__main__":
    main()
