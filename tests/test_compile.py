"""One compiled graph serves a whole training: other batch sizes, image sizes and numbers of boxes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox

pytestmark = pytest.mark.usefixtures("fresh_compiler")
STRIDES = (8, 16, 32)
SIZES = [64 + 32 * (7 * number % 12) for number in range(12)]  # of square images, in pixels
BATCHES = [(4, size) for size in SIZES] + [(3, SIZES[0])]  # number of images and their size; the last batch is a part


def shapes_of(size: int) -> list[tuple[int, int]]:
    return [(-(-size // stride),) * 2 for stride in STRIDES]


def predictions(batch_size: int, size: int, channels: int) -> torch.Tensor:
    torch.manual_seed(size)
    anchors = sum(height * width for height, width in shapes_of(size))
    return torch.randn(batch_size, anchors, channels, device=DEVICE)


def rows_of(batch_size: int, size: int) -> torch.Tensor:
    rows = torch.rand(5 + size // 32, 6, device=DEVICE) * 0.5 + 0.2
    rows[:, 0], rows[:, 1] = torch.arange(len(rows), device=DEVICE) % batch_size, 1
    return rows


def yolo11_step(criterion):
    return lambda preds, shapes, rows: criterion(preds[..., :16], preds[..., 16:], shapes, rows)


def pose_step(criterion):
    def step(preds, shapes, rows):
        return criterion(
            preds[..., :16], preds[..., 16:19], preds[..., 19:], shapes, rows, rows[:, None, 2:5].expand(-1, 2, -1)
        )

    return step


def masks_step(criterion):
    """Prototypes are features of the first level, and masks as large."""

    def step(preds, shapes, rows):
        height, width = shapes[0]
        prototypes = preds[:, : height * width, 23:].transpose(1, 2).reshape(-1, 4, height, width)
        masks = preds.new_ones(preds.shape[0], height, width)
        return criterion(preds[..., :16], preds[..., 16:19], preds[..., 19:23], prototypes, shapes, rows, masks)

    return step


CRITERIA = {
    "yolo11": (19, lambda: yolo11_step(ty.YOLO11Loss(3, strides=STRIDES, reg_max=4))),
    "pose": (25, lambda: pose_step(ty.YOLO11PoseLoss(3, strides=STRIDES, reg_max=4))),
    "masks": (27, lambda: masks_step(ty.YOLO11SegmentationLoss(3, strides=STRIDES, reg_max=4))),
    "yolox": (8, lambda: ty.YOLOXLoss(3, strides=STRIDES, use_l1=True).to(DEVICE).forward),
}


def train(step, channels: int, batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of every batch."""
    found = []
    for batch_size, size in batches:
        preds = predictions(batch_size, size, channels).requires_grad_()
        loss = step(preds, shapes_of(size), rows_of(batch_size, size)).loss
        loss.backward()
        found.append((loss.detach(), preds.grad))
    return found


@pytest.mark.parametrize(
    ("system", "dynamic"), [(system, None) for system in CRITERIA] + [("yolo11", True), ("pose", True), ("yolox", True)]
)
def test_a_training_of_many_sizes_compiles_three_times(system, dynamic):
    channels, make = CRITERIA[system]
    step = make()
    counter = CompileCounterWithBackend("aot_eager")
    have = train(torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic), channels, BATCHES)
    assert counter.frame_count <= 3
    for (loss, grad), (want_loss, want_grad) in zip(have, train(step, channels, BATCHES), strict=True):
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_inductor(system):
    channels, make = CRITERIA[system]
    step, batches = make(), [BATCHES[0], BATCHES[1], BATCHES[-1]]
    have = train(torch.compile(step, fullgraph=True), channels, batches)
    for (loss, grad), (want_loss, want_grad) in zip(have, train(step, channels, batches), strict=True):
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(grad, want_grad)


