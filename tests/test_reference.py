"""The reference against numbers worked out by hand."""

import math

import pytest
import torch

import reference as ref


def box(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_anchors_are_cell_centres_row_major_level_after_level():
    points, strides = ref.make_anchors([(2, 3), (1, 1)], (8, 16))
    assert points.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5]]
    assert strides.tolist() == [8] * 6 + [16]


# Two 2x2 boxes shifted by (1, 1): intersection 1, union 7, enclosing box 3x3, centres 2 apart squared.
@pytest.mark.parametrize(
    ("kind", "expected"), [("iou", 1 / 7), ("giou", 1 / 7 - 2 / 9), ("diou", 1 / 7 - 2 / 18), ("ciou", 1 / 7 - 2 / 18)]
)
def test_iou_family_of_shifted_squares(kind, expected):
    assert ref.bbox_iou(box(0, 0, 2, 2), box(1, 1, 3, 3), kind=kind, eps=0) == pytest.approx(expected, rel=1e-12)


def test_ciou_penalises_the_aspect_ratio():
    # 2x1 in 1x2 at one corner: intersection 1, union 3, diagonal 8, centres (1, .5) and (.5, 1).
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    expected = 1 / 3 - 0.5 / 8 - v * v / (1 - 1 / 3 + v)
    assert ref.bbox_iou(box(0, 0, 2, 1), box(0, 0, 1, 2), kind="ciou", eps=0) == pytest.approx(expected, rel=1e-12)


def test_eps_is_added_to_heights_union_and_enclosing_measure():
    # With eps = 1: w, h = 2, 3 each, intersection 4 (of true sides), union 6 + 6 - 4 + 1 = 9.
    a = b = box(0, 0, 2, 2)
    assert ref.bbox_iou(a, b, eps=1) == pytest.approx(4 / 9)
    # Enclosing area 2 * (2 + 2) + 1 = 9: the height has the eps of both boxes, so that it is the union of equal boxes.
    assert ref.bbox_iou(a, b, kind="giou", eps=1) == pytest.approx(4 / 9)
    # The enclosing box of 3 x 2: 3 * (2 + 2) + 1 = 13; intersection 2, union 6 + 6 - 2 + 1 = 11.
    assert ref.bbox_iou(a, box(1, 0, 3, 2), kind="giou", eps=1) == pytest.approx(2 / 11 - 2 / 13)
    # Squared diagonal 4 + 4 + 1, and centres 1 apart: intersection 2, union 10 + ... = 6 + 6 - 2 + 1.
    assert ref.bbox_iou(a, box(1, 0, 3, 2), kind="diou", eps=1) == pytest.approx(2 / 11 - 1 / (9 + 4 + 1))
    # The angle uses the height with eps: atan(2/3) and atan(2/5); the weight's denominator has eps too.
    v = 4 / math.pi**2 * (math.atan(2 / 5) - math.atan(2 / 3)) ** 2
    iou = 4 / (6 + 10 - 4 + 1)
    expected = iou - 1 / (4 + 16 + 1) - v * v / (1 - iou + v + 1)
    assert ref.bbox_iou(a, box(0, 0, 2, 4), kind="ciou", eps=1) == pytest.approx(expected)


def test_giou_of_flat_boxes():
    # No intersection. Of equal ones 40 wide and 0 high, union and enclosing area are both 2 * 40 * eps + eps.
    flat = box(0, 0, 40, 0)
    assert ref.bbox_iou(flat, flat, kind="giou", eps=1e-7) == pytest.approx(0, abs=1e-12)
    # 10 apart, the enclosing box is 90 wide: the union has 81 of its 181 eps.
    assert ref.bbox_iou(flat, box(50, 0, 90, 0), kind="giou", eps=1e-7) == pytest.approx(-100 / 181)


