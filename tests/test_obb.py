"""The criterion of oriented boxes against the reference, and what must hold whatever the input."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import reference as ref
import triton_yolo as ty
from reference import oriented, yolo11_obb
from tests import strategies as strat
from tests.adapters import pretend_two_ranks
from tests.compare import TOLERANCE, assert_close, assert_same_but_for_order, is_assignment_decided
from tests.conftest import DEVICE, FEW, INTERPRETED
from tests.test_losses import NOT_FINITE, check_is_nothing_but_nan, small_yolo11, with_gradients
from triton_yolo import _backend, _ops
from triton_yolo import _signatures as of
from triton_yolo._signatures import Levels, TaskAligned, YOLO11OBBAssign

TERMS = ("box", "cls", "dfl", "angle")
BY = pytest.mark.parametrize("by", ["package", "reference"])


def on_device(*values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def criterion_of(case: strat.OBBCase) -> ty.YOLO11OBBLoss:
    return ty.YOLO11OBBLoss(case.pred_scores.shape[-1], **case.options)


def is_decided(case: strat.OBBCase) -> bool:
    """Whether neither an edge of a box nor the order of metrics is a matter of rounding."""
    options, rows = case.options, case.rows.double()
    dist, angle, scores = (x.double() for x in case.preds)
    points, strides = ref.make_anchors(case.feat_shapes, options["strides"], device=DEVICE, dtype=torch.float64)
    points_px = points * strides[:, None]
    height, width = (side * options["strides"][0] for side in case.feat_shapes[0])
    labels, boxes, mask = ref.pad_targets(rows, len(dist), (height, width), yolo11_obb.is_target)
    widened = torch.cat([boxes[..., :2], boxes[..., 2:4].clamp(min=options["min_box_side"]), boxes[..., 4:]], -1)
    to_edges = oriented.sides_from(points_px, widened[:, :, None]).abs()
    if ((to_edges < 1e-4) & (boxes[:, :, None, 4:] != 0)).any():
        return False
    pred = ref.decode_oriented(dist, angle, points, reg_max=options["reg_max"], strides=strides)
    metric, overlaps = ref.align_metric(
        scores.sigmoid(), pred, points_px, labels, boxes, mask, alpha=options["alpha"], beta=options["beta"],
        min_box_side=options["min_box_side"], geometry=oriented.ORIENTED,
    )  # fmt: skip
    computed_in = torch.float64 if case.pred_dist.dtype == torch.float64 else torch.float32
    return is_assignment_decided(metric, overlaps, options["topk"], options["topk2"], computed_in)


def check(case: strat.OBBCase) -> None:
    assume(is_decided(case))
    dtype = case.pred_dist.dtype
    tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    criterion, rows = criterion_of(case), case.rows.to(dtype) if dtype == torch.float64 else case.rows
    out, grads = with_gradients(lambda *preds: criterion(*preds, case.feat_shapes, rows), *case.preds)
    expected, expected_grads = with_gradients(
        lambda *preds: ref.yolo11_obb_loss(*preds, case.feat_shapes, case.rows.double(), **case.options),
        *(x.double() for x in case.preds),
    )
    assert out.num_fg == expected.num_fg
    for name in ("loss", *TERMS):
        assert_close(getattr(out, name), getattr(expected, name), name, tolerance)
    for name, pred, grad, expected_grad in zip(("dist", "angle", "scores"), case.preds, grads, expected_grads, strict=True):
        assert grad.dtype == pred.dtype
        assert grad.stride() == torch.empty_like(pred).stride()
        assert_close(grad, expected_grad, f"gradient of {name}")


@settings(max_examples=8 if INTERPRETED else settings().max_examples)
@given(strat.obb_cases())
def test_loss(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@FEW
@given(data=st.data())
def test_loss_in_other_types(dtype, data):
    check(data.draw(strat.obb_cases(dtype)))


@settings(max_examples=2 if INTERPRETED else 20)
@given(strat.obb_cases(), st.randoms())
def test_invariants(case, random):
    criterion = criterion_of(case)

    def run(preds, rows):
        return with_gradients(lambda *x: criterion(*x, case.feat_shapes, rows), *preds)

    out, grads = run(case.preds, case.rows)
    assert min(out.loss, *out[1:5]) >= 0
    for grad in grads[:2]:
        assert (grad.abs().sum(-1) > 0).sum() <= out.num_fg
    # The same to the bit in every run.
    again, grads_again = run(case.preds, case.rows)
    assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*again, *grads_again), strict=True))
    # Rows of several images may come in any order; in an image it decides ties.
    images, order = case.rows[:, 0].tolist(), list(range(len(case.rows)))
    random.shuffle(order)
    in_image = {image: iter([i for i, other in enumerate(images) if other == image]) for image in images}
    shuffled, grads_shuffled = run(case.preds, case.rows[[next(in_image[images[i]]) for i in order]])
    assert_same_but_for_order(shuffled, out)
    for a, b in zip(grads_shuffled, grads, strict=True):
        assert_close(a, b, "gradient of rows in another order", tolerance=TOLERANCE[torch.float32])
    # Images permuted permute the gradients.
    batch_size = len(case.pred_dist)
    rolled_rows = case.rows.clone()
    rolled_rows[:, 0] = torch.where(case.rows[:, 0] >= 0, (case.rows[:, 0] + 1) % batch_size, case.rows[:, 0])
    rolled, grads_rolled = run([x.roll(1, 0) for x in case.preds], rolled_rows)
    assert_close(rolled.loss, out.loss, tolerance=TOLERANCE[torch.float32])
    for a, b in zip(grads_rolled, grads, strict=True):
        assert_close(a, b.roll(1, 0), "gradient of permuted images", tolerance=TOLERANCE[torch.float32])


# ---- worked out by hand


def loss_by(by: str, num_classes: int, **options):
    return ty.YOLO11OBBLoss(num_classes, **options) if by == "package" else functools.partial(ref.yolo11_obb_loss, **options)


@BY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_of_one_anchor(by, dtype):
    """One 8 px cell and a box that fills it, turned by pi / 2 + 2; the prediction has half its sides, and pi / 8 more."""
    dist = on_device([[math.log(3), 0.0] * 4], dtype=dtype)
    logits, angle = on_device([[0.0, -1]], dtype=dtype), on_device([[math.pi / 2 + 2 + math.pi / 8]], dtype=dtype)
    rows = on_device([0, 0, 0.5, 0.5, 1, 1, math.pi / 2 + 2], dtype=dtype)
    out, grads = with_gradients(
        lambda *preds: loss_by(by, 2, strides=(8,), reg_max=2)(*preds, [(1, 1)], rows), dist, angle, logits
    )
    # Squares of variances p and q, whose angle has no part: determinant of the sum (p + q)^2, 4 times the root of both 4 p q.
    score = 1 - math.sqrt(1 - 2 * math.sqrt(16 * 64) / (16 + 64))
    p, q = 0.25 / 12 + 0.01, 1 / 12 + 0.01
    coefficient = ((p + q) ** 2 / (4 * p * q + 1e-7)) ** -0.5
    assert out.box.item() == pytest.approx(7.5 * math.sqrt(1 - coefficient) * score, rel=1e-5)
    assert out.dfl.item() == pytest.approx(1.5 * score * (0.5 * math.log(4 / 3) + 0.5 * math.log(4)), rel=1e-5)
    assert out.angle.item() == pytest.approx(score * 0.5, rel=1e-5)
    assert out.cls.item() == pytest.approx(0.5 * (math.log(2) + math.log(1 + math.exp(-1))), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(out[1:5]).item())
    assert out.num_fg == 1
    # sin^2(2 x) has the slope 2 sin(4 x), which is 2 at pi / 8; of squares with one centre the box term has none.
    assert grads[1].item() == pytest.approx(2 * score, rel=1e-5)
    assert grads[2].flatten().tolist() == pytest.approx([0.5 * (0.5 - score), 0.5 / (1 + math.exp(1))], rel=1e-5)


@BY
def test_distances_are_those_in_the_frame_of_the_target(by):
    # The box about (1, 0.5) in cells, turned by a quarter, is 1 wide along y and 2 high along -x. From (0.5, 0.5), 0.5 along
    # its height, the sides are 0.5, 1.5, 0.5, 0.5 away; top and bottom of the prediction are off by a cell of an image of one.
    dist, logits = torch.zeros(1, 2, 4, device=DEVICE), torch.zeros(1, 2, 1, device=DEVICE)
    dist[0, 0] = on_device(0.5, 0.5, 0.5, 1.5)
    rows = on_device([0, 0, 0.5, 0.5, 0.5, 2, math.pi / 2])
    out = loss_by(by, 1, strides=(8,), reg_max=1, topk=1)(dist, logits, logits, [(1, 2)], rows)
    # The prediction, 8 x 16 px at angle 0, lies 4 px to the left and 4 below.
    score = ref.prob_iou(on_device(4, 8, 8, 16, 0.0), on_device(8, 4, 8, 16, math.pi / 2))
    assert out.dfl.item() == pytest.approx(1.5 * score.item() * (1 + 1) / 4, rel=1e-5)


@BY
def test_rows_shorter_than_two_pixels_are_ignored(by):
    preds = (
        torch.zeros(1, 16, 4, device=DEVICE) + 0.5,
        torch.zeros(1, 16, 1, device=DEVICE),
        torch.zeros(1, 16, 1, device=DEVICE),
    )
    criterion = loss_by(by, 1, strides=(8,), reg_max=1, min_box_side=16.0)
    for width, height, is_target in ((2, 16, True), (1.99, 16, False), (16, 2, True), (16, 1.99, False)):
        rows = on_device([0, 0, 0.5, 0.5, width / 32, height / 32, 0.5])
        assert (criterion(*preds, [(4, 4)], rows).num_fg > 0) == is_target
    assert criterion(*preds, [(4, 4)], on_device([0, 0, 0.5, 0.5, 0.5, 0.5, math.nan])).num_fg == 0
    assert criterion(*preds, [(4, 4)], on_device([0, 0, 0.5, 0.5, 0.5, 0.5, math.inf])).num_fg == 0


@BY
def test_an_angle_of_any_size_is_that_of_its_remainder(by):
    criterion, found = loss_by(by, 1, strides=(8,), reg_max=1), []
    torch.manual_seed(0)
    dist, logits = torch.rand(1, 16, 4, device=DEVICE) * 2, torch.randn(1, 16, 1, device=DEVICE)
    for turns in (0, 1, -3, 100):
        angle = on_device([[0.7 + turns * math.pi]]).expand(1, 16, 1)
        rows = on_device([0, 0, 0.45, 0.5, 0.8, 0.3, 0.4 - turns * math.pi])
        found.append(criterion(dist, angle, logits, [(4, 4)], rows))
        assert found[-1].num_fg > 2
        # Half a turn of the prediction moves its centre to the other side of the anchor, but for that nothing changes.
        assert_close(found[-1].angle / found[-1].angle, found[0].angle / found[0].angle)
        if turns % 2 == 0:
            for have, want in zip(found[-1], found[0], strict=True):
                torch.testing.assert_close(have, want, rtol=1e-4, atol=0)


# ---- small cases


def small(num_rows: int = 3, **options):
    _, dist, scores, shapes, rows = small_yolo11(num_rows)
    angle = torch.randn(2, 20, 1, device=DEVICE)
    rows = torch.cat([rows, on_device(0.5, -2.0, 3.0)[:num_rows, None]], 1)
    return ty.YOLO11OBBLoss(3, strides=(8, 16), reg_max=8, **options), (dist, angle, scores), shapes, rows


def test_the_loss_of_its_own_assignment_is_the_whole():
    criterion, preds, shapes, rows = small()
    out, grads = with_gradients(lambda *p: criterion(*p, shapes, rows), *preds)
    levels = Levels(tuple(side for shape in shapes for side in shape), criterion.strides)
    assigned = _ops.yolo11_obb_assign(YOLO11OBBAssign(*preds, [rows], levels, criterion.reg_max, criterion.assigner))
    targets = ty.Targets.from_yolo(rows, levels.image_size)
    given = targets, assigned.target_row, assigned.target_score, assigned.sums[0].clamp(min=1)
    found, found_grads = with_gradients(lambda *p: criterion.loss_of(*p, shapes, *given), *preds)
    for name, a, b in zip(("loss", *TERMS), found, out, strict=False):
        assert_close(a, b, name)
    assert found.num_fg == out.num_fg > 0
    for a, b in zip(found_grads, grads, strict=True):
        assert_close(a, b, "gradient")


def test_every_form_of_the_targets_gives_the_same_loss():
    criterion, preds, shapes, rows = small()
    expected = criterion(*preds, shapes, rows)
    packed = ty.Targets.from_yolo(rows, 32)
    assert packed.boxes_xywh.shape == (3, 5)
    padding = on_device([-1.0, 0, 0.5, 0.5, 0.5, 0.5, 1])
    of_image = [packed.image_index == image for image in range(2)]
    as_list = [{"boxes": packed.boxes_xywh[m], "labels": packed.labels[m]} for m in of_image]
    labels, boxes = torch.zeros(2, 2, 1, device=DEVICE).long(), torch.zeros(2, 2, 5, device=DEVICE)
    for image, m in enumerate(of_image):
        labels[image, : m.sum(), 0], boxes[image, : m.sum()] = packed.labels[m], packed.boxes_xywh[m]
    for targets in (
        packed,
        torch.cat([padding, rows, padding.expand(2, -1)]),
        ty.Targets.from_list(as_list, box_format="xywhr"),
        ty.Targets.from_padded(labels, boxes, boxes[..., 2] > 0, box_format="xywhr"),
        ty.Targets.from_padded(labels.squeeze(-1), boxes, box_format="xywhr"),
    ):
        assert_same_but_for_order(criterion(*preds, shapes, targets), expected)


@BY
@NOT_FINITE
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_prediction_that_is_no_number_shows(by, bad, which, num_rows):
    _, preds, shapes, rows = small(num_rows)
    criterion = loss_by(by, 3, strides=(8, 16), reg_max=8)
    for anchor in (5, 19):
        broken = [p.clone() for p in preds]
        broken[which][1, anchor, -1] = bad
        check_is_nothing_but_nan(*with_gradients(lambda *x: criterion(*x, shapes, rows), *broken))
    assert criterion(*preds, shapes, rows).loss.isfinite()


@NOT_FINITE
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_broken_image_does_not_disturb_the_assignment_of_another(bad, which):
    _, preds, shapes, rows = small()
    levels = Levels(tuple(side for shape in shapes for side in shape), (8.0, 16.0))
    rule = TaskAligned(10, None, 0.5, 6.0, 0.0, 1e-9)
    clean = _ops.yolo11_obb_assign(YOLO11OBBAssign(*preds, [rows], levels, 8, rule))
    assert (clean.target_row[0] >= 0).any()
    preds[which][1] = bad
    broken = _ops.yolo11_obb_assign(YOLO11OBBAssign(*preds, [rows], levels, 8, rule))
    assert torch.equal(broken.target_row[0], clean.target_row[0])
    assert torch.equal(broken.target_score[0], clean.target_score[0])


@pytest.mark.parametrize("value", [1e15, -1e15, 3e38])
def test_a_finite_number_poisons_nothing(value):
    """Neither an angle that is farther from the next than a turn, nor a box as large as any."""
    criterion, preds, shapes, rows = small()
    for huge in ([1, 2, 0.4, 0.5, 0.5, 0.8, value], [1, 2, 0.4, 0.5, abs(value) / 64, abs(value) / 64, 1.0]):
        out, grads = with_gradients(lambda *x, r=huge: criterion(*x, shapes, torch.cat([rows[[0, 2]], on_device(r)])), *preds)
        assert out.loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
    preds[1][1, 5] = value
    out, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_empty_batch_of_images_and_no_rows():
    criterion, preds, shapes, rows = small()
    out, grads = with_gradients(lambda *x: criterion(*x, shapes, rows[:0]), *preds)
    assert out.num_fg == out.box == out.dfl == out.angle == 0
    assert grads[0].abs().sum() == grads[1].abs().sum() == 0
    assert (grads[2] > 0).all()
    out, grads = with_gradients(lambda *x: criterion(*x, shapes, rows[:0]), *(x[:0] for x in preds))
    assert out.loss == 0
    assert [grad.shape for grad in grads] == [(0, 20, 32), (0, 20, 1), (0, 20, 3)]


def test_only_the_loss_has_a_gradient_which_scales_with_the_incoming_one():
    criterion, preds, shapes, rows = small()
    out, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    leaves = [x.requires_grad_() for x in preds]
    out = criterion(*leaves, shapes, rows)
    assert not any(x.requires_grad for x in out[1:])
    for factor in (0.5, 3.0):
        scaled = torch.autograd.grad(out.loss * factor, leaves, retain_graph=True)
        for have, want in zip(scaled, grads, strict=True):
            assert_close(have, want * factor)
    for number, leaf in enumerate(leaves):  # of one prediction alone
        alone = [x if x is leaf else x.detach() for x in leaves]
        (grad,) = torch.autograd.grad(criterion(*alone, shapes, rows).loss, leaf)
        assert torch.equal(grad, grads[number])


def test_autocast_and_modes_change_nothing_and_inputs_stay():
    criterion, preds, shapes, rows = small()
    before = [x.clone() for x in (*preds, rows)]
    expected = criterion(*preds, shapes, rows)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.inference_mode():
        out = criterion(*preds, shapes, rows)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*preds, rows), before, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_predictions_of_two_types_are_computed_in_the_wider(which):
    criterion, preds, shapes, rows = small()
    mixed = [p.double() if i == which else p for i, p in enumerate(preds)]
    have, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *mixed)
    want, want_grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *(p.double() for p in preds))
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    for grad, want_grad, pred in zip(grads, want_grads, mixed, strict=True):
        assert torch.equal(grad, want_grad.to(pred.dtype))


def test_float16_keeps_small_gradients_under_a_loss_scale():
    criterion, preds, shapes, rows = small()
    halves = [x.half() for x in preds]

    def gradients(inputs, factor):
        leaves = [x.requires_grad_() for x in inputs]
        return torch.autograd.grad(criterion(*leaves, shapes, rows).loss * factor, leaves)

    wanted = gradients([x.float() for x in halves], 1e-6)
    for have, want in zip(gradients([x.clone() for x in halves], 1e-6 * 65536), wanted, strict=True):
        assert have.dtype == torch.float16
        torch.testing.assert_close(have.float() / 65536, want, rtol=2e-3, atol=1e-12)


def test_processes_share_the_normaliser(monkeypatch):
    """The other rank has as many images, and scores that sum to 2 more: this one's are divided by the mean."""
    criterion, preds, shapes, rows = small()
    alone, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    levels = Levels(tuple(side for shape in shapes for side in shape), (8.0, 16.0))
    sums = _ops.yolo11_obb_assign(YOLO11OBBAssign(*preds, [rows], levels, 8, criterion.assigner)).sums
    criterion.process_group = True
    pretend_two_ranks(monkeypatch, 2.0)
    out, shared_grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    score_sum = sums[0].item()
    factor = max(score_sum, 1) / ((score_sum + 2) / 2)
    assert_close(torch.stack(out[1:5]), torch.stack(alone[1:5]) * factor)
    for have, want in zip(shared_grads, grads, strict=True):
        assert_close(have, want * factor * (2 + 2) / 2)  # images of both, over those of this one


