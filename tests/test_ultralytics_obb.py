"""Ultralytics' models of oriented boxes with `patch()`: the same losses, gradients and steps."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import triton_yolo as ty
from tests.test_ultralytics import (  # noqa: F401  fixtures
    EPOCHS,
    assert_loads_without_us,
    compare_steps,
    compare_trainings,
    contained,
    make_batch,
    make_model,
    stays,
    train,
)
from triton_yolo.integrations import ultralytics as integration

pytestmark = pytest.mark.peers
MODELS = ("yolo11n-obb", "yolov8n-obb", "yolo26n-obb")


def make_oriented_batch(empty: str = "") -> dict[str, torch.Tensor]:
    batch = make_batch(empty)
    angles = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.4, 5.0])[: len(batch["cls"])]
    return {**batch, "bboxes": torch.cat([batch["bboxes"], angles[:, None]], 1)}


@pytest.fixture
def calls(monkeypatch) -> list:
    """A growing list of what was called, our criterion at every step."""
    calls, forward = [], ty.YOLO11OBBLoss.forward
    monkeypatch.setattr(ty.YOLO11OBBLoss, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_step(name, calls):
    compare_steps(make_model(name), make_oriented_batch())
    assert len(calls) == (2 if name.startswith("yolo26") else 1)


@pytest.mark.parametrize("empty", ["one", "all"])
def test_empty_images(empty):
    compare_steps(make_model("yolo11n-obb"), make_oriented_batch(empty))


def test_settings_may_change_at_any_time(calls):
    model = make_model("yolo11n-obb")
    model.criterion = model.init_criterion()
    for changes in ({}, {"angle": 3.0}, {"box": 2.0, "dfl": 0.25}):
        vars(model.args).update(changes)
        compare_steps(model, make_oriented_batch())
    model.criterion.class_weights = torch.tensor([[[0.25, 1.0, 4.0]]])
    compare_steps(model, make_oriented_batch())
    assert [call.gains[3] for call in calls] == [1.0, 3.0, 3.0, 3.0]
    assert calls[-1].class_weights.tolist() == [0.25, 1.0, 4.0]


def test_another_loss_of_an_untested_version_stays(monkeypatch):
    from triton_yolo.integrations import _ultralytics_obb
    from triton_yolo.integrations._patching import kept

    monkeypatch.setattr(sys.modules["ultralytics"], "__version__", "8.5.2")
    with pytest.warns(UserWarning, match="untested"):
        integration.patch()
    integration.unpatch()
    ours = ty.YOLO11OBBLoss
    wrong = _ultralytics_obb.ORIENTED._replace(
        make=lambda angle_gain, **settings: ours(angle_gain=1.1 * angle_gain, **settings)
    )
    monkeypatch.setitem(integration._CRITERIA, "v8OBBLoss", wrong)
    kept.cache_clear()
    keeps = "v8OBBLoss keeps its stock computation: .* its loss is another"
    with pytest.warns(UserWarning, match="untested"), pytest.warns(UserWarning, match=keeps):
        integration.patch()
    kept.cache_clear()


@pytest.fixture(scope="module")
def turned_digits(tmp_path_factory) -> Path:
    """Eight pictures with two handwritten digits each, turned; one has none. A row is a class and four corners."""
    import cv2
    from sklearn.datasets import load_digits

    glyphs, labels = load_digits(return_X_y=True)
    folder, rng = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for index in range(8):
        pixels, lines = np.full((64, 64), 20, np.uint8), []
        for x in (16, 46) if index else ():
            digit, angle = rng.integers(len(glyphs)), rng.uniform(-math.pi, math.pi)
            centre, half = np.array([x, rng.uniform(20, 44)]), np.array([rng.uniform(5, 8), rng.uniform(8, 12)])
            cos, sin = math.cos(angle), math.sin(angle)
            corners = centre + (half * [[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ [[cos, sin], [-sin, cos]]
            glyph = (15 * glyphs[digit]).reshape(8, 8).astype(np.uint8)
            source = np.array([[0, 0], [8, 0], [8, 8]], np.float32)
            matrix = cv2.getAffineTransform(source, corners[:3].astype(np.float32))
            pixels = np.maximum(pixels, cv2.warpAffine(glyph, matrix, (64, 64)))
            lines.append(" ".join(map(str, [int(labels[digit]), *(corners / 64).clip(0, 1).ravel()])))
        cv2.imwrite(str(folder / f"images/{index}.png"), cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
        (folder / f"labels/{index}.txt").write_text("\n".join(lines))
    config = folder / "data.yaml"
    config.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {[str(i) for i in range(10)]}\n")
    return config


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ultralytics imports
def test_training(turned_digits, tmp_path, calls):
    stock = train(turned_digits, tmp_path / "stock", "yolo11n-obb.yaml", degrees=180.0)
    assert not calls
    with integration.patched():
        ours = train(turned_digits, tmp_path / "ours", "yolo11n-obb.yaml", degrees=180.0)
    assert len(calls) == EPOCHS * (2 + 2)  # of training and of validation
    compare_trainings(ours, stock)
    assert list(ours.steps[0]) == ["box_loss", "cls_loss", "dfl_loss", "angle_loss", "sum"]
    assert_loads_without_us(ours.trainer.last)
