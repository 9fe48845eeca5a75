"""With ``process_group``, gradients averaged over the ranks equal those of one process on the whole batch."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim.swa_utils import AveragedModel

import triton_yolo as ty
from tests.compare import assert_close

SHAPES, STRIDES = [(6, 6), (3, 3)], (8, 16)
ROWS = [[0, 1, 0.5, 0.5, 0.7, 0.6], [0, 2, 0.4, 0.5, 0.5, 0.8], [2, 0, 0.3, 0.4, 0.4, 0.4], [3, 0, 0.6, 0.6, 0.3, 0.3]]
PARTS = {"equal batches": (2, 2), "unequal batches": (3, 1)}  # images of each rank


def loss_of(system: str, preds: torch.Tensor, rows: torch.Tensor, group):
    if system == "yolo11":
        criterion = ty.YOLO11Loss(3, strides=STRIDES, reg_max=4, process_group=group)
        return criterion(preds[..., :16], preds[..., 16:], SHAPES, rows)
    if system == "pose":
        keypoints = rows.new_tensor([[0.2, 0.3, 1], [0.6, 0.5, 0]]) * rows[:, 2:3, None]  # which know no image
        criterion = ty.YOLO11PoseLoss(3, strides=STRIDES, reg_max=2, process_group=group)
        return criterion(preds[..., :8], preds[..., 8:11], preds[..., 11:17], SHAPES, rows, keypoints)
    return ty.YOLOXLoss(14, strides=STRIDES, use_l1=True, process_group=group)(preds, SHAPES, rows)


def run_rank(
    rank: int, folder: str, system: str, parts: tuple[int, int], preds: torch.Tensor, rows: torch.Tensor, form: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    start, end = (0, parts[0]) if rank == 0 else (parts[0], sum(parts))
    mine = rows[(rows[:, 0] >= start) & (rows[:, 0] < end)] - torch.tensor([start, 0, 0, 0, 0, 0])
    part = preds[start:end].clone().requires_grad_()
    out = loss_of(system, part, mine, True if form == "True" else dist.group.WORLD)
    out.loss.backward()
    torch.save((torch.stack(out[1:-1]), part.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("form", ["group", "True"])
def test_two_ranks_equal_one_process(system: str, parts: tuple[int, int], form: str, tmp_path: Path):
    torch.manual_seed(0)
    preds, rows = torch.randn(4, 45, 19), torch.tensor(ROWS)
    whole = preds.clone().requires_grad_()
    expected = loss_of(system, whole, rows, None)
    expected.loss.backward()
    mp.spawn(run_rank, (str(tmp_path), system, parts, preds, rows, form), nprocs=2)
    (terms_0, grad_0), (terms_1, grad_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # Averaging over the ranks halves what each sees of its own images.
    assert_close(torch.cat([grad_0, grad_1]) / 2, whole.grad, "gradient")
    assert_close((terms_0 + terms_1) / 2, torch.stack(expected[1:-1]), "terms")


def test_two_ranks_with_keypoints_equal_one_process(tmp_path: Path):
    test_two_ranks_equal_one_process("pose", PARTS["unequal batches"], "group", tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


SYSTEMS = pytest.mark.parametrize("system", [ty.YOLO11Loss, ty.YOLOXLoss])


def loss(criterion: torch.nn.Module) -> torch.Tensor:
    preds = [torch.zeros(1, 1, 64), torch.zeros(1, 1, 3)] if isinstance(criterion, ty.YOLO11Loss) else [torch.zeros(1, 1, 8)]
    return criterion(*preds, [(1, 1)], torch.zeros(0, 6)).loss


@SYSTEMS
def test_all_processes_may_be_meant_before_there_are_any(system, tmp_path: Path):
    criterion = system(3, strides=(8,), process_group=True)
    with pytest.raises(RuntimeError, match=r"process_group is given, but torch\.distributed\.init_process_group"):
        loss(criterion)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert torch.equal(loss(criterion), loss(system(3, strides=(8,))))
    finally:
        dist.destroy_process_group()


@SYSTEMS
def test_copies_share_a_group_and_pickles_drop_it(system, world: dist.ProcessGroup):
    criterion = system(3, strides=(8,), process_group=world)
    expected = loss(criterion)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), criterion)
    for copied in (copy.deepcopy(criterion), copy.copy(criterion), AveragedModel(model).module[1]):
        assert copied.process_group is world
        assert torch.equal(loss(copied), expected)
    loaded = pickle.loads(pickle.dumps(criterion))
    for lost in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        with pytest.raises(RuntimeError, match="a process group is not part of a pickle: set process_group"):
            loss(lost)
    loaded.process_group = world
    assert torch.equal(loss(loaded), expected)
    criterion.process_group = True
    assert torch.equal(loss(pickle.loads(pickle.dumps(criterion))), expected)
