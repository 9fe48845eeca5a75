"""The reference's mask term against numbers worked out by hand, and its derivative by finite differences."""

import math

import pytest
import torch
from torch import Tensor

import reference as ref
from reference import masks as ref_masks

LN2 = math.log(2)


def targets_of(boxes: list[list[float]], masks: Tensor, *, images: list[int] | None = None, overlap_mask: bool = True):
    image_index = torch.tensor([0] * len(boxes) if images is None else images)
    return ref.MaskTargets(image_index, torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), masks, overlap_mask)


def one_positive(box: list[float], coefficients: list[float], prototypes: Tensor, mask: Tensor, **options):
    """The only anchor of a picture of 32 x 64 px has this box."""
    coefficients = torch.tensor([[coefficients]], dtype=torch.float64)
    targets = targets_of([box], mask[None], overlap_mask=False)
    return ref.mask_loss(coefficients, prototypes[None], torch.tensor([[0]]), targets, imgsz=(32, 64), **options)


# 8 x 16 pixels of 4 px: a box counts the pixels whose index is at least x1 and below x2, and is divided by its own area.
@pytest.mark.parametrize(
    ("box", "pixels", "area"),
    [
        ((8, 8, 24, 24), 4 * 4, 4 * 4),
        ((9, 8, 24, 24), 3 * 4, 3.75 * 4),
        ((8, 8, 24.5, 24), 5 * 4, 4.125 * 4),
        ((8, 8, 24, 23.9), 4 * 4, 4 * 3.975),
        ((-8, 8, 24, 24), 6 * 4, 8 * 4),
        ((8, 8, 24, 64), 4 * 6, 4 * 14),
        ((9, 9, 11, 11), 0, 0.25),
        ((0, 0, 64, 32), 128, 128),
    ],
)
def test_pixels_of_a_box(box, pixels, area):
    zeros = torch.zeros(1, 8, 16, dtype=torch.float64)
    # A logit of 0 costs ln 2 whatever its target is.
    assert one_positive(list(box), [1.0], zeros, zeros[0]).item() == pytest.approx(LN2 * pixels / area, rel=1e-12)


def test_a_logit_is_the_product_of_coefficients_and_prototypes():
    prototypes = torch.zeros(2, 8, 16, dtype=torch.float64)
    prototypes[:, 2, 3], prototypes[:, 2, 4] = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    mask = torch.zeros(8, 16, dtype=torch.float64)
    mask[2, 3] = 1
    prototypes.requires_grad_()
    # Two pixels, with logits 3 - 2 = 1 and 1 - 4 = -3, of which the first is in the mask.
    loss = one_positive([12, 8, 20, 12], [1.0, -2.0], prototypes, mask)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2)
    (grad,) = torch.autograd.grad(loss, prototypes)
    first, second = (1 / (1 + math.exp(-1)) - 1) / 2, 1 / (1 + math.exp(3)) / 2
    assert grad[:, 2, 3].tolist() == pytest.approx([first, -2 * first])
    assert grad[:, 2, 4].tolist() == pytest.approx([second, -2 * second])
    assert grad.abs().sum().item() == pytest.approx(3 * (abs(first) + abs(second)))


def test_a_mask_may_hold_probabilities():
    prototypes = torch.full((1, 8, 16), 2.0, dtype=torch.float64)
    loss = one_positive([0, 0, 64, 32], [1.0], prototypes, torch.full((8, 16), 0.25, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)) - 0.25 * 2)


def test_prototypes_are_resized_to_the_masks():
    # Pixels have their centres at 0.5, 1.5, ...: twice as many lie at 0, 1/4, 3/4 and 1 between two of them.
    prototypes = torch.tensor([[[0.0, 4.0]]], dtype=torch.float64)
    loss = one_positive([0, 0, 64, 32], [1.0], prototypes, torch.zeros(1, 4, dtype=torch.float64))
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(x)) for x in (0, 1, 3, 4)) / 4)