def test_gradient_of_touching_boxes_is_half_of_that_of_an_intersection():
    # Two 2 x 2 boxes side by side: a step to the right would share 2 of the union's 8, a step to the left nothing.
    a = box(0, 0, 2, 2).requires_grad_()
    (grad,) = torch.autograd.grad(ref.bbox_iou(a, box(2, 0, 4, 2), kind="iou", eps=0), a)
    assert grad.tolist() == [0, 0, 1 / 8, 0]


def test_ciou_weight_is_a_constant_for_the_gradient():
    a = box(0, 0, 2, 1).requires_grad_()
    b = box(0, 0, 1, 2)
    (grad,) = torch.autograd.grad(ref.bbox_iou(a, b, kind="ciou", eps=0), a)
    delta = math.atan(0.5) - math.atan(2)
    v = 4 / math.pi**2 * delta**2
    weight = v / (1 - 1 / 3 + v)
    # d/dx2: IoU 1/3 with union 3 -> -1/9 (the intersection is bounded by b); enclosing 2x2: c2 = 8, rho2 = 1/2;
    # d rho2 = (1 - 0.5) * ... = 2 * 0.5 / 2; d c2 = 2 * 2; angle of a: h / (w^2 + h^2) = 1/5.
    expected = -1 / 9 - (0.5 / 8 - 0.5 * 4 / 64) + weight * 8 / math.pi**2 * delta / 5
    assert grad[2] == pytest.approx(expected, rel=1e-9)


def test_decoding_is_the_expected_bin():
    points = torch.tensor([[1.5, 2.5]])
    logits = torch.zeros(1, 1, 16)  # uniform over 4 bins: 1.5 cells
    assert ref.decode_dfl(logits, points, reg_max=4).tolist() == [[[0.0, 1.0, 3.0, 4.0]]]
    assert ref.decode_dfl(logits, points, reg_max=4, strides=torch.tensor([8.0])).tolist() == [[[0.0, 8.0, 24.0, 32.0]]]
    # log 3 on bin 1 of 2: probability 3/4.
    left = torch.tensor([[[0.0, math.log(3), 0, 0, 0, 0, 0, 0]]])
    assert ref.decode_dfl(left, points, reg_max=2)[0, 0].tolist() == pytest.approx([0.75, 2.0, 2.0, 3.0])
    # One bin: the value itself, also a negative one.
    plain = torch.tensor([[[1.0, -1.0, 2.0, 0.0]]])
    assert ref.decode_dfl(plain, points, reg_max=1)[0, 0].tolist() == [0.5, 3.5, 3.5, 2.5]


def test_dfl_interpolates_between_two_bins():
    # Distances 1.25, 0, -3 (clamped to 0) and 9 (clamped to 2.99 of 4 bins); -log softmax is log 4 less the logit's share.
    logits = torch.zeros(1, 4, 4, dtype=torch.float64)
    distances = torch.tensor([[1.25, 0.0, -3.0, 9.0]], dtype=torch.float64)
    assert ref.dfl_loss(logits, distances).tolist() == pytest.approx([math.log(4)])
    logits[0, 3, 3] = math.log(2)  # probabilities 1/5, 1/5, 1/5, 2/5: 0.01 * log 5 + 0.99 * log 2.5
    expected = (3 * math.log(4) + 0.01 * math.log(5) + 0.99 * math.log(2.5)) / 4
    assert ref.dfl_loss(logits, distances).tolist() == pytest.approx([expected])
    logits = torch.zeros(1, 4, 4, dtype=torch.float64)
    logits[0, 0, 2] = math.log(2)  # 0.75 * log 5 + 0.25 * log 2.5
    expected = (3 * math.log(4) + 0.75 * math.log(5) + 0.25 * math.log(2.5)) / 4
    assert ref.dfl_loss(logits, distances).tolist() == pytest.approx([expected])


