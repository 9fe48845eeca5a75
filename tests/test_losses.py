"""Both criteria against the reference, and what must hold whatever the input."""

import copy
import functools
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import reference as ref
import triton_yolo as ty
from tests import strategies as strat
from tests.compare import TOLERANCE, assert_close, assert_same_but_for_order, is_assignment_decided
from tests.conftest import DEVICE, FEW, INTERPRETED
from tests.test_assigners import is_simota_decided
from triton_yolo import _ops
from triton_yolo._signatures import Levels, SimOTA, YOLOXAssign


def yolo11(case: strat.YOLO11Case) -> ty.YOLO11Loss:
    return ty.YOLO11Loss(case.pred_scores.shape[-1], **case.options)


def yolox(case: strat.YOLOXCase) -> ty.YOLOXLoss:
    return ty.YOLOXLoss(case.preds.shape[-1] - 5, **case.options)


def with_gradients(function, *preds):
    """The output of ``function`` and the gradients of its loss, for leaves with the layout of ``preds``."""
    leaves = [p.detach().requires_grad_() for p in preds]
    out = function(*leaves)
    return out, torch.autograd.grad(out.loss, leaves)


def is_yolo11_decided(case: strat.YOLO11Case) -> bool:
    options = {**case.options, "class_weights": None}
    dist, scores, rows = case.pred_dist.double(), case.pred_scores.double(), case.rows.double()
    points, strides = ref.make_anchors(case.feat_shapes, options["strides"], device=DEVICE, dtype=torch.float64)
    height, width = (side * options["strides"][0] for side in case.feat_shapes[0])
    labels, boxes, mask = ref.pad_targets(rows, len(dist), (height, width))
    metric, overlaps = ref.align_metric(
        scores.sigmoid(),
        ref.decode_dfl(dist, points, reg_max=options["reg_max"], strides=strides),
        points * strides[:, None], labels, ref.xywh_to_xyxy(boxes), mask,
        alpha=options["alpha"], beta=options["beta"], min_box_side=options["min_box_side"],
    )  # fmt: skip
    computed_in = torch.float64 if case.pred_dist.dtype == torch.float64 else torch.float32
    return is_assignment_decided(metric, overlaps, options["topk"], options["topk2"], computed_in)


def check_yolo11(case: strat.YOLO11Case) -> None:
    assume(is_yolo11_decided(case))
    dtype = case.pred_dist.dtype
    value_tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    criterion = yolo11(case)
    out, grads = with_gradients(
        lambda d, s: criterion(d, s, case.feat_shapes, case.rows.to(dtype) if dtype == torch.float64 else case.rows),
        case.pred_dist, case.pred_scores,
    )  # fmt: skip
    expected, expected_grads = with_gradients(
        lambda d, s: ref.yolo11_loss(d, s, case.feat_shapes, case.rows, **case.options),
        case.pred_dist.double(), case.pred_scores.double(),
    )  # fmt: skip
    assert out.num_fg == expected.num_fg
    for name in ("loss", "box", "cls", "dfl"):
        assert_close(getattr(out, name), getattr(expected, name), name, value_tolerance)
    for name, pred, grad, expected_grad in zip(
        ("pred_dist", "pred_scores"), (case.pred_dist, case.pred_scores), grads, expected_grads, strict=True
    ):
        assert grad.dtype == pred.dtype
        assert_close(grad, expected_grad, f"gradient of {name}")


