"""Numbers that only a kernel could get wrong: float64 keys, no number, addresses past 2^31."""

import pytest
import torch
import triton
import triton.language as tl

import triton_yolo as ty
from tests.compare import OF_A_FUNCTION
from tests.kernels import cases
from tests.kernels.cases import (
    assign,
    far_memory,
    laid_out,
    loss,
    make_case,
    make_yolox_case,
    x_assign,
    x_loss,
)  # fmt: skip
from tests.operations import gradient_of, same
from tests.tools.meter import Meter
from triton_yolo import eager, kernels
from triton_yolo._signatures import DecodeYOLOX, SelectTopk
from triton_yolo.kernels.boxes import log_not

pytestmark = pytest.mark.usefixtures("interpreted")


def test_float64_metrics_are_compared_in_float64():
    metric = torch.full((1, 2, 6), 0.5, dtype=torch.float64)
    metric[0, 0] += torch.tensor([0, 1, 3, 2, 3, 1]) * 2.0**-50
    selected = kernels.select_topk_candidates(SelectTopk(metric, 2, None)).selected[0]
    assert selected[0].tolist() == [False, False, True, False, True, False]
    assert selected[1].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_better_one_displaces_the_last_of_equals(dtype, shipped_sizes):
    metric = torch.zeros(1, 1, 1100, dtype=dtype)
    metric[..., [3, 40, 41, 500]], metric[..., 1000] = 0.5, 0.75  # in another tile
    selected = kernels.select_topk_candidates(SelectTopk(metric, 3, None)).selected
    assert selected.nonzero()[:, 2].tolist() == [3, 40, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_overlaps_go_to_the_lower_row_whatever_the_order(dtype):
    case = make_case(0, dtype=dtype, num_rows=6)
    boxes = case.gt_boxes.new_tensor([4.0, 4.0, 30.0, 36.0]).expand(6, 4).contiguous()
    case = case._replace(image_index=torch.tensor([1, 0, 1, 0, 1, 0]), labels=torch.zeros(6, dtype=torch.int64), gt_boxes=boxes)
    target_row = kernels.yolo11_assign(assign(case)).target_row
    assert set(target_row[0].tolist()) == {-1, 1}
    assert set(target_row[1].tolist()) == {-1, 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contested_anchor_goes_to_the_higher_overlap_in_either_order(dtype):
    case = make_case(0, dtype=dtype, num_rows=2)
    boxes = case.gt_boxes.new_tensor([[2.0, 2.0, 24.0, 26.0], [8.0, 12.0, 30.0, 38.0]])
    case = case._replace(image_index=torch.tensor([0, 0]), labels=torch.tensor([1, 1]))
    found = []
    for order in ([0, 1], [1, 0]):
        x = assign(case._replace(gt_boxes=boxes[order]))
        target_row = kernels.yolo11_assign(x).target_row
        assert torch.equal(target_row, eager.yolo11_assign(x).target_row)
        found.append(torch.where(target_row < 0, -1, torch.tensor([*order, -1])[target_row.long()]))
    assert torch.equal(*found)
    assert set(found[0].unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("topk2", [None, 1])
@pytest.mark.usefixtures("meter")
def test_small_boxes_among_many_that_want_the_same_anchors(dtype, topk2):
    """Anchors are claimed by more than two rows, and a small box has fewer cells than its image contested ones."""
    large = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) * 8 + torch.tensor([-4.0, -4.0, 24.0, 32.0])
    corners = torch.tensor([[3.0, 3.0], [11.0, 11.0], [3.0, 19.0], [19.0, 11.0]])
    boxes = torch.cat([large, torch.cat([corners, corners + 10], 1)]).to(dtype)
    case = make_case(0, dtype=dtype, reg_max=1, num_classes=1, num_rows=16)
    case = case._replace(dist=case.dist.abs() / 4 + 0.5, image_index=torch.zeros(16, dtype=torch.int64), gt_boxes=boxes)
    x = assign(case, topk2=topk2)
    have, want = kernels.yolo11_assign(x), eager.yolo11_assign(x)
    assert torch.equal(have.target_row, want.target_row)
    assert have.num_fg == want.num_fg
    torch.testing.assert_close(have.target_score, want.target_score)
    torch.testing.assert_close(have.sums, want.sums)
    assert {12, 13, 14, 15} <= set(want.target_row.unique().tolist())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["dist", "scores"])
def test_no_number_stays_at_its_anchor(value, which):
    case = make_case(1)
    clean = kernels.yolo11_assign(assign(case, topk=3))
    background = (clean.target_row[0] < 0).nonzero()[0, 0]
    getattr(case, which)[0, background, 0] = value
    have, want = kernels.yolo11_assign(assign(case, topk=3)), eager.yolo11_assign(assign(case, topk=3))
    assert torch.equal(have.target_row, want.target_row)
    assert have.sums.isnan().tolist() == [which == "dist", False]
    x = loss(case, have)
    out = kernels.yolo11_loss(x)
    assert out.loss.isnan()
    assert all(term.isnan() for term in out.terms)
    assert out.held[0].isnan()
    assert all(grad.isnan().all() for grad in kernels.yolo11_loss_backward(gradient_of(x, out)))


def test_short_sides_are_widened_for_the_candidate_test():
    case = make_case(1, reg_max=1, num_rows=1)
    boxes = torch.tensor([[9.0, 9.0, 14.0, 18.0]])
    case = case._replace(dist=case.dist.abs() + 0.5, image_index=torch.tensor([0]), gt_boxes=boxes)
    found = []
    for min_box_side in (0.0, 8.0, 16.0):
        x = assign(case, min_box_side=min_box_side)
        have, want = kernels.yolo11_assign(x), eager.yolo11_assign(x)
        assert torch.equal(have.target_row, want.target_row)
        found.append(int(have.num_fg))
    assert found[0] < found[2]


def test_infinite_logit_of_a_positive_shows_in_the_loss():
    case = make_case(1)
    assignment = kernels.yolo11_assign(assign(case))
    row, score, *_ = assignment
    image, anchor = ((row >= 0) & (score > 0)).nonzero()[0]
    case.scores[image, anchor, case.labels[row[image, anchor]]] = -torch.inf
    assert all(term.isnan() for term in kernels.yolo11_loss(loss(case, assignment)).terms)


def test_addresses_past_two_to_the_31():
    """Strides that put the second image 2^31 elements behind the first, and the last channel as far behind that."""
    case = make_case(2, dtype=torch.float16)
    far = far_memory()

    def spread(x: torch.Tensor, start: int) -> torch.Tensor:
        stride_c = 2**31 // (x.shape[2] - 1) + 64
        return far[start:].as_strided(x.shape, (2**31, 1, stride_c)).copy_(x)

    dist, scores = spread(case.dist, 0), spread(case.scores, 2**19)
    far_case = case._replace(dist=dist, scores=scores)
    case = case._replace(dist=laid_out(case.dist, "last"), scores=laid_out(case.scores, "last"))
    assignment = kernels.yolo11_assign(assign(case))
    x, far_x = loss(case, assignment), loss(far_case, assignment)
    out = kernels.yolo11_loss(x)
    with Meter():  # an address that wrapped around must not end the process
        assert same(kernels.yolo11_assign(assign(far_case)), assignment)
        torch.testing.assert_close(kernels.yolo11_loss(far_x), out)
        backward, far_backward = gradient_of(x, out), gradient_of(far_x, out)
        assert same(kernels.yolo11_loss_backward(far_backward), kernels.yolo11_loss_backward(backward))


# ---- YOLOX


@triton.jit
def log_not_kernel(out_ptr, p_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, log_not(tl.load(p_ptr + offs)))


@pytest.mark.parametrize("dtype", OF_A_FUNCTION)
def test_log_of_one_minus_a_probability(dtype):
    p = torch.cat([torch.logspace(-30, 0, 3000, dtype=dtype), torch.linspace(0, 1, 1096, dtype=dtype)])
    out = torch.empty_like(p)
    log_not_kernel[(1,)](out, p, BLOCK=4096)
    want = torch.log1p(-p.double())
    torch.testing.assert_close(out.double(), want, rtol=OF_A_FUNCTION[dtype], atol=0)
    assert want.isinf().any()


def overlapping_pair(dtype, num_classes=1):
    """Two boxes of image 0 whose regions share anchors, and predictions that are all alike."""
    case = make_yolox_case(0, dtype=dtype, num_rows=2, batch_size=1, num_classes=num_classes)
    boxes = case.gt_xywh.new_tensor([[60.0, 60.0, 40.0, 40.0], [68.0, 64.0, 40.0, 40.0]])
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
    preds = torch.zeros_like(case.preds)
    preds[..., 2:4] = 1.5
    return case._replace(preds=preds, image_index=torch.tensor([0, 0]), labels=torch.zeros(2, dtype=torch.int64),
                         gt_boxes=corners, gt_xywh=boxes)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contested_anchor_goes_to_the_cheaper_row_in_either_order(dtype):
    case = overlapping_pair(dtype)
    found = []
    for order in ([0, 1], [1, 0]):
        x = x_assign(case._replace(gt_boxes=case.gt_boxes[order], gt_xywh=case.gt_xywh[order]), radius=2.5)
        target_row = kernels.yolox_assign(x).target_row
        assert torch.equal(target_row, eager.yolox_assign(x).target_row)
        found.append(torch.where(target_row < 0, -1, torch.tensor([*order, -1])[target_row.long()]))
    assert torch.equal(*found)
    assert set(found[0].unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_costs_go_to_the_lower_row_and_anchor(dtype):
    case = overlapping_pair(dtype)
    boxes = torch.tensor([[68.0, 60.0, 68.0, 60.0], [60.0, 64.0, 24.0, 24.0], [60.0, 64.0, 24.0, 24.0]], dtype=dtype)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
    case.preds[..., 2:4] = -60.0  # boxes of no size: no IoU, so that k is 1 and all costs are equal
    case = case._replace(image_index=torch.zeros(3).long(), labels=torch.zeros(3).long(), gt_boxes=corners, gt_xywh=boxes)
    target_row = kernels.yolox_assign(x_assign(case)).target_row
    assert torch.equal(target_row, eager.yolox_assign(x_assign(case)).target_row)
    assert set(target_row.unique().tolist()) == {-1, 0, 1}


def test_an_anchor_can_go_to_a_row_that_did_not_claim_it():
    case = overlapping_pair(torch.float32, num_classes=2)
    boxes, corners = case.gt_xywh[:1].expand(3, -1), case.gt_boxes[:1].expand(3, -1)
    case.preds[..., 2:4], case.preds[..., 5:] = -60.0, -5.0  # no IoU: classes decide, and everyone takes one anchor
    liked_by_all, best_of_row_0 = 7 * 16 + 7, 7 * 16 + 8
    case.preds[0, liked_by_all, 5:] = torch.tensor([2.0, 1.0])
    case.preds[0, best_of_row_0, 5] = 4.0
    labels = torch.tensor([0, 1, 1])
    case = case._replace(image_index=torch.zeros(3).long(), labels=labels, gt_boxes=corners, gt_xywh=boxes)
    x = x_assign(case)
    target_row, _, counts, *_ = kernels.yolox_assign(x)
    assert torch.equal(target_row, eager.yolox_assign(x).target_row)
    assert (target_row[0, liked_by_all], target_row[0, best_of_row_0], counts[0]) == (0, 0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 2, 4, 6])
def test_no_number_of_yolox_stays_at_its_anchor(value, channel):
    case = make_yolox_case(1)
    clean = kernels.yolox_assign(x_assign(case))
    (image, anchor) = (clean.target_row >= 0).nonzero()[3]
    case.preds[image, anchor, channel] = value
    case.preds[image, 300:302, channel] = value
    have, want = kernels.yolox_assign(x_assign(case)), eager.yolox_assign(x_assign(case))
    assert torch.equal(have.target_row, want.target_row)
    assert torch.equal(have.counts, want.counts)
    is_matched = (have.target_row[image, [anchor, 300, 301]] >= 0).any()
    assert have.counts[2] == (channel == 4 or bool(is_matched))  # what takes part: every objectness, and the matched
    assert torch.equal(have.target_row[1 - image], clean.target_row[1 - image])
    assert all(x.isnan() for x in kernels.yolox_loss(x_loss(case, have, normaliser=torch.nan)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 3, 5])
@pytest.mark.parametrize("anchor", [0, 7 * 16 + 7])  # of no region, and of both rows'
def test_no_number_of_yolox_shows_where_it_takes_part_in_the_loss(value, channel, anchor):
    case = overlapping_pair(torch.float32)
    case.preds[0, anchor, channel] = value
    have, want = kernels.yolox_assign(x_assign(case)), eager.yolox_assign(x_assign(case))
    assert torch.equal(have.target_row, want.target_row)
    assert have.counts.tolist() == want.counts.tolist()
    assert have.counts[2] == (have.target_row[0, anchor] >= 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 1, 3, 5, 6])