def test_candidates_lie_strictly_inside():
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0]])
    boxes = torch.tensor([[[4.0, 0.0, 12.5, 8.0], [0.0, 3.0, 3.0, 5.0]]])
    found = ref.task_aligned.find_candidates(points, boxes, torch.ones(1, 2))
    assert found.tolist() == [[[False, True, False], [False, False, False]]]
    # The second box, 3 wide about 1.5, is widened to 6 in both directions: -1.5 to 4.5, 1 to 7.
    found = ref.task_aligned.find_candidates(points, boxes, torch.ones(1, 2), min_box_side=6.0)
    assert found.tolist() == [[[False, True, False], [True, False, False]]]


def test_metric_is_score_and_overlap_in_powers():
    # The first prediction is the box itself (overlap 1), the second half of it (IoU 1/2, centre 2 px off, diagonal 80).
    pred = torch.tensor([[[0.0, 0, 8, 4], [0, 0, 4, 4], [0, 0, 8, 4]]], dtype=torch.float64)
    gt = torch.tensor([[[0.0, 0, 8, 4]]], dtype=torch.float64)
    points = torch.tensor([[4.0, 2.0], [2.0, 2.0], [9.0, 2.0]], dtype=torch.float64)
    scores = torch.tensor([[[0.1, 0.25], [0.2, 0.81], [0.0, 1.0]]], dtype=torch.float64)
    args = (scores, pred, points, torch.tensor([[[1]]]), gt, torch.tensor([[[True]]]))
    metric, overlaps = ref.align_metric(*args, alpha=0.5, beta=2.0)
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2
    second = 0.5 - 4 / 80 - v * v / (0.5 + v)
    assert overlaps[0, 0].tolist() == pytest.approx([1.0, second, 0.0], abs=1e-6)
    assert metric[0, 0].tolist() == pytest.approx([0.5, 0.9 * second**2, 0.0], abs=1e-6)
    metric, overlaps = ref.align_metric(*args[:5], torch.tensor([[[False]]]), alpha=0.5, beta=2.0)
    assert metric.abs().sum() == overlaps.abs().sum() == 0


def test_topk_prefers_the_lower_anchor_and_leaves_zeros():
    metric = torch.tensor([[[0.5, 0.7, 0.5, 0.5], [0.0, 0.2, 0.0, 0.0]]])
    assert ref.select_topk_candidates(metric, 2).int().tolist() == [[[1, 1, 0, 0], [0, 1, 0, 0]]]
    assert ref.select_topk_candidates(metric, 3).int().tolist() == [[[1, 1, 1, 0], [0, 1, 0, 0]]]
    assert ref.select_topk_candidates(metric, 9).int().tolist() == [[[1, 1, 1, 1], [0, 1, 0, 0]]]
    masked = ref.select_topk_candidates(metric, 2, torch.tensor([[[False], [True]]]))
    assert masked.int().tolist() == [[[0, 0, 0, 0], [0, 1, 0, 0]]]


def test_contested_anchor_goes_to_the_highest_overlap_of_all():
    claims = torch.tensor([[[1, 1, 1], [1, 1, 0], [0, 0, 0]]]).bool()
    overlaps = torch.tensor([[[0.3, 0.6, 0.2], [0.5, 0.6, 0.9], [0.7, 0.1, 0.0]]])
    # Anchor 0: slot 2, which did not claim it. Anchor 1: a tie, the lower slot. Anchor 2: not contested.
    candidates = torch.ones_like(claims)
    left = ref.task_aligned.resolve_conflicts(claims, overlaps, candidates)
    assert left.int().tolist() == [[[0, 1, 1], [0, 0, 0], [1, 0, 0]]]
    # Claimed with overlap 0, as happens with beta = 0: slot 0, the lowest of the equal ones, is no candidate.
    claims, candidates = (torch.tensor([[[0], [1], [1]]]).bool() for _ in range(2))
    left = ref.task_aligned.resolve_conflicts(claims, torch.zeros(1, 3, 1), candidates)
    assert left.int().tolist() == [[[0], [1], [0]]]


