"""What ``--data`` names: a Pascal VOC folder, a YOLO data.yaml or a COCO json, read with ``supervision``."""

import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import supervision as sv
import yaml
from digits import DigitScenes
from samples import Sample, area
from torch.utils.data import Dataset

GREY = 114
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class AnnotatedImages(Dataset[Sample]):
    """Images of a ``supervision`` data set on a square canvas, kept in memory at that size.

    Training images are mirrored, scaled and moved at random, which depends on the seed, the epoch and the index only.
    """

    def __init__(self, source: sv.DetectionDataset, imgsz: int, *, is_train: bool, seed: int = 0) -> None:
        self.classes = tuple(source.classes)
        self.imgsz, self.is_train, self.seed = imgsz, is_train, seed
        self.epoch = 0
        self.samples = [shrink(image, detections, imgsz) for _, image, detections in source]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if not self.is_train:
            return place(sample, self.imgsz)
        rng = np.random.default_rng([self.seed, self.epoch, index])
        scale, shift = np.exp(rng.uniform(-0.4, 0.4)), rng.random(2)
        return place(sample, self.imgsz, scale=scale, shift=shift, is_mirrored=bool(rng.random() < 0.5))


def shrink(image: np.ndarray, detections: sv.Detections, imgsz: int) -> Sample:
    """The image in RGB with its longer side at ``imgsz``. COCO's crowds are no boxes."""
    scale = imgsz / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    image = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (width, height), interpolation=cv2.INTER_AREA)
    if len(detections) == 0:
        return Sample(image, np.empty((0, 4), np.float32), np.empty(0, int))
    is_box = (detections.box_area > 0) & ~np.asarray(detections.data.get("iscrowd", [False] * len(detections)), bool)
    return Sample(image, detections.xyxy[is_box] * np.float32(scale), detections.class_id[is_box])


def place(
    sample: Sample,
    imgsz: int,
    *,
    scale: float = 1.0,
    shift: Collection[float] = (0.5, 0.5),
    is_mirrored: bool = False,
    min_visible: float = 0.3,
) -> Sample:
    """Draw on a grey square. ``shift`` 0-1 is where the image lies in its room, or what is cut off if it has none."""
    height, width = sample.image.shape[:2]
    offset = (imgsz - scale * np.array([width, height])) * np.asarray(shift)
    matrix = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    if is_mirrored:
        matrix[0] = -matrix[0] + (0, 0, imgsz)
    pixels = matrix.copy()
    pixels[:, 2] += (matrix[:, :2].diagonal() - 1) / 2  # OpenCV counts from the centre of the first pixel, boxes from its edge
    image = cv2.warpAffine(sample.image, pixels, (imgsz, imgsz), borderValue=(GREY, GREY, GREY))
    corners = sample.boxes_xyxy.reshape(-1, 2, 2) * matrix[:, :2].diagonal() + matrix[:, 2]
    whole = np.concatenate([corners.min(1), corners.max(1)], 1)
    boxes = whole.clip(0, imgsz)
    is_visible = area(boxes) > min_visible * area(whole)
    return Sample(image, boxes[is_visible].astype(np.float32), sample.labels[is_visible])


def load_data(path: Path | None, imgsz: int, *, num_scenes: int, seed: int) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Training and validation data; without a path, digits."""
    if path is None:
        train = DigitScenes(num_scenes, imgsz, is_train=True, seed=seed)
        return train, DigitScenes(max(1, num_scenes // 8), imgsz, is_train=False, seed=seed)
    train, val = read_detections(path, seed)
    if not (len(train) and len(val)):
        raise ValueError(f"{path} has {len(train)} images to train with and {len(val)} to validate with: both need some")
    return AnnotatedImages(train, imgsz, is_train=True, seed=seed), AnnotatedImages(val, imgsz, is_train=False)


def read_detections(path: Path, seed: int = 0) -> tuple[sv.DetectionDataset, sv.DetectionDataset]:
    """Training and validation part, as the data set splits itself, else 4 to 1 at random."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        return read_voc(path, seed)
    if path.suffix in (".yaml", ".yml"):
        return read_yolo(path, seed)
    if path.suffix == ".json":
        return read_coco(path, seed)
    raise ValueError(f"data must be a Pascal VOC folder, a YOLO .yaml or a COCO .json, got {path}")


