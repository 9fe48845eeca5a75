"""Numbers that only a kernel could get wrong: float64 keys, no number, addresses past 2^31."""

import pytest
import torch

from bench.meter import Meter
from tests.kernels.cases import FLAT_SHAPES, STRIDES, laid_out, make_case
from triton_yolo import eager, kernels

pytestmark = pytest.mark.usefixtures("interpreted")


def test_float64_metrics_are_compared_in_float64():
    metric = torch.full((1, 2, 6), 0.5, dtype=torch.float64)
    metric[0, 0] += torch.tensor([0, 1, 3, 2, 3, 1]) * 2.0**-50
    selected = kernels.select_topk_candidates(metric, 2, None)[0]
    assert selected[0].tolist() == [False, False, True, False, True, False]
    assert selected[1].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_overlaps_go_to_the_lower_row_whatever_the_order(dtype):
    case = make_case(0, dtype=dtype, num_rows=6)
    boxes = case.gt_boxes.new_tensor([4.0, 4.0, 30.0, 36.0]).expand(6, 4).contiguous()
    case = case._replace(image_index=torch.tensor([1, 0, 1, 0, 1, 0]), labels=torch.zeros(6, dtype=torch.int64), gt_boxes=boxes)
    target_row, *_ = kernels.yolo11_assign(*case, FLAT_SHAPES, STRIDES, 5, 10, None, 0.5, 6.0, 0.0)
    assert set(target_row[0].tolist()) == {-1, 1}
    assert set(target_row[1].tolist()) == {-1, 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contested_anchor_goes_to_the_higher_overlap_in_either_order(dtype):
    case = make_case(0, dtype=dtype, num_rows=2)
    boxes = case.gt_boxes.new_tensor([[2.0, 2.0, 24.0, 26.0], [8.0, 12.0, 30.0, 38.0]])
    case = case._replace(image_index=torch.tensor([0, 0]), labels=torch.tensor([1, 1]))
    found = []
    for order in ([0, 1], [1, 0]):
        args = (*case[:4], boxes[order], FLAT_SHAPES, STRIDES, 5, 10, None, 0.5, 6.0, 0.0)
        have, want = kernels.yolo11_assign(*args), eager.yolo11_assign(*args)
        assert torch.equal(have[0], want[0])
        found.append(torch.where(have[0] < 0, -1, torch.tensor([*order, -1])[have[0].long()]))
    assert torch.equal(*found)
    assert set(found[0].unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["dist", "scores"])
def test_no_number_stays_at_its_anchor(value, which):
    case = make_case(1)
    args = (FLAT_SHAPES, STRIDES, 5, 3, None, 0.5, 6.0, 0.0)
    clean = kernels.yolo11_assign(*case, *args)
    background = (clean[0][0] < 0).nonzero()[0, 0]
    getattr(case, which)[0, background, 0] = value
    have = kernels.yolo11_assign(*case, *args)
    want = eager.yolo11_assign(*case, *args)
    assert torch.equal(have[0], want[0])
    assert have[2].isnan() == (which == "dist")
    tail = (case.labels, case.gt_boxes, None, *args[:3], (7.5, 0.5, 1.5))
    loss, terms = kernels.yolo11_loss(case.dist, case.scores, *have[:3], 1, *tail)
    assert loss.isnan()
    assert terms.isnan().tolist() == ([True, True, True] if which == "dist" else [False, True, False])


def test_short_sides_are_widened_for_the_candidate_test():
    case = make_case(1, reg_max=1, num_rows=1)
    boxes = torch.tensor([[9.0, 9.0, 14.0, 18.0]])
    case = case._replace(dist=case.dist.abs() + 0.5, image_index=torch.tensor([0]), gt_boxes=boxes)
    found = []
    for min_box_side in (0.0, 8.0, 16.0):
        args = (*case, FLAT_SHAPES, STRIDES, 1, 10, None, 0.5, 6.0, min_box_side)
        have, want = kernels.yolo11_assign(*args), eager.yolo11_assign(*args)
        assert torch.equal(have[0], want[0])
        found.append(int(have[3]))
    assert found[0] < found[2]


def test_infinite_logit_of_a_positive_shows_in_the_loss():
    case = make_case(1)
    levels = (FLAT_SHAPES, STRIDES, 5)
    row, score, total, _ = kernels.yolo11_assign(*case, *levels, 10, None, 0.5, 6.0, 0.0)
    image, anchor = ((row >= 0) & (score > 0)).nonzero()[0]
    case.scores[image, anchor, case.labels[row[image, anchor]]] = -torch.inf
    tail = (total, 1, case.labels, case.gt_boxes, None, *levels, (7.5, 0.5, 1.5))
    _, terms = kernels.yolo11_loss(case.dist, case.scores, row, score, *tail)
    assert terms.isnan().tolist() == [False, True, False]


def test_addresses_past_two_to_the_31():
    """Strides that put the second image 2^31 elements behind the first, and the last channel as far behind that."""
    case = make_case(2, dtype=torch.float16)
    far = torch.empty(2**32 + 2**20, dtype=torch.float16)

    def spread(x: torch.Tensor, start: int) -> torch.Tensor:
        stride_c = 2**31 // (x.shape[2] - 1) + 64
        return far[start:].as_strided(x.shape, (2**31, 1, stride_c)).copy_(x)

    dist, scores = spread(case.dist, 0), spread(case.scores, 2**19)
    args = (*case[2:], FLAT_SHAPES, STRIDES, 5, 10, None, 0.5, 6.0, 0.0)
    near = (laid_out(case.dist, "last"), laid_out(case.scores, "last"))
    assignment = kernels.yolo11_assign(*near, *args)
    tail = (*assignment[:3], 1, *case[3:], None, *args[3:6], (7.5, 0.5, 1.5))
    loss = kernels.yolo11_loss(*near, *tail)
    with Meter():  # an address that wrapped around must not end the process
        for have, want in zip(kernels.yolo11_assign(dist, scores, *args), assignment, strict=True):
            assert torch.equal(have, want)
        torch.testing.assert_close(kernels.yolo11_loss(dist, scores, *tail), loss)
