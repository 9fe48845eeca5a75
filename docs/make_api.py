"""Make the API reference of the docstrings, without a network: ``python docs/make_api.py FOLDER``."""

import importlib
import sys
from pathlib import Path

import pdoc

TRAINERS = ("ultralytics", "yolox", "libreyolo")


def main(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    adapter = importlib.import_module("triton_yolo.integrations.ultralytics")
    adapter.__all__.remove("DetectionTrainer")  # made of Ultralytics' own class when asked for
    pdoc.render.configure(docformat="google")
    modules = ("triton_yolo", "triton_yolo.graphs", *(f"triton_yolo.integrations.{name}" for name in TRAINERS), "reference")
    pdoc.pdoc(*modules, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
