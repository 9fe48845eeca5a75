"""What a user changed in a trainer's criterion keeps the stock computation, in every one of the trainers."""

import copy
import logging
import types

import pytest
import torch
from torch import nn

from tests import peers
from tests.test_ultralytics import make_batch, make_model
from triton_yolo.integrations import ultralytics as integration
from triton_yolo.integrations._stock import BCE, Stock

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True, scope="module")
def contained():
    if not peers.is_installed("ultralytics"):
        pytest.skip("ultralytics is not installed; `make peers` installs it")
    with peers.contained():
        import ultralytics  # noqa: F401  sets up its log

        yield


class FocalLoss(nn.Module):
    """A focal loss in the place of the criterion's BCE, as public threads advise it."""

    def forward(self, logits, targets):
        bce = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return bce * (1 - torch.exp(-bce)) ** 4


def replaced_member(criterion, monkeypatch):
    criterion.bce = FocalLoss()


def weighted_member(criterion, monkeypatch):
    criterion.bce = nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor([2.0, 1.0, 1.0]))


def hooked_member(criterion, monkeypatch):
    criterion.bce.register_forward_hook(lambda module, inputs, output: 3 * output)


def subclassed_box_loss(criterion, monkeypatch):
    class Half(type(criterion.bbox_loss)):
        def forward(self, *args, **kwargs):
            return tuple(x / 2 for x in super().forward(*args, **kwargs))

    criterion.bbox_loss.__class__ = Half


def method_of_the_object(criterion, monkeypatch):
    stock = criterion.bbox_loss.forward
    criterion.bbox_loss.forward = types.MethodType(lambda self, *args: tuple(x / 2 for x in stock(*args)), criterion.bbox_loss)


def method_of_the_class(criterion, monkeypatch):
    stock = type(criterion).bbox_decode
    monkeypatch.setattr(type(criterion), "bbox_decode", lambda self, *args: stock(self, *args) * 1.01)


def function_of_the_module(criterion, monkeypatch):
    import ultralytics.utils.loss as module

    stock = module.bbox_iou
    monkeypatch.setattr(module, "bbox_iou", lambda *args, **kwargs: stock(*args, **kwargs) ** 2)


def part_of_the_assigner(criterion, monkeypatch):
    criterion.assigner.get_box_metrics = types.MethodType(
        lambda self, *args, **kwargs: tuple(x * 0.5 for x in type(self).get_box_metrics(self, *args, **kwargs)),
        criterion.assigner,
    )


CHANGES = [
    replaced_member,
    weighted_member,
    hooked_member,
    subclassed_box_loss,
    method_of_the_object,
    method_of_the_class,
    function_of_the_module,
    part_of_the_assigner,
]


def loss_of(model, batch):
    predictions = model(batch["img"])
    return model.criterion(predictions, batch)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_before", [True, False])
def test_ultralytics_criterion(change, is_before, monkeypatch, caplog):
    model, batch = make_model("yolo11n"), make_batch()
    model.criterion = model.init_criterion()
    plain, _ = loss_of(copy.deepcopy(model), batch)
    if is_before:
        change(model.criterion, monkeypatch)
    with integration.patched(), caplog.at_level(logging.INFO, logger="ultralytics"):
        logging.getLogger("ultralytics").propagate = True
        if not is_before:
            change(model.criterion, monkeypatch)
        ours, items = loss_of(copy.deepcopy(model), batch)
    stock, stock_items = loss_of(copy.deepcopy(model), batch)
    torch.testing.assert_close(ours, stock)  # three terms, and the assigner may be ours
    assert items.keys() == stock_items.keys()
    assert not torch.allclose(stock.sum(), plain.sum(), rtol=1e-4)  # the change shows


def test_ultralytics_criterion_without_a_change_is_ours():
    model, batch = make_model("yolo11n"), make_batch()
    model.criterion = model.init_criterion()
    with integration.patched():
        loss, _ = loss_of(model, batch)
    assert loss.shape == (1,)  # the stock one has three


def test_a_dict_of_gains_has_a_sentence_of_its_own():
    model, batch = make_model("yolo11n"), make_batch()
    model.criterion = model.init_criterion()
    model.criterion.hyp = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
    with integration.patched(), pytest.raises(TypeError, match=r"model\.args must have the gains as attributes"):
        loss_of(model, batch)


class Owner:
    def __init__(self) -> None:
        self.bce = nn.BCEWithLogitsLoss(reduction="none")

    def loss(self):
        return helper()


def helper():
    return 1


def test_what_differs_has_a_name(monkeypatch):
    stock, owner = Stock([Owner], {"bce": BCE}), Owner()
    assert stock.difference(owner) is None
    owner.loss = helper
    assert stock.difference(owner) == "Owner.loss"
    del owner.loss
    owner.bce = nn.BCEWithLogitsLoss()
    assert stock.difference(owner) == "Owner.bce (BCEWithLogitsLoss)"
    monkeypatch.setitem(globals(), "helper", lambda: 2)
    assert stock.difference() == "helper"