def test_target_score_scales_the_metric_to_the_best_overlap():
    positives = torch.tensor([[[True, True, False]]])
    metric, overlaps = torch.tensor([[[0.2, 0.1, 0.9]]]), torch.tensor([[[0.6, 0.8, 0.9]]])
    scores = ref.task_aligned.normalised_scores(positives, metric, overlaps)
    assert scores[0, 0].tolist() == pytest.approx([0.8, 0.4, 0.0])


def assign_one_row(**options):
    """Four anchors in a row, two boxes; predictions equal the boxes of their anchors' halves."""
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0]])
    gt = torch.tensor([[[0.0, 0.0, 32.0, 8.0], [16.0, 0.0, 32.0, 8.0]]])
    pred = torch.tensor([[[0.0, 0, 32, 8], [0, 0, 32, 8], [16, 0, 32, 8], [16, 0, 32, 8]]])
    scores = torch.tensor([[[0.5], [0.25], [0.5], [0.25]]])
    labels, mask = torch.zeros(1, 2, 1, dtype=torch.long), torch.ones(1, 2, 1, dtype=torch.bool)
    return ref.task_aligned_assign(scores, pred, points, labels, gt, mask, alpha=1.0, beta=1.0, **options)


def test_assignment_of_two_overlapping_boxes():
    result = assign_one_row(topk=4)
    # Box 0 claims all four, box 1 claims anchors 2 and 3 and keeps them, as it overlaps them fully.
    assert result.target_gt_idx.tolist() == [[0, 0, 1, 1]]
    assert result.fg_mask.all()
    # Metric 0.5 and 0.25 with overlap 1: scores 1 and 1/2 in both.
    assert result.target_scores[0, :, 0].tolist() == pytest.approx([1.0, 0.5, 1.0, 0.5])
    assert result.target_bboxes[0, 2].tolist() == [16.0, 0.0, 32.0, 8.0]


def test_second_topk_keeps_the_best_of_what_is_left():
    result = assign_one_row(topk=4, topk2=1)
    assert result.fg_mask.tolist() == [[True, False, True, False]]
    assert result.target_labels.tolist() == [[0, 1, 0, 1]]  # background is C = 1
    assert result.target_bboxes[0, 1].tolist() == [0.0] * 4


def test_rows_become_slots_in_order_of_appearance():
    rows = torch.tensor(
        [[1, 3, 0.5, 0.5, 0.5, 1], [0, 1, 0.25, 0.5, 0.5, 0.5], [-1, 0, 0.5, 0.5, 1, 1], [1, 2, 0.5, 0.5, 0.25, 0.25],
         [1, 7, 0.5, 0.5, 0.0, 0.5], [1, 7, 0.5, math.nan, 0.5, 0.5]]
    )  # fmt: skip
    labels, boxes, mask = ref.pad_targets(rows, 3, (32, 64))
    assert mask.tolist() == [[True, False], [True, True], [False, False]]
    assert labels.tolist() == [[1, 0], [3, 2], [0, 0]]
    assert boxes[1].tolist() == [[32.0, 16.0, 32.0, 32.0], [32.0, 16.0, 16.0, 8.0]]


def test_yolo11_loss_of_one_anchor():
    # One 8 px cell, one box that fills it. Two bins with log 3 on the first: distances 1/4, so the predicted box is half
    # as wide as the cell, centred: IoU 1/4, no other penalty. Target distances 1/2.
    dist = torch.tensor([[[math.log(3), 0.0] * 4]], dtype=torch.float64)
    logits = torch.tensor([[[0.0, -1.0]]], dtype=torch.float64)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 1, 1]], dtype=torch.float64)
    out = ref.yolo11_loss(dist, logits, [(1, 1)], rows, strides=(8,), reg_max=2)
    score = 0.25  # the only positive: its metric over the largest, times its overlap
    # The normaliser is max(0.25, 1) = 1.
    assert out.box.item() == pytest.approx(7.5 * 0.75 * score, rel=1e-5)
    assert out.dfl.item() == pytest.approx(1.5 * score * (0.5 * math.log(4 / 3) + 0.5 * math.log(4)), rel=1e-5)
    softplus = math.log(2) + math.log(1 + math.exp(-1))
    assert out.cls.item() == pytest.approx(0.5 * softplus, rel=1e-5)
    assert out.loss.item() == pytest.approx((out.box + out.cls + out.dfl).item())
    assert out.num_fg == 1
    weighted = ref.yolo11_loss(dist, logits, [(1, 1)], rows, strides=(8,), reg_max=2, class_weights=torch.tensor([2.0, 0.0]))
    assert weighted.cls.item() == pytest.approx(0.5 * 2 * math.log(2), rel=1e-5)


