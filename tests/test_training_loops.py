"""The criteria in what training loops do around them: mixed precision, scaling, accumulation, threads, copies, sharding."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import triton_yolo as ty
from tests.compare import assert_close
from tests.conftest import DEVICE

SHAPES, STRIDES, NUM_CLASSES, REG_MAX = [(6, 6), (3, 3)], (8, 16), 3, 4
NUM_ANCHORS = sum(height * width for height, width in SHAPES)
ROWS = torch.tensor(
    [[0, 1, 0.5, 0.5, 0.7, 0.6], [0, 2, 0.4, 0.5, 0.5, 0.8], [2, 0, 0.3, 0.4, 0.4, 0.4], [3, 0, 0.6, 0.6, 0.3, 0.3]]
)
SYSTEMS = ("yolo11", "yolox")
CHANNELS = {"yolo11": 4 * REG_MAX + NUM_CLASSES, "yolox": 5 + NUM_CLASSES}


def make_criterion(system: str, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    if system == "yolo11":
        return ty.YOLO11Loss(NUM_CLASSES, strides=STRIDES, reg_max=REG_MAX, process_group=process_group)
    return ty.YOLOXLoss(NUM_CLASSES, strides=STRIDES, use_l1=True, process_group=process_group)


def make_model(system: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CHANNELS[system])).to(DEVICE)


def make_inputs(seed: int = 1) -> Tensor:
    return torch.randn(4, NUM_ANCHORS, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def loss_of(criterion: nn.Module, preds: Tensor, rows: Tensor = ROWS) -> Tensor:
    rows = rows.to(preds.device)
    if isinstance(criterion, ty.YOLO11Loss):
        return criterion(preds[..., : 4 * REG_MAX], preds[..., 4 * REG_MAX :], SHAPES, rows).loss
    return criterion(preds, SHAPES, rows).loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("system", SYSTEMS)
def test_bfloat16_autocast_of_model_and_criterion(system):
    model, criterion = make_model(system), make_criterion(system)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        preds = model(make_inputs())
        loss = loss_of(criterion, preds)
    loss.backward()
    assert preds.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(criterion, preds.float()))
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(model))


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_accumulate(system):
    model, criterion = make_model(system), make_criterion(system)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for seed in (1, 2):
        model.zero_grad()
        (loss_of(criterion, model(make_inputs(seed))) / 2).backward()
        expected = [a + b for a, b in zip(expected, gradients(model), strict=True)]
    model.zero_grad()
    for seed in (1, 2):
        (loss_of(criterion, model(make_inputs(seed))) / 2).backward()
    for grad, total in zip(gradients(model), expected, strict=True):
        assert torch.equal(grad, total)


@pytest.mark.parametrize("system", SYSTEMS)
def test_grad_scaler(system):
    model, criterion = make_model(system), make_criterion(system)
    loss_of(criterion, model(make_inputs())).backward()
    expected = gradients(model)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
    scaler.scale(loss_of(criterion, model(make_inputs()))).backward()
    scaler.unscale_(optimizer)
    for grad, reference in zip(gradients(model), expected, strict=True):
        assert_close(grad, reference, "gradient")
    scaler.step(optimizer)
    scaler.update()
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    inputs = make_inputs()
    inputs[0, 0] = torch.inf
    scaler.scale(loss_of(criterion, model(inputs))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_criterion_serves_several_threads(system):
    criterion = make_criterion(system)

    def step(seed: int) -> tuple[Tensor, Tensor]:
        preds = torch.randn(4, NUM_ANCHORS, CHANNELS[system], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        preds.requires_grad_()
        loss = loss_of(criterion, preds, ROWS[seed % 4 :])
        return loss.detach(), *torch.autograd.grad(loss, preds)

    expected = [step(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(step, range(16)))
    for actual, reference in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, reference, strict=True))


@pytest.mark.parametrize("make", [lambda: make_criterion("yolo11"), lambda: make_criterion("yolox")])
def test_copies_of_criteria(make):
    criterion = make()
    system = "yolo11" if isinstance(criterion, ty.YOLO11Loss) else "yolox"
    preds = make_model(system)(make_inputs())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(loss_of(twin, preds), loss_of(criterion, preds))
        assert not twin.state_dict()


@pytest.mark.parametrize("make", [ty.TaskAlignedAssigner, ty.SimOTAAssigner])
def test_copies_of_assigners(make):
    assigner = make(num_classes=7)
    for twin in (copy.deepcopy(assigner), pickle.loads(pickle.dumps(assigner))):
        assert vars(twin).keys() == vars(assigner).keys()
        assert twin.num_classes == 7


def padded(rows: Tensor, number: int) -> Tensor:
    """Rows of a fixed number, as a captured CUDA graph needs them: padding has the image index -1.

    Without a GPU, ``test_operators.test_no_value_is_needed_on_the_host`` shows that capturing would not synchronise.
    """
    return torch.cat([rows, rows.new_tensor([[-1.0, 0, 0, 0, 0, 0]]).expand(number - len(rows), -1)])


@pytest.mark.parametrize("system", SYSTEMS)
def test_padding_rows_change_nothing(system):
    criterion, preds = make_criterion(system), make_model(system)(make_inputs())
    for number in (0, 3, 4):
        rows = ROWS[:number]
        assert torch.equal(loss_of(criterion, preds, padded(rows, 9)), loss_of(criterion, preds, rows))


class Loss(nn.Module):
    """The loss alone, of tensors alone."""

    def __init__(self, system: str) -> None:
        super().__init__()
        self.criterion = make_criterion(system).to(DEVICE)

    def forward(self, preds: Tensor, rows: Tensor) -> Tensor:
        return loss_of(self.criterion, preds, rows)


@pytest.mark.parametrize("system", SYSTEMS)
def test_criterion_can_be_exported(system):
    loss, preds = Loss(system), make_model(system)(make_inputs()).detach()
    rows = ROWS.to(DEVICE)
    program = torch.export.export(loss, (preds, rows), dynamic_shapes=(None, {0: torch.export.Dim.AUTO})).module()
    for chosen in (rows, rows[:2]):
        assert torch.equal(program(preds, chosen), loss(preds, chosen))
    assert not torch.equal(loss(preds, rows), loss(preds, rows[:2]))


def run_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh, mine = init_device_mesh("cpu", (2,)), ROWS[(ROWS[:, 0] // 2) == rank] - torch.tensor([2.0 * rank, 0, 0, 0, 0, 0])
    for system in SYSTEMS:
        model = fully_shard(make_model(system).cpu(), mesh=mesh)
        preds = model(make_inputs().cpu()[2 * rank : 2 * rank + 2])
        loss_of(make_criterion(system, dist.group.WORLD), preds, mine).backward()
        grads = [p.grad.full_tensor() for p in model.parameters()]
        if rank == 0:
            torch.save(grads, f"{folder}/{system}.pt")
    dist.destroy_process_group()


def test_fully_sharded_gradients_equal_those_of_one_process(tmp_path: Path):
    mp.spawn(run_sharded, (str(tmp_path),), nprocs=2)
    for system in SYSTEMS:
        model = make_model(system).cpu()
        loss_of(make_criterion(system), model(make_inputs().cpu())).backward()
        for actual, expected in zip(torch.load(tmp_path / f"{system}.pt"), gradients(model), strict=True):
            assert_close(actual, expected, "gradient")
