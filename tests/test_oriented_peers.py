"""Oriented boxes of the reference and of the package beside Ultralytics' of 8.4.190 as a black box.

Its functions compute in float64 where they are asked to; its criterion in float32 only, on rows sorted by image.
"""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference as ref
import triton_yolo as ty
from bench import peers
from reference import oriented
from tests.compare import assert_close

pytestmark = pytest.mark.peers
SHAPES, STRIDES, NUM_CLASSES = [(16, 8), (8, 4), (4, 2)], (8, 16, 32), 3
HEIGHT_PX, WIDTH_PX = 128, 64


@pytest.fixture(autouse=True, scope="module")
def _installed():
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")


def random_boxes(number: int, size: float, seed: int = 0) -> Tensor:
    """Boxes of sides up to ``size`` that are about as far apart, at any angle."""
    unit = torch.rand(number, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return unit * torch.tensor([size, size, size, size, 8]) + torch.tensor([0, 0, size / 20, size / 20, -4])


HAND_CHOSEN = torch.tensor(
    [
        [0, 0, 2, 2, 0], [0, 0, 2, 2, math.pi / 2], [1, 0, 2, 2, 0], [0, 0, 4, 1, 0.5], [0, 0, 4, 1, 0.5 - math.pi],
        [0, 0, 300, 1, 1], [200, 0, 300, 1, 1], [0, 0, 0.01, 0.02, 3], [0.001, 0, 0.02, 0.01, 3], [1e4, 0, 2, 2, 0],
    ],
    dtype=torch.float64,
)  # fmt: skip


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("eps", [1e-7, 1e-3, 0.5])
@pytest.mark.parametrize("size", [0.1, 4.0, 100.0, None])
def test_prob_iou(size, eps, floor):
    probiou, batch_probiou, _ = peers.ultralytics_oriented()
    if size is None:
        a, b = (x.flatten(0, 1) for x in torch.broadcast_tensors(HAND_CHOSEN[:, None], HAND_CHOSEN))
    else:
        a, b = random_boxes(500, size), random_boxes(500, size, seed=1)
    a, b = (x.clone().requires_grad_() for x in (a, b))
    actual, expected = ref.prob_iou(a, b, eps=eps, floor=floor), probiou(a, b, eps=eps, floor=floor).squeeze(-1)
    assert_close(actual, expected)
    for grad, expected_grad in zip(*(torch.autograd.grad(x.sum(), (a, b)) for x in (actual, expected)), strict=True):
        assert_close(grad, expected_grad, "gradient")
    if floor == 0:
        assert_close(ref.prob_iou(a[:50, None], b[:50], eps=eps), batch_probiou(a[:50], b[:50], eps=eps))


@pytest.mark.parametrize("options", [{}, {"topk2": 1}, {"alpha": 0.5, "topk": 10}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_assigner(seed, options):
    _, _, assigner_of = peers.ultralytics_oriented()
    points, strides = ref.make_anchors(SHAPES, STRIDES, dtype=torch.float64)
    points = points * strides[:, None]
    gt = random_boxes(24, 64, seed).reshape(2, 12, 5)
    gt[:, ::3, 2:4] /= 8
    labels, mask = torch.arange(24).reshape(2, 12) % NUM_CLASSES, torch.ones(2, 12)
    mask[1, 7:] = 0
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, len(points), NUM_CLASSES, dtype=torch.float64, generator=generator)
    nearest = torch.cdist(points, gt[..., :2]).argmin(2)
    preds = gt.gather(1, nearest[..., None].expand(-1, -1, 5))
    preds = preds * (0.75 + torch.rand(preds.shape, dtype=torch.float64, generator=generator) / 2)
    expected = assigner_of(num_classes=NUM_CLASSES, **options)(
        scores, preds, points, labels[..., None], gt, mask[..., None]
    )  # fmt: skip
    actual = ref.task_aligned_assign(
        scores, preds, points, labels, gt, mask, min_box_side=16.0, geometry=oriented.ORIENTED, **options
    )
    ours = ty.RotatedTaskAlignedAssigner(num_classes=NUM_CLASSES, min_box_side=16, **options)
    for found in (actual, ours(scores, preds, points, labels, gt, mask)):
        fg = found.fg_mask
        assert fg.sum() > 12
        assert torch.equal(fg, expected[3])
        assert torch.equal(found.target_gt_idx[fg], expected[4][fg])
        assert torch.equal(found.target_bboxes[fg], expected[1][fg])
        assert_close(found.target_scores, expected[2])


def make_preds(reg_max: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, angles and logits of two images, channels first."""
    generator = torch.Generator().manual_seed(seed)
    num_anchors = sum(height * width for height, width in SHAPES)
    dist, angle, logits = (torch.randn(2, n, num_anchors, generator=generator) for n in (4 * reg_max, 1, NUM_CLASSES))
    return dist * scale if reg_max > 1 else dist.abs() * 3, angle.sigmoid() * math.pi, logits - 2


def make_rows(number: int, smallest_px: float, largest_px: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(number)[:, None] * 2 // number
    label = torch.randint(NUM_CLASSES, (number, 1), generator=generator)
    unit = torch.rand(number, 5, generator=generator)
    size = (smallest_px + unit[:, 2:4] * (largest_px - smallest_px)) / torch.tensor([WIDTH_PX, HEIGHT_PX])
    return torch.cat([image, label, unit[:, :2], size, unit[:, 4:] * 8 - 4], 1)


@functools.cache
def criterion_of(config: str) -> Callable:
    return peers.ultralytics_model(config, NUM_CLASSES).init_criterion()


def compare(criterion: Callable, preds: tuple[Tensor, ...], rows: Tensor, **options) -> None:
    dist, angle, logits = preds = tuple(x.requires_grad_() for x in preds)
    expected, items = criterion(peers.ultralytics_preds(dist, logits, SHAPES, angle=angle), peers.ultralytics_batch(rows))
    expected_grads = torch.autograd.grad(expected.sum(), preds)
    options, tolerance = {"strides": STRIDES, "min_box_side": 16.0, **options}, 1e-5  # of their float32
    for dtype, by in (
        (torch.float64, functools.partial(ref.yolo11_obb_loss, **options)),
        (torch.float64, ty.YOLO11OBBLoss(NUM_CLASSES, **options)),
        (torch.float32, ty.YOLO11OBBLoss(NUM_CLASSES, **options)),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in preds]
        output = by(*(x.transpose(1, 2) for x in leaves), SHAPES, rows.to(dtype))
        assert_close(output.loss, expected.sum(), "loss", tolerance)
        for name, item in zip(("box", "cls", "dfl", "angle"), items.values(), strict=True):
            assert_close(getattr(output, name), item, name, tolerance)
        grads = torch.autograd.grad(output.loss, leaves)
        for name, grad, expected_grad in zip(("distances", "angles", "classes"), grads, expected_grads, strict=True):
            assert_close(grad, expected_grad, f"gradient of {name}", tolerance)


@pytest.mark.parametrize("sizes_px", [(3, 60), (1, 4), (2, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_yolo11_obb(sizes_px, seed):
    compare(criterion_of("yolo11n-obb.yaml"), make_preds(16, seed), make_rows(24, *sizes_px, seed))


def test_yolo11_obb_with_weights_of_classes():
    criterion = copy.copy(criterion_of("yolo11n-obb.yaml"))
    criterion.class_weights = torch.tensor([0.5, 1.0, 2.0])
    rows = make_rows(8, 3, 60, 0)
    compare(criterion, make_preds(16, 0, scale=3.0), rows, class_weights=criterion.class_weights)


@pytest.mark.parametrize("config", ["yolo11n-obb.yaml", "yolov8n-obb.yaml"])
def test_yolo11_obb_network(config):
    """Angles come from the head in radians."""
    torch.manual_seed(0)
    network = peers.ultralytics_model(config, NUM_CLASSES)
    logits = []
    for layer in network.model[-1].cv4:
        layer.register_forward_hook(lambda module, inputs, output: logits.append(output.flatten(2)))
    output = network(torch.rand(2, 3, HEIGHT_PX, WIDTH_PX))
    assert torch.equal(ref.decode_angle(torch.cat(logits, 2)), output["angle"])
    preds = tuple(output[name].detach() for name in ("boxes", "angle", "scores"))
    compare(network.init_criterion(), preds, make_rows(8, 3, 60, 0))


@pytest.mark.parametrize("number", [0, 1])
def test_yolo11_obb_without_boxes_in_an_image(number):
    compare(criterion_of("yolo11n-obb.yaml"), make_preds(16, 0), make_rows(8, 3, 60, 0)[:number])


@pytest.mark.parametrize("branch", ["one2many", "one2one"])
@pytest.mark.parametrize("seed", range(3))
def test_yolo26_obb(branch, seed):
    criterion = getattr(criterion_of("yolo26n-obb.yaml"), branch)
    options = {"topk": 7, "topk2": 1} if branch == "one2one" else {}
    compare(criterion, make_preds(1, seed), make_rows(24, 3, 60, seed), reg_max=1, **options)