def read_voc(folder: Path, seed: int) -> tuple[sv.DetectionDataset, sv.DetectionDataset]:
    """JPEGImages and Annotations, split by ImageSets/Main/train.txt and val.txt if they exist."""
    for file in sorted((folder / "Annotations").glob("*.xml")):
        check_xml(file)
    whole = sv.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    if not whole.classes:
        raise ValueError(
            f"{folder} has no boxes: a Pascal VOC folder holds JPEGImages/ and Annotations/*.xml; "
            "of a YOLO data set name the data.yaml, of COCO the json"
        )
    lists = [folder / "ImageSets" / "Main" / f"{part}.txt" for part in ("train", "val")]
    if not all(names.is_file() for names in lists):
        return whole.split(0.8, random_state=seed)
    stems = [set(names.read_text().split()) for names in lists]
    train, val = (subset(whole, lambda path, part=part: path.stem in part) for part in stems)
    return train, val


def check_xml(file: Path) -> None:
    try:
        ElementTree.parse(file)
    except ElementTree.ParseError as error:  # it knows the line
        raise ValueError(f"{file}: {error}") from None


def subset(whole: sv.DetectionDataset, is_kept: Callable[[Path], bool]) -> sv.DetectionDataset:
    paths = [path for path in whole.image_paths if is_kept(Path(path))]
    return sv.DetectionDataset(whole.classes, paths, {path: whole.annotations[path] for path in paths})


def read_yolo(file: Path, seed: int) -> tuple[sv.DetectionDataset, sv.DetectionDataset]:
    """A data.yaml whose ``train`` and ``val`` are each a folder of images, a list of images in a .txt, or several of these.

    The labels of ``images/.../x.jpg`` are in ``labels/.../x.txt``; without such a folder, beside the image. Without ``val``, or
    with the same, 4 to 1 at random.
    """
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:  # it knows the line
        raise ValueError(f"{file}: {error}") from None
    check_yaml(content, file)
    places = [file.parent / (content.get("path") or ""), file.parent]

    def part(entries: str | list[str]) -> sv.DetectionDataset:
        entries = [entries] if isinstance(entries, str) else entries
        images = {image for entry in entries for image in list_images(find(entry, places, str(file)), places)}
        if not images:
            raise ValueError(f"{file}: no images in {', '.join(entries)}")
        num_classes = len(content["names"])
        datasets = [read_yolo_folder(at, images, file, num_classes) for at in sorted({image.parent for image in images})]
        annotations = {path: found for dataset in datasets for path, found in dataset.annotations.items()}
        if not any(map(len, annotations.values())):
            raise ValueError(f"{file}: no labels of {', '.join(entries)}; those of images/x.jpg belong in labels/x.txt")
        return sv.DetectionDataset(datasets[0].classes, sorted(annotations), annotations)

    train, val = content["train"], content.get("val") or content["train"]
    return part(train).split(0.8, random_state=seed) if val == train else (part(train), part(val))


