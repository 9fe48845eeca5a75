"""What has one derivative, in reverse, says so when asked for another."""

import pytest
import torch
from torch.autograd import forward_ad

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
POINTS, STRIDES = ty.make_anchors([(2, 2)], (8,), device=DEVICE)
TARGET = torch.tensor([[[2.0, 2, 9, 9]] * 4], device=DEVICE)


def yolo11(dist):
    criterion, _, scores, shapes, rows = small_yolo11()
    return criterion(dist, scores, shapes, rows).loss


def yolox(preds):
    criterion, _, shapes, rows = small_yolox()
    return criterion(preds, shapes, rows).loss


CALLS = {
    "YOLO11Loss": (yolo11, lambda: small_yolo11()[1]),
    "YOLOXLoss": (yolox, lambda: small_yolox()[1]),
    "YOLO11Loss float16": (yolo11, lambda: small_yolo11()[1].half()),
    "YOLOXLoss float16": (yolox, lambda: small_yolox()[1].half()),
    "decode_dfl": (lambda x: ty.decode_dfl(x, POINTS, reg_max=2, strides=STRIDES), lambda: torch.rand(1, 4, 8, device=DEVICE)),
    "decode_yolox": (lambda x: ty.decode_yolox(x, POINTS, STRIDES), lambda: torch.rand(1, 4, 8, device=DEVICE)),
    "bbox_iou": (lambda x: ty.bbox_iou(x, TARGET, kind="ciou"), lambda: TARGET + torch.rand(1, 4, 4, device=DEVICE)),
}
EVERY = pytest.mark.parametrize("name", CALLS)


@EVERY
def test_double_backward_is_an_error(name):
    call, make = CALLS[name]
    x = make().requires_grad_()
    value = call(x).sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (value + grad.square().sum()).backward()


@EVERY
def test_derivatives_of_derivatives_are_errors(name):
    call, make = CALLS[name]
    penalty = lambda x: torch.func.grad(lambda x: call(x).sum())(x).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="has one derivative, in reverse"):
        torch.func.grad(penalty)(make())


@EVERY
def test_jvp_is_an_error(name):
    call, make = CALLS[name]
    x = make()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward.mode|forward AD"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))


@EVERY
def test_forward_mode_is_an_error(name):
    call, make = CALLS[name]
    x = make()
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward.mode|forward AD"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))


@EVERY
def test_vmap_is_an_error(name):
    call, make = CALLS[name]
    with pytest.raises((RuntimeError, NotImplementedError, ValueError), match="vmap"):
        torch.func.vmap(call)(torch.stack([make(), make()]))


@EVERY
def test_func_grad_is_the_gradient(name):
    call, make = CALLS[name]
    x = make().requires_grad_()
    call(x).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).sum())(x.detach()), x.grad)