def test_yolo11_loss_with_plain_distances_is_l1_per_image_side():
    # 2x1 cells: an image 16 wide, 8 high. The box is the image; the first cell predicts it up to 0.25 cells on the left.
    dist = torch.tensor([[[0.25, 0.5, 1.5, 0.5], [0.0] * 4]], dtype=torch.float64)
    logits = torch.zeros(1, 2, 1, dtype=torch.float64)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 1, 1]], dtype=torch.float64)
    out = ref.yolo11_loss(dist, logits, [(1, 2)], rows, strides=(8,), reg_max=1, topk=1)
    overlap = 1.75 / 2 - (0.125**2) / (4 + 1)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1.75)) ** 2
    overlap -= v * v / (1 - 1.75 / 2 + v)
    assert out.dfl.item() == pytest.approx(1.5 * overlap * (0.25 * 8 / 16) / 4, rel=1e-5)


def test_no_positive_still_reaches_every_prediction():
    dist, logits = torch.zeros(1, 1, 8, requires_grad=True), torch.zeros(1, 1, 1, requires_grad=True)
    out = ref.yolo11_loss(dist, logits, [(1, 1)], torch.zeros(0, 6), strides=(8,), reg_max=2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5 * math.log(2))
    assert dist.grad.abs().sum() == 0
    assert logits.grad.item() == pytest.approx(0.25)


def test_yolox_decoding():
    points, strides = ref.make_anchors([(1, 2)], (8,))
    raw = torch.tensor([[[0.5, 0.25, 0.0, math.log(2)], [0.0, 0.0, 0.0, 0.0]]])
    # Centre (0.5, 0.25) * 8, size 8 x 16; and the corner of the second cell.
    boxes = ref.decode_yolox(raw, points, strides)
    assert boxes[0, 0].tolist() == pytest.approx([0.0, -6.0, 8.0, 10.0])
    assert boxes[0, 1].tolist() == pytest.approx([4.0, -4.0, 12.0, 4.0])


def test_centre_region_is_strict_and_scales_with_the_stride():
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [8.0, 8.0]])
    strides = torch.tensor([8.0, 8.0, 8.0, 16.0])
    boxes = torch.tensor([[[4.0, 0.0, 12.0, 8.0]]])
    centres = torch.tensor([[[8.0, 4.0]]])
    is_gt = torch.ones(1, 1, dtype=torch.bool)
    # 1.5 strides: 12 px for the first three, and the third is 12 away.
    takes_part, feasible = ref.simota.find_regions(points, strides, boxes, centres, is_gt, "center", 1.5)
    assert takes_part.tolist() == [[True, True, False, True]]
    assert feasible.tolist() == [[[True, True, False, True]]]
    # In the box, strictly: none but those at x in (4, 12) and y in (0, 8).
    takes_part, feasible = ref.simota.find_regions(points, strides, boxes, centres, is_gt, "box_and_center", 0.25)
    assert takes_part.tolist() == [[False, False, False, False]]
    takes_part, feasible = ref.simota.find_regions(points, strides, boxes + 1, centres, is_gt, "box_and_center", 1.0)
    assert takes_part.tolist() == [[True, True, False, True]]
    assert feasible.tolist() == [[[False, True, False, True]]]