def ground_truth(batch_size: int, size: int) -> tuple[torch.Tensor, ...]:
    slots = 5 + size // 32
    low = torch.rand(batch_size, slots, 2, device=DEVICE) * size / 2
    boxes = torch.cat([low, low + 20], -1)
    return (
        torch.ones(batch_size, slots, 1, dtype=torch.int64, device=DEVICE),
        boxes,
        torch.ones(batch_size, slots, 1, device=DEVICE),
    )


def anchors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    points, strides = ty.make_anchors(shapes_of(size), STRIDES, device=DEVICE)
    return points * strides[:, None], strides


def assigner_args(batch_size: int, size: int) -> tuple[torch.Tensor, ...]:
    preds, (points, strides) = predictions(batch_size, size, 8), anchors(size)
    boxes = torch.cat([points - 9, points + 8], -1) + preds[..., 4:]
    return preds[..., :3].sigmoid(), preds[..., 3], boxes, points, strides, *ground_truth(batch_size, size)


def rotated_args(batch_size: int, size: int):
    scores, _, boxes, points, _, labels, gt, mask = assigner_args(batch_size, size)
    return scores, torch.nn.functional.pad(boxes, (0, 1)), points, labels, torch.nn.functional.pad(gt, (0, 1)), mask


def mask_args(batch_size: int, size: int):
    preds, rows = predictions(batch_size, size, 4), rows_of(batch_size, size)
    row = torch.full(preds.shape[:2], -1, device=DEVICE)
    row[0, 0], row[1, 2] = 0, 1
    return preds, row, rows, torch.randn(batch_size, 4, size // 4, size // 4, device=DEVICE)


def mask_loss_of_rows(preds, row, rows, prototypes):
    height, width = prototypes.shape[2:]
    size, masks = (4 * height, 4 * width), prototypes.new_ones(prototypes.shape[0], 2 * height, 2 * width)
    return ty.mask_loss(preds, prototypes, row, ty.Targets.from_yolo(rows, size), masks, imgsz=size)


FUNCTIONS = {
    "TaskAlignedAssigner": (
        ty.TaskAlignedAssigner(num_classes=3),
        lambda *batch: [assigner_args(*batch)[place] for place in (0, 2, 3, 5, 6, 7)],
    ),
    "RotatedTaskAlignedAssigner": (ty.RotatedTaskAlignedAssigner(num_classes=3), rotated_args),
    "SimOTAAssigner": (ty.SimOTAAssigner(num_classes=3), assigner_args),
    "decode_dfl": (
        lambda dist, points, strides: ty.decode_dfl(dist, points, reg_max=4, strides=strides),
        lambda batch_size, size: (predictions(batch_size, size, 16), *anchors(size)),
    ),
    "decode_yolox": (ty.decode_yolox, lambda batch_size, size: (predictions(batch_size, size, 8), *anchors(size))),
    "bbox_iou": (
        lambda boxes: ty.bbox_iou(boxes, boxes.flip(0), kind="ciou"),
        lambda batch_size, size: (ground_truth(batch_size, size)[1],),
    ),
    "prob_iou": (
        lambda boxes: ty.prob_iou(boxes, boxes.flip(0), floor=0.01),
        lambda batch_size, size: (predictions(batch_size, size, 5),),
    ),
    "from_padded": (ty.Targets.from_padded, ground_truth),
    "from_yolo and mask_loss": (mask_loss_of_rows, mask_args),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_functions_of_many_sizes_compile_three_times(name, dynamic):
    function, args = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in BATCHES:
        args_of_batch = args(*batch)
        torch.testing.assert_close(compiled(*args_of_batch), function(*args_of_batch))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["decode_dfl", "decode_yolox", "bbox_iou", "prob_iou"])
def test_compiled_functions_have_the_gradient(name):
    function, args = FUNCTIONS[name]
    first, *rest = args(2, 64)
    grads = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = first.clone().requires_grad_()
        run(leaf, *rest).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


class OfLevels(torch.nn.Module):
    def __init__(self, criterion: torch.nn.Module, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.criterion, self.shapes = criterion, shapes

    def forward(self, rows: torch.Tensor, *preds: torch.Tensor):
        return self.criterion(*preds, self.shapes, rows)


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_export_with_any_batch_size(system, strict, requires_grad):
    criterion, *preds, shapes, rows = small_yolo11() if system == "yolo11" else small_yolox()
    preds = [x.requires_grad_(requires_grad) for x in preds]
    sizes = ({0: Dim("B", min=2, max=64)},) * len(preds)
    exported = torch.export.export(
        OfLevels(criterion, shapes), (rows, *preds), dynamic_shapes=({0: Dim("N", min=2, max=999)}, sizes), strict=strict
    ).module()
    preds, rows = (
        [torch.cat([x, x[:1]]).detach() for x in preds],
        torch.cat([rows, rows.new_tensor([[2, 0, 0.5, 0.5, 0.4, 0.4]])]),
    )
    torch.testing.assert_close(exported(rows, *preds).loss, criterion(*preds, shapes, rows).loss)


@pytest.mark.parametrize("task", ["pose", "masks", "loss_of"])
def test_export_of_other_tasks_with_any_batch_size(task):
    """Not strict: there ``len`` makes a constant of a size."""
    detection, dist, scores, shapes, rows = small_yolo11()
    pose = ty.YOLO11PoseLoss(3, strides=(8, 16), reg_max=8)
    gt, normaliser = ty.Targets.from_yolo(rows, 32), torch.ones((), device=DEVICE)

    def call(dist, scores, other):
        row = torch.full_like(scores[..., 0], -1, dtype=torch.int32)
        if task == "pose":
            return pose(dist, scores, other, shapes, rows, rows[:, None, 2:5])
        if task == "masks":
            prototypes = other.transpose(1, 2).unflatten(2, (4, 5))
            return ty.mask_loss(other, prototypes, row, gt, prototypes[:, 0], imgsz=32)
        return detection.loss_of(dist, scores, shapes, gt, row, scores[..., 0], normaliser)

    class Loss(torch.nn.Module):
        def forward(self, *preds: torch.Tensor):
            return call(*preds)

    preds = dist, scores, torch.randn(2, 20, 3, device=DEVICE)
    exported = torch.export.export(Loss(), preds, dynamic_shapes=(({0: Dim("B", min=2, max=64)},) * 3,)).module()
    preds = [torch.cat([x, x[:1]]) for x in preds]
    torch.testing.assert_close(exported(*preds), Loss()(*preds))


def test_a_graph_of_symbols_serves_other_image_sizes():
    """As of ``make_fx``, which does not say that it traces; sizes that are equal at first stay so."""
    channels, make = CRITERIA["yolo11"]
    step = make()

    def loss(preds, rows, *maps):
        return step(preds, [x.shape for x in maps], rows).loss

    def args(size):
        maps = [torch.empty(shape, device=DEVICE) for shape in shapes_of(size)]
        return predictions(2, size, channels), rows_of(2, size), *maps

    graph, others = make_fx(loss, tracing_mode="symbolic")(*args(112)), args(160)
    torch.testing.assert_close(graph(*others), loss(*others))


@pytest.mark.parametrize("name", ["TaskAlignedAssigner", "SimOTAAssigner", "decode_dfl", "from_padded"])
def test_strict_export_of_functions_with_any_batch_size(name):
    function, make = FUNCTIONS[name]

    class Function(torch.nn.Module):
        def forward(self, *args: torch.Tensor):
            result = function(*args)
            return result if isinstance(result, torch.Tensor) else tuple(result)

    args = make(2, 64)
    sizes = tuple([{0: Dim("B", min=2, max=64)} if len(x) == 2 else None for x in args])
    exported = torch.export.export(Function(), tuple(args), dynamic_shapes=(sizes,), strict=True).module()
    args = make(5, 64)
    torch.testing.assert_close(exported(*args), Function()(*args))


def test_wrong_sizes_are_named_under_compile_too():
    criterion, preds, shapes, rows = small_yolox()
    with pytest.raises(ValueError, match=r"preds must have shape \(B, A, 8\), got \(2, 20, 7\)"):
        torch.compile(criterion, backend="eager")(preds[..., :7], shapes, rows)
