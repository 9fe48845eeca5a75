"""Ultralytics' models with keypoints and `patch()`: the same losses, items and gradients."""

import functools

import pytest
import torch

from bench import peers
from tests.test_ultralytics import compare_steps, contained, make_batch, stays, step  # noqa: F401
from triton_yolo.integrations import ultralytics as integration

pytestmark = pytest.mark.peers
SHAPES = {"yolo11n-pose": (17, 3), "yolov8n-pose": (17, 2), "yolov8n-pose, few": (4, 3)}


@functools.cache
def model_of(name: str = "yolo11n-pose") -> torch.nn.Module:
    torch.manual_seed(0)
    return peers.ultralytics_pose_model(f"{name.partition(',')[0]}.yaml", 3, *SHAPES[name])


def pose_batch(shape: tuple[int, int] = (17, 3), empty: str = "") -> dict[str, torch.Tensor]:
    """Keypoints in and around every box; those of the first one are not visible, if there are flags."""
    batch = make_batch(empty)
    centre, size = batch["bboxes"][:, None].split(2, 2)
    generator = torch.Generator().manual_seed(2)
    places = centre + size * (torch.rand(len(size), shape[0], 2, generator=generator) - 0.5)
    flags = torch.randint(3, (len(size), shape[0], 1), generator=generator).float()
    flags[:1] = 0
    return {**batch, "keypoints": torch.cat([places, flags], 2)[..., : shape[1]]}


@pytest.mark.parametrize("empty", ["", "one", "all"])
@pytest.mark.parametrize("name", SHAPES)
def test_step(name, empty):
    compare_steps(model_of(name), pose_batch(SHAPES[name], empty))


def test_settings_may_change_at_any_time():
    model = model_of()
    model.criterion = model.init_criterion()
    criterion, items = model.criterion, []
    for change in (
        lambda: None,
        lambda: vars(criterion.hyp).update(pose=3.0, kobj=2.0),
        lambda: setattr(criterion.keypoint_loss, "sigmas", torch.linspace(0.02, 0.1, 17)),
        lambda: criterion.keypoint_loss.sigmas.mul_(2),
        lambda: setattr(criterion, "class_weights", torch.tensor([[[0.25, 1.0, 4.0]]])),
    ):
        change()
        compare_steps(model, pose_batch())
        items.append(tuple(step(model, pose_batch())[1].values()))
    assert len(set(items)) == 5
    del model.criterion
    vars(model.args).update(pose=12.0, kobj=1.0)


@pytest.mark.parametrize("name", ["class_weights", "keypoint_loss.sigmas"])
def test_numbers_that_are_learned_get_their_gradient(name, stays):  # noqa: F811
    criterion = model_of().init_criterion()
    if name == "class_weights":
        learned = criterion.class_weights = torch.ones(1, 1, 3, requires_grad=True)
    else:
        learned = criterion.keypoint_loss.sigmas = criterion.keypoint_loss.sigmas.clone().requires_grad_()
    preds = model_of()(pose_batch()["img"])
    with integration.patched():
        (gradient,) = torch.autograd.grad(criterion(preds, pose_batch())[0].sum(), learned)
    assert gradient.any()
    assert f"{name.partition('.')[0]} has other settings" in stays.pop()


def test_anchors_of_metric_0_are_background_here():
    """The known difference: there a box claims ten anchors wherever top-k finds them, of a score of 0 too; all count alike."""
    criterion = model_of().init_criterion()
    preds = {"boxes": torch.zeros(1, 64, 84), "scores": torch.full((1, 3, 84), -200.0), "kpts": torch.zeros(1, 51, 84)}
    preds["scores"][0, 0, 27], preds["kpts"][0, 2::3] = 2.0, 1.0
    preds["kpts"][0, 2::3, 27] = -1.0
    preds["feats"] = [torch.zeros(1, 1, size, size) for size in (8, 4, 2)]
    batch = {"batch_idx": torch.zeros(1), "cls": torch.zeros(1, 1), "bboxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
    batch["keypoints"] = torch.ones(1, 17, 3)
    _, stock = criterion(preds, batch)
    with integration.patched():
        _, ours = criterion(preds, batch)
    # Cross entropies of -1 and 1: one anchor and nine others, or that one alone.
    assert stock["kobj_loss"].item() == pytest.approx((1.313262 + 9 * 0.313262) / 10, rel=1e-5)
    assert ours["kobj_loss"].item() == pytest.approx(1.313262, rel=1e-5)
    assert stock["box_loss"].item() == pytest.approx(ours["box_loss"].item(), rel=1e-5)
