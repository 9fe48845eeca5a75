"""Whole criteria in one operation against assignment, loss and gradient one after another, on both backends."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import triton_yolo as ty
from tests.compare import OF_AN_ORDER
from tests.kernels.cases import (
    SHAPES,
    STRIDES,
    X_SHAPES,
    X_STRIDES,
    assign,
    criterion,
    laid_out,
    make_case,
    make_yolox_case,
    x_assign,
    x_criterion,
)
from tests.operations import gradient_of, same
from triton_yolo import _signatures as of
from triton_yolo import eager, kernels

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("first", "last", "split", "spread")
FACTORS = (1.0, 0.5, 3.0, 1 / 3, 0.0, -1.0, 65536.0)
# Every layout and every type in both forms of targets, but not with each other.
FORMS = [
    (form, layout, DTYPES[(place + shift) % len(DTYPES)])
    for shift, form in enumerate(("raw", "packed"))
    for place, layout in enumerate(LAYOUTS)
]


@pytest.fixture(params=["eager", "kernels"])
def module(request) -> Iterator[ModuleType]:
    """Kernels as on a GPU, and watched."""
    if request.param == "kernels":
        request.getfixturevalue("meter")
        yield kernels
    else:
        with ty.backend("eager"):
            yield eager


def yolo11_rows(case) -> Tensor:
    """The rows of a case as shares of its image, of 40 x 32 pixels."""
    size = torch.tensor([32.0, 40.0]).repeat(2)
    return torch.cat([case.image_index[:, None], case.labels[:, None], case.targets[3] / size], 1)


def in_parts(module: ModuleType, x: of.YOLO11) -> of.YOLO11Outputs:
    assignment = module.yolo11_assign(of.YOLO11Assign(x.pred_dist, x.pred_scores, x.targets, x.levels, x.reg_max, x.assigner))
    row, score, sums, num_fg, labels, boxes = assignment
    given = of.YOLO11Loss(
        x.pred_dist, x.pred_scores, row, score, sums.clamp(min=1), labels, boxes, x.class_weights, x.levels, x.reg_max, x.gains
    )  # fmt: skip
    out = module.yolo11_loss(given)
    row = row if x.wants_row else row.new_empty(0)
    return of.YOLO11Outputs(out.loss, *out.terms, num_fg, row, *module.yolo11_loss_backward(gradient_of(given, out)))


def x_in_parts(module: ModuleType, x: of.YOLOX) -> of.YOLOXOutputs:
    row, iou, counts, labels, boxes = module.yolox_assign(of.YOLOXAssign(x.preds, x.targets, x.levels, x.assigner))
    num_fg, num_gt, is_broken = counts.to(iou.dtype).unbind()
    normaliser = num_fg.clamp(min=1).masked_fill(is_broken > 0, torch.nan)
    given = of.YOLOXLoss(
        x.preds, row, iou, normaliser, labels, boxes, x.l1_gain, x.levels, x.iou_loss, x.iou_gain
    )  # fmt: skip
    out = module.yolox_loss(given)
    grads = module.yolox_loss_backward(gradient_of(given, out))
    return of.YOLOXOutputs(*out, num_fg / num_gt.clamp(min=1), *grads)


def check_whole(whole, parts, unwanted, *, order: float = 0) -> None:
    """What one operation puts out is what the parts do, to the bit, with the gradients or without.

    Where sums are taken in another ``order``, that is how much loss and terms may differ.
    """
    num_sums = 1 + len(whole.terms)
    assert same(whole[num_sums:], parts[num_sums:])
    first = next(place for place, name in enumerate(whole._fields) if name.startswith("grad_"))
    assert same(unwanted[:first], whole[:first])
    for have, want in zip(whole[:num_sums], parts[:num_sums], strict=True):
        torch.testing.assert_close(have, want, rtol=order, atol=0)
    assert all(x.numel() == 0 for x in unwanted[first:])
    assert [x.dtype for x in unwanted[first:]] == [x.dtype for x in parts[first:]]


def order_of(module: ModuleType, whole: of.YOLO11Outputs | of.YOLOXOutputs) -> float:
    """Kernels of the whole criterion sum over claims or rows, those of the parts, which know none, over anchors."""
    return 0 if module is eager else OF_AN_ORDER * torch.finfo(whole.loss.dtype).eps


@pytest.mark.parametrize(("form", "layout", "dtype"), FORMS)
def test_yolo11_is_the_sum_of_its_parts(module, layout, dtype, form):
    case = make_case(2, dtype=dtype, layout=layout)
    x = criterion(assign(case, topk2=2 if form == "raw" else None), weights=torch.rand(3) if form == "raw" else None)
    if form == "raw":
        x = x._replace(targets=[yolo11_rows(case)])
    for wants_row in (False, True) if layout == "first" else (False,):
        x = x._replace(wants_row=wants_row)
        whole = module.yolo11_criterion(x)
        assert whole.num_fg > 3
        assert whole.grad_pred_dist.stride() == torch.empty_like(case.dist).stride()
        check_whole(
            whole, in_parts(module, x), module.yolo11_criterion(x._replace(wants_grad=False)), order=order_of(module, whole)
        )


@pytest.mark.parametrize(("form", "layout", "dtype"), FORMS)
def test_yolox_is_the_sum_of_its_parts(module, layout, dtype, form):
    case = make_yolox_case(1, dtype=dtype, layout=layout)
    candidates = "box_and_center" if (form, layout) == ("raw", "first") else "center"  # takes ten times as long
    x = x_criterion(x_assign(case, candidates), iou_loss="giou", use_l1=form == "raw")
    if form == "raw":
        size = torch.tensor([128.0, 144.0]).repeat(2)
        x = x._replace(targets=[torch.cat([case.image_index[:, None], case.labels[:, None], case.gt_xywh / size], 1)])
    whole = module.yolox_criterion(x)
    assert whole.num_fg > 0
    unwanted = module.yolox_criterion(x._replace(wants_grad=False))
    check_whole(whole, x_in_parts(module, x), unwanted, order=order_of(module, whole))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(module, num_rows):
    case, x_case = make_case(5, num_rows=num_rows), make_yolox_case(5, num_rows=num_rows)
    x, y = criterion(assign(case)), x_criterion(x_assign(x_case))
    whole = module.yolo11_criterion(x)
    check_whole(
        whole, in_parts(module, x), module.yolo11_criterion(x._replace(wants_grad=False)), order=order_of(module, whole)
    )
    whole, unwanted = module.yolox_criterion(y), module.yolox_criterion(y._replace(wants_grad=False))
    check_whole(whole, x_in_parts(module, y), unwanted, order=order_of(module, whole))


def test_no_images(module):
    case, x_case = make_case(5), make_yolox_case(5)
    nobody = [case.targets[0][:0], *(t[:0] for t in case.targets[1:])]
    x = criterion(assign(case))._replace(pred_dist=case.dist[:0], pred_scores=case.scores[:0], targets=nobody)
    whole = module.yolo11_criterion(x)
    assert whole.loss == whole.num_fg == sum(whole.terms) == 0
    assert (whole.grad_pred_dist.shape, whole.grad_pred_scores.shape) == (x.pred_dist.shape, x.pred_scores.shape)
    y = x_criterion(x_assign(x_case))._replace(preds=x_case.preds[:0], targets=nobody)
    whole = module.yolox_criterion(y)
    assert whole.loss == whole.num_fg == sum(whole.terms) == 0
    assert whole.grad_preds.shape == y.preds.shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_poisons_the_whole(module, bad):
    case, x_case = make_case(6), make_yolox_case(6)
    case.dist[0, 3, 2], x_case.preds[1, 7, 4] = bad, bad
    for whole in (module.yolo11_criterion(criterion(assign(case))), module.yolox_criterion(x_criterion(x_assign(x_case)))):
        assert whole.loss.isnan()
        assert all(term.isnan() for term in whole.terms)
        assert all(x.isnan().all() for name, x in whole._asdict().items() if name.startswith("grad_"))
        assert whole.num_fg.isfinite()


def test_both_backends_agree(meter):
    case, x_case = make_case(7), make_yolox_case(7)
    x, y = criterion(assign(case)), x_criterion(x_assign(x_case), use_l1=True)
    for have, want in zip(
        (*kernels.yolo11_criterion(x), *kernels.yolox_criterion(y)),
        (*eager.yolo11_criterion(x), *eager.yolox_criterion(y)),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=2e-6, atol=2e-6)


# ---- the gradient that arrives from outside


def some_numbers(dtype: torch.dtype) -> Tensor:
    """With zeros of either sign, the smallest and the largest number, infinity and NaN."""
    info = torch.finfo(dtype)
    # The interpreter takes subnormal numbers of bfloat16 for 0.
    smallest = info.smallest_normal * 4 if dtype == torch.bfloat16 else info.smallest_normal / 2
    special = [0.0, -0.0, smallest, info.max, -info.max, torch.inf, torch.nan]
    numbers = torch.randn(2, 26, 9, generator=torch.Generator().manual_seed(0))
    return (
        torch.cat([torch.tensor(special, dtype=torch.float64), numbers.double().flatten()[len(special) :]])
        .view_as(numbers)
        .to(dtype)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize(("factor", "dtype"), [*((1 / 3, x) for x in DTYPES), *((x, torch.bfloat16) for x in FACTORS)])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_scaling_multiplies_once_in_place(module, dtype, factor, layout):
    working = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [laid_out(some_numbers(dtype), layout), laid_out(some_numbers(dtype)[:, :, :3], "first")]
    before, places = [x.clone() for x in grads], [x.data_ptr() for x in grads]
    grad = torch.tensor(factor, dtype=working)
    for chosen in (grads, grads[:1]):
        for x, y in zip(grads, before, strict=True):
            x.copy_(y)
        module.scale_(chosen, grad)
        for number, (x, y) in enumerate(zip(grads, before, strict=True)):
            if factor == 1 or number >= len(chosen):
                assert torch.equal(bits(x), bits(y))
            else:
                torch.testing.assert_close(x, (y.to(working) * grad).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert [x.data_ptr() for x in grads] == places


def test_scaling_of_nothing(module):
    module.scale_([torch.zeros(0, 26, 9), torch.zeros(0, 26, 3)], torch.tensor(2.0))
    module.scale_([torch.zeros(0, 26, 9)], torch.tensor(2.0))


SYSTEMS = pytest.mark.parametrize("system", ["yolo11", "yolox"])


def leaves_and_loss(system: str, dtype: torch.dtype = torch.float32):
    """Leaves, and their loss as a function."""
    if system == "yolo11":
        case = make_case(3, dtype=dtype)
        leaves, yolo11 = [case.dist, case.scores], ty.YOLO11Loss(3, strides=STRIDES, reg_max=case.reg_max)
        return leaves, lambda *preds: yolo11(*preds, SHAPES, ty.Targets(*case.targets)).loss
    x_case, yolox = make_yolox_case(3, dtype=dtype), ty.YOLOXLoss(3, strides=X_STRIDES, use_l1=True)
    return [x_case.preds], lambda *preds: yolox(*preds, X_SHAPES, ty.Targets(*x_case.targets)).loss


def gradients(leaves: list[Tensor], function, factor: float = 1.0) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves) * factor, leaves)


@SYSTEMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_graph_that_is_retained_gives_each_its_own_gradients(module, system, dtype):
    leaves, function = leaves_and_loss(system, dtype)
    leaves = [x.requires_grad_() for x in leaves]
    loss = function(*leaves)
    found = []
    for factor in (3.0, 1.0):
        grads = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        found.append((grads, [x.clone() for x in grads]))
        assert same(grads, gradients(leaves, function, factor))
    for grads, copies in found:
        assert same(grads, copies)


@SYSTEMS
def test_gradients_accumulate(module, system):
    leaves, function = leaves_and_loss(system)
    leaves = [x.requires_grad_() for x in leaves]
    wanted = gradients(leaves, function)
    for _ in range(2):
        function(*leaves).backward()
    loss = function(*leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    for x, once in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(x.grad, 4 * once)


@SYSTEMS
def test_a_second_backward_runs_where_forward_ran(system, meter):
    leaves, function = leaves_and_loss(system)
    leaves = [x.requires_grad_() for x in leaves]
    loss = function(*leaves)  # the fixture's backend
    with ty.backend("eager"):
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        before = len(meter.launches)
        second = torch.autograd.grad(loss, leaves)
    assert len(meter.launches) > before
    assert same(first, second)


@SYSTEMS
def test_float16_keeps_small_gradients_under_a_loss_scale(module, system):
    """Divided by a million positives, gradients would be below what float16 has; times 65536 they are not."""
    leaves, function = leaves_and_loss(system, torch.float16)
    weight, scale = 1e-6, 65536.0
    have = gradients(leaves, function, weight * scale)
    want = gradients([x.float() for x in leaves], function, weight)
    plain = gradients(leaves, function, weight)
    for x, y, lost in zip(have, want, plain, strict=True):
        assert x.dtype == torch.float16
        torch.testing.assert_close(x.float() / scale, y, rtol=2e-3, atol=1e-12)
        assert (lost == 0).sum() > (x == 0).sum()  # without the scale
    assert all(x.isfinite().all() for x in have)