def test_rows_are_numbered_in_their_images():
    masks = torch.tensor([[[0, 1, 2]], [[3, 2, 1]]])
    found = ref_masks.masks_of_rows(targets_of([[0, 0, 1, 1]] * 5, masks, images=[1, 0, 1, -1, 1]))
    # Rows 0, 2 and 4 are the first three of image 1, row 1 is the first of image 0, row 3 is padding.
    assert found.int().tolist() == [[[0, 0, 1]], [[0, 1, 0]], [[0, 1, 0]], [[0, 0, 0]], [[1, 0, 0]]]


def test_the_mean_is_over_the_positives_of_the_batch():
    coefficients, prototypes = torch.zeros(2, 3, 4), torch.zeros(2, 4, 8, 16)
    targets = targets_of([[8, 8, 24, 24], [9, 9, 11, 11]], torch.zeros(2, 8, 16), images=[0, 1])
    row = torch.tensor([[0, -1, 0], [-1, 1, -1]])
    # Two positives cost ln 2, one whose box has no pixel costs nothing.
    assert ref.mask_loss(coefficients, prototypes, row, targets, imgsz=(32, 64)).item() == pytest.approx(LN2 * 2 / 3)
    loss = ref.mask_loss(coefficients, prototypes, row, targets, imgsz=(32, 64), normaliser=torch.tensor(8.0))
    assert loss.item() == pytest.approx(LN2 * 2 / 8)


def test_no_positive_costs_nothing_and_reaches_every_prediction():
    coefficients, prototypes = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 4, 8, 16, requires_grad=True)
    loss = ref.mask_loss(
        coefficients, prototypes, torch.full((2, 3), -1), targets_of([], torch.zeros(2, 8, 16)), imgsz=(32, 64)
    )
    loss.backward()
    assert loss.item() == coefficients.grad.abs().sum() == prototypes.grad.abs().sum() == 0


@pytest.mark.parametrize(("place", "shows"), [((0, 2, 3), True), ((0, 0, 0), False)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_inside_a_box(place, shows, value):
    prototypes = torch.ones(1, 8, 16, dtype=torch.float64)
    prototypes[place] = value
    prototypes.requires_grad_()
    loss = one_positive([8, 8, 24, 24], [1.0], prototypes, torch.ones(8, 16, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss, prototypes)
    assert loss.isnan() == shows
    assert grad.isnan().all() == shows


def test_derivative():
    torch.manual_seed(0)
    coefficients, prototypes = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    targets = targets_of([[0, 0, 9, 7], [3, 1, 16, 16], [5, 2, 20, 9]], torch.randint(3, (2, 8, 10)), images=[0, 1, 1])
    row = torch.tensor([[0, 0, -1, 0], [1, -1, 2, 1]])
    inputs = coefficients.requires_grad_(), prototypes.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, p: ref.mask_loss(c, p, row, targets, imgsz=(16, 20)), inputs)


def test_yolo11_seg_adds_the_masks_of_its_positives():
    """Two boxes side by side with an anchor each, the second in order in the first place; a box without sides before both."""
    dist, logits = torch.zeros(1, 2, 8, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64)
    coefficients = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    rows = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0.75, 0.5, 0.5, 1], [0, 0, 0.25, 0.5, 0.5, 1]], dtype=torch.float64)
    masks = torch.tensor([[[3, 0, 2, 2]]])
    prototypes = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)
    out = ref.yolo11_seg_loss(dist, logits, coefficients, prototypes, [(1, 2)], rows, masks, strides=(8,), reg_max=2)
    detector = ref.yolo11_loss(dist, logits, [(1, 2)], rows, strides=(8,), reg_max=2)
    # The left anchor has logits 1 and 2, of which its mask, number 3, has the first; the right one -3 and -4, both in number 2.
    of_left, of_right = (
        math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2)),
        math.log(1 + math.exp(3)) + math.log(1 + math.exp(4)),
    )
    assert out.num_fg == detector.num_fg == 2
    assert out.mask.item() == pytest.approx(7.5 * (of_left + of_right) / 2 / 2)
    assert out.loss.item() == pytest.approx((detector.loss + out.mask).item())
    assert (out.box, out.cls, out.dfl) == (detector.box, detector.cls, detector.dfl)
