"""The mask term and the criterion of segmentation against the reference, and what must hold whatever the input."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference as ref
import triton_yolo as ty
from tests import strategies as strat
from tests.adapters import pretend_two_ranks
from tests.compare import assert_close
from tests.conftest import DEVICE, FEW, INTERPRETED
from tests.test_losses import is_yolo11_decided
from triton_yolo import _backend, _ops
from triton_yolo._signatures import ImageSize, MaskLoss

LN2 = math.log(2)
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on the CPU only: elsewhere it would synchronise")


def targets_of(case: strat.MaskCase, dtype: torch.dtype) -> ty.Targets:
    boxes, labels = case.boxes.to(dtype), torch.zeros_like(case.image_index)
    return ty.Targets(case.image_index, labels, boxes, boxes)


def check_mask_loss(case: strat.MaskCase) -> None:
    dtype = case.coefficients.dtype
    working = torch.float64 if dtype == torch.float64 else torch.float32
    preds = [x.detach().requires_grad_() for x in (case.coefficients, case.prototypes)]
    loss = ty.mask_loss(
        *preds, case.target_row, targets_of(case, working), case.masks, imgsz=case.imgsz, overlap_mask=case.overlap_mask
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in preds]
    truth = ref.MaskTargets(case.image_index, case.boxes.double(), case.masks, case.overlap_mask)
    expected = ref.mask_loss(*exact, case.target_row, truth, imgsz=case.imgsz)
    assert loss.dtype == working
    assert_close(loss, expected, "loss")
    grads, expected_grads = torch.autograd.grad(loss, preds), torch.autograd.grad(expected, exact)
    smallest = (case.boxes[:, 2:] - case.boxes[:, :2]).prod(1).clamp(min=0.25).amin().item() if len(case.boxes) else 1
    for name, grad, expected_grad, other in zip(
        ("coefficients", "prototypes"), grads, expected_grads, (case.prototypes, case.coefficients), strict=True
    ):
        assert grad.dtype == dtype
        # Terms are of the other factor's size, by the area, and may cancel.
        size = other.abs().max().item() / smallest / max(1, int((case.target_row >= 0).sum()))
        assert_close(grad, expected_grad, f"gradient of {name}", size_of_terms=max(size, 1e-12))


@given(strat.mask_cases())
def test_mask_loss(case):
    check_mask_loss(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@FEW
@given(data=st.data())
def test_mask_loss_in_other_types(dtype, data):
    check_mask_loss(data.draw(strat.mask_cases(dtype)))


def crowded(dtype: torch.dtype = torch.float32, *, overlap_mask: bool = True, wants_grad: bool = True) -> MaskLoss:
    """Two images of 20 x 30 pixels with boxes of every size, five positives each, some anchors after anchors of other rows."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(8, 2, generator=generator) * torch.tensor([70.0, 40.0])
    boxes = torch.cat([low, low + 8 + torch.rand(8, 2, generator=generator) * 60], 1)
    row = torch.full((2, 60), -1, dtype=torch.int32)
    for image in range(2):
        row[image, torch.randperm(60, generator=generator)[:20]] = torch.arange(20, dtype=torch.int32) % 4 * 2 + image
    coefficients, prototypes = torch.randn(2, 60, 32, generator=generator), torch.randn(2, 32, 20, 30, generator=generator)
    masks = torch.randint(5, (2, 20, 30), generator=generator, dtype=torch.uint8)
    if not overlap_mask:
        masks = torch.randint(2, (8, 20, 30), generator=generator, dtype=torch.uint8)
    number, scale = torch.arange(8) // 2 + 1, torch.tensor(1 / 40)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    x = coefficients.to(dtype), prototypes.to(dtype), row, boxes.to(working), masks, number, scale.to(working)
    return MaskLoss(*[part.to(DEVICE) for part in x], ImageSize((80, 120)), overlap_mask, wants_grad)


