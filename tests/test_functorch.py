"""``torch.func.grad`` is autograd, and what an operation has no rule for is an error, not a wrong number."""

import pytest
import torch
import torch.autograd.forward_ad as fwd

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox


def cases():
    points, strides = ty.make_anchors([(4, 4), (2, 2)], (8, 16), device=DEVICE)
    yolo11, dist, scores, shapes, rows = small_yolo11()
    yolox, preds, *_ = small_yolox(use_l1=True)
    others = torch.tensor([[1.0, 1, 3, 4]], device=DEVICE)
    return {
        "decode_dfl": (lambda x: ty.decode_dfl(x, points, reg_max=8, strides=strides).square().mean(), dist),
        "decode_yolox": (lambda x: ty.decode_yolox(x, points, strides).square().mean(), preds),
        "bbox_iou": (lambda x: ty.bbox_iou(x, others, kind="ciou").square().sum(), others + torch.rand(5, 4, device=DEVICE)),
        "prob_iou": (lambda x: ty.prob_iou(x, x[:1].detach() / 2).square().sum(), torch.rand(5, 5, device=DEVICE) + 1),
        "YOLO11Loss of pred_dist": (lambda x: yolo11(x, scores, shapes, rows).loss, dist),
        "YOLO11Loss of pred_scores": (lambda x: yolo11(dist, x, shapes, rows).loss, scores),
        "YOLO11Loss of float16": (lambda x: yolo11(dist, x, shapes, rows).loss, scores.half()),
        "YOLOXLoss": (lambda x: yolox(x, shapes, rows).loss, preds),
    }


CASES = cases()
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of PyTorch about itself, in a class for every version
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
@pytest.mark.parametrize("create_graph", [False, True])
def test_grad_equals_autograd(name, create_graph):
    function, x = CASES[name]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=create_graph)
    assert grad.abs().sum() > 0
    assert grad.requires_grad == create_graph
    torch.testing.assert_close(torch.func.grad(function)(x), grad.detach(), rtol=1e-6, atol=0)


@EVERY
def test_a_second_derivative_is_an_error(name):
    function, x = CASES[name]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    penalised = function(leaf) + grad.square().sum()
    with pytest.raises(NotImplementedError, match="double backward"):
        penalised.backward()
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(x)


@EVERY
@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_tangent_is_an_error(name, grad_mode):
    function, x = CASES[name]

    def run(x):
        with torch.set_grad_enabled(grad_mode):
            return function(x)

    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))
    with fwd.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        run(fwd.make_dual(x, torch.ones_like(x)))


@EVERY
def test_vmap_is_an_error(name):
    function, x = CASES[name]
    for transformed in (function, torch.func.grad(function)):
        with pytest.raises(RuntimeError, match=r"does not have vmap support|Batching rule not implemented"):
            torch.func.vmap(transformed)(torch.stack([x, x]))


class Dropped(torch.autograd.Function):
    """A sum that gives its first summand no gradient."""

    @staticmethod
    def forward(ctx, x, other):
        return x + other

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@EVERY
def test_no_gradient_stays_none(name):
    function, x = CASES[name]
    leaf, other = x.clone().requires_grad_(), x.new_ones((), requires_grad=True)
    Dropped.apply(function(leaf), other).sum().backward()
    assert (leaf.grad, other.grad.item()) == (None, 1)


def test_a_retained_graph_gives_its_gradient_again():
    function, x = CASES["YOLOXLoss"]
    leaf = x.clone().requires_grad_()
    loss = 3 * function(leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(first, second)