def test_no_number_of_yolox_shows_where_all_anchors_have_it(value, channel):
    case = overlapping_pair(torch.float32, num_classes=2)
    case.preds[0, :, channel] = value
    have, want = kernels.yolox_assign(x_assign(case)), eager.yolox_assign(x_assign(case))
    assert torch.equal(have.target_row, want.target_row)
    assert have.counts.tolist() == want.counts.tolist()
    assert have.counts[0] > 0
    assert have.counts[2] == 1


@pytest.mark.parametrize("is_right_class", [True, False])
def test_logarithms_of_the_cost_are_clamped(is_right_class):
    """One logarithm of 0 costs 100, less than twenty of 1e-6."""
    case = overlapping_pair(torch.float32, num_classes=40)
    case = case._replace(image_index=torch.tensor([0, -1]), labels=torch.zeros(2, dtype=torch.int64))
    case.preds[..., 2:4], case.preds[..., 4], case.preds[..., 5:] = -60.0, 20.0, 14.0  # no IoU: classes decide, and k is 1
    at = 7 * 16 + 7
    case.preds[0, at, 6:] = -20.0
    case.preds[0, at, 5 if is_right_class else 6] = -400.0 if is_right_class else 400.0
    target_row = kernels.yolox_assign(x_assign(case)).target_row
    assert (target_row >= 0).nonzero().tolist() == [[0, at]]
    case.preds[0, at, 5:] = 14.0
    assert kernels.yolox_assign(x_assign(case)).target_row[0, at] == -1
    case.preds[..., 5:], case.preds[..., 6] = -20.0, 14.0
    case.preds[0, at, 6] = 400.0  # 100 against 14
    assert kernels.yolox_assign(x_assign(case)).target_row[0, at] == -1