@pytest.mark.parametrize("overlap_mask", [True, False])
def test_repeats_are_equal_to_the_bit(overlap_mask):
    x = crowded(overlap_mask=overlap_mask)
    first, second = (_ops.mask_loss.run(x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(_ops.mask_loss.run(x._replace(wants_grad=False))[0], first[0])


@pytest.mark.parametrize("overlap_mask", [True, False])
def test_gradcheck(overlap_mask):
    x = crowded(torch.float64, overlap_mask=overlap_mask)
    x = x._replace(
        coefficients=x.coefficients[:, ::10, :3].contiguous(), prototypes=x.prototypes[:, :3, ::5, ::5].contiguous(),
        target_row=x.target_row[:, ::10].contiguous(), masks=x.masks[:, ::5, ::5],
    )  # fmt: skip
    inputs = x.coefficients.requires_grad_(), x.prototypes.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, p: _ops.mask_loss(x._replace(coefficients=c, prototypes=p)).loss, inputs, fast_mode=INTERPRETED
    )


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *[x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor)]])
        return result


def test_no_tensor_has_an_entry_for_every_positive_and_pixel():
    x, times = crowded(), 4 if INTERPRETED else 100
    x = x._replace(target_row=x.target_row.repeat(1, times), coefficients=x.coefficients.repeat(1, times, 1))
    with _Largest() as largest:
        _backend.implementation(DEVICE).mask_loss(x)
    assert largest.bytes <= 4 * max(x.coefficients.numel(), x.prototypes.numel(), 0 if INTERPRETED else 2**18)


def one_positive(**changes):
    """The example of ``mask_loss`` with a logit of 2 everywhere."""
    boxes = torch.tensor([[8.0, 8, 40, 24]], device=DEVICE)
    args = dict(
        pred_masks=torch.ones(1, 4, 2, device=DEVICE), prototypes=torch.ones(1, 2, 8, 8, device=DEVICE),
        target_row=torch.tensor([[-1, 0, -1, -1]], device=DEVICE), masks=torch.zeros(1, 8, 8, dtype=torch.uint8, device=DEVICE),
        targets=ty.Targets.from_list([{"boxes": boxes, "labels": torch.tensor([0], device=DEVICE)}]), imgsz=32,
    )  # fmt: skip
    args["masks"][0, 2:6, 2:6] = 1
    return {**args, **changes}


def test_a_mask_by_hand():
    # Of the box's 8 x 4 pixels at 4 px those are in the image whose index is below 8: 6 x 4, of which 4 x 4 are in the mask.
    expected = (16 * math.log(1 + math.exp(-2)) + 8 * math.log(1 + math.exp(2))) / 32
    for masks in (one_positive()["masks"], one_positive()["masks"].bool(), one_positive()["masks"].double()):
        for overlap_mask in (True, False):
            loss = ty.mask_loss(**one_positive(masks=masks, overlap_mask=overlap_mask))
            torch.testing.assert_close(loss, torch.tensor(expected, device=DEVICE))
    half = ty.mask_loss(**one_positive(normaliser=torch.tensor(2.0, device=DEVICE)))
    torch.testing.assert_close(half, torch.tensor(expected / 2, device=DEVICE))


def test_prototypes_are_resized_to_the_masks():
    args = one_positive(
        masks=torch.zeros(1, 1, 4, device=DEVICE), imgsz=(32, 64), pred_masks=torch.ones(1, 4, 1, device=DEVICE)
    )
    boxes = torch.tensor([[0.0, 0, 64, 32]], device=DEVICE)
    args["targets"] = args["targets"]._replace(boxes_xyxy=boxes)
    args["prototypes"] = torch.tensor([[[[0.0, 4.0]]]], device=DEVICE, requires_grad=True)
    loss = ty.mask_loss(**args)
    torch.testing.assert_close(loss, torch.tensor(sum(math.log(1 + math.exp(x)) for x in (0, 1, 3, 4)) / 4, device=DEVICE))
    loss.backward()
    slopes = [1 / (1 + math.exp(-x)) / 4 for x in (0, 1, 3, 4)]
    expected = [slopes[0] + 0.75 * slopes[1] + 0.25 * slopes[2], 0.25 * slopes[1] + 0.75 * slopes[2] + slopes[3]]
    assert args["prototypes"].grad.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_a_small_loss_of_large_logits_keeps_its_digits():
    args = one_positive(pred_masks=torch.full((1, 4, 2), 5.0, device=DEVICE), masks=torch.ones(1, 8, 8, device=DEVICE))
    expected = 24 / 32 * math.log1p(math.exp(-10))
    assert ty.mask_loss(**args).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "place", "shows"),
    [
        ("pred_masks", (0, 1, 0), True), ("pred_masks", (0, 2, 0), False), ("prototypes", (0, 1, 5, 7), True),
        ("prototypes", (0, 1, 1, 2), False), ("prototypes", (0, 0, 2, 1), False),
    ],
)  # fmt: skip
def test_what_is_not_finite_shows_inside_a_box(name, place, shows, value):
    args = one_positive()
    args[name][place] = value
    leaves = [args[field].requires_grad_() for field in ("pred_masks", "prototypes")]
    loss = ty.mask_loss(**args)
    grads = torch.autograd.grad(loss, leaves)
    assert [x.isnan().all().item() for x in (loss, *grads)] == [shows] * 3
    assert shows or all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
