"""Masks beside Ultralytics' of 8.4.190 as a black box: the term alone, the criterion, and steps of patched models."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import reference as ref
import triton_yolo as ty
from bench import peers
from bench.cases import Case, yolo11_preds
from tests import adapters
from tests.compare import OF_A_STEP, assert_close
from triton_yolo.integrations import ultralytics as integration

pytestmark = pytest.mark.peers
SHAPES, NUM_CLASSES, SIDE_PX = [(16, 16), (8, 8), (4, 4)], 3, 128
OF_FLOAT32 = 1e-5
"""Of their numbers, which are float32 in part whatever they are given."""


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")
    with peers.contained():
        import ultralytics  # noqa: F401  sets up its log

        yield


@pytest.fixture(autouse=True)
def stays() -> Iterator[list[str]]:
    """What keeps Ultralytics' own computation."""
    with adapters.what_stays("ultralytics") as lines:
        yield lines
        integration.unpatch()


@functools.cache
def network(config: str) -> nn.Module:
    torch.manual_seed(0)
    return peers.ultralytics_model(config, NUM_CLASSES)


def criterion_of(config: str = "yolo11n-seg.yaml", *, overlap_mask: bool = True) -> Callable:
    criterion = network(config).init_criterion()
    criterion.overlap = overlap_mask
    return criterion