@given(strat.yolo11_cases())
def test_yolo11_loss(case):
    check_yolo11(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@given(data=st.data())
def test_yolo11_loss_in_other_types(dtype, data):
    check_yolo11(data.draw(strat.yolo11_cases(dtype)))


def check_yolox(case: strat.YOLOXCase) -> None:
    dtype = case.preds.dtype
    value_tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    wide, rows = case.preds.double(), case.rows.double()
    strides = case.options["strides"]
    points, point_strides = ref.make_anchors(case.feat_shapes, strides, device=DEVICE, dtype=torch.float64)
    labels, boxes, mask = ref.pad_targets(rows, len(wide), tuple(side * strides[0] for side in case.feat_shapes[0]))
    args = (
        wide[..., 5:], wide[..., 4], ref.decode_yolox(wide, points, point_strides), points * point_strides[:, None],
        point_strides, labels, ref.xywh_to_xyxy(boxes), mask,
    )  # fmt: skip
    assume(is_simota_decided(case, args, case.options))
    criterion = yolox(case)
    rows = rows if dtype == torch.float64 else case.rows
    out, (grad,) = with_gradients(lambda p: criterion(p, case.feat_shapes, rows), case.preds)
    expected, (expected_grad,) = with_gradients(lambda p: ref.yolox_loss(p, case.feat_shapes, rows, **case.options), wide)
    assert_close(out.num_fg, expected.num_fg, "num_fg", 1e-6)
    for name in ("loss", "iou", "obj", "cls", "l1"):
        assert_close(getattr(out, name), getattr(expected, name), name, value_tolerance)
    assert grad.dtype == dtype
    assert_close(grad, expected_grad, "gradient")


@given(strat.yolox_cases())
def test_yolox_loss(case):
    check_yolox(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@given(data=st.data())
def test_yolox_loss_in_other_types(dtype, data):
    check_yolox(data.draw(strat.yolox_cases(dtype)))


@FEW
@given(strat.yolo11_cases())
def test_yolo11_invariants(case):
    criterion = yolo11(case)

    def run(dist, scores, rows):
        return with_gradients(lambda d, s: criterion(d, s, case.feat_shapes, rows), dist, scores)

    out, grads = run(case.pred_dist, case.pred_scores, case.rows)
    assert min(out.loss, out.box, out.cls, out.dfl) >= 0
    assert (grads[0].flatten(2).abs().sum(-1) > 0).sum() <= out.num_fg

    # The same to the bit in every run.
    again, grads_again = run(case.pred_dist, case.pred_scores, case.rows)
    assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*again, *grads_again), strict=True))

    # Images permuted permute the gradients.
    batch_size = len(case.pred_dist)
    order = torch.arange(batch_size, device=DEVICE).roll(1)
    rows = case.rows.clone()
    rows[:, 0] = torch.where(rows[:, 0] >= 0, (rows[:, 0] + 1) % batch_size, rows[:, 0])
    rolled, grads_rolled = run(case.pred_dist[order], case.pred_scores[order], rows)
    assert_close(rolled.loss, out.loss, tolerance=TOLERANCE[torch.float32])
    for a, b in zip(grads_rolled, grads, strict=True):
        assert_close(a, b[order], "gradient of permuted images", tolerance=TOLERANCE[torch.float32])


@FEW
@given(strat.yolo11_cases())
def test_every_form_of_the_targets_gives_the_same_loss(case):
    criterion = yolo11(case)
    imgsz = [int(side * case.options["strides"][0]) for side in case.feat_shapes[0]]
    expected = criterion(case.pred_dist, case.pred_scores, case.feat_shapes, case.rows)

    packed = ty.Targets.from_yolo(case.rows, imgsz)
    padding = torch.tensor([[-1.0, 0, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    with_padding = torch.cat([padding, case.rows, padding.expand(2, -1)])
    of_image = [packed.image_index == image for image in range(len(case.pred_dist))]
    as_list = ty.Targets.from_list([{"boxes": packed.boxes_xyxy[m], "labels": packed.labels[m]} for m in of_image])
    num_slots = max(int(m.sum()) for m in of_image)
    labels = torch.zeros(len(of_image), num_slots, 1, device=DEVICE).long()
    boxes, mask = labels.new_zeros(len(of_image), num_slots, 4).float(), labels.bool()
    for image, m in enumerate(of_image):
        labels[image, : m.sum(), 0], mask[image, : m.sum(), 0] = packed.labels[m], True
        boxes[image, : m.sum()] = packed.boxes_xyxy[m]
    padded = [
        ty.Targets.from_padded(labels, boxes, mask),
        ty.Targets.from_padded(labels.squeeze(-1), boxes),
        ty.Targets.from_padded(labels, ref.xyxy_to_xywh(boxes), mask.squeeze(-1), box_format="xywh"),
    ]
    for targets in (packed, with_padding, as_list, *padded):
        out = criterion(case.pred_dist, case.pred_scores, case.feat_shapes, targets)
        assert_same_but_for_order(out, expected)


@FEW
@given(strat.yolox_cases())
def test_yolox_invariants(case):
    criterion = yolox(case)
    out, (grad,) = with_gradients(lambda p: criterion(p, case.feat_shapes, case.rows), case.preds)
    assert min(out.loss, out.iou, out.obj, out.cls, out.l1) >= 0
    is_positive = grad[..., 5:].abs().sum(-1) > 0
    assert (grad[..., :4].abs().sum(-1) > 0).sum() <= is_positive.sum()
    again, (grad_again,) = with_gradients(lambda p: criterion(p, case.feat_shapes, case.rows), case.preds)
    assert all(torch.equal(a, b) for a, b in zip((*out, grad), (*again, grad_again), strict=True))
    padding = torch.full((2, 6), -1.0, device=DEVICE)
    padded, (grad_padded,) = with_gradients(
        lambda p: criterion(p, case.feat_shapes, torch.cat([padding, case.rows])), case.preds
    )
    assert_same_but_for_order(padded, out)
    assert torch.equal(grad_padded, grad)


def small_yolo11(num_rows: int = 3, **options):
    torch.manual_seed(0)
    dist, scores = torch.randn(2, 20, 32, device=DEVICE), torch.randn(2, 20, 3, device=DEVICE)
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.7, 0.6], [1, 2, 0.4, 0.5, 0.5, 0.8], [0, 0, 0.3, 0.4, 0.4, 0.4]], device=DEVICE)
    return ty.YOLO11Loss(3, strides=(8, 16), reg_max=8, **options), dist, scores, [(4, 4), (2, 2)], rows[:num_rows]


