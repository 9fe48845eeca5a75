"""Settings that criteria keep in buffers survive whatever moves, empties or replaces buffers."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox

WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def weighted():
    return ty.YOLO11Loss(3, strides=(8, 16), reg_max=8, class_weights=WEIGHTS.clone())


def with_l1():
    return ty.YOLOXLoss(3, strides=(8, 16), use_l1=True)


def loss(criterion: torch.nn.Module) -> torch.Tensor:
    _, *args = small_yolo11() if isinstance(criterion, ty.YOLO11Loss) else small_yolox()
    return criterion(*args).loss


def emptied(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, **options) -> torch.nn.Module:
    """The module with fresh memory, which holds anything."""
    empty_like = torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
        return module.to_empty(device=DEVICE, **options)


MAKE = pytest.mark.parametrize("make", [weighted, with_l1])


@MAKE
def test_to_empty(make, monkeypatch):
    criterion = make().to(DEVICE)
    expected = loss(criterion)
    assert torch.equal(loss(emptied(criterion, monkeypatch)), expected)
    assert torch.equal(loss(emptied(criterion, monkeypatch, recurse=False)), expected)
    criterion.reset_parameters()  # what a wrapper that shards calls then
    assert torch.equal(loss(criterion), expected)


@MAKE
def test_meta_device(make, monkeypatch):
    expected = loss(make().to(DEVICE))
    weights = WEIGHTS.clone()
    with torch.device("meta"):
        made_there = ty.YOLO11Loss(3, strides=(8, 16), reg_max=8, class_weights=weights) if make is weighted else with_l1()
    moved_there = torch.nn.Sequential(make()).to("meta")
    assert torch.equal(loss(emptied(made_there, monkeypatch)), expected)
    assert torch.equal(loss(emptied(moved_there, monkeypatch)[0]), expected)


def test_a_switch_that_was_left_on_meta():
    with torch.device("meta"):
        criterion = with_l1()
    assert torch.equal(loss(criterion), loss(with_l1().to(DEVICE)))


@MAKE
def test_moves_and_copies(make):
    criterion = make().to(DEVICE)
    expected = loss(criterion)
    for other in (
        copy.deepcopy(criterion).to(DEVICE),
        AveragedModel(criterion).module,
        copy.deepcopy(criterion).half().float(),
    ):
        assert torch.equal(loss(other), expected)


@MAKE
def test_inference_mode(make):
    """What was made, moved or copied there is written to outside."""
    expected = loss(make().to(DEVICE))
    with torch.inference_mode():
        made = make()
        moved, copied = make().to(DEVICE), copy.deepcopy(made)
        was_moved = make().double().float()
    for criterion in (made, moved, copied, was_moved):
        assert torch.equal(loss(criterion.to(DEVICE)), expected)
        criterion.reset_parameters()
        if make is with_l1:
            criterion.use_l1 = False
            assert loss(criterion) < expected
            criterion.use_l1 = True
        assert torch.equal(loss(criterion), expected)


def test_weights_that_became_a_parameter():
    expected, criterion = loss(weighted().to(DEVICE)), weighted()
    criterion.class_weights = torch.nn.Parameter(WEIGHTS, requires_grad=False)
    assert torch.equal(loss(criterion.to(DEVICE)), expected)


def test_weights_that_were_changed_stay_changed():
    criterion, other = weighted().to(DEVICE), weighted().to(DEVICE)
    criterion.class_weights.mul_(2)
    other.class_weights = WEIGHTS.to(DEVICE) * 2
    assert loss(criterion) == loss(other) > loss(weighted().to(DEVICE))
    for changed in (criterion, other):
        assert torch.equal(changed.double().class_weights, WEIGHTS.double().to(DEVICE) * 2)
