"""LibreYOLO's YOLOv9 with `patch()`: the same losses, gradients and training steps as its own, on boxes of every size."""

import copy
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import peers
from bench.cases import STRIDES, Case, has_coco, make_case, yolo11_preds
from tests import adapters
from tests.compare import OF_A_STEP, TOLERANCE, assert_close

pytestmark = pytest.mark.peers
DATA = Path(os.environ["TRITON_YOLO_DATA"]) if "TRITON_YOLO_DATA" in os.environ else None
NAMES = {"total_loss", "box_loss", "dfl_loss", "cls_loss", "box", "dfl", "cls", "num_fg"}
SIDES = {"below the strides": (1, 7), "one scale": (20, 110), "beyond the bins": (970, 1020)}  # of boxes in pixels
IMGSZ = 1024  # an anchor reaches 15 bins of 32 px to each side


class Peer(NamedTuple):
    """LibreYOLO's modules and our adapter of it."""

    integration: ModuleType
    loss: Any
    e2e: Any
    models: Any


@pytest.fixture(autouse=True, scope="module")
def peer():
    if not peers.is_installed("libreyolo"):
        pytest.skip("libreyolo is not installed; `make peers` installs it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with peers.contained():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from libreyolo.models.yolo9 import loss
            from libreyolo.models.yolo9 import nn as models
            from libreyolo.models.yolo9_e2e import loss as e2e

        from triton_yolo.integrations import libreyolo as integration

        yield Peer(integration, loss, e2e, models)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def stays(peer):
    """What keeps the stock computation."""
    with adapters.what_stays("libreyolo") as lines:
        yield lines
        peer.integration.unpatch()


def sized_case(sides: str) -> Case:
    """Two images with six boxes each, log-uniform between two sides."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.tensor(side / IMGSZ) for side in SIDES[sides])
    size = torch.exp(torch.empty(12, 2).uniform_(low.log(), high.log(), generator=generator))
    centre = size / 2 + (1 - size) * torch.rand(12, 2, generator=generator)
    number = torch.arange(12)[:, None]
    return Case(torch.cat([number // 6, number % 5, centre, size], 1), 2, IMGSZ, 5)


def targets_of(case: Case) -> Tensor:
    return peers.libreyolo_targets(case.rows, case.batch_size)


def maps_of(case: Case) -> list[Tensor]:
    return peers.libreyolo_maps(*yolo11_preds(case), case.feat_shapes)


def criterion_of(peer: Peer, case: Case, strides: tuple[int, ...] = STRIDES, **settings: Any) -> Any:
    size = [case.imgsz, case.imgsz]
    return peer.loss.YOLO9Loss(case.num_classes, 16, list(strides), size, torch.device("cpu"), **settings)


def losses_and_grads(criterion: Callable, maps: list[Tensor], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    leaves = [level.clone().requires_grad_() for level in maps]
    output = criterion(leaves, targets)
    output["total_loss"].backward()
    return output, torch.cat([leaf.grad.flatten(2) for leaf in leaves], 2)


def compare(
    peer: Peer, criterion: Callable, maps: list[Tensor], targets: Tensor, tolerance: float = TOLERANCE[torch.float32]
) -> dict[str, Tensor]:
    stock, grad = losses_and_grads(criterion, maps, targets)
    with peer.integration.patched():
        ours, our_grad = losses_and_grads(criterion, maps, targets)
    assert set(ours) == set(stock) == NAMES
    for name in NAMES:
        assert ours[name].dtype == stock[name].dtype
        assert_close(ours[name], stock[name], name, tolerance)
    for what, channels in (("distances", slice(0, 64)), ("scores", slice(64, None))):
        assert_close(our_grad[:, channels], grad[:, channels], f"gradient of the {what}", tolerance)
    return ours


@pytest.mark.parametrize("boxes", ["coco", "lognormal", *SIDES])
def test_losses_and_gradients(peer, boxes):
    if boxes == "coco" and not has_coco(DATA):
        pytest.skip("COCO box sizes: TRITON_YOLO_DATA names no folder with coco_boxes.json")
    case = sized_case(boxes) if boxes in SIDES else make_case(boxes, batch_size=3, imgsz=640, num_classes=80, data=DATA)
    criterion, maps, targets = criterion_of(peer, case), maps_of(case), targets_of(case)
    assert compare(peer, criterion, maps, targets)["dfl_loss"] > 0
    compare(peer, criterion, [level.double() for level in maps], targets.double())


@pytest.mark.parametrize("sides", ["below the strides", "beyond the bins"])
def test_those_sizes_have_positives_without_candidates(peer, sides):
    """What ``YOLO11Loss`` does not do, so that its loss is another."""
    case = sized_case(sides)
    criterion, targets = criterion_of(peer, case), targets_of(case) * torch.tensor([1, *[IMGSZ] * 4])
    scores, _, boxes = criterion.vec2box(maps_of(case))
    is_candidate = criterion.matcher.get_valid_matrix(targets[..., 1:])
    _, is_positive, indices = criterion.matcher(targets, (scores, boxes), return_indices=True)
    given = ~is_candidate.any(2).gather(1, indices) & is_positive
    assert given.sum() >= 3


@pytest.mark.parametrize("empty", ["an image", "padding", "nothing"])
def test_empty_images(peer, empty):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    targets = targets_of(case)
    targets[1 if empty == "an image" else slice(None)] = 0
    if empty == "nothing":
        targets = targets[:, :0]
    out = compare(peer, criterion_of(peer, case), maps_of(case), targets)
    assert (out["num_fg"] > 0) == (empty == "an image")


def test_labels_of_padding(peer):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    targets = targets_of(case)
    targets[1, 4:] = torch.tensor([-1.0, 0, 0, 0, 0])
    compare(peer, criterion_of(peer, case), maps_of(case), targets)


def test_settings_of_the_criterion(peer):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    settings = {"box_weight": 3.0, "dfl_weight": 5.0, "cls_weight": 7.0, "topk": 3, "iou_factor": 2.0, "cls_factor": 1.0}
    compare(peer, criterion_of(peer, case, **settings), maps_of(case), targets_of(case))
    compare(peer, criterion_of(peer, case, strides=(4, 8, 16)), maps_of(case._replace(imgsz=640)), targets_of(case))


@pytest.mark.parametrize("others", [0, 100])
@pytest.mark.parametrize("is_empty", [False, True])
def test_normaliser_of_two_ranks(peer, monkeypatch, others, is_empty):
    """It is the average over the ranks, which is less than 1 where they have few boxes; ``others`` is that of another rank."""
    adapters.pretend_two_ranks(monkeypatch, others)
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    compare(peer, criterion_of(peer, case), maps_of(case), targets_of(case)[:, : 0 if is_empty else None])


def test_no_boxes_on_two_ranks_by_hand(peer, monkeypatch):
    """21 anchors of 2 classes at logit 0 cost ln 2 each, divided by 1/2, in both images: 0.5 * 21 * 2 * 2 ln 2 * 2 / 2."""
    adapters.pretend_two_ranks(monkeypatch, 0)
    case = Case(torch.zeros(0, 6), 2, 32, 2)
    maps = [torch.zeros(2, 66, side, side) for side in (4, 2, 1)]
    with peer.integration.patched():
        out, grad = losses_and_grads(criterion_of(peer, case), maps, torch.zeros(2, 0, 5))
    assert_close(out["total_loss"], torch.tensor(0.5 * 2 * 21 * 2 * 2 * math.log(2)), "loss")
    assert_close(grad[:, 64:], torch.full((2, 2, 21), 0.5 * 2 * 0.5), "gradient")  # gain * sigmoid(0) / (1/2)


def test_end_to_end_criterion(peer):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    criterion = peer.e2e.YOLO9E2ELoss(5, 16, list(STRIDES), [320, 320], torch.device("cpu"))
    compare(peer, lambda maps, targets: criterion(maps, [-level for level in maps], targets), maps_of(case), targets_of(case))


def test_bfloat16_autocast(peer):
    """The assignment is theirs, and the loss is computed in float32, which theirs is not where boxes overlap."""
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    maps, criterion = [level.bfloat16() for level in maps_of(case)], criterion_of(peer, case)
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = losses_and_grads(criterion, maps, targets_of(case))
        with peer.integration.patched():
            ours, grad = losses_and_grads(criterion, maps, targets_of(case))
    for name in NAMES:
        assert ours[name].dtype == torch.float32
        assert_close(ours[name], stock[name], name, 1e-3)
    assert torch.equal(ours["num_fg"], stock["num_fg"])
    assert grad.isfinite().all()


def make_batch(seed: int) -> tuple[Tensor, Tensor]:
    """Two images of 96 x 64 px with bright boxes, and padded targets (2, 4, 5)."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(2, 3, 64, 96, generator=generator) / 3, torch.zeros(2, 4, 5)
    for image, number in enumerate([3, 1]):
        for slot in range(number):
            width, height = (3 + 57 * torch.rand(2, generator=generator)).tolist()
            left, top = (torch.rand(2, generator=generator) * torch.tensor([96 - width, 64 - height])).tolist()
            images[image, :, int(top) : int(top + height), int(left) : int(left + width)] += 0.5
            targets[image, slot] = torch.tensor([slot, left / 96, top / 64, (left + width) / 96, (top + height) / 64])
    return images.double(), targets.double()


def make_model(peer: Peer, with_aux: bool) -> nn.Module:
    torch.manual_seed(0)
    model = peer.models.LibreYOLO9Model("t", nb_classes=3, img_size=64)
    if with_aux:
        model.enable_aux()
    return model.double().train()


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    output = model(*batch)
    output["total_loss"].backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.stack([output[name].detach() for name in sorted(NAMES)]), grads


def train(peer: Peer, with_aux: bool) -> tuple[Tensor, Tensor]:
    """Six steps of SGD: the losses of each, and by how much the weights changed.

    In float64: at the first logits, -10, PyTorch's BCE is 1 % off in float32, and so is theirs. Batch norm keeps its
    statistics: those of such small maps make the training chaotic, stock against stock as well.
    """
    model, losses = make_model(peer, with_aux), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    start = flat_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for number in range(6):
        losses.append(step(model, make_batch(number))[0])
        optimizer.step()
    return torch.stack(losses), flat_weights(model) - start


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("with_aux", [False, True])
def test_training(peer, with_aux):
    stock, stock_change = train(peer, with_aux)
    with peer.integration.patched():
        ours, change = train(peer, with_aux)
    assert ((ours - stock).abs() <= 1e-4 * stock.abs()).all()
    assert (stock > 0).all()
    assert_close(change, stock_change, "change of the weights", OF_A_STEP)


@pytest.mark.parametrize("with_aux", [False, True])
def test_every_step_of_a_training_with_the_same_weights(peer, with_aux):
    model = make_model(peer, with_aux)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for number in range(6):
        stock, stock_grads = step(copy.deepcopy(model), make_batch(number))
        with peer.integration.patched():
            ours, grads = step(model, make_batch(number))
        assert ((ours - stock).abs() <= 1e-5 * stock.abs()).all()
        assert_close(grads, stock_grads, "gradients", TOLERANCE[torch.float32])
        optimizer.step()


def test_patch_and_unpatch(peer):
    stock = peer.loss.YOLO9Loss.__call__
    peer.integration.patch()
    peer.integration.patch()
    assert peer.loss.YOLO9Loss.__call__ is not stock
    peer.integration.unpatch()
    assert peer.loss.YOLO9Loss.__call__ is stock


@pytest.mark.parametrize("what", ["criterion", "term"])
def test_another_loss_keeps_it(peer, what, stays):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    criterion = criterion_of(peer, case)
    owner, name = (criterion, "YOLO9Loss") if what == "criterion" else (criterion.box_loss, "BoxLoss")
    owner.__class__ = type("Changed", (getattr(peer.loss, name),), {})
    expected = losses_and_grads(criterion, maps_of(case), targets_of(case))[0]["total_loss"]
    with peer.integration.patched():
        for _ in range(2):
            loss = losses_and_grads(criterion, maps_of(case), targets_of(case))[0]["total_loss"]
            assert torch.equal(loss, expected)
    assert ("its class is another" if what == "criterion" else "box_loss is a Changed") in stays.pop()


@pytest.mark.parametrize(
    ("owner", "name"),
    [("YOLO9Loss", "__call__"), ("YOLO9Loss", "_global_cls_norm"), ("Vec2Box", "__call__"), ("BoxMatcher", "__call__")],
)
def test_changed_methods_are_an_error(peer, owner, name, monkeypatch):
    monkeypatch.setattr(getattr(peer.loss, owner), name, lambda self, other: None)
    with pytest.raises(RuntimeError, match=rf"{owner}.{name} takes \('self', 'other'\)"):
        peer.integration.patch()


@pytest.mark.parametrize("name", ["YOLO9Loss", "BoxMatcher", "DFLoss"])
def test_missing_classes_are_an_error(peer, name, monkeypatch):
    monkeypatch.delattr(peer.loss, name)
    with pytest.raises(RuntimeError, match=f"libreyolo 1.6.0.*{name}"):
        peer.integration.patch()


@pytest.mark.parametrize("name", ["matcher", "vec2box", "box_weight", "dfl_loss", "reg_max"])
def test_changed_settings_are_an_error(peer, name):
    case = make_case("lognormal", batch_size=2, imgsz=320, num_classes=5)
    criterion = copy.copy(criterion_of(peer, case))
    delattr(criterion, name)
    with peer.integration.patched(), pytest.raises(RuntimeError, match=f"settings have changed.*{name}"):
        criterion(maps_of(case), targets_of(case))
