"""Measure what this package does against other implementations of it, and against the fewest bytes that it takes."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from . import gpu, host, loss, plot, scaling, train_step, training
from .options import image_side, positive


def main() -> None:
    arguments = make_parser().parse_args()
    arguments.run(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, what, run in (
        ("loss", "both criteria, forward and backward", loss.run),
        ("stages", "decoding, align metric, top-k, IoU, the losses of an assignment", loss.run),
        ("assign", "both assigners, on padded ground truth", loss.run),
        ("tasks", "what other tasks add, in a term alone and a whole criterion: 100 objects in each of 8 images", loss.run),
        ("scaling", "how the cost of the criteria grows with each size", scaling.run),
        ("train-step", "whole training steps, and the share of the loss in them", train_step.run),
    ):
        add = commands.add_parser(name, help=what, description=what)
        _add_case(add, loss.OPERATIONS.get(name) or (train_step.MODELS if name == "train-step" else scaling.CRITERIA))
        if run is loss.run:
            _add_others(add)
        add.set_defaults(run=run, **({"batch_size": 8, "boxes": "hundred"} if name == "tasks" else {}))
    add = commands.add_parser("gpu", help="everything that a CUDA machine can show: tests, sanitizer, benchmarks, with logs")
    add.add_argument("--parts", nargs="+", choices=gpu.PARTS, help="only these; default: all but scaling")
    add.add_argument("--seconds", type=float, default=300, help="that all parts may take; default: %(default)s")
    add.add_argument("--rehearse", action="store_true", help="small cases in Triton's interpreter instead")
    add.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        help="folder of log, summary and results; default: %(default)s",
    )
    add.set_defaults(run=gpu.run)
    add = commands.add_parser("host", help="what a step costs the host, beside an older version; fails past the bar")
    add.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    add.add_argument("--rounds", type=positive, default=11)
    add.add_argument("--steps", type=positive, default=200, help="of a round")
    add.set_defaults(run=host.run)
    add = commands.add_parser("training", help="train the example's detector on digits and, with the data, on BCCD")
    add.add_argument("--what", nargs="+", choices=["digits", "BCCD"], help="only these")
    add.add_argument("--device", default="cpu")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with bccd/")
    _add_out(add)
    add.set_defaults(run=training.run)
    add = commands.add_parser("plot", help="draw the plots, and write the tables of README and docs, from the saved results")
    add.set_defaults(run=plot.run)
    return parser


def _add_case(add: argparse.ArgumentParser, rows: Iterable[str]) -> None:
    add.add_argument("--what", nargs="+", metavar="NAME", choices=list(rows), help="only these rows: %(choices)s")
    add.add_argument("--device", default="cpu")
    add.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    add.add_argument("--batch-size", type=positive, default=16)
    add.add_argument("--imgsz", type=image_side, default=640)
    add.add_argument("--classes", type=positive, default=80)
    add.add_argument("--reg-max", type=positive, default=16, help="bins of the distance distribution")
    add.add_argument(
        "--boxes", choices=["coco", "lognormal", "hundred", "crowded"], help="default: coco with the data, else lognormal"
    )
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.add_argument("--rounds", type=positive, default=15)
    add.add_argument("--quick", action="store_true", help="three rounds, memory once, nothing compiled")
    _add_out(add)


def _add_others(add: argparse.ArgumentParser) -> None:
    add.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    add.add_argument("--cuda-graph", action="store_true", help="also ours as a replayed CUDA graph")
    add.add_argument("--only", nargs="+", metavar="NAME", help="other implementations to compare with; default: all")
    add.add_argument("--time-limit", type=float, default=600, metavar="S", help="of the process that first tries each alone")
    add.add_argument("--memory-limit", type=float, metavar="GIB", help="address space of that process")


def _add_out(add: argparse.ArgumentParser) -> None:
    add.add_argument("--out", type=Path, help="append to this file instead of bench/results/<machine>.jsonl")


if __name__ == "__main__":
    main()