def small_yolox(**options):
    torch.manual_seed(0)
    rows = torch.tensor([[0, 1, 0.5, 0.5, 0.7, 0.6], [1, 2, 0.4, 0.5, 0.5, 0.8], [0, 0, 0.3, 0.4, 0.4, 0.4]], device=DEVICE)
    return ty.YOLOXLoss(3, strides=(8, 16), **options), torch.randn(2, 20, 8, device=DEVICE), [(4, 4), (2, 2)], rows


@pytest.mark.parametrize("seed", range(5))
def test_crowded_batch_is_cut_by_images_without_a_trace(seed, monkeypatch):
    """Numbers at the end of a piece are computed one by one, which PyTorch rounds otherwise: values differ by an ulp."""
    from triton_yolo.eager import pairs

    torch.manual_seed(seed)
    preds = torch.randn(5, 20, 32, device=DEVICE), torch.randn(5, 20, 3, device=DEVICE)
    rows = torch.rand(40, 6, device=DEVICE)
    rows[:, 0], rows[:, 1] = torch.randint(-1, 4, (40,)), torch.randint(0, 3, (40,))  # image 4 has none
    criterion = ty.YOLO11Loss(3, strides=(8, 16), reg_max=8, topk=3)
    checked = criterion._checked(dict(zip(("pred_dist", "pred_scores"), preds, strict=True)), [(4, 4), (2, 2)])
    whole, row = criterion._with_rows(*checked, rows)
    assert whole.num_fg > 15
    monkeypatch.setattr(pairs, "_PART", 60)
    cut, row_of_cut = criterion._with_rows(*checked, rows)
    assert torch.equal(row_of_cut, row)
    torch.testing.assert_close(tuple(cut), tuple(whole), rtol=3e-7, atol=0)


BY = pytest.mark.parametrize("by", ["package", "reference"])


def loss_by(by: str, system: str, num_classes: int, **options):
    """A criterion of the package or of the reference, as a function of predictions, levels and rows."""
    if by == "package":
        return (ty.YOLO11Loss if system == "yolo11" else ty.YOLOXLoss)(num_classes, **options)
    return functools.partial(ref.yolo11_loss if system == "yolo11" else ref.yolox_loss, **options)


def check_is_nothing_but_nan(out, grads):
    """The loss, its terms and every gradient are NaN."""
    assert all(x.isnan() for x in out[:-1])
    assert all(grad.isnan().all() for grad in grads)


NOT_FINITE = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])


@BY
@NOT_FINITE
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_yolo11_shows_a_prediction_that_is_no_number(by, bad, which, num_rows):
    _, *preds, shapes, rows = small_yolo11(num_rows)
    criterion = loss_by(by, "yolo11", 3, strides=(8, 16), reg_max=8)
    for anchor in (0, 5, 19):
        broken = [p.clone() for p in preds]
        broken[which][1, anchor, 2] = bad
        check_is_nothing_but_nan(*with_gradients(lambda d, s: criterion(d, s, shapes, rows), *broken))
    assert criterion(*preds, shapes, rows).loss.isfinite()