def test_thousands_of_boxes_in_an_image():
    torch.manual_seed(0)
    shapes = [(10, 10), (5, 5), (3, 3)] if INTERPRETED else [(40, 40), (20, 20), (10, 10)]
    num_anchors = sum(h * w for h, w in shapes)
    rows = torch.rand(200 if INTERPRETED else 5000, 7, device=DEVICE)
    rows[:, 0], rows[:, 1], rows[:, 4:6], rows[:, 6] = 0, 0, rows[:, 4:6] * 0.1 + 0.01, rows[:, 6] * 8 - 4
    preds = torch.randn(1, num_anchors, 64), torch.randn(1, num_anchors, 1), torch.randn(1, num_anchors, 2)
    preds = tuple(x.to(DEVICE) for x in preds)
    criterion = ty.YOLO11OBBLoss(2)
    out = criterion(*preds, shapes, rows)
    with ty.backend("eager"):
        eager = criterion(*preds, shapes, rows)
    assert out.loss.isfinite()
    assert out.num_fg == eager.num_fg > 0
    assert_close(out.loss, eager.loss, "loss")


class Largest(TorchDispatchMode):
    """The most elements that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return out


@pytest.mark.skipif(INTERPRETED, reason="kernels hold no pairs but in registers, and take long for thousands of anchors")
def test_no_tensor_has_an_entry_for_every_box_and_anchor():
    """The largest hold class logits, 256 levels of metrics of a box, or pairs with anchors in the rectangles around boxes."""
    torch.manual_seed(0)
    shapes, num_anchors, num_boxes = [(80, 80)], 6400, 1000
    rows = torch.rand(num_boxes, 7, device=DEVICE)
    rows[:, 0], rows[:, 1], rows[:, 4:6] = 0, 0, 0.02
    preds = [torch.randn(1, num_anchors, n, device=DEVICE) for n in (4, 1, 8)]
    args = *(x.requires_grad_() for x in preds), shapes, rows
    criterion = ty.YOLO11OBBLoss(8, strides=(8,), reg_max=1)
    x = of.YOLO11OBB(*preds, [rows], None, Levels((80, 80), (8.0,)), 1, criterion.assigner, criterion.gains, True)
    with Largest() as largest, torch.no_grad():
        out = _backend.implementation(DEVICE).yolo11_obb_criterion(x)
    assert out.num_fg > 100
    assert torch.equal(out.loss, criterion(*args).loss)
    assert largest.most <= 256 * num_boxes < num_boxes * num_anchors / 20


def pairs_in_grid(boxes: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """(nth, anchors) that the eager backend finds inside."""
    from triton_yolo.eager.pairs import Shape, grid_pairs
    from triton_yolo.eager.task_aligned import ORIENTED

    shape = Shape(ORIENTED.axes(boxes.T), ORIENTED.span, functools.partial(ORIENTED.is_inside, eps=0.0))
    return grid_pairs(*ORIENTED.bounds(boxes), levels, shape)


ONLY_EAGER = pytest.mark.skipif(INTERPRETED, reason="of the eager backend alone")


@ONLY_EAGER
def test_pairs_lie_along_a_turned_box():
    """Of 5 x 5 cells of 8 px: a box of 40 x 4 px about the middle has the three in the middle of a diagonal."""
    boxes = on_device([20, 20, 40, 4, math.pi / 4], [20, 20, 40, 4, -math.pi / 4], [20, 20, 40, 4, 5 * math.pi / 4])
    nth, anchors = pairs_in_grid(boxes, Levels((5, 5), (8.0,)))
    assert nth.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert anchors.tolist() == [6, 12, 18, 8, 12, 16, 6, 12, 18]


@ONLY_EAGER
def test_pairs_on_the_edges_of_an_upright_box():
    """The anchors of three rows of cells lie on two of its edges and in between; a turned box may lose those on edges."""
    boxes = on_device([20, 20, 38, 16, 0], [20, 20, 16, 38, -math.pi / 2], [20, 20, 16, 38, 1e-7 - math.pi / 2])
    nth, anchors = pairs_in_grid(boxes, Levels((5, 5), (8.0,)))
    assert anchors[nth == 0].tolist() == list(range(5, 20))
    for turned in (1, 2):
        assert set(range(10, 15)) <= set(anchors[nth == turned].tolist()) <= set(range(5, 20))


@ONLY_EAGER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_anchor_inside_a_box_is_missed(dtype):
    """Long, flat, huge and nearly upright boxes, some on edges of which anchors lie, beside a test of every anchor."""
    from triton_yolo.eager.pairs import anchor_table
    from triton_yolo.eager.task_aligned import ORIENTED

    levels = Levels((20, 20, 10, 10), (8.0, 16.0))
    sides = torch.tensor([0.5, 8.0, 16.0, 50.0, 200.0, 1e8])
    angles = torch.cat(
        [torch.tensor([0.0, 1e-12, -1e-8, 1e-5, 0.3, 0.785398163]) + quarter * math.pi / 2 for quarter in range(5)]
    )
    centre, width, height, angle = (
        x.flatten() for x in torch.meshgrid(torch.tensor([44.0, 77.7]), sides, sides, angles, indexing="ij")
    )
    boxes = torch.stack([centre, 160 - centre, width, height, angle], 1).to(DEVICE, dtype)
    points, strides = anchor_table(levels, boxes)
    expected = ORIENTED.is_inside((points * strides)[:, None], ORIENTED.axes(boxes.T)[..., None], 0.0)
    nth, anchors = pairs_in_grid(boxes, levels)
    found = torch.zeros_like(expected)
    found[nth, anchors] = True
    assert torch.equal(found, expected)
    assert found.sum() == len(nth)


def test_crowded_batch_is_cut_by_images_without_a_trace(monkeypatch):
    from triton_yolo.eager import pairs

    torch.manual_seed(0)
    criterion, shapes = ty.YOLO11OBBLoss(3, strides=(8, 16), reg_max=8, topk=3), [(4, 4), (2, 2)]
    preds = [torch.randn(5, 20, channels, device=DEVICE) for channels in (32, 1, 3)]
    rows = torch.rand(40, 7, device=DEVICE)
    rows[:, 0], rows[:, 1] = torch.randint(-1, 4, (40,)), torch.randint(0, 3, (40,))  # image 4 has none
    whole = criterion(*preds, shapes, rows)
    assert whole.num_fg > 20
    monkeypatch.setattr(pairs, "_PART", 60)
    for a, b in zip(whole, criterion(*preds, shapes, rows), strict=True):
        assert torch.equal(a, b)


@ONLY_EAGER
@pytest.mark.parametrize("is_transposed", [True, False])
def test_passes_over_all_classes_are_cut_without_a_trace(is_transposed, monkeypatch):
    """In either layout, the head's own and that of (B, A, C)."""
    from triton_yolo.eager import finite, memory

    criterion, preds, shapes, rows = small()
    if is_transposed:
        preds = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in preds)
    whole, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    monkeypatch.setattr(memory, "_BLOCK", 45)
    monkeypatch.setattr(finite, "_PART", 45)
    cut, grads_cut = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    assert_close(cut.cls, whole.cls)
    for have, want in zip(grads_cut, grads, strict=True):
        assert_close(have, want, tolerance=TOLERANCE[torch.float32])
    for place in ((0, 0, 0), (0, 19, 2), (1, 0, 2), (1, 19, 0)):
        broken = [x.clone() for x in preds]
        broken[2][place] = -math.inf
        assert criterion(*broken, shapes, rows).loss.isnan()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pred_dist": torch.zeros(2, 20, 30)}, ValueError, r"pred_dist must have shape \(B, A, 32\), got \(2, 20, 30\)"),
        ({"pred_angle": torch.zeros(2, 20)}, ValueError, r"pred_angle must have shape \(2, 20, 1\), got \(2, 20\)"),
        ({"pred_angle": torch.zeros(2, 20, 1).int()}, TypeError, "pred_angle must be float16"),
        ({"pred_scores": torch.zeros(2, 20, 4)}, ValueError, r"pred_scores must have shape \(2, 20, 3\)"),
        ({"feat_shapes": [(4, 4)]}, ValueError, "feat_shapes must have one"),
        ({"targets": torch.zeros(3, 6)}, ValueError, r"targets must have shape \(N, 7\), got \(3, 6\)"),
        ({"targets": []}, TypeError, r"targets must be an \(N, 7\) tensor or triton_yolo.Targets, .* got list"),
        ({"targets": ty.Targets.from_yolo(torch.rand(3, 6).floor(), 32)}, ValueError,
         r"targets.boxes_xywh must have shape \(3, 5\), got \(3, 4\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes, error, message):
    criterion, (dist, angle, scores), shapes, rows = small()
    args = dict(pred_dist=dist, pred_angle=angle, pred_scores=scores, feat_shapes=shapes, targets=rows)
    changes = {
        key: x.to(DEVICE) if isinstance(x, torch.Tensor | ty.Targets) else x for key, x in changes.items()
    }  # fmt: skip
    with pytest.raises(error, match=message):
        criterion(**{**args, **changes})
    if DEVICE.type == "cpu":
        rows[0, 1] = 3
        with pytest.raises(ValueError, match=r"labels in 0\.\.\.2, got \[3\]"):
            criterion(dist, angle, scores, shapes, rows)


def test_oriented_targets():
    rows = on_device([0, 1, 0.5, 0.25, 0.25, 0.125, -4.0])
    targets = ty.Targets.from_yolo(rows, (32, 64))
    assert targets.boxes_xywh.tolist() == [[32, 8, 16, 4, -4]]
    assert targets.boxes_xyxy.tolist() == [[24, 6, 40, 10]]
    padded = ty.Targets.from_padded(on_device([1.0]), targets.boxes_xywh[None], box_format="xywhr")
    assert all(torch.equal(a, b) for a, b in zip(padded, targets, strict=True))
    assert targets.is_valid(1, 2).tolist() == [True]
    targets.boxes_xywh[0, 4] = math.inf
    assert targets.is_valid(1, 2).tolist() == [False]
    with pytest.raises(ValueError, match=r"targets\.boxes_xywh must have shape \(1, 4\), got \(1, 5\)"):
        ty.YOLO11Loss(2, strides=(8,))(torch.zeros(1, 1, 64), torch.zeros(1, 1, 2), [(1, 1)], targets.to("cpu"))
    with pytest.raises(ValueError, match=r"boxes must have shape \(B, G, 4\), got \(1, 1, 5\)"):
        ty.Targets.from_padded(on_device([1.0]), targets.boxes_xywh[None], box_format="xywh")
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\] must have shape \(n, 5\), got \(1, 4\)"):
        ty.Targets.from_list([{"boxes": targets.boxes_xyxy, "labels": targets.labels}], box_format="xywhr")
    with pytest.raises(ValueError, match=r"rows must have shape \(N, 6\), got \(1, 8\)"):
        ty.Targets.from_yolo(torch.zeros(1, 8), 32)


@pytest.mark.skipif(INTERPRETED, reason="graphs hold the operator, whose kernels run in other tests")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_functional():
    criterion, preds, shapes, rows = small()
    out, grads = with_gradients(lambda *x: criterion(*x, shapes, rows), *preds)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for number in (3, 2, 1, 3):
        have, have_grads = with_gradients(lambda *x, n=number: compiled(*x, shapes, rows[:n]), *preds)
    assert counter.frame_count <= 3
    assert all(torch.equal(a, b) for a, b in zip(have, out, strict=True))
    functional = torch.func.grad(lambda *x: criterion(*x, shapes, rows).loss, argnums=(0, 1, 2))(*preds)
    for grad, compiled_grad, functional_grad in zip(grads, have_grads, functional, strict=True):
        assert torch.equal(compiled_grad, grad)
        assert torch.equal(functional_grad, grad)
