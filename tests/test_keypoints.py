"""The loss of keypoints against the reference, and what must hold whatever the input."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference as ref
import triton_yolo as ty
from tests import operations
from tests import strategies as strat
from tests.compare import TOLERANCE, assert_close
from tests.conftest import DEVICE, FEW
from triton_yolo import _ops
from triton_yolo._signatures import KeypointLossOutputs

F16, F32, F64 = torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:gt_keypoints are at most")  # cases that are drawn may lie in a corner


def run(function: Any, case: strat.KeypointCase, preds: Tensor, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The output of a function, and the gradient of its loss for a leaf with the layout of ``preds``."""
    leaf = preds.detach().requires_grad_()
    gt = case.keypoints.to(dtype), case.boxes.to(dtype)
    out = function(leaf, case.target_row, *gt, case.feat_shapes, **case.options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def check(case: strat.KeypointCase) -> None:
    dtype = case.preds.dtype
    computed_in = F64 if dtype == F64 else F32
    out, grad = run(ty.keypoint_loss, case, case.preds, computed_in)
    expected, expected_grad = run(ref.keypoint_loss, case, case.preds.double(), F64)
    for name in out._fields:
        assert getattr(out, name).dtype == computed_in
        assert_close(getattr(out, name), getattr(expected, name), name, TOLERANCE[computed_in])
    assert grad.dtype == dtype
    assert_close(grad, expected_grad, "gradient", size_of_terms=1e-3)  # those far off pull by exp(-distance^2)
    assert not grad[case.target_row < 0].any()


@given(strat.keypoint_cases())
def test_keypoint_loss(case):
    check(case)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, F16])
@FEW
@given(data=st.data())
def test_keypoint_loss_in_other_types(dtype, data):
    check(data.draw(strat.keypoint_cases(dtype)))


@FEW
@given(strat.keypoint_cases())
def test_invariants(case):
    out, grad = run(ty.keypoint_loss, case, case.preds, F32)
    assert min(out) >= 0
    # The same to the bit in every run, of every layout, and whatever background holds.
    is_background = (case.target_row < 0)[..., None]
    for preds in (case.preds, case.preds.contiguous(), case.preds.masked_fill(is_background, torch.nan)):
        again, grad_again = run(ty.keypoint_loss, case, preds, F32)
        assert all(torch.equal(a, b) for a, b in zip((*out, grad), (*again, grad_again), strict=True))
    # Rows of nobody in front move the others.
    moved = case._replace(
        target_row=case.target_row + (case.target_row >= 0) * 2,
        keypoints=F.pad(case.keypoints, (0, 0, 0, 0, 2, 0), value=torch.nan),
        boxes=F.pad(case.boxes, (0, 0, 2, 0), value=torch.nan),
    )
    found, grad_found = run(ty.keypoint_loss, moved, case.preds, F32)
    assert all(torch.equal(a, b) for a, b in zip((*out, grad), (*found, grad_found), strict=True))


def loss_by(by: str, preds: Tensor, *gt: Tensor, **options: Any) -> Any:
    function = ty.keypoint_loss if by == "package" else ref.keypoint_loss
    return function(preds, *gt, [(2, 2)], strides=(8,), **options)


def small(num_dims: int = 3) -> tuple[Tensor, ...]:
    """Two images of four cells, each with one positive, of two keypoints."""
    torch.manual_seed(0)
    row = torch.tensor([[-1, 0, -1, -1], [-1, -1, 1, -1]], device=DEVICE)
    keypoints = torch.tensor([[[10.0, 6, 2], [14, 4, 0]], [[2, 12, 1], [5, 9, 1]]], device=DEVICE)
    boxes = torch.tensor([[8.0, 0, 16, 8], [0, 0, 16, 16]], device=DEVICE)
    return torch.randn(2, 4, 2 * num_dims, device=DEVICE), row, keypoints, boxes


