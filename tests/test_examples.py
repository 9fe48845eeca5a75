import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from supervision.metrics import MeanAveragePrecision

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import pictures
import predict as photos
import train as example
from checkpoint import Run, load_model, write
from criteria import LOSSES, make_criterion
from data import load_data, place, read_detections
from detector import Detector
from digits import DigitScenes
from evaluate import evaluate, predict, truth
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pictures import annotate, draw_assignment, draw_map, draw_predictions
from samples import Batch, Sample, area, collate

from tests.recorder import recorded

CPU = torch.device("cpu")
OUTPUTS = {"loss.png", "map.png", "predictions.png", "assignment.png", "metrics.json", "last.pt", "best.pt"}
SMALL = ["--device", "cpu", "--imgsz", "64", "--scenes", "16", "--batch", "4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only slow down images this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a few steps."""
    monkeypatch.setattr(example, "draw", lambda *arguments: None)


def run(tmp_path: Path, *argv: str) -> dict:
    return example.main([*SMALL, "--output", str(tmp_path / "run"), *argv])


def curves(*argv: str) -> dict[str, list[float]]:
    """Of a run that evaluates and writes nothing."""
    options = example.parse([*SMALL, *argv])
    torch.manual_seed(options.seed)
    model = Detector(10, options.loss.removeprefix("reference-"))
    return example.train(model, DigitScenes(options.scenes, options.imgsz, is_train=True), options, CPU)


@pytest.mark.parametrize("is_train", [True, False])
def test_scenes_have_their_digits_inside_and_apart(is_train: bool) -> None:
    scenes = DigitScenes(40, 160, is_train=is_train)
    for scene in (scenes[index] for index in range(len(scenes))):
        boxes = scene.boxes_xyxy
        assert scene.image.shape == (160, 160, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(boxes) == len(scene.labels) <= 8
        assert ((boxes >= 0) & (boxes <= 160)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert set(scene.labels) <= set(range(10))
        low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
        common = (high - low).clip(min=0).prod(-1) - np.diag(area(boxes))
        assert (common <= 0.1 * np.minimum(area(boxes)[:, None], area(boxes)) + 1e-3).all()


def test_scenes_repeat_at_one_seed_and_change_with_the_epoch() -> None:
    first, again, other = (DigitScenes(4, 96, is_train=True, seed=seed) for seed in (0, 0, 1))
    assert (first[2].image == again[2].image).all()
    assert (first[2].image != other[2].image).any()
    again.epoch = 1
    assert (first[2].image != again[2].image).any()


def test_validation_has_other_handwriting() -> None:
    train, val = (DigitScenes(1, 96, is_train=is_train).ink.reshape(-1, 64) for is_train in (True, False))
    assert len(train) > len(val) > 100
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in val}


def test_collate_makes_rows_that_the_criteria_take() -> None:
    scenes = DigitScenes(3, 64, is_train=True)
    empty = Sample(scenes[0].image, np.empty((0, 4), np.float32), np.empty(0, int))
    batch = collate([scenes[0], empty, scenes[1]])
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.targets.dtype == torch.float32
    assert batch.targets[:, 0].unique().tolist() == [0, 2]
    assert len(batch.targets) == len(scenes[0].labels) + len(scenes[1].labels)
    assert ((batch.targets[:, 2:] > 0) & (batch.targets[:, 2:] <= 1)).all()


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, (0.5, 0.5)), (0.6, (0.0, 1.0)), (1.5, (0.5, 0.2))])
def test_boxes_move_with_their_image(scale: float, shift: tuple[float, float], is_mirrored: bool) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[20:30, 30:45] = 255
    sample = Sample(image, np.array([[30, 20, 45, 30]], np.float32), np.array([0]))
    placed = place(sample, 64, scale=scale, shift=shift, is_mirrored=is_mirrored)
    y, x = np.nonzero(placed.image[..., 0] > 180)
    np.testing.assert_allclose(placed.boxes_xyxy[0], [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1.5)


@pytest.mark.parametrize(
    ("scale", "is_mirrored", "columns"),
    [(1.0, False, (30, 69)), (1.0, True, (58, 97)), (2.0, False, (60, 139)), (2.0, True, (116, 195))],
)
def test_pixels_lie_in_their_box(scale: float, is_mirrored: bool, columns: tuple[int, int]) -> None:
    """Columns 30 to 69 are a box from 30 to 70; mirrored in 128 columns it is one from 58 to 98."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, 30:70] = 255
    sample = Sample(image, np.array([[30, 0, 70, 128]], np.float32), np.array([0]))
    placed = place(sample, int(128 * scale), scale=scale, is_mirrored=is_mirrored)
    bright = np.nonzero(placed.image[64, :, 0] > 127)[0]
    assert (bright[0], bright[-1]) == columns
    assert placed.boxes_xyxy[0, ::2].tolist() == [columns[0], columns[1] + 1]


def test_a_box_that_leaves_the_image_is_dropped() -> None:
    sample = Sample(np.zeros((64, 64, 3), np.uint8), np.array([[0, 0, 8, 8], [28, 28, 36, 36]], np.float32), np.array([4, 5]))
    assert place(sample, 64, scale=2.0).labels.tolist() == [5]


def make_images(folder: Path) -> sv.DetectionDataset:
    """Five images of 60 x 40 with a red rectangle each, the last one without a box."""
    folder.mkdir(parents=True)
    annotations = {}
    for index in range(5):
        image = np.full((40, 60, 3), 90, np.uint8)
        image[10:30, 8 * index : 8 * index + 20] = (0, 0, 255)
        path = str(folder / f"{index}.png")
        cv2.imwrite(path, image)
        box = np.array([[8 * index, 10, 8 * index + 20, 30]], np.float32)
        annotations[path] = sv.Detections(box, class_id=np.array([index % 2])) if index < 4 else sv.Detections.empty()
    return sv.DetectionDataset(["disc", "ring"], list(annotations), annotations)


def write_voc(folder: Path) -> Path:
    make_images(folder / "JPEGImages").as_pascal_voc(annotations_directory_path=str(folder / "Annotations"))
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n4\n")
    (lists / "val.txt").write_text("2\n3\n")
    return folder


def write_yolo(folder: Path) -> Path:
    for part in ("train", "val"):
        images = make_images(folder / "images" / part)
        images.as_yolo(annotations_directory_path=str(folder / "labels" / part), data_yaml_path=str(folder / "data.yaml"))
    (folder / "data.yaml").write_text("names: [disc, ring]\ntrain: images/train\nval: images/val\n")
    return folder / "data.yaml"


def write_coco(folder: Path) -> Path:
    make_images(folder / "images").as_coco(annotations_path=str(folder / "annotations.json"))
    return folder / "annotations.json"


@pytest.mark.parametrize(("write", "sizes"), [(write_voc, (3, 2)), (write_yolo, (5, 5)), (write_coco, (4, 1))])
def test_annotated_images_are_read(write: Callable[[Path], Path], sizes: tuple[int, int], tmp_path: Path) -> None:
    train, val = load_data(write(tmp_path), 96, num_scenes=0, seed=0)
    assert (len(train), len(val)) == sizes
    assert train.classes == val.classes == ("disc", "ring")
    train.is_train = False
    for sample in (*map(train.__getitem__, range(len(train))), *map(val.__getitem__, range(len(val)))):
        assert sample.image.shape == (96, 96, 3)
        red = (sample.image.astype(int) - sample.image[..., 2:]).argmax()
        for x1, y1, x2, y2 in sample.boxes_xyxy:
            assert x1 - 1 <= red % (96 * 3) // 3 < x2 + 1
            assert y1 - 1 <= red // (96 * 3) < y2 + 1
            assert (x2 - x1, y2 - y1) == pytest.approx((32, 32), abs=2)


def test_unknown_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"boxes\.csv does not exist"):
        read_detections(tmp_path / "boxes.csv")
    (tmp_path / "boxes.csv").touch()
    with pytest.raises(ValueError, match="data must be"):
        read_detections(tmp_path / "boxes.csv")
    with pytest.raises(ValueError, match=r"has no boxes: a Pascal VOC folder holds JPEGImages/ and Annotations"):
        read_detections(tmp_path)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_writes_everything(loss: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--loss", loss, "--epochs", "1", "--steps", "2")
    assert {file.name for file in (tmp_path / "run").iterdir()} == OUTPUTS
    assert load_model(tmp_path / "run" / "best.pt")[1] == tuple("0123456789")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 2
    assert all(np.isfinite(curve).all() for curve in metrics["curves"].values())
    assert 200_000 < metrics["parameters"] < 900_000


def write_listed(folder: Path) -> Path:
    """The same with lists: of names from the folder of the list, and of names from the folder of data.yaml."""
    file = write_yolo(folder)
    (folder / "images" / "3.txt").write_text("./train/0.png\n./train/1.png\n\n./train/4.png\n")
    (folder / "val.txt").write_text("images/val/2.png\nimages/train/3.png\n")
    file.write_text("names: {0: disc, 1: ring}\ntrain: images/3.txt\nval: [val.txt]\n")
    return file


def test_images_may_be_listed(tmp_path: Path) -> None:
    train, val = read_detections(write_listed(tmp_path))
    names = [[Path(path).relative_to(tmp_path / "images").as_posix() for path in part.image_paths] for part in (train, val)]
    assert names == [["train/0.png", "train/1.png", "train/4.png"], ["train/3.png", "val/2.png"]]
    assert [found.class_id.tolist() for found in val.annotations.values()] == [[1], [0]]
    (tmp_path / "val.txt").write_text("images/val/missing.png\n")
    with pytest.raises(FileNotFoundError, match=r"val\.txt, line 1: images/val/missing\.png is in none of"):
        read_detections(tmp_path / "data.yaml")


def test_only_listed_images_are_read(tmp_path: Path) -> None:
    """Not one of the same name in another format; the list may begin with a byte order mark, and name images alone."""
    file = write_listed(tmp_path)
    shutil.copy(tmp_path / "images/train/0.png", tmp_path / "images/train/0.jpg")
    (tmp_path / "images" / "3.txt").write_text("./train/0.png\n", encoding="utf-8-sig")
    train, _ = read_detections(file)
    assert [Path(path).name for path in train.image_paths] == ["0.png"]
    (tmp_path / "images" / "3.txt").write_text("./train/0.png\n./train\n")
    with pytest.raises(ValueError, match=r"3\.txt, line 2: \./train is no image"):
        read_detections(file)


def test_an_empty_val_is_none(tmp_path: Path) -> None:
    file = write_yolo(tmp_path)
    file.write_text("names: [disc, ring]\ntrain: images/train\nval:\n")
    assert [len(part) for part in read_detections(file)] == [4, 1]


def test_an_export_may_lead_one_folder_too_high(tmp_path: Path) -> None:
    file = write_yolo(tmp_path)
    file.write_text("names: [disc, ring]\ntrain: ../images/train\nval: ../images/val\n")
    assert [len(part) for part in read_detections(file)] == [5, 5]


def test_a_folder_named_like_images_keeps_its_name(tmp_path: Path) -> None:
    """Only a whole part of a path is replaced by ``labels``."""
    file = write_yolo(tmp_path / "my_images")
    (tmp_path / "my_images" / "images").rename(tmp_path / "my_images" / "pictures_of_images")
    (tmp_path / "my_images" / "labels" / "train").joinpath("0.txt").replace(
        tmp_path / "my_images" / "pictures_of_images" / "train" / "0.txt"
    )
    file.write_text("names: [disc, ring]\ntrain: pictures_of_images/train\n")
    train, val = read_detections(file)
    assert sum(map(len, [*train.annotations.values(), *val.annotations.values()])) == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1 34 20 20 20", "looks like pixels"),
        ("1 0.5 0.5 0.2", "has fewer than five numbers"),
        ("disc 0.5 0.5 0.2 0.2", "is not made of numbers"),
        ("2 0.5 0.5 0.2 0.2", "is of none of the classes 0 to 1"),
        ("1 -34 0.5 0.2 0.2", "looks like pixels"),
    ],
)
def test_a_line_that_is_no_label_is_refused(line: str, fault: str, tmp_path: Path) -> None:
    file = write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "3.txt").write_text(f"0 0.5 0.5 0.2 0.2\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"labels/train/3\.txt, line 3: '{line}' {fault}; a YOLO label is class cx cy w h"):
        read_detections(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no names and no train"),
        ("names: [disc\ntrain: images/train\n", r"data\.yaml: (?s:.*)line 2"),
        ("names: [disc, ring]\ntrain: images/test\n", r"data\.yaml: images/test is in none of"),
        ("names: [disc, ring]\ntrain: labels/train\n", r"data\.yaml: no images in labels/train"),
        ("names: [disc, ring]\ntrain: unlabelled\n", r"data\.yaml: no labels of unlabelled"),
        ("- disc\n- ring\n", "has no names and no train: it is no mapping"),
        ("names: {1: disc, 2: ring}\ntrain: images/train\n", r"names must be a list, or a mapping from 0, 1, \.\.\. to a name"),
        ("names: 2\ntrain: images/train\n", "names must be a list"),
        ("names: [disc, ring]\ntrain: images/train\nval: 3\n", "val must be a path or a list of them, got 3"),
        ("names: [disc, ring]\npath: 3\ntrain: images/train\n", "path must be a path, got 3"),
    ],
)
def test_a_data_yaml_that_leads_nowhere_is_refused(content: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path).write_text(content)
    make_images(tmp_path / "unlabelled")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_detections(tmp_path / "data.yaml")


def test_a_coco_json_may_lie_beside_its_images(tmp_path: Path) -> None:
    file = write_coco(tmp_path).replace(tmp_path / "images" / "_annotations.coco.json")
    assert [len(part) for part in read_detections(file)] == [4, 1]


def drop_an_image(folder: Path) -> None:
    (folder / "images" / "3.png").unlink()


def change(part: str, folder: Path, **values: Any) -> None:
    """Set fields of all entries; those of None are dropped."""
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    for entry in content[part]:
        entry.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del entry[name]
    file.write_text(json.dumps(content))


change_boxes = partial(change, "annotations")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_an_image, r"1 of 5 images are missing, the first is 3\.png; looked in .*images"),
        (partial(change_boxes, bbox=[0.1, 0.2, 0.5, 0.5]), "boxes look like shares"),
        (partial(change_boxes, category_id=7), "annotation 1 is of category 7, which is not listed"),
        (partial(change_boxes, image_id="1"), "annotation 1 is of image '1', which is not listed"),
        (partial(change_boxes, bbox=None), r"annotations\[0\] has no bbox"),
        (partial(change_boxes, bbox=[1, 2, 3]), r"annotation 1 has a bbox that is not four finite numbers: \[1, 2, 3\]"),
        (partial(change, "images", id=1), "two of the images have the same id"),
        (partial(change, "categories", name=None, id=None), r"categories\[0\] has no id and no name"),
        (lambda folder: (folder / "annotations.json").write_text("[]"), "has no images and no annotations and no categories"),
        (lambda folder: (folder / "annotations.json").write_text("{\n"), "Expecting .*: line 2"),
    ],
)
def test_a_coco_json_that_is_wrong_is_refused(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"annotations\.json:? {message}"):
        read_detections(file)


def test_an_xml_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_voc(tmp_path)
    (folder / "Annotations" / "2.xml").write_text("<annotation>\n")
    with pytest.raises(ValueError, match=r"Annotations/2\.xml: no element found: line 2"):
        read_detections(folder)


def test_data_that_cannot_be_read_ends_the_run_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^--data: .*/nowhere does not exist$"):
        run(tmp_path, "--data", str(tmp_path / "nowhere"))


def test_one_image_is_too_few(tmp_path: Path) -> None:
    file = write_yolo(tmp_path)
    (tmp_path / "one.txt").write_text("images/train/0.png")
    file.write_text("names: [disc, ring]\ntrain: one.txt\n")
    with pytest.raises(ValueError, match=r"data\.yaml has 0 images to train with and 1 to validate with"):
        load_data(file, 64, num_scenes=0, seed=0)


@pytest.mark.parametrize("head", ["yolo11", "yolox"])
@pytest.mark.usefixtures("without_pictures")
def test_a_resumed_run_continues_as_if_never_stopped(head: str, tmp_path: Path) -> None:
    argv = ["--loss", head, "--epochs", "3", "--validate-every", "2"]
    whole = run(tmp_path / "whole", *argv)
    run(tmp_path, *argv, "--steps", "6")  # in the middle of the second epoch
    resumed = example.main(["--output", str(tmp_path / "run"), "--device", "cpu", "--resume"])
    assert resumed["curves"] == whole["curves"]
    assert [score["epoch"] for score in whole["validations"]] == [2, 3]
    assert [score["epoch"] for score in resumed["validations"]] == [1.5, 2, 3]
    expected, found = (load_model(folder / "run" / "last.pt")[0].state_dict() for folder in (tmp_path / "whole", tmp_path))
    for name, weights in expected.items():
        assert (weights == found[name]).all(), name
    again = example.main(["--output", str(tmp_path / "run"), "--device", "cpu", "--resume"])
    assert again["steps"] == 12
    assert again["validations"] == resumed["validations"]


@pytest.mark.usefixtures("without_pictures")
def test_what_cannot_be_resumed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume")
    assert "nothing to resume" in capsys.readouterr().err
    run(tmp_path, "--epochs", "0")
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume", "--loss", "yolox")
    assert "--loss cannot change in a resumed run: it was yolo11" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--resume: the run learned \('0', .*, the data has \('disc', 'ring'\)"):
        run(tmp_path, "--resume", "--data", str(write_coco(tmp_path)))
    (tmp_path / "run" / "last.pt").write_text("cut short")
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume")
    assert "last.pt was not saved by examples/train.py" in capsys.readouterr().err


def test_no_epoch_leaves_the_first_weights(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--epochs", "0")
    assert {file.name for file in (tmp_path / "run").iterdir()} == OUTPUTS
    assert (metrics["steps"], metrics["epochs"], metrics["curves"]) == (0, 0, {})
    assert [score["epoch"] for score in metrics["validations"]] == [0]
    torch.manual_seed(0)
    for name, weights in Detector(10).state_dict().items():
        assert (weights == load_model(tmp_path / "run" / "last.pt")[0].state_dict()[name]).all(), name


@pytest.mark.parametrize(
    "option",
    [
        "epochs=-1",
        "steps=-1",
        "batch=0",
        "imgsz=100",
        "imgsz=0",
        "scenes=0",
        "reg-max=0",
        "lr=-1",
        "lr=nan",
        "workers=-1",
        "seed=-1",
    ],
)
def test_options_out_of_range_are_refused(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        example.parse([f"--{option}"])
    assert f"--{option.partition('=')[0]} must be" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "message"), [("foo", "a device as cpu"), ("cuda:99", "a device that is here")])
@pytest.mark.parametrize("parse", [example.parse, lambda argv: photos.parse(["photo.png", *argv])])
def test_a_device_that_is_not_there_is_refused(
    parse: Callable, device: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse(["--device", device])
    assert f"error: argument --device: must be {message}" in capsys.readouterr().err


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """The second of three validations is best; equal ones prefer the later."""
    scores = iter([0.1, 0.3, 0.2, 0.3])
    options = example.parse([*SMALL, "--output", str(tmp_path), "--epochs", "4"])

    def validate() -> argparse.Namespace:
        score = next(scores)
        return argparse.Namespace(map50=score, map75=score, map50_95=score)

    record = Run(options, tuple("0123456789"), validate)
    model = Detector(10)
    record.begin(model=model)
    for epoch, kept in [(1, 1), (2, 2), (3, 2), (4, 4)]:
        torch.nn.init.constant_(model.head.boxes.bias, epoch)
        record.end_epoch(epoch, {"loss": [0.0]}, is_last=False)
        assert load_model(tmp_path / "best.pt")[0].head.boxes.bias[0] == kept
        assert load_model(tmp_path / "last.pt")[0].head.boxes.bias[0] == epoch
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("without_pictures")
def test_the_snippets_of_the_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "--epochs", "0", "--output", str(tmp_path / "runs" / "train"))
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("photo.jpg", np.zeros((40, 60, 3), np.uint8))
    names: dict[str, Any] = {"images": torch.zeros(2, 3, 64, 96, dtype=torch.uint8)}
    for module in (example, photos):
        exec("\n".join(line.strip() for line in module.__doc__.splitlines() if line.startswith("    ")), names)
    assert [type(found) for found in [*names["detections"], names["found"]]] == [sv.Detections] * 3


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a detector that finds nothing yet."""
    options = {"loss": "yolo11", "reg_max": 16, "imgsz": 64}
    file = tmp_path / "best.pt"
    write(file, {"options": options, "classes": ("disc", "ring"), "model": Detector(2).state_dict()})
    return file


def test_boxes_are_in_pixels_of_the_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo of 60 x 40 lies in rows 16 to 48 of a square of 96: it is enlarged by 1.6 to 96 x 64."""
    seen = []

    def predict(model: Detector, images: torch.Tensor, *, threshold: float) -> list[sv.Detections]:
        seen.append(images)
        return [sv.Detections(np.array([[32, 24, 64, 56], [-9, 0, 99, 96]], np.float32), class_id=np.array([1, 0]))]

    monkeypatch.setattr(photos, "predict", predict)
    image = np.zeros((40, 60, 3), np.uint8)
    image[5:25, 20:40] = (255, 0, 0)  # blue as OpenCV has it
    found = photos.find_objects(Detector(2), image, 96)
    np.testing.assert_allclose(found.xyxy, [[20, 5, 40, 25], [0, 0, 60, 40]], atol=1e-4)
    rows, columns = np.nonzero(seen[0][0, 2].numpy() > 180)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((24, 55, 32, 63), abs=1)


@pytest.mark.parametrize("size", [(1, 1, 3), (37, 501, 3), (3000, 5, 3), (40, 60)])
def test_photos_of_any_size_are_drawn(size: tuple[int, ...], weights: Path, capsys: pytest.CaptureFixture) -> None:
    folder = weights.parent
    cv2.imwrite(str(folder / "photo.png"), np.full(size, 90, np.uint8))
    argv = [str(folder / "photo.png"), "--weights", str(weights), "--output", str(folder / "out"), "--device", "cpu"]
    photos.main(argv)
    assert "photo.png: nothing with a confidence above 0.3; see" in capsys.readouterr().out
    assert max(cv2.imread(str(folder / "out" / "photo-found.png")).shape) == pytest.approx(960, abs=1)
    photos.main([*argv, "--threshold", "0"])
    assert re.search(r"photo.png: \d+ disc, \d+ ring; see", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg does not exist"),
        (["text.jpg"], "text.jpg is no image that OpenCV can read"),
        (["a.jpg", "--weights", "none.pt"], "none.pt does not exist; `make train` writes runs/train/best.pt"),
        (["a.jpg", "--weights", "text.jpg"], "text.jpg was not saved by examples/train.py"),
        (["a.jpg", "--weights", "other.pt"], "other.pt was not saved by examples/train.py"),
        (["a.jpg", "--imgsz", "100"], "--imgsz must be positive and divisible by 32"),
        (["a.jpg", "b/a.jpg"], "two photos of one name"),
    ],
)
def test_photos_and_weights_that_cannot_be_read(
    argv: list[str], message: str, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(weights.parent)
    Path("text.jpg").write_text("no image")
    torch.save({"epoch": 3}, "other.pt")
    with pytest.raises(SystemExit) as ended:
        photos.main(["--weights", "best.pt", *argv])
    assert message in capsys.readouterr().err + str(ended.value)
    assert not Path("runs").exists()


def test_images_of_odd_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides of images must be divisible by 32, got \(64, 100\)"):
        predict(Detector(2), torch.zeros(1, 3, 64, 100, dtype=torch.uint8))


def test_evaluation_leaves_the_model_in_training() -> None:
    model = Detector(10).double()
    evaluate(model, DigitScenes(2, 64, is_train=False), CPU)
    assert model.training
    assert model.head.boxes.weight.dtype == torch.float64


def test_no_label_is_cut_off() -> None:
    """Labels of boxes in all corners: the same pixels as in a scene with room around it."""
    corners = np.array([[0, 0, 20, 20], [108, 0, 128, 20], [0, 108, 20, 128], [108, 108, 128, 128]], np.float32)
    detections = sv.Detections(corners, confidence=np.full(4, 0.5), class_id=np.arange(4))
    names = ("platelet", "erythrocyte", "leukocyte", "thrombocyte")
    blank = np.zeros((128, 128, 3), np.uint8)
    middle = sv.Detections(np.array([[54, 54, 74, 74]], np.float32), confidence=np.array([0.5]), class_id=np.array([0]))
    for index in range(4):
        middle.class_id[:] = index
        white = (annotate(blank, detections[index : index + 1], names).min(-1) > 200).sum()
        assert white == pytest.approx((annotate(blank, middle, names).min(-1) > 200).sum(), rel=0.05)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(
        FigureCanvasAgg,
        "__init__",
        lambda self, figure, init=FigureCanvasAgg.__init__: (drawn.append(figure), init(self, figure))[1],
    )
    return drawn


def test_the_assignment_has_a_legend_and_titles(tmp_path: Path, figures: list[Figure]) -> None:
    scenes = DigitScenes(2, 64, is_train=False)
    draw_assignment(tmp_path / "assignment.png", Detector(10), [scenes[0], scenes[1]], CPU)
    figure = figures[-1]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["stride 8", "stride 16", "stride 32", "target score 0.1", "target score 0.5", "target score 1"]
    assert all(axes.get_title() for axes in figure.axes)
    scores = {epoch: dict.fromkeys(("map50", "map75", "map50_95"), 0.1 * epoch) for epoch in (2.0, 1.0)}
    draw_map(tmp_path / "map.png", scores)
    curve, *_ = figures[-1].axes[0].lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([2, 1], [0.2, 0.1])


def test_what_is_found_with_too_little_confidence_is_named(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short training nothing is sure yet: a picture without boxes says how far it is."""
    boxes = np.array([[0, 0, 20, 20], [30, 30, 50, 50]], np.float32)
    unsure, sure = (
        sv.Detections(boxes, confidence=np.array(confidence), class_id=np.array([1, 2]))
        for confidence in ([0.124, 0.02], [0.31, 0.02])
    )
    nothing = sv.Detections(boxes[:0], confidence=np.empty(0), class_id=np.empty(0, int))
    monkeypatch.setattr(pictures, "predict", lambda *arguments: [unsure, sure, nothing])
    scenes = DigitScenes(3, 64, is_train=False)
    draw_predictions(tmp_path / "predictions.png", Detector(10), list(map(scenes.__getitem__, range(3))), scenes.classes, CPU)
    titles = [axes.get_title() for axes in figures[-1].axes[1::2]][:3]
    assert titles == ["found: 0 boxes, at best with 0.12", "found: 1 box", "found: 0 boxes, at best with 0.00"]


def test_a_single_validation_can_be_read(tmp_path: Path, figures: list[Figure]) -> None:
    """A run of one epoch: a marker that the edge does not cut, and numbers in the legend."""
    draw_map(tmp_path / "map.png", {1.0: {"map50": 0.0213, "map75": 0.0, "map50_95": 0.0071}})
    (axes,) = figures[-1].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["mAP@50: 0.021", "mAP@75: 0.000", "mAP@50-95: 0.007", "best.pt: epoch 1"]
    curves = axes.lines[:3]
    assert all(curve.get_marker() in "osD" and curve.get_markersize() >= 5 and not curve.get_clip_on() for curve in curves)
    assert axes.get_xlim() == (0, 1.04)


def test_a_run_on_annotated_images(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--data", str(write_voc(tmp_path / "voc")), "--epochs", "1", "--batch", "2")
    assert metrics["data"] == "voc"
    assert metrics["steps"] == 1


@pytest.mark.parametrize("loss", ["yolo11", "yolox"])
def test_mixed_precision_stays_close(loss: str) -> None:
    plain = curves("--loss", loss, "--epochs", "1", "--steps", "2")["loss"]
    mixed = curves("--loss", loss, "--epochs", "1", "--steps", "2", "--amp")["loss"]
    assert mixed == pytest.approx(plain, rel=0.05)
    assert mixed != plain


def test_l1_joins_at_the_end() -> None:
    l1 = curves("--loss", "yolox", "--epochs", "5")["l1"]
    assert l1[:19] == [0.0] * 19
    assert l1[19] > 0


@pytest.mark.parametrize("loss", ["yolo11", "yolox"])
def test_graphed_steps_have_the_same_curve(loss: str) -> None:
    argv = ("--loss", loss, "--epochs", "10", "--scenes", "8", "--amp")
    options = example.parse([*SMALL, *argv, "--cuda-graph"])
    torch.manual_seed(options.seed)
    model = Detector(10, loss)
    with recorded(model) as recorder:
        graphed = example.train(model, DigitScenes(options.scenes, options.imgsz, is_train=True), options, CPU)
        assert recorder.num_graphs == 2  # L1, which joins for the last step, needs no others
    assert graphed == curves(*argv)
    assert graphed.get("l1", [1])[-1] > 0


@pytest.mark.parametrize("other", [("--compile",), ("--loss", "reference-yolo11")])
def test_graphed_steps_refuse_what_they_cannot_hold(other: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        example.parse([*SMALL, "--cuda-graph", *other])
    assert "--cuda-graph takes one process" in capsys.readouterr().err


# In float32 rounding alone grows by a factor of ten every few steps once the learning rate is high: soon in a short training.
@pytest.mark.parametrize(
    ("options", "steps"),
    [(("--epochs", "3"), 12), (("--epochs", "160", "--steps", "52"), 52), (("--epochs", "13", "--double"), 52)],
)
@pytest.mark.parametrize("loss", ["yolo11", "yolox"])
def test_the_reference_gives_the_same_curve(loss: str, options: tuple[str, ...], steps: int) -> None:
    ours = curves("--loss", loss, *options)
    plain = curves("--loss", f"reference-{loss}", *options)
    assert len(ours["loss"]) == steps
    for name, curve in plain.items():
        assert ours[name] == pytest.approx(curve, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss", ["yolo11", "yolox"])
def test_the_loss_falls(loss: str) -> None:
    curve = curves("--loss", loss, "--epochs", "8", "--steps", "28")["loss"]
    assert np.mean(curve[-4:]) < 0.8 * np.mean(curve[:4])


def test_boxes_that_repeat_the_truth_score_one() -> None:
    """The metric and the conversions around it, without a model in between."""
    scenes = [DigitScenes(4, 96, is_train=False)[index] for index in range(4)]
    found = [truth(scene) for scene in scenes]
    for detections in found:
        detections.confidence = np.ones(len(detections), np.float32)
    assert MeanAveragePrecision().update(found, [truth(scene) for scene in scenes]).compute().map50 == pytest.approx(1)


def gradients(loss: str, batch: Batch) -> list[torch.Tensor]:
    """Of one step on this process's share of the batch, through what ``train`` uses."""
    torch.manual_seed(0)
    model = Detector(10, loss)
    group = dist.group.WORLD if example.num_ranks() > 1 else None
    step = example.make_step(model, make_criterion(loss, 10, 16, group), CPU, is_mixed=False, is_compiled=False)
    step(batch).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = DigitScenes(4, 64, is_train=True)
    batch = next(iter(example.make_loader(data, argparse.Namespace(batch=4, seed=0, workers=0), CPU)))
    torch.save({loss: gradients(loss, batch) for loss in ("yolo11", "yolox")}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = collate(list(map(DigitScenes(4, 64, is_train=True).__getitem__, range(4))))
    for loss in first:
        for a, b, one in zip(first[loss], second[loss], gradients(loss, whole), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            torch.testing.assert_close(a, one, rtol=1e-4, atol=1e-5 * one.abs().max().item() + 1e-7)


@pytest.mark.skipif("TRITON_YOLO_DATA" not in os.environ, reason="TRITON_YOLO_DATA names no folder of real data")
def test_real_annotations_are_read() -> None:
    train, val = read_detections(Path(os.environ["TRITON_YOLO_DATA"]) / "bccd")
    assert set(train.classes) == {"RBC", "WBC", "Platelets"}
    assert (len(train), len(val)) == (205, 87)
    assert not set(train.image_paths) & set(val.image_paths)
