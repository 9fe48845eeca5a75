"""Launches and bytes of the whole criterion against the fewest that the job allows."""

import pytest
import torch

import triton_yolo as ty
from tests.kernels.cases import laid_out

RATIO = {"yolo11": 1.25, "yolox": 1.35}
MAX_LAUNCHES = {"yolo11": (8, 2), "yolox": (8, 1)}  # forward, from raw rows to the loss; backward


def coco_like_rows(batch_size: int, boxes_an_image: int, num_classes: int) -> torch.Tensor:
    """Rows whose sides have the spread of COCO's: a mean area of a twelfth of the image, half of them below a hundredth."""
    torch.manual_seed(0)
    count = batch_size * boxes_an_image
    side = (torch.randn(count, 1) - 2.2).exp().clamp(0.01, 0.95)
    shape = (0.4 * torch.randn(count, 1)).exp().sqrt()
    size = torch.cat([side * shape, side / shape], -1).clamp(max=0.99)
    centre = size / 2 + torch.rand(count, 2) * (1 - size)
    image = torch.arange(count)[:, None] % batch_size
    return torch.cat([image, torch.randint(0, num_classes, (count, 1)), centre, size], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_criterion_moves_few_bytes_in_few_launches(meter, dtype, layout):
    batch_size, num_classes, reg_max, imgsz = 2, 80, 16, 256
    shapes = [(imgsz // s, imgsz // s) for s in (8, 16, 32)]
    num_anchors = sum(h * w for h, w in shapes)
    preds = [torch.randn(batch_size, channels, num_anchors).to(dtype) for channels in (4 * reg_max, num_classes)]
    preds = [x if layout == "first" else x.transpose(1, 2).contiguous().transpose(1, 2) for x in preds]
    dist, scores = (x.transpose(1, 2).requires_grad_() for x in preds)
    rows = coco_like_rows(batch_size, 7, num_classes)

    out = ty.YOLO11Loss(num_classes)(dist, scores, shapes, rows)
    num_forward = len(meter.launches)
    out.loss.backward()

    assert out.num_fg > 50
    limit = batch_size * num_anchors * (3 * num_classes + 2 * 4 * reg_max) * dist.element_size()
    print(f"\n{meter.table()}\n{meter.requested / limit:.3f} of the limit")
    assert meter.requested <= RATIO["yolo11"] * limit
    assert (num_forward, len(meter.launches) - num_forward) == MAX_LAUNCHES["yolo11"]
    # Beside the predictions: a few numbers an anchor, a list of ten a row; never a tensor of pairs.
    inputs = sum(x.untyped_storage().nbytes() for x in (dist, scores))
    spare = batch_size * num_anchors * 64 + 14 * 512
    assert all(launch.arguments <= inputs + spare for launch in meter.launches[:num_forward])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_yolox_moves_few_bytes_in_few_launches(meter, dtype, layout):
    batch_size, num_classes, imgsz = 2, 80, 256
    shapes = [(imgsz // s, imgsz // s) for s in (8, 16, 32)]
    num_anchors = sum(h * w for h, w in shapes)
    rows = coco_like_rows(batch_size, 7, num_classes)
    preds = laid_out(torch.randn(batch_size, num_anchors, 5 + num_classes).to(dtype), layout).requires_grad_()

    out = ty.YOLOXLoss(num_classes)(preds, shapes, rows)
    num_forward = len(meter.launches)
    out.loss.backward()

    assert out.num_fg > 0.5
    limit = 3 * preds.numel() * preds.element_size()
    print(f"\n{meter.table()}\n{meter.requested / limit:.3f} of the limit")
    assert meter.requested <= RATIO["yolox"] * limit
    assert (num_forward, len(meter.launches) - num_forward) == MAX_LAUNCHES["yolox"]
    spare = batch_size * num_anchors * 64 + 14 * 512
    assert all(launch.arguments <= preds.untyped_storage().nbytes() + spare for launch in meter.launches[:num_forward])