@BY
@NOT_FINITE
@pytest.mark.parametrize("channel", [0, 3, 4, 6])
def test_yolox_shows_a_prediction_that_is_no_number_where_it_takes_part_in_the_loss(by, bad, channel):
    _, preds, shapes, rows = small_yolox()
    criterion = loss_by(by, "yolox", 3, strides=(8, 16))
    clean, (clean_grad,) = with_gradients(lambda p: criterion(p, shapes, rows), preds)
    found = []
    for anchor in (0, 2, 5, 7, 10, 13, 15, 16, 18):
        broken = preds.clone()
        broken[1, anchor, channel] = bad
        found.append(bool(ref.yolox_assign(broken, shapes, rows, strides=(8, 16)).fg_mask[1, anchor]))
        out, grads = with_gradients(lambda p: criterion(p, shapes, rows), broken)
        if found[-1] or channel == 4:
            check_is_nothing_but_nan(out, grads)
            assert out.num_fg.isfinite()
        else:
            assert out.loss.isfinite()
            assert grads[0].isfinite().all()
            # Outside of the region of image 1's box, whose centre is (12.8, 16): cells 0-2 x 1-2 and the second level.
            if anchor in (0, 7, 15):
                assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*clean, clean_grad), strict=True))
    if DEVICE.type == "cpu":  # elsewhere random numbers are others
        assert found.count(True) == ((channel, bad) in [(4, torch.inf), (6, torch.inf), (6, -torch.inf)])


@BY
@pytest.mark.parametrize(
    ("places", "bad", "expected"),
    [
        ([], 0.0, 3 * math.log(2)),
        ([(1, 5), (1, 0), (1, 2)], torch.nan, 3 * math.log(2)),  # of the cell that is not chosen
        ([(1, 5)], torch.inf, 3 * math.log(2)),
        ([(0, 5)], torch.nan, 3.75 + 3 * math.log(2)),  # the other is chosen in its place
        ([(0, 5)], -torch.inf, 3.75 + 3 * math.log(2)),
        ([(0, 2)], torch.nan, 3.75 + 3 * math.log(2)),
        ([(0, 5)], torch.inf, torch.nan),  # costs less, is chosen
        ([(0, 5), (1, 5)], torch.nan, torch.nan),  # one has to be chosen
        ([(0, 4)], -torch.inf, torch.nan),
        ([(1, 4)], torch.inf, torch.nan),
    ],
)
def test_only_a_chosen_cell_shows_that_its_logits_are_no_numbers(by, places, bad, expected):
    """Two cells with logits of 0 in the region of a box of 8 x 8 px: one predicts the box, the other one twice as wide; k is 1.

    Two objectness logits and a class logit of 0 cost log 2 each; an IoU of 1/2 costs 5 * (1 - 1/4).
    """
    preds = torch.zeros(1, 2, 6, device=DEVICE)
    preds[0, 0, :2], preds[0, 1, :3] = preds.new_tensor([1.0, 0.5]), preds.new_tensor([0.0, 0.5, math.log(2)])
    for cell, channel in places:
        preds[0, cell, channel] = bad
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 1.0]], device=DEVICE)
    criterion = loss_by(by, "yolox", 1, strides=(8,))
    out, grads = with_gradients(lambda p: criterion(p, [(1, 2)], rows), preds)
    if math.isnan(expected):
        check_is_nothing_but_nan(out, grads)
    else:
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert grads[0].isfinite().all()
    assert out.num_fg == 1


@NOT_FINITE
@pytest.mark.parametrize("channel", [0, 3, 4, 6])
def test_a_broken_image_of_yolox_does_not_disturb_the_assignment_of_another(bad, channel):
    _, preds, shapes, rows = small_yolox()
    levels = Levels(tuple(side for shape in shapes for side in shape), (8.0, 16.0))
    x = YOLOXAssign(preds, [rows], levels, SimOTA("center", 1.5))
    clean = _ops.yolox_assign(x)
    preds[1, :, channel] = bad
    broken = _ops.yolox_assign(x)
    assert torch.equal(broken.target_row[0], clean.target_row[0])
    assert broken.counts[2] == 1


@BY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_masked_class_costs_nothing(by, dtype):
    scores = torch.zeros(1, 4, 2, dtype=dtype, device=DEVICE)
    scores[..., 1] = torch.finfo(dtype).min
    criterion = loss_by(by, "yolo11", 2, strides=(8,))
    out, grads = with_gradients(
        lambda d, s: criterion(d, s, [(2, 2)], torch.zeros(0, 6, device=DEVICE)),
        torch.zeros(1, 4, 64, dtype=dtype, device=DEVICE), scores,
    )  # fmt: skip
    # Four cells with one logit of 0: 0.5 * 4 * log 2; its gradient is 0.5 * (1/2 - 0).
    assert out.loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert grads[0].abs().sum() == 0
    assert grads[1].tolist() == [[[0.25, 0.0]] * 4]


