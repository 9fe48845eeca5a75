"""Whole trainings with ``examples/train.py``: mean average precision, time, first steps beside the reference's losses."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import results

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train.py"
COMPARED = 50  # steps


def run(arguments: argparse.Namespace) -> None:
    digits = {f"digits, {loss} head": ["--loss", loss] for loss in ("yolo11", "yolox")}
    trainings = {**digits, "BCCD, yolo11 head": ["--data", str(arguments.data / "bccd")]} if arguments.data else digits
    print(HEADER)
    for what, options in trainings.items():
        if arguments.what and what.split(",")[0] not in arguments.what:
            continue
        options = [*options, "--device", arguments.device, "--seed", str(arguments.seed)]
        metrics = train(*options)
        loss = metrics["loss"]
        first = train(*options, "--loss", f"reference-{loss}", "--steps", str(COMPARED)) if "digits" in what else None
        row = {
            "what": what, "device": arguments.device, "seed": arguments.seed, "map50": metrics["map50"],
            "steps": metrics["steps"], "seconds": metrics["train_seconds"], "parameters": metrics["parameters"],
            "difference": first and largest_difference(metrics["curves"]["loss"], first["curves"]["loss"]),
        }  # fmt: skip
        results.append("training", row, arguments.out)
        print(markdown(row), flush=True)


HEADER = (
    f"| data and head | mAP@50 | steps | seconds | largest difference of the first {COMPARED} losses from the reference's |\n"
    "|---|--:|--:|--:|--:|"
)


def markdown(row: dict[str, Any]) -> str:
    difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
    return f"| {row['what']} | {row['map50']:.3f} | {row['steps']} | {row['seconds']:.0f} | {difference} |"


def train(*options: str) -> dict[str, Any]:
    """The metrics that one training writes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(TRAIN), *options, "--output", folder], check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "metrics.json").read_text())


def largest_difference(curve: list[float], expected: list[float]) -> float:
    """Relative, over the steps that both have."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, expected, strict=False))
