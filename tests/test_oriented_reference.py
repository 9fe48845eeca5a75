"""The reference's oriented boxes against numbers worked out by hand, and their derivatives by finite differences."""

import math

import pytest
import torch
from torch import Tensor

import reference as ref
from reference import oriented, yolo11_obb

QUARTER = math.pi / 2


def box(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A side of w has a variance of w^2 / 12, so 1/3 for a side of 2 and 4/3 for one of 4.
@pytest.mark.parametrize(
    ("a", "b", "coefficient"),
    [
        # Equal boxes: the squared offset by the variance along it, 1 / (1/3), over 8.
        ((0, 0, 2, 2, 0), (1, 0, 2, 2, 0), math.exp(-3 / 8)),
        ((0, 0, 4, 2, math.pi / 4), (1, 1, 4, 2, math.pi / 4), math.exp(-2 * 3 / 4 / 8)),
        ((0, 0, 4, 2, math.pi / 4), (1, -1, 4, 2, math.pi / 4), math.exp(-2 * 3 / 8)),
        # One centre: determinant of the sum 2/3 * 5/3, and 4 * sqrt(4/9 * 1/9) = 8/9; their ratio is 5/4.
        ((0, 0, 2, 4, 0), (0, 0, 2, 2, 1), math.sqrt(4 / 5)),
        # Crossed: (1/3 + 4/3)^2 over 4 * 4/9 is 25/16.
        ((3, 2, 4, 2, 1), (3, 2, 4, 2, 1 + QUARTER), 4 / 5),
        ((3, 2, 4, 2, 1), (3, 2, 2, 4, 1 - QUARTER), 1),
    ],
)
def test_prob_iou_by_the_bhattacharyya_coefficient(a, b, coefficient):
    expected = pytest.approx(1 - math.sqrt(1 - coefficient), abs=1e-7)
    assert ref.prob_iou(box(*a), box(*b), eps=1e-15) == expected
    assert ref.prob_iou(box(*b), box(*a), eps=1e-15) == expected


def test_eps_of_prob_iou():
    # Unit variances: the determinant of the sum is 4, and so is 4 times the root of both.
    side = math.sqrt(12)
    a = box(0, 0, side, side, 0)
    distance = 2 / 4.1 / 4 + math.log(4 / 4.1 + 0.1) / 2
    expected = 1 - math.sqrt(1 - math.exp(-distance) + 0.1)
    assert ref.prob_iou(a, box(1, 0, side, side, 0), eps=0.1) == pytest.approx(expected, rel=1e-12)
    # The distance is at least eps and at most 100.
    assert ref.prob_iou(a, a, eps=0.1) == pytest.approx(1 - math.sqrt(1 - math.exp(-0.1) + 0.1), rel=1e-12)
    assert ref.prob_iou(a, box(1e4, 0, side, side, 0), eps=0.1) == pytest.approx(1 - math.sqrt(1.1), rel=1e-12)


def test_prob_iou_has_no_gradient_past_its_bounds():
    a = box(0, 0, 4, 2, 1).requires_grad_()
    for other in (box(0, 0, 4, 2, 1), box(1e4, 0, 4, 2, 1)):
        (grad,) = torch.autograd.grad(ref.prob_iou(a, other), a)
        assert grad.tolist() == [0] * 5


def test_floor_is_added_to_the_variances_of_the_boxs_own_axes():
    # 0 + 4/3 and 0 + 1/3 cannot both come of one floor: 1 + 1/3 and 0 + 1/3 can.
    a, b = box(0, 0, math.sqrt(12), 0, 1), box(1, 2, 0, math.sqrt(12), 3)
    expected = ref.prob_iou(box(0, 0, 4, 2, 1), box(1, 2, 2, 4, 3))
    assert ref.prob_iou(a, b, floor=1 / 3) == pytest.approx(expected.item(), rel=1e-12)


def test_sides_are_along_the_boxs_axes():
    # A quarter turn takes x to y: a point 1 further down is 1 further to the right in the box.
    sides = oriented.sides_from(box(0, 1), box(0, 0, 4, 2, QUARTER))
    assert sides.tolist() == pytest.approx([3, 1, 1, 1])


def test_candidates_lie_inside_or_on_an_edge():
    points = box(0, 0, 2, 0, 2.01, 0, 0, 1, 2, 1, 0, -1.01).reshape(-1, 2)
    assert oriented.contains(box(0, 0, 4, 2, 0), points, 0.0, 1e-9).tolist() == [True, True, False, True, True, False]
    # Turned by 45 degrees, the long half axis ends at (sqrt 2, sqrt 2).
    points = box(1.41, 1.41, 1.42, 1.42, 0.7, -0.7, 0.71, -0.71).reshape(-1, 2)
    turned = box(0, 0, 4, 2, math.pi / 4)
    assert oriented.contains(turned, points, 0.0, 1e-9).tolist() == [True, False, True, False]
    # Widened to 3, across only: its half axis ends at 1.06.
    points = box(1.42, 1.42, 1.06, -1.06, 1.07, -1.07).reshape(-1, 2)
    assert oriented.contains(turned, points, 3.0, 1e-9).tolist() == [False, True, False]


def test_decoding_turns_the_offset_of_the_centre():
    # Half the differences, (1, 1.5), by a quarter turn: (-1.5, 1).
    dist, points = box(1, 2, 3, 5).reshape(1, 1, 4), box(10, 20)[None]
    decoded = ref.decode_oriented(dist, box(QUARTER).reshape(1, 1, 1), points, reg_max=1)
    assert decoded[0, 0].tolist() == pytest.approx([8.5, 21, 4, 7, QUARTER])
    decoded = ref.decode_oriented(dist, box(QUARTER).reshape(1, 1, 1), points, reg_max=1, strides=box(8))
    assert decoded[0, 0].tolist() == pytest.approx([68, 168, 32, 56, QUARTER])
    # Seen from the point, the box has these sides again.
    assert oriented.sides_from(points[0], ref.decode_oriented(dist, dist[..., :1], points, reg_max=1)[0, 0]).tolist() == (
        pytest.approx([1, 2, 3, 5])
    )


def test_angles_of_logits():
    assert ref.decode_angle(box(0, math.log(3), -math.inf, math.inf)).tolist() == pytest.approx(
        [math.pi / 4, QUARTER, -math.pi / 4, 3 * math.pi / 4]
    )


def test_angle_loss_counts_less_for_long_boxes():
    square, long = (0, 0, 2, 2), (0, 0, math.exp(3), 1)
    pred = torch.stack([box(5, 5, 7, 1, angle) for angle in (math.pi / 4, math.pi / 4, 1 + QUARTER, math.pi / 8)])
    target = torch.stack([box(*square, 0), box(*long, 0), box(*square, 1), box(*square, 0)])
    assert yolo11_obb.angle_loss(pred, target).tolist() == pytest.approx([1, math.exp(-1), 0, 0.5], abs=1e-8)


def test_rows_shorter_than_two_pixels_are_ignored():
    rows = box(
        0, 1, 0.5, 0.25, 2 / 64, 0.5, -4,
        0, 2, 0.5, 0.5, 1.99 / 64, 0.5, 0,
        0, 2, 0.5, 0.5, 0.5, 1.99 / 32, 0,
        0, 2, 0.5, 0.5, 0.5, 0.5, math.nan,
    ).reshape(-1, 7)  # fmt: skip
    labels, boxes, mask = ref.pad_targets(rows, 1, (32, 64), yolo11_obb.is_target)
    assert boxes.tolist() == [[[32, 8, 2, 16, -4]]]
    assert labels.tolist() == [[1]]
    assert mask.tolist() == [[True]]


def test_assignment_of_crossed_boxes():
    """Two long boxes crossed over nine points: the one in the middle is contested."""
    points = torch.cartesian_prod(*[box(4, 12, 20)] * 2).flip(1)
    gt = torch.stack([box(12, 12, 26, 4, math.pi / 4), box(12, 12, 26, 4, -math.pi / 4)])[None]
    # Each point of the diagonals predicts the diagonal it is on, and the one in the middle the second.
    of_points = [0, 0, 1, 0, 1, 0, 1, 0, 0]
    pred = gt[:, of_points]
    scores, labels, mask = torch.full((1, 9, 2), 0.5), torch.tensor([[0, 1]]), torch.ones(1, 2)
    result = ref.task_aligned_assign(scores, pred, points, labels, gt, mask, geometry=oriented.ORIENTED)
    assert result.fg_mask.int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 1]]
    assert result.target_labels.tolist() == [[0, 2, 1, 2, 1, 2, 1, 2, 0]]
    assert torch.equal(result.target_bboxes[0, 6], gt[0, 1])
    # All overlaps are as high as they get, 1 - sqrt(1 - exp(-1e-7) + 1e-7).
    best = 1 - math.sqrt(2e-7)
    assert result.target_scores[0, [0, 2, 4], [0, 1, 1]].tolist() == pytest.approx([best] * 3, abs=1e-6)