@pytest.mark.parametrize("logit", [-12.0, 0.0, 19.9, 30.0, 60.0])
def test_without_targets_every_logit_costs_its_softplus(logit):
    """Of nine anchors and two classes: 0.5 * 18 * log(1 + exp(logit))."""
    criterion = ty.YOLO11Loss(2, strides=(8,), reg_max=1)
    preds = torch.zeros(1, 9, 4, device=DEVICE), torch.full((1, 9, 2), logit, device=DEVICE)
    loss = criterion(*preds, [(3, 3)], torch.zeros(0, 6, device=DEVICE)).loss
    assert loss.item() == pytest.approx(9 * math.log1p(math.exp(logit)), rel=1e-6)


@BY
def test_large_logits_of_yolo11_are_as_good_as_any(by):
    """What is masked counts as with -1e4, whose exponential is 0 too; a box as wide as any number is nobody's."""
    lowest, rows = torch.finfo(torch.float32).min, small_yolo11()[-1]
    _, dist, scores, shapes, _ = small_yolo11()
    criterion = loss_by(by, "yolo11", 3, strides=(8, 16), reg_max=8)
    found = []
    for masked in (-1e4, lowest):
        dist.unflatten(2, (4, 8))[..., 6:], scores[:, ::3, 0] = masked, masked
        scores[1, 2, 1] = 1e4
        found.append(with_gradients(lambda d, s: criterion(d, s, shapes, rows), dist, scores))
    (want, want_grads), (have, have_grads) = found
    assert have.num_fg == want.num_fg > 3
    assert all(torch.equal(a, b) for a, b in zip((*have, *have_grads), (*want, *want_grads), strict=True))

    # 0.5 * 2e38 for one logit of the largest numbers that has no target.
    scores = torch.zeros(1, 4, 1, device=DEVICE)
    scores[0, 1] = 2e38
    criterion = loss_by(by, "yolo11", 1, strides=(8,), reg_max=8)
    out, grads = with_gradients(lambda d, s: criterion(d, s, [(2, 2)], rows[:0]), torch.zeros(1, 4, 32, device=DEVICE), scores)
    assert out.loss.item() == pytest.approx(1e38)
    assert grads[1].flatten().tolist() == [0.25, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("off", [{"cls_gain": 0.0}, {"class_weights": torch.tensor([0.0, 1.0])}], ids=["gain", "weight"])
def test_what_has_no_weight_costs_nothing_where_its_sum_overflows(off):
    scores = torch.zeros(1, 4, 2, device=DEVICE)
    scores[..., 0] = 3e38
    criterion = ty.YOLO11Loss(2, strides=(8,), **off).to(DEVICE)
    out, (_, grad) = with_gradients(
        lambda d, s: criterion(d, s, [(2, 2)], torch.zeros(0, 6, device=DEVICE)), torch.zeros(1, 4, 64, device=DEVICE), scores
    )
    # What is left is 0.5 * log 2 at four cells.
    assert out.loss.item() == pytest.approx(0.0 if "cls_gain" in off else 2 * math.log(2), rel=1e-6)
    assert grad.tolist() == [[[0.0, 0.0 if "cls_gain" in off else 0.25]] * 4]


@BY
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_one_distance_of_the_largest_numbers_is_nobodys(by, value):
    torch.manual_seed(0)
    criterion = loss_by(by, "yolo11", 3, strides=(8, 16), reg_max=1)
    _, _, scores, shapes, rows = small_yolo11()
    found = []
    for distance in (-50.0, value):  # no overlap with anything
        dist = torch.full((2, 20, 4), 1.5, device=DEVICE)
        dist[:, 5, 1] = distance
        found.append(with_gradients(lambda d, s: criterion(d, s, shapes, rows), dist, scores))
    (want, want_grads), (have, have_grads) = found
    assert have.num_fg == want.num_fg > 3
    assert all(torch.equal(a, b) for a, b in zip((*have, *have_grads), (*want, *want_grads), strict=True))


@BY
def test_masked_objectness_costs_nothing(by):
    preds = torch.zeros(1, 4, 7, device=DEVICE)
    preds[0, 0, 4], preds[0, 1, 5] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    criterion = loss_by(by, "yolox", 2, strides=(8,))
    out, (grad,) = with_gradients(lambda p: criterion(p, [(2, 2)], torch.zeros(0, 6, device=DEVICE)), preds)
    assert out.loss.item() == pytest.approx(3 * math.log(2))
    assert grad[0, :, 4].tolist() == [0.0, 0.5, 0.5, 0.5]
    assert grad[..., [0, 1, 2, 3, 5, 6]].abs().sum() == 0


@BY
@pytest.mark.parametrize(("channel", "value"), [(0, 3e38), (1, -3e38), (2, 100.0), (3, 3e38)])
@pytest.mark.parametrize(("iou_loss", "worst"), [("iou", 1), ("giou", 2)])
def test_a_box_of_yolox_that_overflows_overlaps_nothing(by, channel, value, iou_loss, worst):
    """One anchor takes part and is the positive; its class target is the IoU, 0."""
    preds = torch.zeros(1, 1, 6, device=DEVICE)
    preds[0, 0, channel], preds[0, 0, 4] = value, 3e38
    criterion = loss_by(by, "yolox", 1, strides=(8,), iou_loss=iou_loss)
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]], device=DEVICE)
    out, (grad,) = with_gradients(lambda p: criterion(p, [(1, 1)], rows), preds)
    assert out.num_fg == 1
    assert out.obj == 0
    assert out.iou.item() == pytest.approx(5 * worst)
    assert out.cls.item() == pytest.approx(math.log(2))
    assert grad.tolist() == [[[0.0, 0.0, 0.0, 0.0, 0.0, 0.5]]]


