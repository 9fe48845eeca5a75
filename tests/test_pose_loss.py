"""The criterion of boxes with keypoints against the reference, and what must hold whatever the input."""

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import reference as ref
import triton_yolo as ty
from tests import strategies as strat
from tests.compare import TOLERANCE, assert_close, assert_same_but_for_order
from tests.conftest import DEVICE, FEW
from tests.test_losses import NOT_FINITE, check_is_nothing_but_nan, is_yolo11_decided, small_yolo11, with_gradients

F32, F64 = torch.float32, torch.float64


@st.composite
def cases(draw, dtype: torch.dtype = F32) -> tuple[strat.YOLO11Case, Tensor, Tensor]:
    """A case of YOLO11, raw keypoints, and those of its rows, in and around the image."""
    case = draw(strat.yolo11_cases(dtype))
    num_keypoints, num_dims = draw(st.sampled_from([(1, 2), (17, 3), (4, 3)]))
    raw = draw(strat.tensors((*case.pred_dist.shape[:2], num_keypoints * num_dims), jitters=(0.0, 0.25)))
    places = draw(strat.tensors((len(case.rows), num_keypoints, 2), st.integers(-2, 18).map(lambda i: i / 16), jitters=(0.0,)))
    flags = draw(strat.tensors((len(case.rows), num_keypoints, 1), st.sampled_from([0.0, 1.0, 2.0]), jitters=(0.0,)))
    return case, draw(strat.layouts(raw.to(dtype))), torch.cat([places, flags], 2)


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@FEW
@given(data=st.data())
def test_yolo11_pose_loss(dtype, data):
    case, raw, keypoints = data.draw(cases(dtype))
    assume(is_yolo11_decided(case))
    preds, given_as = (case.pred_dist, case.pred_scores, raw), F64 if dtype == F64 else F32
    criterion = ty.YOLO11PoseLoss(case.pred_scores.shape[-1], **case.options)
    rows = case.rows.to(given_as)
    out, grads = with_gradients(lambda *p: criterion(*p, case.feat_shapes, rows, keypoints.to(given_as)), *preds)
    expected, expected_grads = with_gradients(
        lambda *p: ref.yolo11_pose_loss(*p, case.feat_shapes, case.rows.double(), keypoints.double(), **case.options),
        *(x.double() for x in preds),
    )
    for name, value in zip(out._fields[:-1], out[:-1], strict=True):
        assert value.dtype == given_as
        assert_close(value, getattr(expected, name), name, TOLERANCE[given_as])
    assert out.num_fg == expected.num_fg
    for name, pred, grad, expected_grad in zip(("dist", "scores", "keypoints"), preds, grads, expected_grads, strict=True):
        assert grad.dtype == pred.dtype
        assert_close(grad, expected_grad, f"gradient of {name}", size_of_terms=1e-3)


def small(num_rows: int = 3, **options) -> tuple[ty.YOLO11PoseLoss, list[Tensor], list, Tensor, Tensor]:
    _, dist, scores, shapes, rows = small_yolo11(num_rows)
    raw, keypoints = torch.randn(2, 20, 15, device=DEVICE), torch.rand(num_rows, 5, 3, device=DEVICE)
    return ty.YOLO11PoseLoss(3, strides=(8, 16), reg_max=8, **options), [dist, scores, raw], shapes, rows, keypoints


@NOT_FINITE
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_number_shows_in_all_gradients(bad, which):
    criterion, preds, shapes, rows, keypoints = small()
    is_positive = torch.autograd.grad(criterion(*preds[:2], preds[2].requires_grad_(), shapes, rows, keypoints).loss, preds[2])
    is_positive = is_positive[0].any(-1)
    assert 0 < is_positive.sum() < 40
    for anchor in (6, 11, 19):
        broken = [x.detach().clone() for x in preds]
        broken[which][1, anchor, 2] = bad
        out, grads = with_gradients(lambda *p: criterion(*p, shapes, rows, keypoints), *broken)
        if which < 2 or is_positive[1, anchor]:
            check_is_nothing_but_nan(out, grads)
        else:
            assert out.loss.isfinite()
            assert all(grad.isfinite().all() for grad in grads)


def test_every_form_of_the_targets_gives_the_same_loss():
    criterion, preds, shapes, rows, keypoints = small()
    expected = criterion(*preds, shapes, rows, keypoints)
    assert expected.num_fg > 4
    pixels = keypoints * keypoints.new_tensor([32, 32, 1])
    targets = ty.Targets.from_yolo(rows, (32, 32))
    assert_same_but_for_order(criterion(*preds, shapes, targets, pixels), expected)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    padded = torch.cat([torch.full_like(rows[:1], -1), rows[order]])
    moved = torch.cat([torch.full_like(keypoints[:1], torch.nan), keypoints[order]])
    out, whole = criterion(*preds, shapes, padded, moved), expected
    for name in ("loss", "pose", "kobj"):
        assert_close(getattr(out, name), getattr(whole, name), name)


