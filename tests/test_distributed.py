"""With ``process_group``, gradients averaged over the ranks equal those of one process on the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import triton_yolo as ty
from tests.compare import assert_close

SHAPES, STRIDES = [(6, 6), (3, 3)], (8, 16)
ROWS = [[0, 1, 0.5, 0.5, 0.7, 0.6], [0, 2, 0.4, 0.5, 0.5, 0.8], [2, 0, 0.3, 0.4, 0.4, 0.4], [3, 0, 0.6, 0.6, 0.3, 0.3]]
PARTS = {"equal batches": (2, 2), "unequal batches": (3, 1)}  # images of each rank


def loss_of(system: str, preds: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup | None):
    if system == "yolo11":
        criterion = ty.YOLO11Loss(3, strides=STRIDES, reg_max=4, process_group=group)
        return criterion(preds[..., :16], preds[..., 16:], SHAPES, rows)
    return ty.YOLOXLoss(14, strides=STRIDES, use_l1=True, process_group=group)(preds, SHAPES, rows)


def run_rank(rank: int, folder: str, system: str, parts: tuple[int, int], preds: torch.Tensor, rows: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    start, end = (0, parts[0]) if rank == 0 else (parts[0], sum(parts))
    mine = rows[(rows[:, 0] >= start) & (rows[:, 0] < end)] - torch.tensor([start, 0, 0, 0, 0, 0])
    part = preds[start:end].clone().requires_grad_()
    out = loss_of(system, part, mine, dist.group.WORLD)
    out.loss.backward()
    torch.save((torch.stack(out[1:-1]), part.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_two_ranks_equal_one_process(system: str, parts: tuple[int, int], tmp_path: Path):
    torch.manual_seed(0)
    preds, rows = torch.randn(4, 45, 19), torch.tensor(ROWS)
    whole = preds.clone().requires_grad_()
    expected = loss_of(system, whole, rows, None)
    expected.loss.backward()
    mp.spawn(run_rank, (str(tmp_path), system, parts, preds, rows), nprocs=2)
    (terms_0, grad_0), (terms_1, grad_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # Averaging over the ranks halves what each sees of its own images.
    assert_close(torch.cat([grad_0, grad_1]) / 2, whole.grad, "gradient")
    assert_close((terms_0 + terms_1) / 2, torch.stack(expected[1:-1]), "terms")