def test_yolo11_obb_loss_of_one_anchor():
    # As of axis-aligned boxes: one 8 px cell, a box that fills it, and a prediction half as wide, turned by pi / 8.
    dist = torch.tensor([[[math.log(3), 0.0] * 4]], dtype=torch.float64)
    logits, angle = box(0, -1).reshape(1, 1, 2), box(math.pi / 8).reshape(1, 1, 1)
    rows = box(0, 0, 0.5, 0.5, 1, 1, 0)[None]
    out = ref.yolo11_obb_loss(dist, angle, logits, [(1, 1)], rows, strides=(8,), reg_max=2)
    # Squares of variances p and q, whose angle has no part: determinant of the sum (p + q)^2, 4 times the root of both 4 p q.
    score = 1 - math.sqrt(1 - 2 * math.sqrt(16 * 64) / (16 + 64))
    p, q = 0.25 / 12 + 0.01, 1 / 12 + 0.01
    coefficient = ((p + q) ** 2 / (4 * p * q + 1e-7)) ** -0.5
    assert out.box.item() == pytest.approx(7.5 * math.sqrt(1 - coefficient) * score, rel=1e-5)
    assert out.dfl.item() == pytest.approx(1.5 * score * (0.5 * math.log(4 / 3) + 0.5 * math.log(4)), rel=1e-5)
    assert out.angle.item() == pytest.approx(score * 0.5, rel=1e-5)
    assert out.cls.item() == pytest.approx(0.5 * (math.log(2) + math.log(1 + math.exp(-1))), rel=1e-5)
    assert out.loss.item() == pytest.approx((out.box + out.cls + out.dfl + out.angle).item())
    assert out.num_fg == 1


