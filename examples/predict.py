"""Find objects in photos of any size with the weights that ``examples/train.py`` saved, and draw them.

With ``examples/`` on Python's path, the same in a program of your own:

    import cv2
    from checkpoint import load_model
    from predict import find_objects

    model, classes = load_model("runs/train/best.pt")
    found = find_objects(model, cv2.imread("photo.jpg"), imgsz=320)  # a supervision.Detections in the photo's pixels
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import supervision as sv
import torch
from checkpoint import load_model, read
from data import place, shrink
from detector import Detector
from devices import available
from evaluate import predict
from pictures import annotate
from samples import collate

LONGER_SIDE = 960  # of a drawing


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", help="image files")
    parser.add_argument("--weights", type=Path, default=Path("runs/train/best.pt"), help="default: %(default)s")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest confidence; default: %(default)s")
    parser.add_argument("--imgsz", type=int, help="side of the square that a photo is fitted into; default: as in training")
    parser.add_argument("--device", type=available, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/predict"), help="folder of drawings; default: %(default)s")
    options = parser.parse_args(argv)
    if not options.weights.is_file():
        parser.error(f"--weights: {options.weights} does not exist; `make train` writes runs/train/best.pt")
    try:
        trained = read(options.weights)["options"]["imgsz"]
    except ValueError as error:
        parser.error(f"--weights: {error}")
    options.imgsz = trained if options.imgsz is None else options.imgsz
    if options.imgsz % 32 or options.imgsz < 1:
        parser.error("--imgsz must be positive and divisible by 32")
    if len({photo.stem for photo in options.photos}) < len(options.photos):
        parser.error("two photos of one name would be drawn into one file")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    images = [load_photo(photo) for photo in options.photos]  # all, before anything is written
    model, classes = load_model(options.weights, options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    for photo, image in zip(options.photos, images, strict=True):
        found = find_objects(model, image, options.imgsz, options.threshold)
        file = options.output / f"{photo.stem}-found.png"
        cv2.imwrite(str(file), annotate(image, found, classes, LONGER_SIDE * image.shape[0] / max(image.shape[:2])))
        print(f"{photo}: {describe(found, classes) or f'nothing with a confidence above {options.threshold:g}'}; see {file}")


def load_photo(file: Path) -> np.ndarray:
    """An image (H, W, 3) in BGR and uint8, turned as the camera was."""
    if not file.is_file():
        raise SystemExit(f"{file} does not exist, or is a folder")
    image = cv2.imread(str(file))
    if image is None:
        raise SystemExit(f"{file} is no image that OpenCV can read")
    return image


def find_objects(model: Detector, image: np.ndarray, imgsz: int, threshold: float = 0.3) -> sv.Detections:
    """Objects in a photo (H, W, 3) in BGR, as OpenCV reads it, with boxes in its pixels."""
    size = np.tile(image.shape[1::-1], 2).astype(np.float32)
    whole = sv.Detections(size[None] * (0, 0, 1, 1), class_id=np.array([0]))
    placed = place(shrink(image, whole, imgsz), imgsz)
    (at,) = placed.boxes_xyxy  # where the photo lies in the square
    device = next(model.parameters()).device
    (found,) = predict(model, collate([placed]).images.to(device), threshold=threshold)
    found.xyxy = ((found.xyxy - np.tile(at[:2], 2)) / np.tile(at[2:] - at[:2], 2) * size).clip(0, size)
    return found


def describe(found: sv.Detections, classes: tuple[str, ...]) -> str:
    """How many there are of every class."""
    numbers = np.bincount(found.class_id.astype(int), minlength=len(classes))
    return ", ".join(f"{number} {name}" for name, number in zip(classes, numbers, strict=True) if number)


if __name__ == "__main__":
    main()
