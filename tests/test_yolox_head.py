"""YOLOX's head and models with `patch()`: the same losses, gradients and training steps, in each package that has them."""

import copy
import pickle
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from bench import peers
from tests import adapters
from tests.compare import assert_close
from triton_yolo.integrations import _yolox_head
from triton_yolo.integrations._patching import kept

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
SIZE, NUM_CLASSES = 64, 3


class Peer(NamedTuple):
    """A package with YOLOX: our adapter of it, its classes and what it calls the six losses."""

    integration: ModuleType
    neck: type
    head: type
    model: type
    names: tuple[str, ...]

    def make_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        neck, head = self.neck(depth=0.33, width=0.125), self.head(NUM_CLASSES, width=0.125)
        model = self.model(neck, head)
        model.head.initialize_biases(1e-2)
        return model.train()


def yolox() -> Peer:
    from triton_yolo.integrations import yolox as integration

    classes = peers.yolox_models("YoloPafpn", "YoloxHead", "YoloxModule")
    return Peer(integration, *classes, ("total_loss", "iou_loss", "conf_loss", "cls_loss", "l1_loss", "num_fg"))


def libreyolo() -> Peer:
    from libreyolo.models.yolox import nn

    from triton_yolo.integrations import libreyolo as integration

    def make(neck: torch.nn.Module, head: torch.nn.Module) -> torch.nn.Module:
        model = nn.LibreYOLOXModel("n", nb_classes=NUM_CLASSES)
        model.backbone, model.head = neck, head
        return model

    names = ("total_loss", "iou_loss", "obj_loss", "cls_loss", "l1_loss", "num_fg")
    return Peer(integration, nn.YOLOPAFPN, nn.YOLOXHead, make, names)


