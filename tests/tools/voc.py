"""Pascal VOC annotations as YOLO rows."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path


def read_boxes(annotation: Path, classes: Sequence[str]) -> list[tuple[int, float, float, float, float]]:
    """(class, cx, cy, w, h) of every box, 0-1 of the image."""
    root = ElementTree.parse(annotation).getroot()
    sides = [float(root.findtext(f"size/{side}")) for side in ("width", "height")]
    rows = []
    for thing in root.iter("object"):
        low, high = (
            [float(thing.findtext(f"bndbox/{axis}{end}")) / side for axis, side in zip("xy", sides, strict=True)]
            for end in ("min", "max")
        )
        centre = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        rows.append((classes.index(thing.findtext("name")), *centre, *(b - a for a, b in zip(low, high, strict=True))))
    return rows


def write_yolo(voc: Path, folder: Path, classes: Sequence[str], num_images: int) -> Path:
    """Link the first images of each part of a VOC folder and write their labels and a data.yaml; returns its path."""
    for part in ("train", "val"):
        images, labels = folder / "images" / part, folder / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        names = (voc / f"ImageSets/Main/{part}.txt").read_text().split()
        for name in names[:num_images]:
            os.symlink(voc / f"JPEGImages/{name}.jpg", images / f"{name}.jpg")
            rows = read_boxes(voc / f"Annotations/{name}.xml", classes)
            (labels / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    config = folder / "data.yaml"
    config.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {list(classes)}\n")
    return config