def test_small_probabilities_of_several_tiles_add_up(shipped_sizes):
    """Four classes of 0.12 cost 0.51, less than one of 0.42; as if they excluded each other they would cost 0.59."""
    case = overlapping_pair(torch.float32, num_classes=40)
    case = case._replace(image_index=torch.tensor([0, -1]), labels=torch.full((2,), 39))
    case.preds[..., 2:4], case.preds[..., 4], case.preds[..., 5:] = -60.0, 20.0, -20.0  # no IoU: classes decide, and k is 1
    case.preds[..., 5], at = -1.541, 7 * 16 + 7
    case.preds[0, at, 5:37:8] = -4.226
    target_row = kernels.yolox_assign(x_assign(case)).target_row
    assert (target_row >= 0).nonzero().tolist() == [[0, at]]


def test_anchors_in_the_box_take_part_in_the_paper_mode():
    case = overlapping_pair(torch.float32)
    case = case._replace(image_index=torch.tensor([0, -1]))
    points, strides = ty.make_anchors(cases.X_SHAPES, cases.X_STRIDES)
    box = case.gt_xywh[0]
    case.preds[..., :2] = (box[:2] / strides[:, None] - points + 0.5)[None]
    case.preds[..., 2:4] = (box[2:] / strides[:, None]).log()[None]
    counts = [kernels.yolox_assign(x_assign(case, mode, 0.6)).counts[0].item() for mode in ("center", "box_and_center")]
    assert counts == [2, 10]