@pytest.mark.parametrize("side", [1e15, 1e20, 3e38])
@pytest.mark.parametrize("options", [{}, {"candidates": "box_and_center", "center_radius": 2.5}])
@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_a_huge_box_changes_no_other_image(system, side, options):
    torch.manual_seed(0)
    shapes, num_images = [(4, 4), (2, 2)], 6
    boxes = torch.tensor([[2.0, 2, 28, 30]]).repeat(num_images, 1)
    boxes[:-1:2] = torch.tensor([-side / 2, -side / 2, side / 2, side / 2])
    targets = ty.Targets.from_padded(torch.zeros(num_images, 1).long(), boxes[:, None])
    targets = ty.Targets(*(x.to(DEVICE) for x in targets))
    if system == "yolo11":
        preds = torch.rand(num_images, 20, 32, device=DEVICE), torch.randn(num_images, 20, 1, device=DEVICE)
        criterion = ty.YOLO11Loss(1, strides=(8, 16), reg_max=8, **({"min_box_side": 16.0} if options else {}))
    else:
        preds = (torch.randn(num_images, 20, 6, device=DEVICE),)
        criterion = ty.YOLOXLoss(1, strides=(8, 16), **options)
    whole, grads = with_gradients(lambda *p: criterion(*p, shapes, targets), *preds)
    assert whole.loss.isfinite()
    for image in (1, 3, 5):
        alone = ty.Targets(torch.zeros_like(targets.image_index[:1]), *(x[image : image + 1] for x in targets[1:]))
        _, own = with_gradients(lambda *p, t=alone: criterion(*p, shapes, t), *(p[image : image + 1] for p in preds))
        is_positive = own[0].flatten(2)[..., :4].abs().sum(-1) > 0
        assert is_positive.any()
        assert torch.equal(grads[0][image : image + 1, :, :4].abs().sum(-1) > 0, is_positive)


