"""The kernels of YOLO11's criterion of oriented boxes, launched as on a GPU, beside the eager backend and as a sum of parts."""

import functools

import pytest
import torch
from torch import Tensor

import triton_yolo as ty
from tests.compare import OF_AN_ORDER, assert_same
from tests.kernels.cases import ANCHORS, LEVELS, laid_out, make_case
from tests.kernels.test_launches import use_tiles
from tests.operations import gradient_of, same
from triton_yolo import _ops, eager, kernels
from triton_yolo import _signatures as of
from triton_yolo.kernels.plans import task_aligned

F64, GAINS = torch.float64, (7.5, 0.5, 1.5, 1.0)
CASES = [  # layout, type, raw rows, R, second top-k and shortest side of candidates
    ("first", torch.float32, True, 5, None, 0.0),
    ("last", torch.float64, False, 16, 2, 16.0),
    ("split", torch.bfloat16, False, 1, None, 16.0),
    ("spread", torch.float16, True, 5, 1, 0.0),
]


def make_inputs(layout: str, dtype: torch.dtype, is_raw: bool, reg_max: int, topk2: int | None, side: float) -> of.YOLO11OBB:
    case = make_case(2, dtype=dtype, layout=layout, reg_max=reg_max, num_rows=9)
    generator = torch.Generator().manual_seed(0)
    pred_angle = laid_out(3 * torch.randn(2, ANCHORS, 1, generator=generator).to(dtype), layout)
    boxes = torch.cat([case.targets[3], 3 * torch.randn(9, 1, generator=generator).to(case.gt_boxes)], 1)
    targets = [*case.targets[:3], boxes]
    if is_raw:
        shares = boxes / torch.tensor([32.0, 40, 32, 40, 1])
        targets = [torch.cat([case.image_index[:, None], case.labels[:, None], shares], 1)]
    rule, weights = of.TaskAligned(10, topk2, 0.5, 6.0, side, 1e-9), torch.tensor([1.0, 2.0, 0.5]) if is_raw else None
    return of.YOLO11OBB(case.dist, pred_angle, case.scores, targets, weights, LEVELS, reg_max, rule, GAINS, True)


def assigned(x: of.YOLO11OBB) -> of.YOLO11OBBAssign:
    return of.YOLO11OBBAssign(x.pred_dist, x.pred_angle, x.pred_scores, x.targets, x.levels, x.reg_max, x.assigner)


def given(x: of.YOLO11OBB, assignment: of.YOLO11Assignment, normaliser: Tensor) -> of.YOLO11OBBLoss:
    preds, labels, boxes = (x.pred_dist, x.pred_angle, x.pred_scores), assignment.gt_labels, assignment.gt_boxes
    row, score = assignment.target_row, assignment.target_score
    options = x.class_weights, x.levels, x.reg_max, x.gains
    return of.YOLO11OBBLoss(*preds, row, score, normaliser, labels, boxes, *options)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("meter")
def test_parts_beside_the_eager_backend(case):
    x = make_inputs(*case)
    assignment = eager.yolo11_obb_assign(assigned(x))
    assert assignment.num_fg > 2
    assert_same(kernels.yolo11_obb_assign(assigned(x)), assignment)
    loss = given(x, assignment, assignment.target_score.new_tensor([2.5, 3.0]))
    out = eager.yolo11_obb_loss(loss)
    assert_same(kernels.yolo11_obb_loss(loss), out)
    backward = gradient_of(loss, out, torch.tensor(1.5, dtype=out.loss.dtype))
    assert_same(kernels.yolo11_obb_loss_backward(backward), eager.yolo11_obb_loss_backward(backward))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.usefixtures("meter")
def test_the_whole_is_the_sum_of_its_parts(case):
    x = make_inputs(*case)
    whole, unwanted = kernels.yolo11_obb_criterion(x), kernels.yolo11_obb_criterion(x._replace(wants_grad=False))
    assignment = kernels.yolo11_obb_assign(assigned(x))
    loss = given(x, assignment, assignment.sums.clamp(min=1))
    out = kernels.yolo11_obb_loss(loss)
    grads = kernels.yolo11_obb_loss_backward(gradient_of(loss, out))
    assert same(whole[5:], (assignment.num_fg, *grads))
    assert same(unwanted[:6], whole[:6])
    assert [grad.numel() for grad in unwanted[6:]] == [0, 0, 0]
    for have, want in zip(whole[:5], out[:5], strict=True):
        rtol = OF_AN_ORDER * torch.finfo(have.dtype).eps
        torch.testing.assert_close(have, want, rtol=rtol, atol=0)


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.usefixtures("meter")
def test_few_rows_and_no_images(num_rows):
    x = make_inputs(*CASES[0])
    x = x._replace(targets=[x.targets[0][:num_rows]])
    assert_same(kernels.yolo11_obb_criterion(x), eager.yolo11_obb_criterion(x), tolerance=2e-6)
    empty = x._replace(pred_dist=x.pred_dist[:0], pred_angle=x.pred_angle[:0], pred_scores=x.pred_scores[:0])
    empty = empty._replace(targets=[x.targets[0][:0]])
    assert_same(kernels.yolo11_obb_criterion(empty), eager.yolo11_obb_criterion(empty))


@pytest.mark.parametrize("sizes", [(1, 4, 3), (4, 8, 1)])
@pytest.mark.usefixtures("interpreted")
def test_tile_sizes_leave_no_trace_in_the_assignment(sizes, monkeypatch):
    """Boxes of up to twice the image, whose rectangles several tiles and parts hold."""
    use_tiles(monkeypatch, task_aligned, *sizes)
    x = assigned(make_inputs(*CASES[1]))
    x.targets[3][:, 2:4] *= 2
    assert_same(kernels.yolo11_obb_assign(x), eager.yolo11_obb_assign(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16])
@pytest.mark.usefixtures("meter")
def test_unpack_rows(dtype):
    torch.manual_seed(0)
    rows = torch.randn(200, 8)[:, :7]
    rows[:, :2] = (8 * rows[:, :2]).round()
    for laid in (rows.to(dtype), rows.to(dtype).T.contiguous().T):
        want = eager.unpack_rows(of.UnpackRows(laid, of.ImageSize((64, 96))))
        assert want.boxes_xywh.shape == (200, 5)
        assert_same(kernels.unpack_rows(of.UnpackRows(laid, of.ImageSize((64, 96)))), want, tolerance=0)


@pytest.mark.parametrize("reg_max", [1, 5])
@pytest.mark.usefixtures("interpreted")
def test_gradcheck(reg_max):
    x = make_inputs("first", F64, is_raw=False, reg_max=reg_max, topk2=None, side=0.0)
    x = x._replace(pred_dist=x.pred_dist.abs() + 0.5)
    assignment = _ops.yolo11_obb_assign(assigned(x))
    assert assignment.num_fg > 2
    loss = given(x, assignment, assignment.sums.clamp(min=1))
    preds = [pred.requires_grad_() for pred in (x.pred_dist, x.pred_angle, x.pred_scores)]
    names = ("pred_dist", "pred_angle", "pred_scores")
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda *p: _ops.yolo11_obb_loss(loss._replace(**dict(zip(names, p, strict=True)))).loss, preds)


@pytest.mark.usefixtures("interpreted")
def test_three_gradients_are_scaled():
    grads = [torch.full((2, 3, n), 2.0) for n in (4, 1, 5)]
    kernels.scale_(grads, torch.tensor(3.0))
    assert [grad.unique().tolist() for grad in grads] == [[6.0]] * 3
    assert ty.YOLO11OBBLoss(3).gains == GAINS
