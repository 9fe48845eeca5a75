import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from supervision.metrics import MeanAveragePrecision

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train as example
from criteria import LOSSES, make_criterion
from data import load_data, place, read_detections
from detector import Detector
from digits import DigitScenes
from evaluate import truth
from samples import Batch, Sample, area, collate

from tests.recorder import recorded

CPU = torch.device("cpu")
OUTPUTS = {"loss.png", "predictions.png", "assignment.png", "metrics.json"}
SMALL = ["--device", "cpu", "--imgsz", "64", "--scenes", "16", "--batch", "4"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only slow down images this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    with pytest.raises(ValueError, match="data must be"):
        read_detections(tmp_path / "boxes.csv")
    (tmp_path / "boxes.json").write_text('{"images": [{"file_name": "a.png"}]}')
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        read_detections(tmp_path / "boxes.json")
    with pytest.raises(ValueError, match=r"has no boxes: a Pascal VOC folder holds JPEGImages/ and Annotations"):
        read_detections(tmp_path)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_writes_everything(loss: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--loss", loss, "--epochs", "1", "--steps", "2")
    assert {file.name for file in (tmp_path / "run").iterdir()} == OUTPUTS
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 2
    assert all(np.isfinite(curve).all() for curve in metrics["curves"].values())
    assert 200_000 < metrics["parameters"] < 900_000


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
