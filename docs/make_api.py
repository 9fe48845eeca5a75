"""Make the API reference of the docstrings, without a network: ``python docs/make_api.py FOLDER``."""

import sys
from pathlib import Path

import pdoc

from triton_yolo.integrations import ultralytics

TRAINERS = ("ultralytics", "yolox", "libreyolo")


def main(folder: Path) -> None:
    ultralytics.__all__.remove("DetectionTrainer")  # made of Ultralytics' own class when asked for
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("triton_yolo", *(f"triton_yolo.integrations.{name}" for name in TRAINERS), "reference", output_directory=folder)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # for the reference, which is not installed
    main(Path(sys.argv[1]))
