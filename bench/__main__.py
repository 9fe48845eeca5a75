"""``python -m bench loss``: whole criteria against other implementations of them; ``parity``: a real trainer, patched."""

import argparse
import os
from pathlib import Path

from . import loss, parity


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("loss", help="forward and backward of YOLO11's and YOLOX's criterion")
    add.add_argument("--system", choices=["yolo11", "yolox", "both"], default="both")
    add.add_argument("--device", default="cpu")
    add.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    add.add_argument("--batch-size", type=int, default=16)
    add.add_argument("--imgsz", type=int, default=640)
    add.add_argument("--classes", type=int, default=80)
    add.add_argument("--boxes", choices=["coco", "lognormal", "crowded"], help="default: coco with the data, else lognormal")
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with coco_boxes.json")
    add.add_argument("--threads", type=int, help="of torch on the CPU; one is the least disturbed on a busy machine")
    add.add_argument("--rounds", type=int, default=15)
    add.add_argument("--quick", action="store_true", help="three rounds, memory once, nothing compiled")
    add.add_argument("--only", nargs="+", metavar="NAME", help="other implementations to compare with; default: all")
    add.add_argument("--time-limit", type=float, default=600, metavar="S", help="of the process that first tries each alone")
    add.add_argument("--memory-limit", type=float, metavar="GIB", help="address space of that process")
    add.add_argument("--out", type=Path, help="append every row to this file as a line of JSON")
    add.set_defaults(run=loss.run)
    add = commands.add_parser("parity", help="train with a real trainer, stock and patched, and compare every step")
    add.add_argument("trainer", choices=["ultralytics"])
    add.add_argument("--model", default="yolo11n", help="name of a model that Ultralytics builds, e.g. yolo26n")
    add.add_argument("--epochs", type=int, default=2)
    add.add_argument("--images", type=int, default=64, help="of training and of validation, at most")
    add.add_argument("--imgsz", type=int, default=320)
    add.add_argument("--batch-size", type=int, default=8)
    add.add_argument("--threads", type=int, default=1)
    add.add_argument("--perturb", type=float, default=1e-7, help="noise on the weights of a third run, stock too; 0: none")
    add.add_argument("--data", type=Path, default=os.environ.get("TRITON_YOLO_DATA"), help="folder with bccd/")
    add.set_defaults(run=parity.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
