"""Both assigners against the reference: exactly, wherever more than rounding decides."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import reference as ref
import triton_yolo as ty
from tests import strategies as strat
from tests.compare import assert_close, is_assignment_decided, is_decided
from tests.conftest import DEVICE, INTERPRETED

task_aligned_options = st.fixed_dictionaries(
    {
        "topk": st.sampled_from([1, 2, 5, 13, 500]),
        "topk2": st.sampled_from([None, 1, 3]),
        "alpha": st.sampled_from([0.5, 1.0]),
        "beta": st.sampled_from([0.0, 1.0, 6.0]),
        "min_box_side": st.sampled_from([0.0, 16.0]),
    }
)


def assign(case, **options):
    assigner = ty.TaskAlignedAssigner(num_classes=case.scores.shape[-1], **options)
    return assigner(case.scores, case.boxes, case.points, case.gt_labels, case.gt_boxes, case.mask)


@given(strat.assigner_cases(), task_aligned_options)
def test_task_aligned_assigner(case, options):
    wide = case.double()
    metric_options = {name: options[name] for name in ("alpha", "beta", "min_box_side")}
    metric, overlaps = ref.align_metric(
        wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask, **metric_options
    )
    assume(is_assignment_decided(metric, overlaps, options["topk"], options["topk2"]))
    expected = ref.task_aligned_assign(
        wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask, **options
    )
    result = assign(case, **options)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)
    assert torch.equal(result.target_labels, expected.target_labels)
    assert torch.equal(result.target_bboxes, expected.target_bboxes.float())
    assert_close(result.target_scores, expected.target_scores, "target scores")


def test_contested_anchor_goes_to_the_best_candidate_although_it_claimed_another():
    """Two boxes that hold the first point alone claim it. The third overlaps more there, but it claims the second point."""
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0]], device=DEVICE)
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 9], [0, 0, 16, 8]]], device=DEVICE)
    predicted = boxes[:, 2:].expand(1, 2, 4)
    scores = torch.tensor([[[0.5], [0.9]]], device=DEVICE)
    labels, mask = torch.zeros(1, 3, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, 3, 1, device=DEVICE)
    result = ty.TaskAlignedAssigner(topk=1, num_classes=1)(scores, predicted, points, labels, boxes, mask)
    assert result.fg_mask.tolist() == [[True, True]]
    assert result.target_gt_idx.tolist() == [[2, 2]]


@given(strat.assigner_cases(), st.sampled_from([2, 13]))
def test_task_aligned_assigner_takes_arbitrary_points(case, topk):
    order = torch.arange(len(case.points), device=DEVICE).flip(0)
    shuffled = case._replace(scores=case.scores[:, order], boxes=case.boxes[:, order], points=case.points[order] + 0.25)
    wide = shuffled.double()
    args = (wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask)
    metric, overlaps = ref.align_metric(*args, alpha=1.0, beta=6.0)
    assume(is_assignment_decided(metric, overlaps, topk, None))
    expected = ref.task_aligned_assign(*args, topk=topk)
    result = assign(shuffled, topk=topk)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)


ORIENTED = ref.ORIENTED


def oriented(case: strat.AssignerCase, angles: torch.Tensor, pred_angles: torch.Tensor) -> strat.AssignerCase:
    """The same boxes by centre, sides and these angles (G,) and (A,)."""

    def turned(boxes, angle):
        return torch.cat([ref.xyxy_to_xywh(boxes), angle.to(boxes)[:, None].expand(*boxes.shape[:2], 1)], 2)

    return case._replace(boxes=turned(case.boxes, pred_angles), gt_boxes=turned(case.gt_boxes, angles))


@st.composite
def oriented_cases(draw):
    case = draw(strat.assigner_cases())
    angles = (draw(strat.tensors(x.shape[1:2], jitters=(0.0,))) for x in (case.gt_boxes, case.boxes))
    return oriented(case, *angles)


def are_candidates_decided(case: strat.AssignerCase, min_box_side: float) -> bool:
    """Whether no anchor lies on an edge but for rounding: those of boxes at angle 0 are exact."""
    boxes = torch.cat([case.gt_boxes[..., :2], case.gt_boxes[..., 2:4].clamp(min=min_box_side), case.gt_boxes[..., 4:]], -1)
    sides = ref.oriented.sides_from(case.points, boxes[:, :, None].double())
    return not bool(((sides.abs() < 1e-4) & (boxes[:, :, None, 4:] != 0)).any())


@given(oriented_cases(), task_aligned_options)
def test_rotated_task_aligned_assigner(case, options):
    wide = case.double()
    args = (wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask)
    metric_options = {name: options[name] for name in ("alpha", "beta", "min_box_side")}
    metric, overlaps = ref.align_metric(*args, **metric_options, geometry=ORIENTED)
    assume(are_candidates_decided(case, options["min_box_side"]))
    assume(is_assignment_decided(metric, overlaps, options["topk"], options["topk2"]))
    expected = ref.task_aligned_assign(*args, **options, geometry=ORIENTED)
    assigner = ty.RotatedTaskAlignedAssigner(num_classes=case.scores.shape[-1], **options)
    result = assigner(case.scores, case.boxes, case.points, case.gt_labels, case.gt_boxes, case.mask)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)
    assert torch.equal(result.target_labels, expected.target_labels)
    assert torch.equal(result.target_bboxes, expected.target_bboxes.float())
    assert_close(result.target_scores, expected.target_scores, "target scores")


def crossed(*angles, dtype=torch.float32):
    """Nine points in a square, and long boxes through the one in the middle; every prediction is the first of them."""
    points = torch.tensor([[x, y] for y in (4.0, 12, 20) for x in (4.0, 12, 20)], dtype=dtype, device=DEVICE)
    gt = torch.tensor([[[12, 12, 26, 4, angle] for angle in angles]], dtype=dtype, device=DEVICE)
    scores = torch.full((1, 9, 2), 0.5, dtype=dtype, device=DEVICE)
    labels, mask = torch.zeros(1, len(angles), device=DEVICE), torch.ones(1, len(angles), device=DEVICE)
    return scores, gt[:, :1].expand(-1, 9, -1), points, labels, gt, mask


def test_oriented_boxes_have_the_points_on_their_diagonals():
    assigner = ty.RotatedTaskAlignedAssigner(num_classes=2, beta=1.0)
    falling = assigner(*crossed(math.pi / 4))
    assert falling.fg_mask.view(3, 3).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    # What the prediction crosses, sides of 26 and 4: the coefficient is 4 * 26 * 4 / (26^2 + 4^2) under a root, twice.
    both = assigner(*crossed(math.pi / 4, -math.pi / 4))
    assert both.fg_mask.view(3, 3).int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert both.target_gt_idx.view(3, 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert both.target_bboxes[0, 2].tolist() == pytest.approx([12, 12, 26, 4, -math.pi / 4])
    crossing = 1 - math.sqrt(1 - 2 * 26 * 4 / (26**2 + 4**2))
    assert both.target_scores[0, [0, 2], 0].tolist() == pytest.approx([1 - math.sqrt(2e-7), crossing], abs=1e-6)


def test_points_on_the_edge_of_an_oriented_box_are_candidates():
    # Upright and 16 px wide, its edges run through the outer points; 15 px wide it has but the middle, widened all again.
    scores, pred, points, labels, gt, mask = crossed(0.0)
    gt[..., 2:4] = 16
    assert ty.RotatedTaskAlignedAssigner(num_classes=2)(scores, pred, points, labels, gt, mask).fg_mask.all()
    gt[..., 2:4] = 15
    assert ty.RotatedTaskAlignedAssigner(num_classes=2)(scores, pred, points, labels, gt, mask).fg_mask.sum() == 1
    assert ty.RotatedTaskAlignedAssigner(num_classes=2, min_box_side=16)(scores, pred, points, labels, gt, mask).fg_mask.all()


@pytest.mark.parametrize("by", ["package", "reference"])
def test_points_beside_an_oriented_box_are_no_candidates_where_overlaps_do_not_count(by):
    # No box overlaps its predictions. The top right point lies beside the first box, in the rectangle around it.
    scores, pred, points, labels, gt, mask = crossed(math.pi / 4, -math.pi / 4, -math.pi / 4)
    pred = pred + torch.tensor([1e4, 0, 0, 0, 0], device=DEVICE)
    args = scores, pred, points, labels, gt, mask
    result = (
        ty.RotatedTaskAlignedAssigner(num_classes=2, beta=0.0)(*args)
        if by == "package"
        else ref.task_aligned_assign(*args, beta=0.0, geometry=ORIENTED)
    )
    assert result.fg_mask.view(3, 3).int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert result.target_gt_idx.view(3, 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(("place", "value"), [(2, 0.0), (3, -1.0), (4, math.nan), (4, math.inf), (0, math.nan), (2, math.inf)])
def test_oriented_boxes_that_are_none_are_ignored(place, value):
    args = crossed(math.pi / 4, -math.pi / 4)
    args[4][0, 1, place] = value
    result = ty.RotatedTaskAlignedAssigner(num_classes=2, min_box_side=16)(*args)
    alone = ty.RotatedTaskAlignedAssigner(num_classes=2, min_box_side=16)(*crossed(math.pi / 4))
    for have, want in zip(result, alone, strict=True):
        assert torch.equal(have, want)


@given(strat.assigner_cases())
def test_images_are_independent_of_each_other(case):
    whole = assign(case)
    for image in range(len(case.scores)):
        alone = assign(
            case._replace(
                scores=case.scores[image : image + 1], boxes=case.boxes[image : image + 1], mask=case.mask[image : image + 1],
                gt_boxes=case.gt_boxes[image : image + 1], gt_labels=case.gt_labels[image : image + 1],
            )
        )  # fmt: skip
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[image])


@given(strat.assigner_cases(), st.integers(1, 3))
def test_padding_changes_nothing(case, more):
    def pad(x, value):
        return torch.cat([x, torch.full_like(x[:, :1].expand(-1, more, -1), value)], 1) if x.shape[1] else x

    padded = case._replace(gt_boxes=pad(case.gt_boxes, 7.0), gt_labels=pad(case.gt_labels, 99), mask=pad(case.mask, False))
    for a, b in zip(assign(case), assign(padded), strict=True):
        assert torch.equal(a, b)


@given(strat.assigner_cases(), st.integers(1, 3).map(lambda i: 2.0**i))
def test_assignment_does_not_depend_on_the_scale(case, scale):
    # Boxes far larger than eps: the overlap's eps is what does not scale.
    assume(bool(((case.gt_boxes[..., 2:] - case.gt_boxes[..., :2]) > 1).all()))
    wide = case.double()
    args = (wide.scores, wide.boxes, wide.points, wide.gt_labels, wide.gt_boxes, wide.mask)
    metric, overlaps = ref.align_metric(*args, alpha=1.0, beta=6.0)
    assume(is_assignment_decided(metric, overlaps, 13, None))
    scaled = case._replace(boxes=scale * case.boxes, points=scale * case.points, gt_boxes=scale * case.gt_boxes)
    a, b = assign(case), assign(scaled)
    assert torch.equal(a.target_gt_idx, b.target_gt_idx)
    assert torch.equal(a.fg_mask, b.fg_mask)


def is_simota_decided(case, result_args, options) -> bool:
    """Whether float64 costs and sums decide by more than what float32 resolves, a sixteenth at a million included."""
    cls_logits, obj_logits, boxes, points, strides, labels, gt, mask = result_args
    is_gt = mask.reshape(gt.shape[:2]) & ref.targets.is_box(gt)
    centres = ref.xyxy_to_xywh(gt)[..., :2]
    takes_part, feasible = ref.simota.find_regions(
        points, strides, gt, centres, is_gt, options["candidates"], options["center_radius"]
    )
    for image in range(len(gt)):
        anchors, slots = takes_part[image].nonzero().flatten(), is_gt[image].nonzero().flatten()
        if len(anchors) == 0:
            continue
        ious = ref.bbox_iou(gt[image, slots][:, None], boxes[image, anchors], eps=0.0).nan_to_num(nan=0.0)
        total = ious.topk(min(10, ious.shape[1]), dim=1).values.sum(1)
        is_dyadic = (ious * 64 == (ious * 64).round()).all(1)
        near_integer = (total - total.round()).abs() < 1e-4
        if (near_integer & ~is_dyadic & (total > 0.5)).any():
            return False
        cost = ref.simota.classification_cost(
            cls_logits[image, anchors], obj_logits[image, anchors], labels.reshape(len(gt), -1)[image, slots]
        )
        cost = cost - 3 * torch.log(ious + 1e-8)
        cost = torch.where(feasible[image][slots][:, anchors], cost, cost + 1e6)
        k = ref.simota.dynamic_k(ious)
        if not is_decided(-cost, k, rtol=2e-7, atol=1e-3) or not is_decided(-cost.T, 1, rtol=2e-7, atol=1e-3):
            return False
    return True


def test_simota_without_anchors():
    empty = [torch.zeros(2, 0, *shape, device=DEVICE) for shape in ((3,), (), (4,))]
    points, strides = torch.zeros(0, 2, device=DEVICE), torch.zeros(0, device=DEVICE)
    gt = torch.zeros(2, 1, 1, device=DEVICE).long(), torch.ones(2, 1, 4, device=DEVICE), torch.ones(2, 1, 1, device=DEVICE)
    result = ty.SimOTAAssigner(3)(*empty, points, strides, *gt)
    assert result.fg_mask.shape == result.matched_iou.shape == (2, 0)


def test_a_tie_is_decided_unless_something_is_within_rounding_of_it():
    close = torch.tensor([[1.0, 1.0, 1.0 - 1e-9]], dtype=torch.float64)
    assert is_decided(close.round(), 1)
    assert not is_decided(close, 1)
    assert not is_decided(close, 2)
    assert is_decided(close, 3)
    assert is_decided(torch.tensor([[1.0, 1.0 - 1e-9, 0.5]], dtype=torch.float64), 2)


simota_options = st.sampled_from(
    [
        {"candidates": "center", "center_radius": 1.5},
        {"candidates": "center", "center_radius": 0.5},
        {"candidates": "box_and_center", "center_radius": 2.5},
    ]
)


@given(strat.assigner_cases(), simota_options, st.data())
def test_simota_assigner(case, options, data):
    shape = case.scores.shape
    cls_logits, obj_logits = data.draw(strat.tensors(shape)), data.draw(strat.tensors(shape[:2]))
    args = (
        cls_logits, obj_logits, case.boxes, case.points, case.strides, case.gt_labels, case.gt_boxes, case.mask
    )  # fmt: skip
    wide = [x.double() if x.is_floating_point() else x for x in args]
    assume(is_simota_decided(case, wide, options))
    expected = ref.simota_assign(*wide, **options)
    result = ty.SimOTAAssigner(num_classes=shape[-1], **options)(*args)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)
    assert_close(result.matched_iou, expected.matched_iou, "matched IoU")
    assert result.num_fg == expected.num_fg


def test_simota_ties_between_infeasible_anchors_follow_float32():
    # One box takes part in nothing but another's region, where all its costs round to the same sixteenth.
    points = torch.tensor([[36.0, 4.0], [44.0, 4.0], [52.0, 4.0]], device=DEVICE)
    strides = torch.full((3,), 8.0, device=DEVICE)
    gt = torch.tensor([[[0.0, 0, 8, 8], [40.0, 0, 48, 8]]], device=DEVICE)
    pred = torch.tensor([[[40.0, 0, 48, 8], [40.0, 0, 47, 8], [0.0, 0, 8, 8]]], device=DEVICE)
    cls = torch.tensor([[[0.01], [0.0], [-9.0]]], device=DEVICE)
    labels, mask = torch.zeros(1, 2, device=DEVICE).long(), torch.ones(1, 2, device=DEVICE).bool()
    args = (cls, torch.zeros(1, 3, device=DEVICE), pred, points, strides, labels, gt, mask)
    expected, result = ref.simota_assign(*args), ty.SimOTAAssigner(num_classes=1)(*args)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)


@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 4))  # minutes there
@pytest.mark.parametrize(
    ("candidates", "center_radius"), [("center", 0.6), ("box_and_center", 1.5), *([] if INTERPRETED else [("center", 1.5)])]
)
@pytest.mark.parametrize(
    ("num_classes", "num_certain"),
    [
        pytest.param(3, (0, 0), id="few feasible anchors"),
        pytest.param(10000, (4997, 5003), id="feasible costs about half a million"),
        pytest.param(20000, (0, 20000), id="feasible costs of up to two millions"),
    ],
)
@pytest.mark.parametrize("share_of_nan", [0.3] if INTERPRETED else [0.0, 0.3])
def test_simota_where_infeasible_anchors_may_win(seed, candidates, center_radius, num_classes, num_certain, share_of_nan):
    torch.manual_seed(seed)
    points, strides = ty.make_anchors([(5, 5), (2, 2)], (8, 16), dtype=torch.float64)
    points, num_anchors = points * strides[:, None], len(points)
    low = 40 * torch.rand(1, 12, 2, dtype=torch.float64)
    gt = torch.cat([low, low + 6 + 14 * torch.rand_like(low)], -1)
    # Predictions overlap boxes far away too, so that rows take several anchors.
    pred = gt[:, torch.randint(0, 4, (num_anchors,))] + torch.rand(1, num_anchors, 4, dtype=torch.float64)
    number = torch.randint(num_certain[0], num_certain[1] + 1, (1, num_anchors, 1))
    is_certain = torch.rand(1, num_anchors, num_classes).argsort(-1).argsort(-1) < number
    is_nan = torch.rand(1, num_anchors) < share_of_nan
    cls = torch.randn(1, num_anchors, num_classes, dtype=torch.float64).where(torch.tensor(num_classes < 5), -100)
    cls = cls.masked_fill(is_certain, 100).masked_fill(is_nan[..., None], torch.nan)
    obj = torch.full((1, num_anchors), 100.0, dtype=torch.float64)
    labels, mask = torch.randint(0, num_classes, (1, 12)), torch.ones(1, 12).bool()
    args = tuple(x.to(DEVICE) for x in (cls, obj, pred, points, strides, labels, gt, mask))
    options = {"candidates": candidates, "center_radius": center_radius}
    expected, result = ref.simota_assign(*args, **options), ty.SimOTAAssigner(num_classes, **options)(*args)
    assert torch.equal(result.fg_mask, expected.fg_mask)
    assert torch.equal(result.target_gt_idx, expected.target_gt_idx)
    assert expected.num_fg > 3


def test_crowded_image_is_cut_into_blocks_without_a_trace(monkeypatch):
    torch.manual_seed(0)
    from triton_yolo.eager import simota

    points, strides = ty.make_anchors([(8, 8), (4, 4)], (8, 16), device=DEVICE)
    points = points * strides[:, None]
    low = torch.randint(0, 48, (2, 20, 2), device=DEVICE).float()
    # Every box is there twice, so every conflict is tied, often between blocks.
    gt = torch.cat([low, low + torch.randint(4, 32, (2, 20, 2), device=DEVICE)], -1).repeat(1, 2, 1)
    pred = torch.cat([points - 9, points + 7], -1).expand(2, -1, -1)
    args = (
        torch.zeros(2, 80, 3, device=DEVICE), torch.zeros(2, 80, device=DEVICE), pred, points, strides,
        torch.randint(0, 3, (2, 20), device=DEVICE).repeat(1, 2), gt, torch.ones(2, 40, device=DEVICE).bool(),
    )  # fmt: skip
    assigner = ty.SimOTAAssigner(num_classes=3)
    whole = assigner(*args)
    monkeypatch.setattr(simota, "_BLOCK", 300)
    for a, b in zip(whole, assigner(*args), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole, ref.simota_assign(*args), strict=True):
        assert_close(a.float(), b.float())


def assigner_args():
    """Scores, objectness, boxes, points, strides and ground truth, in float32."""
    points, strides = ty.make_anchors([(4, 4), (2, 2)], (8, 16), device=DEVICE, dtype=torch.float32)
    points = points * strides[:, None]
    boxes = torch.cat([points - 7, points + 9], -1).repeat(2, 1, 1)
    scores = strat.spread([0.25, 0.5, 0.125, 0.75], (2, 20, 3), jitter=0.125)
    gt = torch.tensor([[[2.0, 2, 20, 20], [8, 8, 30, 24]], [[0.0, 0, 9, 9], [12, 3, 30, 31]]], device=DEVICE)
    labels, mask = torch.tensor([[0, 2], [1, 0]], device=DEVICE), torch.ones(2, 2, dtype=torch.bool, device=DEVICE)
    return scores, scores[..., 0], boxes, points, strides, labels, gt, mask


def both_assignments(scores, objectness, boxes, points, strides, labels, gt, mask):
    task_aligned = ty.TaskAlignedAssigner(num_classes=3, topk=3)(scores, boxes, points, labels, gt, mask)
    args = (scores, objectness, boxes, points, strides, labels, gt, mask)
    return *task_aligned, *ty.SimOTAAssigner(3)(*args), *ty.SimOTAAssigner(3, 2.5, "box_and_center")(*args)


@pytest.mark.parametrize("wide", range(5))
def test_inputs_of_two_types_are_computed_in_the_wider(wide):
    args = assigner_args()
    which = (0, 1, 2, 3, 6)[wide]
    have = both_assignments(*(x.double() if i == which else x for i, x in enumerate(args)))
    want = both_assignments(*(x.double() if x.is_floating_point() else x for x in args))
    # The objectness is no input of the first.
    for a, b in list(zip(have, want, strict=True))[5 if which == 1 else 0 :]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_logarithm_of_a_probability_of_nothing_costs_a_hundred():
    """Both anchors have a probability of 0; its logarithm counts -100, so that the overlap still makes a difference."""
    points, strides = torch.tensor([[4.0, 4.0], [12.0, 4.0]], device=DEVICE), torch.full((2,), 8.0, device=DEVICE)
    gt = torch.tensor([[[0.0, 0.0, 16.0, 8.0]]], device=DEVICE)
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 8.0], [0.0, 0.0, 8.0, 8.0]]], device=DEVICE)  # IoU 1/4 and 1/2: k is 1
    logits, objectness = torch.full((1, 2, 1), -400.0, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    padded = (torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE), gt, torch.ones(1, 1, 1, dtype=torch.bool, device=DEVICE))
    matched = ty.SimOTAAssigner(1)(logits, objectness, boxes, points, strides, *padded)
    assert matched.fg_mask.tolist() == [[False, True]]