def test_a_finite_logit_shows_nowhere_however_large(value):
    args = one_positive(
        pred_masks=torch.full((1, 4, 2), value / 4, device=DEVICE), masks=torch.ones(1, 8, 8, device=DEVICE) * (value > 0)
    )
    leaves = [args[field].requires_grad_() for field in ("pred_masks", "prototypes")]
    loss = ty.mask_loss(**args)
    assert loss == 0
    assert all(not x.any() for x in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (2, 4)])
def test_nothing_to_match(sizes):
    batch_size, num_anchors = sizes
    leaves = [torch.randn(batch_size, num_anchors, 3, device=DEVICE), torch.randn(batch_size, 3, 5, 6, device=DEVICE)]
    leaves = [x.requires_grad_() for x in leaves]
    targets = ty.Targets.from_padded(torch.zeros(1, 0, device=DEVICE), torch.zeros(1, 0, 4, device=DEVICE))
    row, masks = torch.full(sizes, -1, device=DEVICE), torch.zeros(batch_size, 5, 6, device=DEVICE)
    loss = ty.mask_loss(*leaves, row, targets, masks, imgsz=32)
    loss.backward()
    assert loss == 0
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def test_rows_are_numbered_in_their_images():
    args = one_positive(pred_masks=torch.ones(2, 4, 2, device=DEVICE), prototypes=torch.ones(2, 2, 8, 8, device=DEVICE))
    boxes = torch.tensor([[0.0, 0, 32, 32]] * 4 + [[0, 0, 0, 0]], device=DEVICE)[[0, 4, 1, 2, 3]]
    image_index = torch.tensor([1, 0, 0, 1, -1], device=DEVICE)
    args["targets"] = ty.Targets(image_index, torch.zeros_like(image_index), boxes, boxes)
    args["target_row"] = torch.tensor([[-1, 2, -1, -1], [-1, 3, -1, 0]], device=DEVICE)
    masks = torch.zeros(2, 8, 8, device=DEVICE)
    masks[0, 0, :3], masks[1, 1, :5], masks[1, 2, :7] = 2, 1, 2
    # Row 2 is the second of image 0, after one without sides; rows 0 and 3 are the first and second of image 1.
    expected = (3 * 64 * math.log(1 + math.exp(2)) - 2 * (3 + 5 + 7)) / 64 / 3
    assert ty.mask_loss(**{**args, "masks": masks}).item() == pytest.approx(expected, rel=1e-6)


