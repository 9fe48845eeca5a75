"""Every stage against its dense twin in the reference: values, gradients, tie rules."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import reference as ref
import triton_yolo as ty
from tests import strategies as strat
from tests.compare import TOLERANCE, assert_close, is_decided
from tests.conftest import DEVICE

KINDS = ("iou", "giou", "diou", "ciou")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)


def gradient_of(function, x, weight):
    """Gradient of the weighted sum of ``function(x)``, computed in float64 for the reference."""
    x = x.detach().requires_grad_()
    out = function(x)
    (grad,) = torch.autograd.grad((out * weight.to(out)).sum(), x)
    return grad


@given(strat.pyramids(), st.sampled_from([0.5, 0.0]), st.sampled_from([torch.float32, torch.float64]))
def test_make_anchors(pyramid, offset, dtype):
    shapes, strides = pyramid
    points, point_strides = ty.make_anchors(shapes, strides, offset=offset, dtype=dtype, device=DEVICE)
    expected_points, expected_strides = ref.make_anchors(shapes, strides, offset=offset, dtype=dtype, device=DEVICE)
    assert torch.equal(points, expected_points)
    assert torch.equal(point_strides, expected_strides)
    assert points.dtype == point_strides.dtype == dtype


@st.composite
def decode_cases(draw):
    batch_size, num_anchors = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    reg_max = draw(st.integers(1, 32))
    dtype = draw(dtypes)
    dist = draw(strat.tensors((batch_size, num_anchors, 4 * reg_max), st.integers(-64, 64).map(lambda i: i / 8)))
    points = strat.spread([0.5, 3.5, 7.5], (num_anchors, 2))
    strides = strat.spread([8.0, 16.0], (num_anchors,)) if draw(st.booleans()) else None
    return draw(strat.layouts(dist.to(dtype))), points, strides, reg_max


@given(decode_cases())
def test_decode_dfl(case):
    dist, points, strides, reg_max = case
    boxes = ty.decode_dfl(dist, points, reg_max=reg_max, strides=strides)
    assert boxes.dtype == (torch.float64 if dist.dtype == torch.float64 else torch.float32)
    assert_close(boxes, ref.decode_dfl(dist.double(), points, reg_max=reg_max, strides=strides))
    weight = strat.spread([1.0, -0.5, 2.0], boxes.shape)
    grad = gradient_of(lambda d: ty.decode_dfl(d, points, reg_max=reg_max, strides=strides), dist, weight)
    expected = gradient_of(lambda d: ref.decode_dfl(d, points, reg_max=reg_max, strides=strides), dist.double(), weight)
    assert_close(grad, expected, "gradient")
    assert grad.dtype == dist.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [100.0, -100.0, 1e4])
def test_decode_dfl_of_extreme_logits(dtype, value):
    dist = torch.zeros(1, 2, 4, 5, dtype=dtype, device=DEVICE)
    dist[..., 3] = value
    points = torch.zeros(2, 2, device=DEVICE)
    assert_close(ty.decode_dfl(dist.flatten(2), points, reg_max=5), ref.decode_dfl(dist.double().flatten(2), points, reg_max=5))


@given(st.integers(0, 3), st.integers(0, 20), st.integers(0, 6), dtypes, st.data())
def test_decode_yolox(batch_size, num_anchors, extra, dtype, data):
    preds = data.draw(strat.tensors((batch_size, num_anchors, 4 + extra), st.integers(-16, 16).map(lambda i: i / 8)))
    preds = data.draw(strat.layouts(preds.to(dtype)))
    points = strat.spread([0.5, 3.5], (num_anchors, 2))
    strides = strat.spread([8.0, 16.0, 32.0], (num_anchors,))
    boxes = ty.decode_yolox(preds, points, strides)
    assert_close(boxes, ref.decode_yolox(preds.double(), points, strides))
    weight = strat.spread([1.0, -0.5, 2.0], boxes.shape)
    grad = gradient_of(lambda p: ty.decode_yolox(p, points, strides), preds, weight)
    expected = gradient_of(lambda p: ref.decode_yolox(p, points, strides), preds.double(), weight)
    assert_close(grad, expected, "gradient")


@given(st.integers(0, 12), st.sampled_from(KINDS), st.sampled_from([1e-7, 1e-16, 0.5]), dtypes, st.data())
def test_bbox_iou(number, kind, eps, dtype, data):
    a, b = (data.draw(strat.boxes((number,))).to(dtype) for _ in range(2))
    expected = ref.bbox_iou(a.double(), b.double(), kind=kind, eps=eps)
    # Of two empty boxes, nothing is defined but eps.
    assume(bool(((a[:, 2:] > a[:, :2]).all(-1) | (b[:, 2:] > b[:, :2]).all(-1)).all()))
    assert_close(ty.bbox_iou(a, b, kind=kind, eps=eps), expected)
    weight = strat.spread([1.0, -0.5, 2.0], (number,))
    for x, y in ((a, b), (b, a)):
        is_box = (x[:, 2:] > x[:, :2]).all(-1)  # an empty box has a slope of 1 / eps
        x, y, w = x[is_box], y[is_box], weight[is_box]
        grad = gradient_of(lambda x, y=y: ty.bbox_iou(x, y, kind=kind, eps=eps), x, w)
        expected = gradient_of(lambda x, y=y: ref.bbox_iou(x, y.double(), kind=kind, eps=eps), x.double(), w)
        # Of equal boxes the derivatives of intersection and union, each as large as 1 / side, cancel to what eps leaves.
        is_equal = (x == y).all(-1)
        assert_close(grad[~is_equal], expected[~is_equal], "gradient")
        for one_grad, one_expected, box in zip(grad[is_equal], expected[is_equal], x[is_equal], strict=True):
            steepest = 1 / (box[2:] - box[:2]).min().item()
            assert_close(one_grad, one_expected, "gradient of equal boxes", size_of_terms=steepest)


@given(st.sampled_from(KINDS), st.data())
def test_bbox_iou_is_symmetric_and_bounded(kind, data):
    a, b = (data.draw(strat.boxes((6,))) for _ in range(2))
    iou = ty.bbox_iou(a, b, kind=kind)
    assert_close(iou, ty.bbox_iou(b, a, kind=kind))
    is_box = ((a[:, 2:] > a[:, :2]) & (b[:, 2:] > b[:, :2])).all(-1)
    assert (iou[is_box] <= 1 + 1e-6).all()
    assert (iou[is_box] >= -2).all()
    if kind == "giou":
        assert (iou.abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_giou_of_flat_boxes(dtype):
    # No intersection. Of equal ones the union is the enclosing box; 10 apart it has 81 of its 181 eps.
    a = torch.tensor([[0.0, 0, 40, 0]], dtype=dtype, device=DEVICE)
    b = torch.tensor([[0.0, 0, 40, 0], [50, 0, 90, 0]], dtype=dtype, device=DEVICE)
    assert ty.bbox_iou(a, b, kind="giou").tolist() == pytest.approx([0, -100 / 181], abs=1e-6)


@pytest.mark.parametrize("kind", ["iou", "giou"])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_of_touching_boxes_is_half_of_that_of_an_intersection(kind, axis):
    a = torch.tensor([[0.0, 0, 2, 2]], device=DEVICE, requires_grad=True)
    b = a.detach() + torch.tensor([[2.0, 0], [0, 2]], device=DEVICE)[axis].repeat(2)
    ty.bbox_iou(a, b, kind=kind).sum().backward()
    # A step towards b would share 2 of the union's 8, a step away nothing. Of GIoU the union is the enclosing box, and grows
    # as that less half of what is shared: 1/8 for a side of b's, on either side, and for the others nothing.
    expected = torch.zeros(4, device=DEVICE)
    expected[2 + axis] = 1 / 8 if kind == "iou" else 1 / 8 + (2 - 1) / 8
    assert_close(a.grad[0], expected, "gradient", tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_boxes_overlap_fully_with_no_way_up(kind):
    a = torch.tensor([[0.0, 0, 0.5, 0.5]], device=DEVICE, requires_grad=True)
    iou = ty.bbox_iou(a, a.detach().clone(), kind=kind)
    iou.sum().backward()
    assert_close(iou, torch.ones(1, device=DEVICE))
    assert a.grad.abs().max() < 1e-5


def test_bbox_iou_broadcasts_and_sums_the_gradient():
    a = torch.tensor([[0.0, 0, 4, 4]], device=DEVICE, requires_grad=True)
    b = torch.tensor([[[1.0, 1, 5, 5]], [[2.0, 0, 6, 4]]], device=DEVICE)
    out = ty.bbox_iou(a, b, kind="ciou")
    assert out.shape == (2, 1)
    out.sum().backward()
    expected = gradient_of(lambda x: ref.bbox_iou(x, b.double(), kind="ciou"), a.double(), torch.ones(2, 1))
    assert_close(a.grad, expected, "gradient")


@given(st.integers(0, 12), st.sampled_from([1e-7, 1e-3, 0.5]), st.sampled_from([0.0, 0.01]), dtypes, st.data())
def test_prob_iou(number, eps, floor, dtype, data):
    a, b = (data.draw(strat.oriented_boxes(number)).to(dtype) for _ in range(2))
    expected = ref.prob_iou(a.double(), b.double(), eps=eps, floor=floor)
    assert_close(ty.prob_iou(a, b, eps=eps, floor=floor), expected, size_of_terms=1)  # it is 1 less a distance
    if floor == 0:  # the reference's root of an empty box's determinant has no derivative
        is_box = ((a[:, 2:4] > 0) & (b[:, 2:4] > 0)).all(-1)
        a, b = a[is_box], b[is_box]
    weight = strat.spread([1.0, -0.5, 2.0], (len(a),))
    for x, y in ((a, b), (b, a)):
        grad = gradient_of(lambda x, y=y: ty.prob_iou(x, y, eps=eps, floor=floor), x, weight)
        expected = gradient_of(lambda x, y=y: ref.prob_iou(x, y.double(), eps=eps, floor=floor), x.double(), weight)
        assert_close(grad, expected, "gradient")


@given(st.data())
def test_prob_iou_knows_no_order_no_half_turn_and_no_names_of_sides(data):
    a, b = (data.draw(strat.oriented_boxes(6)) for _ in range(2))
    overlap = ty.prob_iou(a, b, floor=0.01)  # 1 less a distance, which is what is rounded
    assert_close(ty.prob_iou(b, a, floor=0.01), overlap, size_of_terms=1)
    turned = torch.tensor([0, 0, 0, 0, math.pi], device=DEVICE)
    assert_close(ty.prob_iou(a + turned, b, floor=0.01), overlap, size_of_terms=1)
    swapped = a[:, [0, 1, 3, 2, 4]] - turned / 2
    assert_close(ty.prob_iou(swapped, b, floor=0.01), overlap, size_of_terms=1)
    assert ((overlap <= 1) & (overlap > -1e-6)).all()


def test_prob_iou_of_long_boxes_that_nearly_agree():
    """The determinant of the sum over 4 times the root of both is 1 + ((r - 1 / r) sin(turn) / 2)^2 for sides of r to 1."""
    turn = torch.tensor([1e-4, 1e-3, 1e-2, 1.0], device=DEVICE)
    a = torch.tensor([3000.0, 2000, 400, 4, 0], device=DEVICE).repeat(4, 1)
    b = torch.cat([a[:, :4], turn[:, None]], 1)
    excess = ((100 - 0.01) * turn.double().sin() / 2) ** 2
    expected = 1 - torch.sqrt(1 - (1 + excess) ** -0.5 + 1e-7)
    assert_close(ty.prob_iou(a, b), expected)
    # The offset is 0.5 of a variance of 4^2 / 12 twice, over 4.
    b = a + torch.tensor([0, 0.5, 0, 0, 0], device=DEVICE)
    expected = torch.full((4,), 1 - math.sqrt(1 - math.exp(-0.25 * 12 / 16 / 8) + 1e-7))
    assert_close(ty.prob_iou(a, b), expected)


def test_equal_oriented_boxes_overlap_fully_with_no_way_up():
    a = torch.tensor([[0.0, 0, 4, 2, 1], [9, 9, 0.5, 0.5, 0]], device=DEVICE, requires_grad=True)
    overlap = ty.prob_iou(a, a.detach().clone())
    overlap.sum().backward()
    assert_close(overlap, torch.full((2,), 1 - math.sqrt(1 - math.exp(-1e-7) + 1e-7)))
    assert a.grad.abs().sum() == 0


@pytest.mark.parametrize("side", [0.0, 1e-30, 1e8])
def test_prob_iou_of_extreme_sides_has_a_gradient(side):
    a = torch.tensor([1.0, 2, side, 3, 4], device=DEVICE, requires_grad=True)
    overlap = ty.prob_iou(a, torch.tensor([2.0, 2, 2, 2, 0], device=DEVICE))
    overlap.backward()
    assert 0 <= overlap < 0.5
    assert a.grad.isfinite().all()


def test_prob_iou_of_what_is_no_number_is_none():
    a = torch.tensor([1.0, 2, 3, 4, 5], device=DEVICE).repeat(5, 1).fill_diagonal_(math.nan)
    assert ty.prob_iou(a, torch.zeros(5, device=DEVICE)).isnan().all()


def test_prob_iou_broadcasts_and_sums_the_gradient():
    a = torch.tensor([[0.0, 0, 4, 2, 1]], device=DEVICE, requires_grad=True)
    b = torch.tensor([[[1.0, 1, 5, 3, 0]], [[2.0, 0, 6, 4, 2]]], device=DEVICE)
    out = ty.prob_iou(a, b)
    assert out.shape == (2, 1)
    out.sum().backward()
    assert_close(a.grad, gradient_of(lambda x: ref.prob_iou(x, b.double()), a.double(), torch.ones(2, 1)), "gradient")


@given(strat.assigner_cases(), st.sampled_from([0.5, 1.0]), st.sampled_from([1.0, 6.0]), st.sampled_from([0.0, 16.0]))
def test_align_metric(case, alpha, beta, min_box_side):
    options = dict(alpha=alpha, beta=beta, min_box_side=min_box_side)
    args = (case.gt_labels, case.gt_boxes, case.mask)
    metric, overlaps = ty.align_metric(case.scores, case.boxes, case.points, *args, **options)
    wide = case.double()
    expected_metric, expected_overlaps = ref.align_metric(
        wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask, **options
    )
    assert_close(overlaps, expected_overlaps, "overlaps")
    assert_close(metric, expected_metric, "metric")
    assert ((metric > 0) <= (overlaps > 0)).all()


def test_align_metric_scales_with_the_image():
    case = strat.AssignerCase(
        torch.full((1, 2, 1), 0.5), torch.tensor([[[0.0, 0, 6, 6], [2, 2, 12, 12]]]), torch.tensor([[4.0, 4], [8, 8]]),
        torch.ones(2), torch.zeros(1, 1, 1).long(), torch.tensor([[[1.0, 1, 11, 9]]]), torch.ones(1, 1, 1).bool(),
    )  # fmt: skip
    case = strat.AssignerCase(*(x.to(DEVICE) for x in case))
    args = (case.gt_labels, case.gt_boxes, case.mask)
    small = ty.align_metric(case.scores, case.boxes, case.points, *args, alpha=1.0, beta=2.0)
    args = (case.gt_labels, 8 * case.gt_boxes, case.mask)
    large = ty.align_metric(case.scores, 8 * case.boxes, 8 * case.points, *args, alpha=1.0, beta=2.0)
    for a, b in zip(small, large, strict=True):
        assert_close(a, b, tolerance=TOLERANCE[torch.float32])


@given(
    st.integers(0, 3), st.integers(0, 4), st.integers(0, 50), st.integers(1, 60), dtypes,
    st.booleans(), st.data(),
)  # fmt: skip
def test_select_topk_candidates(batch_size, num_gt, num_anchors, topk, dtype, has_mask, data):
    values = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 1e-6])
    metric = data.draw(strat.tensors((batch_size, num_gt, num_anchors), values, jitters=(0.0,))).to(dtype)
    mask = strat.spread([1.0, 0.0, 1.0], (batch_size, num_gt, 1)) > 0 if has_mask else None
    selected = ty.select_topk_candidates(metric, topk, mask)
    assert selected.dtype == torch.bool
    assert torch.equal(selected, ref.select_topk_candidates(metric, topk, mask))


@given(st.integers(1, 30), st.data())
def test_topk_of_distinct_values_commutes_with_a_permutation(topk, data):
    metric = data.draw(strat.tensors((2, 3, 40), st.integers(0, 8).map(float), jitters=(0.25,)))
    assume(is_decided(metric.flatten(0, 1), topk))
    order = data.draw(st.permutations(range(40)))
    permuted = ty.select_topk_candidates(metric[..., order], topk)
    assert torch.equal(permuted, ty.select_topk_candidates(metric, topk)[..., order])


@pytest.mark.parametrize("bad", [torch.nan, -1.0, -0.0, -torch.inf])
def test_topk_never_marks_what_is_not_above_zero(bad):
    metric = torch.tensor([[[bad, 0.5, bad, 0.25, 0.0]]], device=DEVICE)
    assert ty.select_topk_candidates(metric, 5).tolist() == [[[False, True, False, True, False]]]


@example(0.0)
@example(float("nan"))
@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_prediction_that_is_no_number_leaves_the_other_anchors_alone(value):
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 7, 8]]], device=DEVICE)
    points = torch.tensor([[2.0, 2], [4, 4], [6, 6]], device=DEVICE)
    gt, labels = torch.tensor([[[0.0, 0, 8, 8]]], device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE).long()
    mask = torch.ones(1, 1, 1, device=DEVICE).bool()
    scores = torch.full((1, 3, 1), 0.5, device=DEVICE)
    clean, _ = ty.align_metric(scores, boxes, points, labels, gt, mask, alpha=1.0, beta=6.0)
    boxes[0, 1] = value
    metric, _ = ty.align_metric(scores, boxes, points, labels, gt, mask, alpha=1.0, beta=6.0)
    assert metric[0, 0, 1] == 0
    assert torch.equal(metric[0, 0, [0, 2]], clean[0, 0, [0, 2]])