@pytest.mark.parametrize("by", ["package", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", range(6))
def test_no_number_of_a_positive_shows_everywhere(by, bad, channel):
    """Also that of a keypoint which is not visible: the second of the first row."""
    preds, *gt = small()
    preds[0, 1, channel] = bad
    out = loss_by(by, preds.requires_grad_(), *gt)
    assert all(x.isnan() for x in out)
    assert torch.autograd.grad(out.loss, preds)[0].isnan().all()
    preds, *gt = small()
    preds[0, 0, channel] = bad
    out = loss_by(by, preds.requires_grad_(), *gt)
    assert all(x.isfinite() for x in out)
    assert torch.autograd.grad(out.loss, preds)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, F16, F64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_huge_number_costs_as_much_as_it_can_and_pulls_no_more(dtype, sign):
    preds, *gt = small()
    preds = preds.to(dtype)
    preds[0, 1], preds[1, 2] = sign * torch.finfo(dtype).max, 0
    preds.requires_grad_()
    out = loss_by("package", preds, *gt)
    (grad,) = torch.autograd.grad(out.loss, preds)
    # The other positive: its cell's corner is (0, 1) cells; 8 sigma^2 area = 8 cells.
    others = [(0.25**2 + 0.5**2) / 8, (0.625**2 + 0.125**2) / 8]
    expected = 12 * (1 + sum(1 - math.exp(-error) for error in others) / 2) / 2
    assert out.pose.item() == pytest.approx(expected, rel=1e-6)
    assert grad.isfinite().all()
    # Of two logits one is right, as far as it is.
    assert not grad[0, 1, [0, 1, 3, 4]].any()
    assert grad[0, 1, [2, 5]].tolist() == ([0, 0.5] if sign > 0 else [-0.5, 0])


def test_a_keypoint_of_the_truth_that_is_no_number_is_not_visible():
    preds, row, keypoints, boxes = small()
    expected = loss_by("package", preds, row, keypoints, boxes)
    for number in range(3):
        keypoints[0, 1] = 1
        keypoints[0, 1, number] = torch.nan
        assert all(torch.equal(a, b) for a, b in zip(loss_by("package", preds, row, keypoints, boxes), expected, strict=True))


def test_predictions_without_visibility():
    preds, row, keypoints, boxes = small()
    whole = loss_by("package", preds, row, keypoints, boxes)
    out = loss_by("package", preds.unflatten(2, (2, 3))[..., :2].flatten(2), row, keypoints, boxes)
    assert torch.equal(out.pose, whole.pose)
    assert out.kobj == 0
    flagless = loss_by("package", preds, row, keypoints[..., :2], boxes)
    keypoints[..., 2] = 1
    assert all(torch.equal(a, b) for a, b in zip(flagless, loss_by("package", preds, row, keypoints, boxes), strict=True))


def test_gradients_of_float16_wait_for_the_loss_scale():
    """Small ones are 0 in float16, and 65536 times as large are not."""
    preds, *gt = small()
    scaled = [
        torch.autograd.grad(65536 * loss_by("package", leaf, *gt, pose_gain=1e-6, kobj_gain=1e-6).loss, leaf)[0]
        for leaf in (preds.half().requires_grad_(), preds.half().float().requires_grad_())
    ]
    assert scaled[0].dtype == F16
    assert (scaled[0] != 0).sum() > 8
    assert_close(scaled[0], scaled[1], "scaled gradient")


def test_backward_twice_and_scaled():
    preds, *gt = small()
    leaf = preds.requires_grad_()
    out = loss_by("package", leaf, *gt)
    first, again = (torch.autograd.grad(out.loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
    (tripled,) = torch.autograd.grad(3 * loss_by("package", leaf, *gt).loss, leaf)
    assert torch.equal(first, again)
    assert_close(tripled, 3 * first, "scaled gradient")


def test_numbers_of_other_processes_replace_ours():
    x = operations.keypoint_loss(F64)
    expected = KeypointLossOutputs(*_ops.keypoint_loss.run(x))
    halves = x._replace(num_fg=torch.tensor(3.5, device=DEVICE).double(), num_images=torch.tensor(6.0, device=DEVICE).double())
    out = KeypointLossOutputs(*_ops.keypoint_loss.run(halves))  # of seven positives and two images
    assert_close(torch.stack(out.terms), 2 * torch.stack(expected.terms), "terms")
    assert_close(out.loss - 1, 6 * (expected.loss - 1), "loss")
    assert_close(out.grad_pred_keypoints, 6 * expected.grad_pred_keypoints, "gradient")
    out = _ops.keypoint_loss.run(x._replace(other_loss=torch.full_like(x.other_loss, torch.nan)))
    assert all(y.isnan().all() for y in out)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph():
    preds, *gt = small()
    expected = loss_by("package", preds.requires_grad_(), *gt)
    (expected_grad,) = torch.autograd.grad(expected.loss, preds)
    compiled = torch.compile(loss_by, fullgraph=True, backend="aot_eager")
    out = compiled("package", preds, *gt)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(torch.autograd.grad(out.loss, preds)[0], expected_grad)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"pred_keypoints": torch.zeros(2, 4, 5)}, ValueError, "pred_keypoints must have 2 or 3 channels for each of 2 keyp"),
        ({"target_row": torch.zeros(2, 4)}, TypeError, "target_row must be int32 or int64"),
        ({"target_row": torch.zeros(2, 3).long()}, ValueError, r"target_row must have shape \(2, 4\)"),
        ({"gt_keypoints": torch.zeros(2, 2, 4)}, ValueError, r"gt_keypoints must have shape \(N, K, 2\) or \(N, K, 3\)"),
        ({"gt_keypoints": torch.zeros(2, 0, 2)}, ValueError, r"gt_keypoints must have shape \(N, K, 2\) or \(N, K, 3\)"),
        ({"gt_boxes": torch.zeros(1, 4)}, ValueError, r"gt_boxes must have shape \(2, 4\)"),
        ({"sigmas": [0.1]}, ValueError, "sigmas must be one for each of 2 keypoints, got 1"),
        ({"sigmas": [0.1, 0.0]}, ValueError, "sigmas must be finite and positive"),
        ({"sigmas": 0.1}, TypeError, "sigmas must be a sequence, got 0.1"),
        ({"pose_gain": -1.0}, ValueError, "pose_gain must be finite and not negative"),
        ({"feat_shapes": [(2, 3)]}, ValueError, "feat_shapes must have as many cells"),
    ],
)
def test_errors(changes, error, match):
    preds, row, keypoints, boxes = small()
    given = dict(
        pred_keypoints=preds, target_row=row, gt_keypoints=keypoints, gt_boxes=boxes, feat_shapes=[(2, 2)], strides=(8,)
    )
    changes = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(error, match=match):
        ty.keypoint_loss(**{**given, **changes})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere such an anchor is background")
def test_a_row_that_there_is_not():
    preds, row, *gt = small()
    with pytest.raises(ValueError, match=r"target_row must be below the number of rows 2, got \[2\]"):
        loss_by("package", preds, row.where(row < 1, 2), *gt)