def test_a_mask_of_bytes_holds_no_number_above_255():
    boxes = torch.tensor([[0.0, 0, 32, 32]] * 257, device=DEVICE)
    targets = ty.Targets.from_list([{"boxes": boxes, "labels": torch.zeros(257, device=DEVICE)}])
    for number, target in ((256, 0), (0, 1)):  # pixels of 1 are those of the first row, and none of the 257th's
        args = one_positive(
            targets=targets, target_row=torch.tensor([[-1, number, -1, -1]], device=DEVICE),
            masks=torch.ones(1, 8, 8, dtype=torch.uint8, device=DEVICE),
        )  # fmt: skip
        assert ty.mask_loss(**args).item() == pytest.approx(math.log(1 + math.exp(2)) - 2 * target, rel=1e-6)
        gt = ref.MaskTargets(targets.image_index, boxes, args["masks"], True)
        expected = ref.mask_loss(args["pred_masks"], args["prototypes"], args["target_row"], gt, imgsz=(32, 32))
        assert ty.mask_loss(**args).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pred_masks": torch.ones(4, 2)}, ValueError, r"pred_masks must have shape \(B, A, M\), got \(4, 2\)"),
        ({"prototypes": torch.ones(1, 3, 8, 8)}, ValueError, r"prototypes must have shape \(1, 2, h, w\), got \(1, 3, 8, 8\)"),
        ({"masks": torch.ones(2, 8, 8)}, ValueError, r"masks must have shape \(1, H, W\), got \(2, 8, 8\)"),
        ({"masks": torch.ones(1, 0, 8)}, ValueError, r"masks must have sides of 1 to 65535 pixels, got \(1, 0, 8\)"),
        ({"masks": torch.ones(1, 8, 8).cfloat()}, TypeError, "masks must be real, got torch.complex64"),
        ({"target_row": torch.zeros(1, 4)}, TypeError, "target_row must be int32 or int64, got torch.float32"),
        ({"prototypes": torch.ones(1, 2, 0, 8)}, ValueError, r"prototypes must have pixels, got \(1, 2, 0, 8\)"),
        ({"targets": torch.ones(4, 6)}, TypeError, "targets must be triton_yolo.Targets, .* got Tensor"),
        ({"targets": None}, TypeError, "targets must be triton_yolo.Targets, .* got NoneType"),
        ({"imgsz": 0}, ValueError, "imgsz must be finite and positive, got 0"),
        ({"normaliser": torch.ones(1)}, ValueError, r"normaliser must have shape \(\), got \(1,\)"),
        pytest.param({"target_row": torch.tensor([[0, 1, 0, 0]])}, ValueError, r"target_row .* got \[1\]", marks=ON_CPU),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, error, message):
    changes = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        ty.mask_loss(**one_positive(**changes))


# ---- the criterion


def small_criterion(dtype: torch.dtype = torch.float32, **options):
    """A criterion and what it takes: two images of 32 px, with two boxes and one."""
    torch.manual_seed(0)
    preds = [torch.randn(2, 20, channels, dtype=dtype, device=DEVICE).requires_grad_() for channels in (32, 3, 4)]
    prototypes = torch.randn(2, 4, 8, 8, dtype=dtype, device=DEVICE).requires_grad_()
    rows = torch.tensor(
        [[1, 0, 0.5, 0.5, 0.75, 0.625], [0, 1, 0.375, 0.5, 0.5, 0.8125], [1, 2, 0.3125, 0.375, 0.375, 0.4375]], device=DEVICE
    )
    masks = torch.randint(3, (2, 8, 8), dtype=torch.uint8, device=DEVICE)
    criterion = ty.YOLO11SegmentationLoss(3, strides=(8, 16), reg_max=8, **options)
    return criterion, [*preds, prototypes, [(4, 4), (2, 2)], rows, masks]


@pytest.mark.parametrize("name", ["pred_dist", "pred_scores", "pred_masks", "prototypes"])
def test_a_prediction_that_is_no_tensor_is_named(name):
    criterion, args = small_criterion()
    args[("pred_dist", "pred_scores", "pred_masks", "prototypes").index(name)] = None
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
        criterion(*args)


