"""Every kernel, launched as on a GPU: inside its memory, free of races, and with the result of the eager path."""

import pytest
import torch

import triton_yolo as ty
from tests.flat import eager, kernels
from tests.kernels.cases import (
    ANCHORS,
    FLAT_SHAPES,
    SHAPES,
    STRIDES,
    X_LEVELS,
    X_SHAPES,
    X_STRIDES,
    laid_out,
    make_case,
    make_yolox_case,
    points_and_boxes,
)  # fmt: skip
from triton_yolo.kernels import launch
from triton_yolo.kernels.plans import simota, task_aligned

LAYOUTS = ("first", "last", "split", "spread")
DTYPES = (torch.float32, torch.float64, torch.float16)
GAINS = (7.5, 0.5, 1.5)
CENTER, PAPER = ("center", 1.5), ("box_and_center", 2.5)


def assert_same(actual, expected, tolerance=2e-6):
    for have, want in zip(actual, expected, strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        if not want.dtype.is_floating_point:
            assert torch.equal(have, want)
        else:
            bound = max(tolerance, 2 * torch.finfo(want.dtype).eps) * max(1.0, want.abs().max().item() if want.numel() else 0)
            torch.testing.assert_close(have, want, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 200])
@pytest.mark.usefixtures("meter")
def test_unpack_rows(dtype, num_rows):
    torch.manual_seed(0)
    rows = torch.randn(num_rows, 7)[:, :6]
    rows[:, :2] = (8 * rows[:, :2]).round()
    rows = rows.to(dtype)
    for laid in (rows, rows.T.contiguous().T):
        have, want = kernels.unpack_rows(laid, 96.0, 64.0), eager.unpack_rows(rows, 96.0, 64.0)
        assert_same(have, want, tolerance=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reg_max", [1, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("meter")
def test_decode_dfl(layout, reg_max, dtype):
    case = make_case(0, dtype=dtype, layout=layout, reg_max=reg_max)
    points, strides = ty.make_anchors(SHAPES, STRIDES)
    for scale in (None, strides):
        boxes = kernels.decode_dfl(case.dist, points, scale, reg_max)
        assert_same([boxes], [eager.decode_dfl(case.dist, points, scale, reg_max)])
        grad = torch.randn(2, 1, 4, dtype=boxes.dtype).expand_as(boxes)
        expected = eager.decode_dfl_backward(grad, case.dist, scale, reg_max)
        assert_same([kernels.decode_dfl_backward(grad, case.dist, scale, reg_max)], [expected])


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-7, 0.25])
@pytest.mark.usefixtures("meter")
def test_bbox_iou(kind, dtype, eps):
    case = make_case(1, dtype=dtype, num_rows=20)
    boxes = case.gt_boxes.to(dtype)
    boxes[:3] = boxes[:3, [0, 3, 2, 1]]  # inverted
    boxes[4] = boxes[3, [2, 1, 2, 3]] + boxes.new_tensor([0.0, 0.0, 4.0, 0.0])  # side by side
    boxes[5] = boxes[3, [0, 3, 2, 3]] + boxes.new_tensor([0.0, 0.0, 0.0, 4.0])  # one above the other
    a, b = torch.broadcast_tensors(boxes[:, None], boxes.flip(0)[None])
    assert_same([kernels.bbox_iou(a, b, kind, eps)], [eager.bbox_iou(a, b, kind, eps)])
    grad = torch.randn(20, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32).expand(20, 20)
    expected = eager.bbox_iou_backward(grad, a, b, kind, eps)
    assert_same(kernels.bbox_iou_backward(grad, a, b, kind, eps), expected, tolerance=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reg_max", "topk2", "min_box_side"), [(5, None, 0.0), (16, 2, 16.0)])
@pytest.mark.usefixtures("meter")
def test_yolo11(layout, dtype, reg_max, topk2, min_box_side):
    case = make_case(2, dtype=dtype, layout=layout, reg_max=reg_max)
    levels = (FLAT_SHAPES, STRIDES, reg_max)
    options = (10, topk2, 0.5, 6.0, min_box_side)
    assignment = eager.yolo11_assign(*case, *levels, *options)
    assert (assignment[0] >= 0).sum() > 3
    assert_same(kernels.yolo11_assign(*case, *levels, *options), assignment)

    target_row, target_score, *_ = assignment
    normaliser = target_score.new_tensor([2.5, 3.0])
    weights = torch.rand(3) if topk2 else None
    args = (case.dist, case.scores, target_row, target_score, normaliser, case.labels, case.gt_boxes, weights, *levels, GAINS)
    assert_same(kernels.yolo11_loss(*args), eager.yolo11_loss(*args))
    grad = torch.tensor(1.5, dtype=target_score.dtype)
    assert_same(kernels.yolo11_loss_backward(grad, *args), eager.yolo11_loss_backward(grad, *args))


@pytest.mark.parametrize("num_classes", [40, 1203])
@pytest.mark.usefixtures("meter")
def test_classes_of_several_tiles(num_classes):
    case = make_case(4, num_classes=num_classes)
    levels = (FLAT_SHAPES, STRIDES, 5)
    target_row, target_score, sums, _ = eager.yolo11_assign(*case, *levels, 10, None, 0.5, 6.0, 0.0)
    args = (case.dist, case.scores, target_row, target_score, sums, case.labels, case.gt_boxes, None, *levels, GAINS)
    assert_same(kernels.yolo11_loss(*args), eager.yolo11_loss(*args))
    x_args = (*make_yolox_case(4, num_classes=num_classes), *X_LEVELS, "center", 1.5)
    assert_same(kernels.yolox_assign(*x_args), eager.yolox_assign(*x_args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("meter")
def test_padded_stages(layout, dtype):
    case = make_case(3, dtype=dtype, layout=layout, num_rows=8)
    points, boxes = points_and_boxes(case, 5)
    boxes, scores = laid_out(boxes, layout), laid_out(case.scores.sigmoid(), layout)
    options = (4, 2, 1.0, 6.0, 16.0)
    row_args = (scores, boxes, points, case.image_index, case.labels, case.gt_boxes, *options, 1e-9)
    assert_same(kernels.task_aligned_assign(*row_args), eager.task_aligned_assign(*row_args))
    mask = torch.rand(2, 4) > 0.3
    args = (scores, boxes, points, case.labels.view(2, 4), case.gt_boxes.view(2, 4, 4), mask, *options[2:])
    metric, overlaps = eager.align_metric(*args)
    assert_same(kernels.align_metric(*args), (metric, overlaps))
    metric = laid_out(metric.to(dtype), layout)
    for topk, mask_gt in ((3, mask), (2 * ANCHORS, None)):
        expected = eager.select_topk_candidates(metric, topk, mask_gt)
        assert_same([kernels.select_topk_candidates(metric, topk, mask_gt)], [expected])


def use_tiles(monkeypatch, module, rows, parts, anchors):
    """Tiles of so many rows and anchors; lists of ``parts`` of them."""
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(module, "row_sizes", lambda *_: (rows, anchors, 1))
    monkeypatch.setattr(module, "claim_sizes", lambda *_: {"BLOCK_G": rows, "PARTS": parts, "BLOCK_P": anchors, "num_warps": 1})


@pytest.mark.parametrize("sizes", [(1, 1, 2), (4, 1, 8), (16, 1, 32), (1, 4, 2), (1, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("interpreted")
def test_tile_sizes_leave_no_trace_in_the_assignment(sizes, dtype, monkeypatch):
    case = make_case(4, dtype=dtype)
    use_tiles(monkeypatch, task_aligned, *sizes)
    args = (*case, FLAT_SHAPES, STRIDES, 5, 4, 2, 0.5, 6.0, 0.0)
    assert_same(kernels.yolo11_assign(*args), eager.yolo11_assign(*args))


@pytest.mark.parametrize("num_rows", [0, 1, 2])
@pytest.mark.parametrize("topk", [1, 3, 10, 200])
@pytest.mark.usefixtures("interpreted")
def test_few_rows(num_rows, topk):
    case = make_case(5, num_rows=2)
    case = case._replace(image_index=torch.tensor([1, 0])[:num_rows], labels=case.labels[:num_rows],
                         gt_boxes=case.gt_boxes[:num_rows])  # fmt: skip
    args = (*case, FLAT_SHAPES, STRIDES, 5, topk, None, 0.5, 6.0, 0.0)
    assert_same(kernels.yolo11_assign(*args), eager.yolo11_assign(*args))


@pytest.mark.usefixtures("shipped_sizes")
def test_results_repeat_to_the_bit():
    case = make_case(6)
    args = (*case, FLAT_SHAPES, STRIDES, 5, 10, None, 0.5, 6.0, 0.0)
    first = kernels.yolo11_assign(*args)
    torch.full((1000,), torch.nan)
    for have, want in zip(kernels.yolo11_assign(*args), first, strict=True):
        assert torch.equal(have, want)


# ---- YOLOX


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("meter")
def test_decode_yolox(layout, dtype):
    preds = make_yolox_case(0, dtype=dtype, layout=layout, num_classes=21).preds
    points, strides = ty.make_anchors(X_SHAPES, X_STRIDES)
    boxes = kernels.decode_yolox(preds, points, strides)
    assert_same([boxes], [eager.decode_yolox(preds, points, strides)])
    grad = torch.randn(2, 1, 4, dtype=boxes.dtype).expand_as(boxes)
    assert_same([kernels.decode_yolox_backward(grad, preds, strides)], [eager.decode_yolox_backward(grad, preds, strides)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "iou_loss", "use_l1"), [(CENTER, "iou", False), (PAPER, "giou", True)])
@pytest.mark.usefixtures("meter")
def test_yolox(layout, dtype, mode, iou_loss, use_l1):
    case = make_yolox_case(1, dtype=dtype, layout=layout, num_classes=3 if use_l1 else 37)
    assignment = eager.yolox_assign(*case, *X_LEVELS, *mode)
    assert assignment[2][0] > 10
    assert_same(kernels.yolox_assign(*case, *X_LEVELS, *mode), assignment)
    normaliser = assignment[1].new_tensor(2.5)
    args = (
        case.preds,
        *assignment[:2],
        normaliser,
        case.labels,
        case.gt_xywh,
        *X_LEVELS,
        iou_loss,
        5.0,
        torch.tensor(float(use_l1)),
    )
    assert_same(kernels.yolox_loss(*args), eager.yolox_loss(*args))
    grad = torch.tensor(1.5, dtype=assignment[1].dtype)
    assert_same([kernels.yolox_loss_backward(grad, *args)], [eager.yolox_loss_backward(grad, *args)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [CENTER, PAPER])
@pytest.mark.usefixtures("meter")
def test_simota_with_points_in_any_order(layout, dtype, mode):
    case = make_yolox_case(2, dtype=dtype, layout=layout)
    points, strides = ty.make_anchors(X_SHAPES, X_STRIDES)
    boxes = eager.decode_yolox(case.preds, points, strides)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    points, strides = laid_out((points * strides[:, None] + 0.25)[None, order], layout)[0], strides[order]
    logits = laid_out(case.preds[:, order, 5:], layout)
    args = (logits, case.preds[:, order, 4], laid_out(boxes[:, order].to(dtype), layout), points, strides, *case[1:], *mode)
    assert_same(kernels.simota_assign(*args), eager.simota_assign(*args))


@pytest.mark.parametrize("sizes", [(1, 1, 32), (4, 1, 64), (16, 1, 512), (1, 4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [CENTER, PAPER])
@pytest.mark.usefixtures("interpreted")
def test_tile_sizes_leave_no_trace_in_yolox_assignment(sizes, dtype, mode, monkeypatch):
    case = make_yolox_case(3, dtype=dtype)
    use_tiles(monkeypatch, simota, *sizes)
    args = (*case, *X_LEVELS, *mode)
    assert_same(kernels.yolox_assign(*args), eager.yolox_assign(*args))


@pytest.mark.parametrize("num_rows", [0, 1, 2])
@pytest.mark.usefixtures("shipped_sizes")
def test_few_rows_of_yolox(num_rows):
    case = make_yolox_case(4)
    case = case._replace(image_index=torch.tensor([1, 0])[:num_rows], labels=case.labels[:num_rows],
                         gt_boxes=case.gt_boxes[4:][:num_rows], gt_xywh=case.gt_xywh[4:][:num_rows])  # fmt: skip
    args = (*case, *X_LEVELS, *CENTER)
    want = eager.yolox_assign(*args)
    assert_same(kernels.yolox_assign(*args), want)
    args = (case.preds, *want[:2], torch.tensor(2.5), case.labels, case.gt_xywh, *X_LEVELS, "iou", 5.0, torch.ones(()))
    assert_same(kernels.yolox_loss(*args), eager.yolox_loss(*args))
    assert_same([kernels.yolox_loss_backward(torch.ones(()), *args)], [eager.yolox_loss_backward(torch.ones(()), *args)])


@pytest.mark.usefixtures("interpreted")
def test_yolox_with_more_boxes_than_anchors():
    case = make_yolox_case(5, num_rows=400)
    args = (*case, *X_LEVELS, *CENTER)
    assert_same(kernels.yolox_assign(*args), eager.yolox_assign(*args))


@pytest.mark.usefixtures("shipped_sizes")
def test_yolox_results_repeat_to_the_bit():
    case = make_yolox_case(6)

    def run():
        assignment = kernels.yolox_assign(*case, *X_LEVELS, *CENTER)
        args = (
            case.preds,
            *assignment[:2],
            torch.tensor(2.5),
            case.labels,
            case.gt_xywh,
            *X_LEVELS,
            "iou",
            5.0,
            torch.ones(()),
        )
        return *assignment, *kernels.yolox_loss(*args), kernels.yolox_loss_backward(torch.ones(()), *args)

    first = run()
    torch.full((1000,), torch.nan)
    for have, want in zip(run(), first, strict=True):
        assert torch.equal(have, want)