def test_distances_are_those_in_the_frame_of_the_target():
    # The box about (1, 0.5) in cells, turned by a quarter, is 1 wide along y and 2 high along -x. From (0.5, 0.5), 0.5 along
    # its height, the sides are 0.5, 1.5, 0.5, 0.5 away; top and bottom of the prediction are off by a cell of an image of one.
    dist, logits = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64)
    dist[0, 0] = box(0.5, 0.5, 0.5, 1.5)
    rows = box(0, 0, 0.5, 0.5, 0.5, 2, QUARTER)[None]
    out = ref.yolo11_obb_loss(dist, logits, logits, [(1, 2)], rows, strides=(8,), reg_max=1, topk=1)
    # The prediction, 8 x 16 px at angle 0, lies 4 px to the left and 4 below.
    score = ref.prob_iou(box(4, 8, 8, 16, 0), box(8, 4, 8, 16, QUARTER))
    assert out.dfl.item() == pytest.approx(1.5 * score.item() * (1 + 1) / 4, rel=1e-5)


def random_boxes(number: int) -> Tensor:
    torch.manual_seed(0)
    unit = torch.rand(number, 5, dtype=torch.float64)
    return unit * box(4, 4, 6, 6, 6) + box(0, 0, 0.5, 0.5, -3)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_derivative_of_prob_iou(floor):
    a, b = random_boxes(24).requires_grad_().chunk(2)
    assert torch.autograd.gradcheck(lambda a, b: ref.prob_iou(a, b, floor=floor), (a, b))


@pytest.mark.parametrize("reg_max", [1, 4])
def test_derivative_of_the_loss(reg_max):
    torch.manual_seed(0)
    dist = torch.rand(2, 9, 4 * reg_max, dtype=torch.float64)
    angle, logits = torch.randn(2, 9, 1, dtype=torch.float64), torch.randn(2, 9, 2, dtype=torch.float64)
    rows = box(0, 1, 0.4, 0.5, 0.9, 0.6, 1, 1, 0, 0.6, 0.6, 0.6, 1, 2).reshape(2, 7)
    options = {"feat_shapes": [(3, 3)], "targets": rows, "strides": (8,), "reg_max": reg_max}
    preds = tuple(x.requires_grad_() for x in (dist, angle, logits))
    assignment = ref.yolo11_obb_assign(*preds, **options)
    assert assignment.fg_mask.sum() > 4
    assert torch.autograd.gradcheck(lambda *x: ref.yolo11_obb_loss(*x, **options, assignment=assignment).loss, preds)


def test_no_positive_still_reaches_every_prediction():
    dist, angle, logits = (torch.zeros(1, 1, n, requires_grad=True) for n in (8, 1, 1))
    out = ref.yolo11_obb_loss(dist, angle, logits, [(1, 1)], torch.zeros(0, 7), strides=(8,), reg_max=2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5 * math.log(2))
    assert dist.grad.abs().sum() == angle.grad.abs().sum() == 0
    assert logits.grad.item() == pytest.approx(0.25)
    angle = torch.full((1, 1, 1), math.nan)
    out = ref.yolo11_obb_loss(dist, angle, logits, [(1, 1)], torch.zeros(0, 7), strides=(8,), reg_max=2)
    assert out.loss.isnan()