@FEW
@given(data=st.data())
def test_yolo11_segmentation_loss(data):
    case = data.draw(strat.yolo11_cases())
    assume(is_yolo11_decided(case))
    height, width = (2 * side for side in case.feat_shapes[0])
    batch_size, num_anchors, num_classes = case.pred_scores.shape
    coefficients = data.draw(strat.tensors((batch_size, num_anchors, 3), jitters=(0.25,)))
    prototypes = data.draw(strat.tensors((batch_size, 3, height, width), jitters=(0.25,)))
    masks = data.draw(strat.tensors((batch_size, height, width), st.integers(0, 4).map(float), jitters=(0.0,)))
    criterion = ty.YOLO11SegmentationLoss(num_classes, mask_gain=2.0, **case.options)
    leaves = [x.detach().requires_grad_() for x in (case.pred_dist, case.pred_scores, coefficients, prototypes)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = criterion(*leaves, case.feat_shapes, case.rows, masks)
    expected = ref.yolo11_seg_loss(*exact, case.feat_shapes, case.rows.double(), masks, mask_gain=2.0, **case.options)
    assert out.num_fg == expected.num_fg
    for name in ("loss", "box", "cls", "dfl", "mask"):
        assert_close(getattr(out, name), getattr(expected, name), name)
    for grad, expected_grad in zip(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected.loss, exact), strict=True
    ):
        assert_close(grad, expected_grad, "gradient", size_of_terms=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_criterion_in_other_types(dtype):
    criterion, args = small_criterion(dtype)
    out = criterion(*args)
    exact = [x.detach().double().requires_grad_() for x in args[:4]]
    rows = args[5].double() if dtype == torch.float64 else args[5]
    expected = ref.yolo11_seg_loss(*exact, args[4], rows, args[6], strides=(8, 16), reg_max=8)
    assert_close(out.mask, expected.mask, "mask")
    for grad, expected_grad in zip(
        torch.autograd.grad(out.loss, args[:4]), torch.autograd.grad(expected.loss, exact), strict=True
    ):
        assert grad.dtype == dtype
        assert_close(grad, expected_grad, "gradient")


def test_criterion_takes_targets_and_masks_of_either_kind():
    criterion, args = small_criterion()
    expected = criterion(*args)
    rows, masks = args[5:]
    images, numbers = rows[:, 0].long(), torch.tensor([1, 1, 2], device=DEVICE)
    separate = masks[images] == numbers[:, None, None]
    criterion.overlap_mask = False
    for targets in (rows, ty.Targets.from_yolo(rows, 32)):
        torch.testing.assert_close(criterion(*args[:5], targets, separate), expected)
    padding = torch.full((2, 8, 8), torch.nan, device=DEVICE)
    padded = torch.cat([rows, torch.full_like(rows[:2], -1)]), torch.cat([separate, padding])
    torch.testing.assert_close(criterion(*args[:5], *padded), expected)


def test_a_batch_of_no_images_costs_nothing():
    criterion, (dist, scores, masks, prototypes, shapes, rows, images) = small_criterion()
    preds = [x[:0] for x in (dist, scores, masks, prototypes)]
    out = criterion(*preds, shapes, rows[:0], images[:0])
    out.loss.backward()
    assert [x.item() for x in out] == [0] * 6


@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_anywhere_is_finite_nowhere(place):
    criterion, args = small_criterion()
    detection = criterion.detection
    row = detection._with_rows(*detection._checked(dict(pred_dist=args[0], pred_scores=args[1]), args[4]), args[5])[1]
    image, anchor = (row >= 0).nonzero()[0].tolist()
    with torch.no_grad():
        if place == 3:
            args[3][image, 1] = math.inf
        else:
            args[place][image, anchor, 1] = math.inf
    out = criterion(*args)
    assert all(x.isnan() for x in out[:-1])
    assert all(x.isnan().all() for x in torch.autograd.grad(out.loss, args[:4]))


@pytest.mark.parametrize("grad", [1.0, 0.5])
def test_gradient_of_a_scaled_loss(grad):
    criterion, args = small_criterion()
    wanted = torch.autograd.grad(criterion(*args).loss, args[:4])
    found = torch.autograd.grad(grad * criterion(*args).loss, args[:4])
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, grad * want)


def test_normalised_over_ranks(monkeypatch):
    criterion, args = small_criterion()
    alone = criterion(*args)
    pretend_two_ranks(monkeypatch, 3.0)
    criterion.process_group = True
    out = criterion(*args)
    # Of two ranks the mean of the positives, and the sum of the images.
    torch.testing.assert_close(out.mask, alone.mask * alone.num_fg / ((alone.num_fg + 3) / 2))
    torch.testing.assert_close(out.loss, (2 + 3) * (out.box + out.cls + out.dfl + out.mask))


@pytest.mark.skipif(INTERPRETED, reason="graphs run operators, which other tests compare")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_as_one_graph():
    """In float16, whose gradients wait for a loss scale; tests/test_compile.py has float32."""
    criterion, args = small_criterion(torch.float16)
    expected = criterion(*args)
    out = torch.compile(criterion, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(list(out), list(expected))
    for a, b in zip(*(torch.autograd.grad(x.loss, args[:4]) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_value_is_needed_on_the_host(num_rows):
    criterion, args = small_criterion()
    with FakeTensorMode():
        shapes = [x.shape if isinstance(x, Tensor) else x for x in args]
        shapes[5] = torch.Size((num_rows, 6))
        fake = [torch.zeros(x, device="cuda") if isinstance(x, torch.Size) else x for x in shapes]
        out = criterion(*fake)
        criterion.overlap_mask = False
        criterion(*fake[:-1], torch.zeros(num_rows, 16, 16, device="cuda"))
    assert out.loss.device.type == "cuda"