@pytest.fixture(autouse=True, scope="module", params=[yolox, libreyolo])
def peer(request):
    name = request.param.__name__
    if not peers.is_installed(name):
        pytest.skip(f"{name} is not installed; `make peers` installs it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with peers.contained():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = request.param()
        yield peer
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def stays(peer):
    """What keeps the stock computation."""
    with adapters.what_stays(peer.head.__module__.partition(".")[0]) as lines:
        yield lines
        peer.integration.unpatch()


def make_batch(seed: int = 0, empty: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Three images with bright boxes and padded labels (3, 6, 5); "one" image or "all" without."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, SIZE, SIZE, generator=generator) * 90
    labels = torch.zeros(3, 6, 5)
    for image, number in enumerate([3, 0 if empty == "one" else 1, 4]):
        for slot in range(0 if empty == "all" else number):
            width, height = (8 + 30 * torch.rand(2, generator=generator)).tolist()
            left, top = (torch.rand(2, generator=generator) * (SIZE - 38)).tolist()
            images[image, :, int(top) : int(top + height), int(left) : int(left + width)] += 120
            labels[image, slot] = torch.tensor([slot % NUM_CLASSES, left + width / 2, top + height / 2, width, height])
    return images, labels


def step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[dict, torch.Tensor]:
    model.zero_grad()
    output = model(images, labels)
    output["total_loss"].backward()
    return output, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_steps(peer: Peer, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict:
    stock, grad = step(copy.deepcopy(model), images, labels)
    with peer.integration.patched():
        ours, our_grad = step(model, images, labels)
    assert set(ours) == set(stock) == set(peer.names)
    assert all(value.shape == () for value in ours.values())
    for name in peer.names if labels.any() else peer.names[:-1]:
        assert_close(ours[name], torch.as_tensor(stock[name]), name, 1e-4)
    assert (our_grad - grad).abs().max() <= 1e-4 * grad.abs().max()
    return ours


@pytest.mark.parametrize("use_l1", [False, True])
@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
def test_step(peer, use_l1, iou_loss):
    model = peer.make_model()
    model.head.use_l1, model.head.iou_loss.loss_type = use_l1, iou_loss
    assert (compare_steps(peer, model, *make_batch())["l1_loss"] > 0) == use_l1


def test_steps_share_a_criterion_for_each_state_of_the_switch(peer, monkeypatch):
    calls, forward = [], _yolox_head.YOLOXLoss.forward
    monkeypatch.setattr(_yolox_head.YOLOXLoss, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    model = peer.make_model()
    for use_l1 in (False, True, True, False):
        model.head.use_l1 = use_l1
        assert (compare_steps(peer, model, *make_batch())["l1_loss"] > 0) == use_l1
    off, on, still_on, off_again = calls
    assert off is off_again is not on is still_on


def test_a_criterion_of_inference_mode_trains(peer):
    kept.cache_clear()
    model = peer.make_model()
    with peer.integration.patched(), torch.inference_mode():
        model(*make_batch())
    compare_steps(peer, model, *make_batch())


@pytest.mark.parametrize("empty", ["one", "all"])
def test_empty_images(peer, empty):
    compare_steps(peer, peer.make_model(), *make_batch(empty=empty))


def test_half_precision_labels(peer):
    images, labels = make_batch()
    model = peer.make_model()
    whole = labels.half()
    with peer.integration.patched():
        ours, expected = (step(model, images, x)[0]["total_loss"] for x in (whole, whole.float()))
    assert torch.equal(ours, expected)
    compare_steps(peer, model, images, whole.float())


def test_integer_labels(peer):
    images, labels = make_batch()
    compare_steps(peer, peer.make_model(), images, labels.round().long())


def test_boxes_without_height_are_ignored(peer):
    """A mosaic of YOLOX whose boxes are all cut off has such rows; the stock loss gives them anchors."""
    images, labels = make_batch()
    model = peer.make_model()
    cut = torch.cat([labels, torch.tensor([[0.0, 21, 64, 40, 0], [1.0, 0, 20, 0, 10]]).expand(3, 2, 5)], 1)
    with peer.integration.patched():
        ours, expected = (step(model, images, x)[0]["total_loss"] for x in (cut, labels))
    assert torch.equal(ours, expected)


def test_bfloat16_autocast(peer):
    """The head's output is bfloat16, the loss is computed in float32 of it."""
    images, labels = make_batch()
    model = peer.make_model()
    with peer.integration.patched(), torch.autocast("cpu", torch.bfloat16):
        output, grad = step(model, images, labels)
    assert output["total_loss"].dtype == torch.float32
    assert_close(output["total_loss"], step(model, images, labels)[0]["total_loss"], "loss", 0.02)
    assert grad.isfinite().all()


def train(peer: Peer, num_steps: int, take_step: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """SGD with L1 in the last two steps: what ``take_step`` gave at each, and the weights at the end.

    In float64: such small maps make the training chaotic, and float32's rounding is a tenth of the loss after six steps.
    """
    model, results = peer.make_model().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for number in range(num_steps):
        model.head.use_l1 = number >= num_steps - 2
        results.append(take_step(peer, model, number))
        optimizer.step()
    return torch.stack(results), torch.cat([p.detach().flatten() for p in model.parameters()])


def losses_of_step(peer: Peer, model: torch.nn.Module, number: int) -> torch.Tensor:
    output, _ = step(model, *(x.double() for x in make_batch(number)))
    return torch.stack([torch.as_tensor(output[name]).detach() for name in peer.names])


def test_training(peer):
    stock, stock_weights = train(peer, 6, losses_of_step)
    with peer.integration.patched():
        ours, weights = train(peer, 6, losses_of_step)
    assert ((ours - stock).abs() <= 1e-4 * stock.abs() + 1e-6).all()
    assert (stock[:, 4] > 0).tolist() == [False] * 4 + [True] * 2
    assert_close(weights, stock_weights, "weights", 1e-4)


def test_every_step_of_a_training_with_the_same_weights(peer):
    train(peer, 10, lambda peer, model, number: compare_steps(peer, model.float(), *make_batch(number))["total_loss"].detach())


def test_models_hold_nothing_of_ours(peer):
    model, batch = peer.make_model(), make_batch()
    keys = list(model.state_dict())
    with peer.integration.patched():
        expected = step(model, *batch)[0]["total_loss"]
        assert list(model.state_dict()) == keys
        assert b"triton_yolo" not in pickle.dumps(model)
        assert_close(step(copy.deepcopy(model), *batch)[0]["total_loss"], expected)
        ours = model.eval()(batch[0])
    for a, b in zip(ours, model(batch[0]), strict=True):
        assert torch.equal(a, b)


def test_patch_and_unpatch(peer):
    stock = peer.head.get_losses, peer.head.get_output_and_grid
    peer.integration.patch()
    peer.integration.patch()
    assert peer.head.get_losses is not stock[0]
    peer.integration.unpatch()
    assert (peer.head.get_losses, peer.head.get_output_and_grid) == stock


def test_a_head_with_its_own_assignment_keeps_it(peer, stays):
    class Head(peer.head):
        def get_assignments(self, *args, **kwargs):
            return super().get_assignments(*args, **kwargs)

    model = peer.make_model()
    model.head.__class__ = Head
    compare_exactly(peer, model)
    assert "Head.get_assignments was replaced" in stays.pop()


def compare_exactly(peer: Peer, model: torch.nn.Module) -> None:
    """Two steps patched are the stock ones to the bit."""
    expected, expected_grad = step(model, *make_batch())
    with peer.integration.patched():
        for _ in range(2):
            output, grad = step(model, *make_batch())
            assert torch.equal(output["total_loss"], expected["total_loss"])
            assert torch.equal(grad, expected_grad)


class Doubled(torch.nn.BCEWithLogitsLoss):
    def forward(self, logits, targets):
        return 2 * super().forward(logits, targets)


@pytest.mark.parametrize("name", ["bcewithlog_loss", "l1_loss", "iou_loss"])
def test_a_head_with_a_loss_of_its_own_keeps_it(peer, name, stays):
    model = peer.make_model()
    model.head.use_l1 = True
    plain = step(model, *make_batch())[0]["total_loss"]
    if name == "bcewithlog_loss":
        model.head.bcewithlog_loss = Doubled(reduction="none")
    else:
        getattr(model.head, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    assert step(model, *make_batch())[0]["total_loss"] > plain
    compare_exactly(peer, model)
    assert ("bcewithlog_loss is a Doubled" if name == "bcewithlog_loss" else f"{name} has hooks") in stays.pop()


def test_a_head_decodes_in_its_own_way(peer, stays):
    class Head(peer.head):
        def get_output_and_grid(self, output, k, stride, dtype):
            return stock(self, output, k, stride, dtype)

    model, stock = peer.make_model(), peer.head.get_output_and_grid
    model.head.__class__ = Head
    compare_exactly(peer, model)
    assert "somebody else decoded its outputs" in stays.pop()


@pytest.mark.parametrize("others", [0, 1000])
@pytest.mark.parametrize("empty", ["one", "all"])
def test_two_ranks(peer, monkeypatch, others, empty):
    """LibreYOLO divides by the mean number of positives; ``others`` is that of another rank. YOLOX by its own."""
    adapters.pretend_two_ranks(monkeypatch, others)
    model, batch = peer.make_model(), make_batch(empty=empty)
    stock, grad = step(model, *batch)
    with peer.integration.patched():
        ours, our_grad = step(model, *batch)
    assert_close(ours["total_loss"], stock["total_loss"], "loss", 1e-4)
    assert (our_grad - grad).abs().max() <= 1e-4 * grad.abs().max()


@pytest.mark.parametrize("name", ["get_losses", "get_output_and_grid"])
def test_changed_methods_are_an_error(peer, name, monkeypatch):
    monkeypatch.setattr(peer.head, name, lambda self, other: None)
    with pytest.raises(RuntimeError, match=rf"{name} of the head takes \('self', 'other'\)"):
        peer.integration.patch()


def test_changed_head_is_an_error(peer):
    model = peer.make_model()
    del model.head.use_l1
    with peer.integration.patched(), pytest.raises((RuntimeError, AttributeError), match="use_l1"):
        model(*make_batch())
    head = peer.make_model().head
    peer.integration.patch()
    head.get_output_and_grid(torch.zeros(1, 8, 8, 8), 0, 8, "torch.FloatTensor")
    with pytest.raises(RuntimeError, match="decoded 64 anchors, its loss has 84"):
        peers.yolox_losses(head, torch.zeros(1, 84, 8), [(8, 8), (4, 4), (2, 2)], torch.zeros(1, 2, 5))