def test_results_repeat_to_the_bit():
    criterion, preds, *others = small()
    first, again = (with_gradients(lambda *p: criterion(*p, *others), *preds) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_the_sum_of_its_parts(num_rows):
    criterion, preds, shapes, rows, keypoints = small(num_rows, pose_gain=2.0, kobj_gain=3.0, sigmas=[0.1, 0.2, 0.3, 0.4, 0.5])
    out = criterion(*preds, shapes, rows, keypoints)
    detection = criterion.detection
    found, target_row = detection._with_rows(*detection._checked(dict(pred_dist=preds[0], pred_scores=preds[1]), shapes), rows)
    boxes, size = ty.Targets.from_yolo(rows, (32, 32)).boxes_xyxy, keypoints.new_tensor([32, 32, 1])
    alone = ty.keypoint_loss(
        preds[2],
        target_row,
        keypoints * size,
        boxes,
        shapes,
        strides=(8, 16),
        sigmas=criterion.sigmas,
        pose_gain=2,
        kobj_gain=3,
    )
    assert_close(out.loss, found.loss + alone.loss, "loss")
    assert_close(torch.stack([out.pose, out.kobj]), torch.stack(alone[1:]), "terms")
    assert (out.box, out.cls, out.dfl, out.num_fg) == found[1:]
    assert (out.pose > 0) == (num_rows > 0)


@pytest.mark.usefixtures("fresh_compiler")
def test_model_and_criterion_compile_as_one_graph():
    criterion, preds, *others = small()
    layers = [x.clone().requires_grad_() for x in preds]
    out, grads = with_gradients(lambda *p: criterion(*(2 * x for x in p), *others), *layers)
    compiled = torch.compile(lambda *p: criterion(*(2 * x for x in p), *others), fullgraph=True, backend="aot_eager")
    found, found_grads = with_gradients(compiled, *layers)
    for a, b in zip((*found, *found_grads), (*out, *grads), strict=True):
        torch.testing.assert_close(a, b)


def test_copies():
    criterion, preds, *others = small(class_weights=torch.tensor([1.0, 2.0, 0.5]))
    criterion = criterion.to(DEVICE)
    expected = criterion(*preds, *others).loss
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(*preds, *others).loss, expected)
    assert not criterion.state_dict()
    assert criterion.process_group is None


@pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on the CPU only: elsewhere it would synchronise")
def test_keypoints_in_other_units_than_boxes_are_noticed():
    criterion, preds, shapes, rows, keypoints = small()
    keypoints = keypoints.clamp(min=0.1)
    keypoints[0] = 0  # not seen
    with pytest.warns(UserWarning, match=r"^keypoints are up to .* images away: beside normalised rows they are shares"):
        criterion(*preds, shapes, rows, keypoints * keypoints.new_tensor([320, 320, 1]))
    with pytest.warns(UserWarning, match=r"^keypoints are at most 0\.\d+ px away: beside boxes in pixels"):
        criterion(*preds, shapes, ty.Targets.from_yolo(rows, 32), keypoints)
    row = torch.full(preds[0].shape[:2], -1)
    with pytest.warns(UserWarning, match="gt_keypoints are at most"):
        ty.keypoint_loss(preds[2], row, keypoints, rows[:, 2:] * 32, shapes, strides=(8, 16))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"keypoints": torch.zeros(3, 5, 4)}, r"^keypoints must have shape \(N, K, 2\) or"),
        ({"keypoints": None}, "^keypoints must be a tensor, got NoneType"),
        ({"pred_scores": None}, "pred_scores must be a tensor, got NoneType"),
        ({"keypoints": torch.zeros(2, 5, 3)}, "keypoints must be those of 3 rows of targets, got 2"),
        ({"keypoints": torch.zeros(3, 6, 3)}, "pred_keypoints must have 2 or 3 channels for each of 6 keypoints, got 15"),
        ({"pred_keypoints": torch.zeros(2, 19, 15)}, r"pred_keypoints must have shape \(2, 20, K \* D\)"),
    ],
)
def test_errors(changes, match):
    criterion, preds, *others = small()
    names = ("pred_dist", "pred_scores", "pred_keypoints", "feat_shapes", "targets", "keypoints")
    given = dict(zip(names, (*preds, *others), strict=True))
    given |= {name: x if x is None else x.to(DEVICE) for name, x in changes.items()}
    with pytest.raises((ValueError, TypeError), match=match):
        criterion(**given)
