"""YOLOX's head and models with `patch()`: the same losses, gradients and training steps."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch

from tests import peers
from tests.compare import assert_close
from triton_yolo.integrations import yolox as integration

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
SIZE, NUM_CLASSES = 64, 3


@pytest.fixture(autouse=True, scope="module")
def contained():
    if not peers.is_installed("yolox"):
        pytest.skip("yolox is not installed; `make peers` installs it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with peers.contained():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import yolox.models  # noqa: F401
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    integration.unpatch()


def make_model() -> torch.nn.Module:
    neck, head, model = peers.yolox_models("YoloPafpn", "YoloxHead", "YoloxModule")
    torch.manual_seed(0)
    model = model(neck(depth=0.33, width=0.125), head(NUM_CLASSES, width=0.125))
    model.head.initialize_biases(1e-2)
    return model.train()


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


NAMES = ("total_loss", "iou_loss", "conf_loss", "cls_loss", "l1_loss", "num_fg")


def step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[dict, torch.Tensor]:
    model.zero_grad()
    output = model(images, labels)
    output["total_loss"].backward()
    return output, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_steps(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict:
    stock, grad = step(copy.deepcopy(model), images, labels)
    with integration.patched():
        ours, our_grad = step(model, images, labels)
    assert set(ours) == set(stock) == set(NAMES)
    assert all(value.shape == () for value in ours.values())
    for name in NAMES if labels.any() else NAMES[:-1]:
        assert_close(ours[name], torch.as_tensor(stock[name]), name, 1e-4)
    assert (our_grad - grad).abs().max() <= 1e-4 * grad.abs().max()
    return ours


@pytest.mark.parametrize("use_l1", [False, True])
@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
def test_step(use_l1, iou_loss):
    model = make_model()
    model.head.use_l1, model.head.iou_loss.loss_type = use_l1, iou_loss
    assert (compare_steps(model, *make_batch())["l1_loss"] > 0) == use_l1


@pytest.mark.parametrize("empty", ["one", "all"])
def test_empty_images(empty):
    compare_steps(make_model(), *make_batch(empty=empty))


def test_half_precision_labels():
    images, labels = make_batch()
    model = make_model()
    whole = labels.half()
    with integration.patched():
        ours, expected = (step(model, images, x)[0]["total_loss"] for x in (whole, whole.float()))
    assert torch.equal(ours, expected)
    compare_steps(model, images, whole.float())


def test_bfloat16_autocast():
    """The head's output is bfloat16, the loss is computed in float32 of it."""
    images, labels = make_batch()
    model = make_model()
    with integration.patched(), torch.autocast("cpu", torch.bfloat16):
        output, grad = step(model, images, labels)
    assert output["total_loss"].dtype == torch.float32
    assert_close(output["total_loss"], step(model, images, labels)[0]["total_loss"], "loss", 0.02)
    assert grad.isfinite().all()


def train(num_steps: int, take_step: Callable[[torch.nn.Module, int], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """SGD with L1 in the last two steps: what ``take_step`` gave at each, and the weights at the end.

    In float64: such small maps make the training chaotic, and float32's rounding is a tenth of the loss after six steps.
    """
    model, results = make_model().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for number in range(num_steps):
        model.head.use_l1 = number >= num_steps - 2
        results.append(take_step(model, number))
        optimizer.step()
    return torch.stack(results), torch.cat([p.detach().flatten() for p in model.parameters()])


def losses_of_step(model: torch.nn.Module, number: int) -> torch.Tensor:
    output, _ = step(model, *(x.double() for x in make_batch(number)))
    return torch.stack([torch.as_tensor(output[name]).detach() for name in NAMES])


def test_training():
    stock, stock_weights = train(6, losses_of_step)
    with integration.patched():
        ours, weights = train(6, losses_of_step)
    assert ((ours - stock).abs() <= 1e-4 * stock.abs() + 1e-6).all()
    assert (stock[:, 4] > 0).tolist() == [False] * 4 + [True] * 2
    assert_close(weights, stock_weights, "weights", 1e-4)


def test_every_step_of_a_training_with_the_same_weights():
    train(10, lambda model, number: compare_steps(model.float(), *make_batch(number))["total_loss"].detach())


def test_models_hold_nothing_of_ours():
    model, batch = make_model(), make_batch()
    keys = list(model.state_dict())
    with integration.patched():
        expected = step(model, *batch)[0]["total_loss"]
        assert list(model.state_dict()) == keys
        assert b"triton_yolo" not in pickle.dumps(model)
        assert_close(step(copy.deepcopy(model), *batch)[0]["total_loss"], expected)
        assert model.eval()(batch[0]).shape == (3, 84, 5 + NUM_CLASSES)


def test_patch_and_unpatch():
    (YoloxHead,) = peers.yolox_models("YoloxHead")  # noqa: N806

    stock = YoloxHead.get_losses, YoloxHead.get_output_and_grid
    integration.patch()
    integration.patch()
    assert YoloxHead.get_losses is not stock[0]
    integration.unpatch()
    assert (YoloxHead.get_losses, YoloxHead.get_output_and_grid) == stock


def test_a_head_with_its_own_assignment_keeps_it():
    (YoloxHead,) = peers.yolox_models("YoloxHead")  # noqa: N806

    class Head(YoloxHead):
        def get_assignments(self, *args, **kwargs):
            return super().get_assignments(*args, **kwargs)

    model = make_model()
    expected = step(model, *make_batch())[0]["total_loss"]
    model.head.__class__ = Head
    with integration.patched():
        with pytest.warns(UserWarning, match="Head changes YOLOX's assignment"):
            loss = step(model, *make_batch())[0]["total_loss"]
        assert step(model, *make_batch())[0]["num_fg"] > 0
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", ["get_losses", "get_output_and_grid"])
def test_changed_methods_are_an_error(name, monkeypatch):
    (YoloxHead,) = peers.yolox_models("YoloxHead")  # noqa: N806

    monkeypatch.setattr(YoloxHead, name, lambda self, other: None)
    with pytest.raises(RuntimeError, match=rf"{name} of the head takes \('self', 'other'\)"):
        integration.patch()


def test_changed_head_is_an_error():
    model = make_model()
    del model.head.use_l1
    with integration.patched(), pytest.raises((RuntimeError, AttributeError), match="use_l1"):
        model(*make_batch())
    head = peers.yolox_head(NUM_CLASSES, (8, 16, 32))
    with integration.patched(), pytest.raises(RuntimeError, match="decoded 0 anchors, its loss has 84"):
        peers.yolox_losses(head, torch.zeros(1, 84, 8), [(8, 8), (4, 4), (2, 2)], torch.zeros(1, 2, 5))