def make_rows(number: int, seed: int) -> Tensor:
    """Up to four rows of each of two images, sorted, and none of a third: a box in every quarter.

    So each box has ten anchors whose predictions overlap with it. Where one has fewer, Ultralytics counts others, too.
    """
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(number)[:, None]
    size = 0.3 + 0.15 * torch.rand(number, 2, generator=generator)
    corner = (0.5 - size) * torch.rand(number, 2, generator=generator)
    quarter = torch.cat([row % 2, row // 2 % 2], 1)
    return torch.cat([row // 4, row % NUM_CLASSES, corner + size / 2 + 0.5 * quarter, size], 1)


def make_masks(rows: Tensor, size: tuple[int, int], *, overlap_mask: bool) -> Tensor:
    """An ellipse in every box; where they overlap the last row has the pixel."""
    height, width = size
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    x = ((torch.arange(width) + 0.5) / width)[None, :]
    cx, cy, w, h = rows[:, 2:, None, None].unbind(1)
    separate = ((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 < 0.25
    if not overlap_mask:
        return separate.float()
    masks, counts = torch.zeros(3, height, width), [0] * 3
    for image, mask in zip(rows[:, 0].int().tolist(), separate, strict=True):
        counts[image] += 1
        masks[image][mask] = counts[image]
    return masks


def make_preds(rows: Tensor) -> list[Tensor]:
    """Distances and logits that know the boxes, coefficients and prototypes of three images, channels first."""
    preds = [x.clone() for x in yolo11_preds(Case(rows, 3, SIDE_PX, NUM_CLASSES))]
    generator = torch.Generator().manual_seed(1)
    preds.append(torch.randn(3, 32, preds[0].shape[2], generator=generator))
    preds.append(torch.randn(3, 32, SIDE_PX // 4, SIDE_PX // 4, generator=generator) / 2)
    return [x.requires_grad_() for x in preds]


@pytest.mark.parametrize("overlap_mask", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_mask_loss(seed, overlap_mask):
    """Given an assignment, in float64: boxes of it may have any place and size."""
    rows = make_rows(8, seed)
    rows[:, 2:] = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed))
    masks = make_masks(rows, (32, 32), overlap_mask=overlap_mask)
    preds = [x.detach().double().requires_grad_() for x in make_preds(rows)[2:]]
    targets = ty.Targets.from_yolo(rows.double(), SIDE_PX)
    row = torch.full((3, preds[0].shape[2]), -1)
    for image in range(2):
        row[image, image::5] = image * 4 + torch.arange(row[image, image::5].numel()) % 4
    slot = torch.where(row >= 0, row % 4, 0)
    size = torch.tensor([SIDE_PX, SIDE_PX], dtype=torch.float64)
    boxes = targets.boxes_xyxy[row.clamp(min=0)]
    expected = criterion_of(overlap_mask=overlap_mask).calculate_segmentation_loss(
        row >= 0, masks, slot, boxes, rows[:, :1], preds[1], preds[0].transpose(1, 2), size
    )  # fmt: skip
    wanted = torch.autograd.grad(expected, preds)
    truth = ref.MaskTargets(targets.image_index, targets.boxes_xyxy, masks, overlap_mask)
    coefficients, imgsz = preds[0].transpose(1, 2), (SIDE_PX, SIDE_PX)
    for loss in (
        ref.mask_loss(coefficients, preds[1], row, truth, imgsz=imgsz),
        ty.mask_loss(coefficients, preds[1], row, targets, masks, imgsz=imgsz, overlap_mask=overlap_mask),
    ):
        assert_close(loss, expected, "loss", OF_FLOAT32)
        for name, grad, want in zip(("coefficients", "prototypes"), torch.autograd.grad(loss, preds), wanted, strict=True):
            assert_close(grad, want, f"gradient of {name}", OF_FLOAT32)


@pytest.mark.parametrize("overlap_mask", [True, False])
@pytest.mark.parametrize(("scale", "number"), [(1, 8), (2, 8), (4, 3), (0.5, 8), (1, 0)])
def test_criterion(scale, number, overlap_mask):
    """Masks of the prototypes' size, of others, and no box at all; its second image may have none, its third has none."""
    rows = make_rows(number, 5)
    preds = make_preds(rows)
    masks = make_masks(rows, (int(32 * scale), int(32 * scale)), overlap_mask=overlap_mask)
    inputs = peers.ultralytics_preds(*preds[:2], SHAPES, mask_coefficient=preds[2], proto=preds[3])
    criterion = criterion_of(overlap_mask=overlap_mask)
    expected, items = criterion(inputs, {**peers.ultralytics_batch(rows), "masks": masks})
    ours = ty.YOLO11SegmentationLoss(NUM_CLASSES, overlap_mask=overlap_mask, min_box_side=16)
    out = ours(*(x.transpose(1, 2) for x in preds[:3]), preds[3], SHAPES, rows, masks)
    assert_close(out.loss, expected.sum(), "loss", OF_FLOAT32)
    assert_close(out.mask, items["seg_loss"], "mask", OF_FLOAT32)
    assert list(items) == ["box_loss", "seg_loss", "cls_loss", "dfl_loss", "sem_loss"]
    assert items["sem_loss"] == 0
    grads = (torch.autograd.grad(x, preds) for x in (out.loss, expected.sum()))
    for name, grad, want in zip(("distances", "classes", "coefficients", "prototypes"), *grads, strict=True):
        assert_close(grad, want, f"gradient of {name}", OF_FLOAT32)


def make_batch(rows: Tensor, *, overlap_mask: bool = True) -> dict[str, Tensor]:
    images = torch.rand(3, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(2))
    masks = make_masks(rows, (SIDE_PX // 4, SIDE_PX // 4), overlap_mask=overlap_mask)
    sem_masks = torch.zeros(3, SIDE_PX // 4, SIDE_PX // 4, dtype=torch.long)
    return {**peers.ultralytics_batch(rows), "img": images, "masks": masks, "sem_masks": sem_masks}


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, items and the gradient of all parameters."""
    model.zero_grad()
    loss, items = model.loss(batch)
    loss.sum().backward()
    return loss.detach(), items, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_steps(model: nn.Module, batch: dict[str, Tensor], *, is_ours: bool = True) -> None:
    """One step stock and one patched, with the same criterion object."""
    stock = step(model, batch)
    with integration.patched():
        ours = step(model, batch)
    assert ours[0].shape == ((1,) if is_ours else stock[0].shape)
    assert_close(ours[0].sum(), stock[0].sum(), "loss", OF_A_STEP)
    assert list(ours[1]) == list(stock[1])
    for name, item in stock[1].items():
        assert not ours[1][name].requires_grad
        assert_close(ours[1][name], item, name, OF_A_STEP)
    assert_close(ours[2], stock[2], "gradient", OF_A_STEP)


@pytest.mark.parametrize("config", ["yolo11n-seg.yaml", "yolov8n-seg.yaml"])
def test_patched_steps(config):
    """Of a training: the same weights before every step, which the stock loss has led to."""
    model = peers.ultralytics_model(config, NUM_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for seed in range(3):
        model.criterion = criterion_of(config)
        compare_steps(model, make_batch(make_rows(8, seed)))
        optimizer.step()


def test_patched_criterion_follows_its_settings():
    model = network("yolo11n-seg.yaml")
    model.criterion = criterion_of(overlap_mask=False)
    model.criterion.class_weights = torch.tensor([[[0.5, 1.0, 2.0]]])
    model.criterion.hyp.box = 2.0
    try:
        compare_steps(model, make_batch(make_rows(8, 3), overlap_mask=False))
    finally:
        model.criterion.hyp.box = 7.5


def test_what_a_user_changed_stays(monkeypatch, stays):
    from ultralytics.utils import loss as losses

    model = network("yolo11n-seg.yaml")
    model.criterion = criterion_of()
    stock = losses.v8SegmentationLoss.single_mask_loss
    with monkeypatch.context() as context:
        context.setattr(losses.v8SegmentationLoss, "single_mask_loss", staticmethod(lambda *args: 2 * stock(*args)))
        compare_steps(model, make_batch(make_rows(8, 4)), is_ours=False)
    lines = [line for line in stays if "keeps the computation" in line]
    assert lines
    assert all("single_mask_loss was replaced" in line for line in lines)
    stays.clear()
    compare_steps(model, make_batch(make_rows(8, 4)))


def test_yolo26_keeps_its_own(stays):
    """It has an assigner of its own and a semantic term."""
    model = network("yolo26n-seg.yaml")
    model.criterion = model.init_criterion()
    compare_steps(model, make_batch(make_rows(8, 4)), is_ours=False)
    assert "its class is another" in stays[-1]
    stays.clear()