@pytest.mark.parametrize("size", [100.0, -200.0])
def test_boxes_of_yolox_without_bounds_or_size(size):
    case = make_yolox_case(2)
    case.preds[:, ::2, 2:4] = size
    assignment = eager.yolox_assign(x_assign(case))
    assert torch.equal(kernels.yolox_assign(x_assign(case)).target_row, assignment.target_row)
    x = x_loss(case, assignment)
    out = eager.yolox_loss(x)
    torch.testing.assert_close(kernels.yolox_loss(x), out)
    have, want = (f(gradient_of(x, out)).grad_preds for f in (kernels.yolox_loss_backward, eager.yolox_loss_backward))
    assert want.isfinite().all()
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)


def test_addresses_of_yolox_past_two_to_the_31():
    case = make_yolox_case(2, dtype=torch.float16)
    far = far_memory()
    stride_c = 2**31 // (case.preds.shape[2] - 1) + 64
    preds = far.as_strided(case.preds.shape, (2**31, 1, stride_c)).copy_(case.preds)
    far_case, case = case._replace(preds=preds), case._replace(preds=laid_out(case.preds, "last"))
    assignment = kernels.yolox_assign(x_assign(case))
    x, far_x = x_loss(case, assignment, use_l1=True), x_loss(far_case, assignment, use_l1=True)
    out = kernels.yolox_loss(x)
    decode = DecodeYOLOX(case.preds, torch.rand(preds.shape[1], 2), torch.rand(preds.shape[1]))
    with Meter():  # an address that wrapped around must not end the process
        assert same(kernels.yolox_assign(x_assign(far_case)), assignment)
        torch.testing.assert_close(kernels.yolox_loss(far_x), out)
        assert same(kernels.yolox_loss_backward(gradient_of(far_x, out)), kernels.yolox_loss_backward(gradient_of(x, out)))
        assert same(kernels.decode_yolox(decode._replace(preds=preds)), kernels.decode_yolox(decode))