def check_yaml(content: Any, file: Path) -> None:
    """Raise if this does not say which classes there are, and where images."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} has no names and no train: it is no mapping")
    if missing := [name for name in ("names", "train") if not content.get(name)]:
        raise ValueError(f"{file} has no {' and no '.join(missing)}")
    names = content["names"]
    is_numbered = isinstance(names, dict) and set(map(str, names)) == set(map(str, range(len(names))))
    if not (is_numbered or isinstance(names, list)):
        raise ValueError(f"{file}: names must be a list, or a mapping from 0, 1, ... to a name each, got {names}")
    for name in ("train", "val", "path"):
        entries = content.get(name) or []
        if not all(isinstance(entry, str) for entry in (entries if isinstance(entries, list) else [entries])):
            raise ValueError(f"{file}: {name} must be a path{'' if name == 'path' else ' or a list of them'}, got {entries}")


def find(name: str, places: list[Path], named_in: str) -> Path:
    """The first that exists. Some exports lead one folder too high."""
    for path in (place / start for place in places for start in (name, name.removeprefix("../"))):
        if path.exists():
            return path
    raise FileNotFoundError(f"{named_in}: {name} is in none of {', '.join(map(str, dict.fromkeys(places)))}")


def list_images(path: Path, places: list[Path]) -> Iterator[Path]:
    if path.suffix == ".txt":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if name := line.strip():
                image = find(name, [path.parent, *places], f"{path}, line {number}")
                if image.suffix.lower() not in SUFFIXES:
                    raise ValueError(f"{path}, line {number}: {name} is no image: {' '.join(sorted(SUFFIXES))}")
                yield image
    else:
        yield from (image for image in path.rglob("*") if image.suffix.lower() in SUFFIXES)


def read_yolo_folder(folder: Path, kept: Collection[Path], file: Path, num_classes: int) -> sv.DetectionDataset:
    """Those of the ``kept`` images that are in ``folder``, with their labels."""
    labels = label_folder(folder)
    for stem in sorted({path.stem for path in kept if path.parent == folder}):
        check_labels(labels / f"{stem}.txt", num_classes)
    return subset(sv.DetectionDataset.from_yolo(str(folder), str(labels), str(file)), kept.__contains__)


def label_folder(images: Path) -> Path:
    """The folder with the last ``images`` of its path replaced."""
    parts = list(images.parts)
    if "images" not in parts:
        return images
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def check_labels(file: Path, num_classes: int) -> None:
    """Raise if a line is no label of one of the classes."""
    lines = file.read_text().splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if line.strip() and (fault := fault_of(line.split(), num_classes)):
            raise ValueError(
                f"{file}, line {number}: {line!r} {fault}; "
                "a YOLO label is class cx cy w h, the last four as shares (0-1) of the image's sides"
            )


def fault_of(words: list[str], num_classes: int, limit: float = 1.5) -> str:
    """What is wrong with a label, if anything. A box may reach out of its image a little."""
    try:
        label, *sides = map(float, words)
    except ValueError:
        return "is not made of numbers"
    if len(sides) < 4:
        return "has fewer than five numbers"
    if label not in range(num_classes):
        return f"is of none of the classes 0 to {num_classes - 1}"
    return "looks like pixels" if max(map(abs, sides[:4])) > limit else ""


def read_coco(file: Path, seed: int) -> tuple[sv.DetectionDataset, sv.DetectionDataset]:
    """A COCO json; images lie beside it, in ``images`` beside it, or in a folder named as the json says (val2017)."""
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:  # it knows the line
        raise ValueError(f"{file}: {error}") from None
    check_coco(content, file)
    part = file.stem.removeprefix("instances_")
    places = [file.parent, file.parent / "images", file.parent.parent / part, file.parent.parent / "images"]
    names = [image["file_name"] for image in content["images"]]
    absent = {place: [name for name in names if not (place / name).is_file()] for place in places}
    images = min(absent, key=lambda place: len(absent[place]))
    if missing := absent[images]:
        tried = ", ".join(map(str, places))
        found = f"{len(missing)} of {len(names)} images are missing, the first is {missing[0]}"
        raise FileNotFoundError(f"{file}: {found}; looked in {tried}")
    return sv.DetectionDataset.from_coco(str(images), str(file)).split(0.8, random_state=seed)


COCO_FIELDS = {
    "images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}  # fmt: skip


def check_coco(content: Any, file: Path) -> None:
    """Raise if this is no ground truth, or boxes of no category or in no pixels."""
    content = content if isinstance(content, dict) else {}
    if missing := [name for name in ("images", "annotations", "categories") if not content.get(name)]:
        raise ValueError(f"{file} has no {' and no '.join(missing)}: it is no COCO json of ground truth")
    for part, fields in COCO_FIELDS.items():
        for place, entry in enumerate(content[part]):
            if missing := [field for field in fields if not isinstance(entry, dict) or field not in entry]:
                raise ValueError(f"{file}: {part}[{place}] has no {' and no '.join(missing)}")
    images, categories = ([entry["id"] for entry in content[part]] for part in ("images", "categories"))
    for part, ids in (("images", images), ("categories", categories)):
        if len(set(ids)) < len(ids):
            raise ValueError(f"{file}: two of the {part} have the same id")
    known = {"image": set(images), "category": set(categories)}
    for place, box in enumerate(content["annotations"]):
        name = f"{file}: annotation {box.get('id', place)}"
        for kind, ids in known.items():
            if box[f"{kind}_id"] not in ids:
                raise ValueError(f"{name} is of {kind} {box[f'{kind}_id']!r}, which is not listed")
        if not is_box(box["bbox"]):
            raise ValueError(f"{name} has a bbox that is not four finite numbers: {box['bbox']}")
    if all(max(box["bbox"]) <= 1 for box in content["annotations"]):
        raise ValueError(f"{file}: boxes look like shares (0-1) of the image's sides; COCO's bbox is x y w h in pixels")


def is_box(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 4
    return is_list and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