def test_classification_cost_clamps_each_logarithm():
    logit = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    cost = ref.simota.classification_cost(logit, torch.zeros(1, dtype=torch.float64), torch.tensor([0]))
    assert cost.item() == pytest.approx(-2 * math.log(0.5))  # sqrt(1/2 * 1/2) = 1/2
    sure = torch.tensor([[-1000.0, 1000.0]], dtype=torch.float64)
    cost = ref.simota.classification_cost(sure, torch.full((1,), 1000.0, dtype=torch.float64), torch.tensor([0]))
    assert cost.item() == pytest.approx(200.0)


def test_dynamic_k_sums_the_ten_largest():
    assert ref.simota.dynamic_k(torch.full((1, 20), 0.25)).item() == 2
    assert ref.simota.dynamic_k(torch.tensor([[0.9, 0.1]])).item() == 1
    assert ref.simota.dynamic_k(torch.zeros(1, 3)).item() == 1


def test_matching_ties_go_to_the_lower_anchor_and_the_lower_slot():
    cost = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.5, 0.5, 9.0]])
    # Slot 0 takes anchors 0 and 1, slot 1 takes 1 (of a tie with 2), slot 2 takes 1: contested, cheapest is slot 2.
    assert ref.simota.match(cost, torch.tensor([2, 1, 1])).int().tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    cost = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert ref.simota.match(cost, torch.tensor([1, 1])).int().tolist() == [[1, 0], [0, 0]]


def test_yolox_loss_of_one_anchor():
    # One 8 px cell and a box of 4 px about its centre. Raw (0.5, 0.5, 0, 0) predicts the 8 px cell: IoU 16/64.
    preds = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    out = ref.yolox_loss(preds, [(1, 1)], rows, strides=(8,), use_l1=True)
    assert out.iou.item() == pytest.approx(5 * (1 - 1 / 16))
    assert out.obj.item() == pytest.approx(math.log(2))
    assert out.cls.item() == pytest.approx(2 * math.log(2))
    assert out.l1.item() == pytest.approx(2 * math.log(2), rel=1e-6)  # log(4 / 8) for both sides
    assert out.num_fg.item() == 1.0
    out = ref.yolox_loss(preds, [(1, 1)], rows, strides=(8,), iou_loss="giou")
    assert out.iou.item() == pytest.approx(5 * 0.75)
    assert out.l1 == 0


def test_yolox_target_of_the_class_is_the_iou():
    preds = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0, 2.0]]], dtype=torch.float64)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    out = ref.yolox_loss(preds, [(1, 1)], rows, strides=(8,))
    assert out.cls.item() == pytest.approx(math.log(1 + math.exp(2)) - 0.25 * 2)


def test_image_in_which_no_anchor_takes_part_has_no_positive():
    preds = torch.zeros(1, 1, 6)
    far = torch.tensor([[0, 0, 9.0, 9.0, 0.5, 0.5]])
    out = ref.yolox_loss(preds, [(1, 1)], far, strides=(8,))
    assert out.num_fg == 0
    assert out.loss.item() == pytest.approx(math.log(2))


def test_infeasible_anchor_is_taken_only_when_nothing_else_is_left():
    # Two anchors take part because of box 1; box 0 has one of them in its region, and two perfect predictions: k = 2.
    points, strides = torch.tensor([[4.0, 4.0], [36.0, 4.0]]), torch.tensor([8.0, 8.0])
    gt = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [32.0, 0.0, 40.0, 8.0]]])
    pred = torch.tensor([[[0.0, 0, 8, 8], [0.0, 0, 8, 8]]])
    labels, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    result = ref.simota_assign(torch.zeros(1, 2, 1), torch.zeros(1, 2), pred, points, strides, labels, gt, mask)
    # Box 0 takes both; box 1 its own, feasible, and wins the conflict because infeasible costs a million more.
    assert result.fg_mask.tolist() == [[True, True]]
    assert result.target_gt_idx.tolist() == [[0, 1]]
    assert result.matched_iou.tolist() == [[1.0, 0.0]]
    assert result.num_fg == 2
