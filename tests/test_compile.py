"""Compiled and exported: sizes that change, of batches and of images, stay one graph."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import triton_yolo as ty
from tests.conftest import DEVICE

MOST_COMPILES = 3
# Heights and widths of a training at many scales, whose last batch is smaller.
SIZES = [
    (64, 64),
    (80, 112),
    (96, 64),
    (64, 96),
    (128, 96),
    (48, 80),
    (112, 112),
    (64, 128),
    (144, 48),
    (96, 96),
    (128, 128),
    (80, 80),
]
BATCHES = [(2, *size) for size in SIZES] + [(3, 64, 64)]


@pytest.fixture(autouse=True)
def _quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        yield
    torch._dynamo.reset()


class Detector(torch.nn.Module):
    """Two levels and a criterion: from images and rows to a loss."""

    def __init__(self, system: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_yolo11 = system == "yolo11"
        channels = 4 * 4 + 3 if self.is_yolo11 else 5 + 3
        self.levels = torch.nn.ModuleList(torch.nn.Conv2d(1, channels, stride, stride) for stride in (8, 16))
        settings = dict(strides=(8, 16))
        self.criterion = ty.YOLO11Loss(3, reg_max=4, **settings) if self.is_yolo11 else ty.YOLOXLoss(3, use_l1=True, **settings)
        self.to(DEVICE)

    def forward(self, images, rows):
        maps = [level(images) for level in self.levels]
        feat_shapes = [x.shape[2:] for x in maps]
        out = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)
        preds = out.split([16, 3], 2) if self.is_yolo11 else (out,)
        return self.criterion(*preds, feat_shapes, rows)


def batch(batch_size, height, width):
    torch.manual_seed(batch_size + height)
    num_rows = batch_size + height // 16
    rows = torch.rand(num_rows, 6) * 0.5 + 0.25
    rows[:, 0], rows[:, 1] = torch.arange(num_rows) % batch_size, torch.arange(num_rows) % 3
    return torch.randn(batch_size, 1, height, width, device=DEVICE), rows.to(DEVICE)


def run(call, model, x):
    model.zero_grad()
    out = call(*x)
    out.loss.backward()
    return [*out, *[p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_twelve_image_sizes_and_a_last_batch_are_one_graph(system, dynamic):
    model, counter = Detector(system), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for sizes in BATCHES:
        x = batch(*sizes)
        torch.testing.assert_close(run(compiled, model, x), run(model, model, x))
    assert counter.frame_count <= MOST_COMPILES


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_inductor_takes_sizes_that_change(system):
    model = Detector(system)
    compiled = torch.compile(model, fullgraph=True)
    for sizes in BATCHES[:2] + BATCHES[-1:]:
        x = batch(*sizes)
        torch.testing.assert_close(run(compiled, model, x), run(model, model, x))


TASK_ALIGNED, SIMOTA = ty.TaskAlignedAssigner(num_classes=3), ty.SimOTAAssigner(num_classes=3)


def padded(batch_size):
    torch.manual_seed(batch_size)
    points, strides = ty.make_anchors([(4, 4)], (8,), device=DEVICE)
    points, boxes = points * strides[:, None], torch.rand(batch_size, 16, 4, device=DEVICE)
    gt = torch.tensor([[2.0, 2, 20, 20], [8, 8, 30, 24]], device=DEVICE).expand(batch_size, 2, 4)
    labels = torch.ones(batch_size, 2, device=DEVICE).long()
    pred = torch.cat([points - 6 - boxes[..., :2], points + 7 + boxes[..., 2:]], -1)
    return torch.rand(batch_size, 16, 3, device=DEVICE), pred, points, strides, labels, gt, torch.ones_like(labels)


def task_aligned(scores, boxes, points, _, *gt):
    return TASK_ALIGNED(scores, boxes, points, *gt)


def simota(scores, boxes, points, strides, *gt):
    return SIMOTA(scores, scores[..., 0], boxes, points, strides, *gt)


def decode_dfl(scores, boxes, points, strides, *_):
    return ty.decode_dfl(boxes, points, reg_max=1, strides=strides)


def from_padded(scores, boxes, points, strides, *gt):
    return tuple(ty.Targets.from_padded(*gt))


def from_yolo(scores, boxes, points, strides, labels, gt, mask):
    rows = torch.cat([labels.new_zeros(len(gt), 1), labels[:, :1], gt[:, 0] / 32], 1)
    return tuple(ty.Targets.from_yolo(rows, (64, 32)))


def align_metric(scores, boxes, points, _, *gt):
    return ty.align_metric(scores, boxes, points, *gt, alpha=1.0, beta=6.0)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "call", [task_aligned, simota, decode_dfl, from_padded, from_yolo, align_metric], ids=lambda f: f.__name__
)
def test_batch_size_may_change(call, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch_size in (2, 3, 5, 4):
        args = padded(batch_size)
        torch.testing.assert_close(compiled(*args), call(*args))
    assert counter.frame_count <= MOST_COMPILES


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_export_with_a_dynamic_batch(system, strict):
    model = Detector(system)
    sizes, num_rows = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rows", min=1, max=999)
    shapes = {"images": {0: sizes}, "rows": {0: num_rows}}
    program = torch.export.export(model, batch(4, 64, 64), dynamic_shapes=shapes, strict=strict)
    for batch_size in (2, 4, 7):
        x = batch(batch_size, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(list(program.module()(*x)), list(model(*x)))


def test_wrong_sizes_are_named_while_a_graph_is_made():
    criterion = ty.YOLOXLoss(3, strides=(8, 16)).to(DEVICE)
    rows = batch(2, 64, 64)[1]
    with pytest.raises(Exception, match=r"preds must have shape \(B, A, 8\), got"):
        torch.compile(criterion, fullgraph=True, backend="eager")(torch.zeros(2, 20, 7, device=DEVICE), [(4, 4), (2, 2)], rows)