@BY
@pytest.mark.parametrize("stride", [3.5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_prediction_of_a_fractional_image_costs_nothing(by, stride, dtype):
    """15 cells of 3 x 5, and the box is the image: 1 for every IoU, 0 for every distance."""
    points = torch.cartesian_prod(torch.arange(3), torch.arange(5)).flip(-1).to(DEVICE, dtype) + 0.5  # (x, y) of each cell
    rows = torch.tensor([[0, 0, 0.5, 0.5, 1, 1]], dtype=dtype, device=DEVICE)
    to_sides = torch.cat([points, torch.tensor([5, 3], device=DEVICE) - points], -1)[None]
    criterion = loss_by(by, "yolo11", 1, strides=(stride,), reg_max=1)
    out = criterion(to_sides, torch.zeros(1, 15, 1, dtype=dtype, device=DEVICE), [(3, 5)], rows)
    assert out.num_fg == 10
    assert out.box.item() == pytest.approx(0, abs=1e-5)
    assert out.dfl.item() == pytest.approx(0, abs=1e-9 if dtype == torch.float64 else 1e-5)
    # Ten scores of 1, of which a logit of 0 takes nothing.
    assert out.loss.item() == pytest.approx(0.5 * 15 * math.log(2) / 10, rel=1e-4)

    preds = torch.zeros(1, 15, 6, dtype=dtype, device=DEVICE)
    preds[..., :2] = torch.tensor([2.5, 1.5], device=DEVICE) - (points - 0.5)
    preds[..., 2:4] = torch.tensor([5.0, 3.0], device=DEVICE).log()
    out = loss_by(by, "yolox", 1, strides=(stride,), use_l1=True)(preds, [(3, 5)], rows)
    assert out.num_fg in (8, 9)  # the 3 x 3 cells around the centre, less one where an IoU of 1 is rounded down
    assert out.iou.item() == pytest.approx(0, abs=1e-5)
    assert out.l1.item() == pytest.approx(0, abs=1e-5)
    assert out.loss.item() == pytest.approx(15 * math.log(2) / out.num_fg.item() + math.log(2), rel=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_yolo11_computes_predictions_of_two_types_in_the_wider(which):
    criterion, *preds, shapes, rows = small_yolo11()
    mixed = [p.double() if i == which else p for i, p in enumerate(preds)]
    have, grads = with_gradients(lambda d, s: criterion(d, s, shapes, rows), *mixed)
    want, want_grads = with_gradients(lambda d, s: criterion(d, s, shapes, rows), *(p.double() for p in preds))
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    for grad, want_grad, pred in zip(grads, want_grads, mixed, strict=True):
        assert grad.dtype == pred.dtype
        assert torch.equal(grad, want_grad.to(pred.dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_image_does_not_disturb_the_assignment_of_another(bad):
    assigner = ty.TaskAlignedAssigner(num_classes=2)
    points, strides = ty.make_anchors([(4, 4)], (8,), device=DEVICE)
    points = points * strides[:, None]
    boxes = torch.cat([points - 8, points + 9], -1).repeat(2, 1, 1)
    scores = torch.full((2, 16, 2), 0.5, device=DEVICE)
    gt, labels = torch.tensor([[[4.0, 4, 28, 28]]] * 2, device=DEVICE), torch.zeros(2, 1, device=DEVICE).long()
    mask = torch.ones(2, 1, device=DEVICE).bool()
    clean = assigner(scores, boxes, points, labels, gt, mask)
    boxes[0] = bad
    scores[0, 3] = bad
    broken = assigner(scores, boxes, points, labels, gt, mask)
    assert not broken.fg_mask[0].any()
    for a, b in zip(clean, broken, strict=True):
        assert torch.equal(a[1], b[1])


def test_huge_raw_sizes_of_yolox_overlap_nothing_and_hurt_nobody():
    criterion, preds, shapes, rows = small_yolox()
    preds[0, :, 2:4] = 100.0
    preds[1, :, 2:4] = -200.0
    out, (grad,) = with_gradients(lambda p: criterion(p, shapes, rows), preds)
    assert out.iou.isfinite()
    assert out.loss.isfinite()
    assert grad[..., 4:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype):
    criterion, dist, scores, shapes, rows = small_yolo11()
    dist, scores = (100 * dist).to(dtype), (100 * scores).to(dtype)
    out, grads = with_gradients(lambda d, s: criterion(d, s, shapes, rows), dist, scores)
    options = dict(strides=(8, 16), reg_max=8)
    expected, expected_grads = with_gradients(
        lambda d, s: ref.yolo11_loss(d, s, shapes, rows, **options), dist.float(), scores.float()
    )  # in float32, as the specification says: there a metric underflows to 0
    assert_close(out.loss, expected.loss)
    for a, b in zip(grads, expected_grads, strict=True):
        assert_close(a, b)


def test_empty_batch_of_images_and_no_rows():
    criterion, dist, scores, shapes, rows = small_yolo11()
    out, grads = with_gradients(lambda d, s: criterion(d, s, shapes, rows[:0]), dist, scores)
    assert out.num_fg == out.box == out.dfl == 0
    assert grads[0].abs().sum() == 0
    assert (grads[1] > 0).all()
    out, grads = with_gradients(lambda d, s: criterion(d, s, shapes, rows[:0]), dist[:0], scores[:0])
    assert out.loss == 0
    assert grads[1].shape == (0, 20, 3)
    criterion, preds, shapes, rows = small_yolox()
    assert criterion(preds, shapes, rows[:0]).num_fg == 0
    assert criterion(preds[:0], shapes, rows[:0]).loss == 0


def test_more_boxes_than_anchors_and_topk_above_all():
    criterion, dist, scores, shapes, rows = small_yolo11(topk=99)
    many = rows.repeat(20, 1)
    many[:, 2:4] += torch.linspace(-0.2, 0.2, 60, device=DEVICE)[:, None]
    options = dict(strides=(8, 16), reg_max=8, topk=99)
    assert_close(criterion(dist, scores, shapes, many).loss, ref.yolo11_loss(dist, scores, shapes, many, **options).loss)
    criterion, preds, shapes, _ = small_yolox()
    assert_close(criterion(preds, shapes, many).loss, ref.yolox_loss(preds, shapes, many, strides=(8, 16)).loss)


def test_only_the_loss_has_a_gradient():
    criterion, dist, scores, shapes, rows = small_yolo11()
    out = criterion(dist.requires_grad_(), scores, shapes, rows)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    criterion, preds, shapes, rows = small_yolox(use_l1=True)
    out = criterion(preds.requires_grad_(), shapes, rows)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])


def test_gradients_scale_with_the_incoming_one_and_keep_the_layout():
    criterion, dist, scores, shapes, rows = small_yolo11()
    dist = dist.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(criterion(dist, scores, shapes, rows).loss, dist)
    (half,) = torch.autograd.grad(0.5 * criterion(dist, scores, shapes, rows).loss, dist)
    assert_close(2 * half, grad)
    assert grad.stride() == dist.stride()


def test_l1_switches_on_at_any_time():
    criterion, preds, shapes, rows = small_yolox()
    assert criterion(preds, shapes, rows).l1 == 0
    criterion.use_l1 = True
    out = criterion(preds, shapes, rows)
    assert_close(out.l1, ref.yolox_loss(preds, shapes, rows, strides=(8, 16), use_l1=True).l1)
    assert out.l1 > 0


def test_autocast_changes_nothing():
    criterion, dist, scores, shapes, rows = small_yolo11()
    expected = criterion(dist, scores, shapes, rows)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = criterion(dist, scores, shapes, rows)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    criterion, preds, shapes, rows = small_yolox(use_l1=True)
    expected = criterion(preds, shapes, rows)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = criterion(preds, shapes, rows)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_inputs_are_left_as_they_were():
    criterion, dist, scores, shapes, rows = small_yolo11()
    before = [x.clone() for x in (dist, scores, rows)]
    with_gradients(lambda d, s: criterion(d, s, shapes, rows), dist, scores)
    assert all(torch.equal(a, b) for a, b in zip((dist, scores, rows), before, strict=True))
    criterion, preds, shapes, rows = small_yolox(use_l1=True)
    before = [x.clone() for x in (preds, rows)]
    with_gradients(lambda p: criterion(p, shapes, rows), preds)
    assert all(torch.equal(a, b) for a, b in zip((preds, rows), before, strict=True))


def test_criteria_carry_no_state_and_survive_copying():
    criterion, dist, scores, shapes, rows = small_yolo11(class_weights=torch.tensor([1.0, 2.0, 0.5], device=DEVICE))
    assert criterion.state_dict() == {}
    expected = criterion(dist, scores, shapes, rows).loss
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(dist, scores, shapes, rows).loss, expected)
    assert "num_classes=3" in repr(criterion)
    assert "center" in repr(small_yolox()[0])


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_thousands_of_boxes_in_an_image(system):
    torch.manual_seed(0)
    shapes = [(40, 40), (20, 20), (10, 10)]
    num_anchors = sum(h * w for h, w in shapes)
    rows = torch.rand(1000 if INTERPRETED else 5000, 6, device=DEVICE)
    rows[:, 0], rows[:, 1], rows[:, 4:] = 0, 0, rows[:, 4:] * 0.1 + 0.01
    if system == "yolo11":
        preds = torch.randn(1, num_anchors, 64, device=DEVICE), torch.randn(1, num_anchors, 2, device=DEVICE)
        criterion = ty.YOLO11Loss(2)
    else:
        preds, criterion = (torch.randn(1, num_anchors, 7, device=DEVICE),), ty.YOLOXLoss(2)
    out = criterion(*preds, shapes, rows)
    with ty.backend("eager"):
        eager = criterion(*preds, shapes, rows)
    assert out.loss.isfinite()
    assert out.num_fg == eager.num_fg > 0
    assert_close(out.loss, eager.loss, "loss")
