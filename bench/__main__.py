"""Measure what this package does against other implementations of it, and against the fewest bytes that it takes."""

import argparse
import os
from pathlib import Path

from . import gpu, host, instructions, launches, loss, model, parity, plot, scaling, traffic, train_step, training


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
        ("scaling", "how the cost of the criteria grows with each size", scaling.run),
        ("train-step", "whole training steps, and the share of the loss in them", train_step.run),
    ):
        add = commands.add_parser(name, help=what, description=what)
        _add_case(add)
        if run is loss.run:
            _add_others(add)
        add.set_defaults(run=run)
    add = commands.add_parser("traffic", help="bytes and launches of the kernels, in the interpreter; fails past the bar")
    add.set_defaults(run=traffic.run)
    add = commands.add_parser("resources", help="compile every kernel for every target: registers, spills; fails past the bar")
    add.add_argument("--targets", nargs="+", default=launches.TARGETS)
    add.add_argument("--dtypes", nargs="+", default=launches.DTYPES)
    add.add_argument("--operators", nargs="+", default=[""], metavar="PREFIX", help="only those; nothing is saved")
    add.add_argument("--verbose", action="store_true", help="a line for every kernel")
    add.add_argument("--json", type=Path, help="write every kernel's figures as JSON lines")
    add.add_argument("--out", type=Path, help="append a line a target and type here instead of bench/results/resources.jsonl")
    add.set_defaults(run=_compile_everything)
    add = commands.add_parser("instructions", help="what the compiled kernels issue, counted by an emulator of PTX")
    add.add_argument("--target", default="cuda:90", help="architecture; default: %(default)s")
    add.add_argument("--dtype", choices=launches.DTYPES, default="bfloat16")
    add.add_argument("--batch-size", type=int, default=2)
    add.add_argument("--imgsz", type=int, default=640)
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.set_defaults(run=instructions.run)
    add = commands.add_parser("parity", help="train with a real trainer, stock and patched, and compare every step")
    add.add_argument("trainer", choices=["ultralytics"])
    add.add_argument("--model", default="yolo11n", help="name of a model that Ultralytics builds, e.g. yolo26n")
    add.add_argument("--epochs", type=int, default=2)
    add.add_argument("--images", type=int, default=64, help="of training and of validation, at most")
    add.add_argument("--imgsz", type=int, default=320)
    add.add_argument("--batch-size", type=int, default=8)
    add.add_argument("--threads", type=int, default=1)
    add.add_argument("--double", action="store_true", help="train in float64: rounding grows too little to be seen")
    add.add_argument("--perturb", type=float, default=1e-7, help="noise on the weights of a third run, stock too; 0: none")
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with bccd/")
    _add_out(add)
    add.set_defaults(run=parity.run)
    add = commands.add_parser("model", help="an estimate of the kernels' time on a GPU, at best and at worst")
    add.add_argument("--gpu", choices=model.GPUS, default="H100-SXM")
    add.add_argument("--dtype", choices=launches.DTYPES, default="bfloat16")
    add.add_argument("--batch-size", type=int, default=64)
    add.add_argument("--imgsz", type=int, default=640)
    add.add_argument("--classes", type=int, default=80)
    add.set_defaults(run=model.run)
    add = commands.add_parser("gpu", help="everything that a CUDA machine can show: tests, sanitizer, benchmarks, with logs")
    add.add_argument("--parts", nargs="+", choices=gpu.PARTS, help="only these; default: all, some nine minutes")
    add.add_argument("--rehearse", action="store_true", help="small cases in Triton's interpreter instead")
    add.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of logs and results; default: %(default)s")
    add.set_defaults(run=gpu.run)
    add = commands.add_parser("host", help="what a step costs the host, beside an older version; fails past the bar")
    add.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    add.add_argument("--rounds", type=int, default=11)
    add.add_argument("--steps", type=int, default=200, help="of a round")
    add.set_defaults(run=host.run)
    add = commands.add_parser("training", help="train the example's detector on digits and, with the data, on BCCD")
    add.add_argument("--what", nargs="+", choices=["digits", "BCCD"], help="only these")
    add.add_argument("--device", default="cpu")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with bccd/")
    _add_out(add)
    add.set_defaults(run=training.run)
    add = commands.add_parser("plot", help="draw the plots, and write the tables of the README, from the saved results")
    add.set_defaults(run=plot.run)
    return parser


def _compile_everything(arguments: argparse.Namespace) -> None:
    from . import resources  # needs Triton, which the others do without

    resources.run(arguments)


def _add_case(add: argparse.ArgumentParser) -> None:
    add.add_argument("--what", nargs="+", metavar="NAME", help="only these rows")
    add.add_argument("--device", default="cpu")
    add.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    add.add_argument("--batch-size", type=int, default=16)
    add.add_argument("--imgsz", type=int, default=640)
    add.add_argument("--classes", type=int, default=80)
    add.add_argument("--reg-max", type=int, default=16, help="bins of the distance distribution")
    add.add_argument("--boxes", choices=["coco", "lognormal", "crowded"], help="default: coco with the data, else lognormal")
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.add_argument("--rounds", type=int, default=15)
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
