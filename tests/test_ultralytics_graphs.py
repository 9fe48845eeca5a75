"""Training steps of Ultralytics' other tasks as graphs, which a recorder stands in for: the same losses and gradients."""

import copy
from typing import Any

import pytest
import torch

from bench import peers
from tests.test_ultralytics import (  # noqa: F401  fixtures
    as_training,
    assert_close,
    contained,
    graphs,
    make_batch,
    make_model,
    stays,
    step,
    task_batch,
    task_model,
)
from tests.test_ultralytics_obb import make_oriented_batch
from tests.test_ultralytics_pose import pose_batch
from triton_yolo.integrations import ultralytics as integration

pytestmark = pytest.mark.peers
Batch = dict[str, torch.Tensor]


def masks_batch(empty: str = "") -> Batch:
    """One image of numbers a picture, in the type that Ultralytics loads."""
    batch = task_batch("yolo11n-seg")
    kept = batch["batch_idx"] != 1 if empty else slice(None)
    rows = {name: batch[name][kept] for name in ("batch_idx", "cls", "bboxes")}
    return {"img": batch["img"], **rows, "masks": batch["masks"].byte()}


def separate_masks_batch(empty: str = "") -> Batch:
    batch = masks_batch(empty)
    first = torch.cat([torch.ones(1, dtype=torch.bool), batch["batch_idx"].diff() > 0])
    number = torch.arange(1, len(first) + 1) - torch.where(first, torch.arange(len(first)), 0).cummax(0).values
    return {**batch, "masks": (batch["masks"][batch["batch_idx"].long()] == number[:, None, None]).byte()}


TASKS: dict[str, tuple[Any, Any]] = {
    "obb": (lambda: make_model("yolo11n-obb"), make_oriented_batch),
    "obb, two branches": (lambda: make_model("yolo26n-obb"), make_oriented_batch),
    "pose": (lambda: peers.ultralytics_pose_model("yolo11n-pose.yaml", 3, 17, 3), lambda empty="": pose_batch(empty=empty)),
    "masks": (lambda: task_model("yolo11n-seg"), masks_batch),
    "masks a row": (lambda: task_model("yolo11n-seg"), separate_masks_batch),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks(task, graphs, as_training):  # noqa: F811
    """Three steps, the last of which has fewer boxes and is replayed."""
    make, batch_of = TASKS[task]
    model = make()
    model.criterion = model.init_criterion()
    if task.startswith("masks"):
        model.criterion.overlap = task == "masks"
    state, found = {}, []

    def work() -> None:
        for empty in ("", "", "one"):
            state.update(copy.deepcopy(model.state_dict()))
            found[:] = step(model, batch_of(empty))

    as_training(model, work)
    assert graphs[0].num_replays == 1
    model.load_state_dict(state)
    with integration.patched():
        ours = step(model, batch_of("one"))
    model.load_state_dict(state)
    stock = step(model, batch_of("one"))
    loss, items, gradient = found
    assert torch.equal(loss, ours[0])
    assert torch.equal(gradient, ours[2])
    assert list(items) == list(stock[1])
    for name, item in stock[1].items():
        assert torch.equal(items[name], ours[1][name])
        assert_close(items[name], item, name)
    assert (gradient - stock[2]).abs().max() <= 1e-4 * stock[2].abs().max()


def test_predictions_with_an_objection_have_no_graphs(graphs, as_training, stays):  # noqa: F811
    """YOLO26's head without its second branch, and the criterion of the others: its prototypes have a semantic part."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import SegmentationModel, yaml_model_load
    from ultralytics.utils.loss import v8SegmentationLoss

    model = SegmentationModel({**yaml_model_load("yolo26n-seg.yaml"), "end2end": False}, ch=3, nc=1, verbose=False).train()
    model.args = get_cfg()
    model.criterion = v8SegmentationLoss(model)
    as_training(model, lambda: [step(model, task_batch("yolo26n-seg")) for _ in range(3)])
    assert not graphs
    assert "keeps the computation of ultralytics: its prototypes have a semantic part" in stays.pop()
