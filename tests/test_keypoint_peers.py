"""The keypoints' loss beside Ultralytics' of 8.4.190 as a black box, which computes its criterion in float32 only."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference as ref
from bench import peers
from reference import yolo11_pose
from tests.compare import assert_close

pytestmark = pytest.mark.peers
SHAPES, STRIDES, NUM_CLASSES = [(16, 8), (8, 4), (4, 2)], (8, 16, 32), 3
HEIGHT_PX, WIDTH_PX = 128, 64
TOLERANCE = 1e-5  # of their float32


@pytest.fixture(autouse=True, scope="module")
def _installed():
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")


@pytest.mark.parametrize("num_keypoints", [1, 4, 17])
def test_distance(num_keypoints):
    distance_of = peers.ultralytics_keypoint_loss()
    generator = torch.Generator().manual_seed(num_keypoints)
    pred, target = torch.randn(2, 8, num_keypoints, 2, dtype=torch.float64, generator=generator)
    visible = torch.rand(8, num_keypoints, generator=generator) > 0.4
    visible[0] = False
    area = torch.rand(8, dtype=torch.float64, generator=generator) * 30
    area[1:3] = torch.tensor([0, 1e-6])
    sigmas = torch.rand(num_keypoints, dtype=torch.float64, generator=generator) / 10 + 0.02
    pred.requires_grad_()
    expected = distance_of(sigmas)(pred, target, visible, area[:, None])
    actual = yolo11_pose.keypoint_distance(pred, target, visible, area, sigmas).mean()
    tolerance = 1e-7  # of their count of what is visible
    assert_close(actual, expected, tolerance=tolerance)
    assert_close(*(torch.autograd.grad(x, pred)[0] for x in (actual, expected)), "gradient", tolerance)


@functools.cache
def criterion_of(config: str, num_keypoints: int, num_dims: int) -> Callable:
    return peers.ultralytics_pose_model(config, NUM_CLASSES, num_keypoints, num_dims).init_criterion()


def make_preds(channels: int, seed: int, scale: float) -> tuple[Tensor, ...]:
    """Distances, logits and keypoints of two images, channels first."""
    generator = torch.Generator().manual_seed(seed)
    num_anchors = sum(height * width for height, width in SHAPES)
    dist, logits, keypoints = (torch.randn(2, n, num_anchors, generator=generator) for n in (64, NUM_CLASSES, channels))
    return dist * 2, logits - 2, keypoints * scale


def make_rows(number: int, num_keypoints: int, num_dims: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by image, boxes of 20 to 60 px that may leave it, keypoints in and around them, some unseen."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(number)[:, None] * 2 // max(number, 1)
    label = torch.randint(NUM_CLASSES, (number, 1), generator=generator)
    unit = torch.rand(number, 4, generator=generator)
    size = (20 + unit[:, 2:] * 40) / torch.tensor([WIDTH_PX, HEIGHT_PX])
    places = unit[:, None, :2] + size[:, None] * (torch.rand(number, num_keypoints, 2, generator=generator) - 0.5) * 1.2
    flags = torch.randint(3, (number, num_keypoints, 1), generator=generator)
    keypoints = torch.cat([places, flags], 2)[..., :num_dims]
    return torch.cat([image, label, unit[:, :2], size], 1), keypoints


def compare(criterion: Callable, preds: tuple[Tensor, ...], rows: Tensor, keypoints: Tensor) -> None:
    preds = tuple(x.detach().requires_grad_() for x in preds)
    dist, logits, raw = preds
    batch = {**peers.ultralytics_batch(rows), "keypoints": keypoints}
    expected, items = criterion(peers.ultralytics_preds(dist, logits, SHAPES, kpts=raw), batch)
    exact = [x.detach().double().requires_grad_() for x in preds]
    output = ref.yolo11_pose_loss(
        *(x.transpose(1, 2) for x in exact), SHAPES, rows.double(), keypoints.double(), strides=STRIDES, min_box_side=16.0,
        pose_gain=criterion.hyp.pose, kobj_gain=criterion.hyp.kobj,
    )  # fmt: skip
    assert_close(output.loss, expected.sum(), "loss", TOLERANCE)
    for name in ("box", "pose", "kobj", "cls", "dfl"):
        assert_close(getattr(output, name), items[f"{name}_loss"], name, TOLERANCE)
    grads = (torch.autograd.grad(*x, allow_unused=True) for x in ((output.loss, exact), (expected.sum(), preds)))
    for name, grad, expected_grad in zip(("distances", "classes", "keypoints"), *grads, strict=True):
        expected_grad = torch.zeros_like(grad) if expected_grad is None else expected_grad
        assert_close(grad, expected_grad, f"gradient of {name}", TOLERANCE)
    assert len(rows) == 0 or output.num_fg > 4


@pytest.mark.parametrize(("num_keypoints", "num_dims"), [(17, 3), (17, 2), (4, 3), (1, 2)])
@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_yolo11_pose(num_keypoints, num_dims, scale):
    criterion = criterion_of("yolo11n-pose.yaml", num_keypoints, num_dims)
    preds = make_preds(num_keypoints * num_dims, num_keypoints, scale)
    compare(criterion, preds, *make_rows(10, num_keypoints, num_dims, num_keypoints))


@pytest.mark.parametrize(("pred_dims", "dims"), [(2, 3), (3, 2)])
def test_predictions_with_flags_and_keypoints_without_or_the_other_way_round(pred_dims, dims):
    compare(criterion_of("yolo11n-pose.yaml", 4, pred_dims), make_preds(4 * pred_dims, 0, 1.0), *make_rows(8, 4, dims, 0))


@pytest.mark.parametrize("number", [0, 1])
def test_images_without_boxes(number):
    rows, keypoints = make_rows(8, 17, 3, 0)
    compare(criterion_of("yolo11n-pose.yaml", 17, 3), make_preds(51, 0, 1.0), rows[:number], keypoints[:number])


@pytest.mark.parametrize("config", ["yolo11n-pose.yaml", "yolov8n-pose.yaml"])
def test_networks(config):
    torch.manual_seed(0)
    network = peers.ultralytics_pose_model(config, NUM_CLASSES)
    output = network(torch.rand(2, 3, HEIGHT_PX, WIDTH_PX))
    preds = tuple(output[name] for name in ("boxes", "scores", "kpts"))
    compare(network.init_criterion(), preds, *make_rows(8, 17, 3, 0))
