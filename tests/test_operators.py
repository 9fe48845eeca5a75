"""The operations as PyTorch's machinery sees them: schemas, fakes, gradients, compilation, no value needed on the host."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
import triton_yolo as ty
from tests import flat
from tests.conftest import DEVICE
from tests.flat import ops
from tests.gradients import held_weight, held_weight_of_loss
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _ops
from triton_yolo import _signatures as of

F64 = torch.float64


def decode_args():
    points, strides = ty.make_anchors([(4, 4), (2, 2)], (8, 16), device=DEVICE, dtype=F64)
    return torch.randn(2, 20, 20, dtype=F64, device=DEVICE, requires_grad=True), points, strides, 5


def box_args(kind):
    torch.manual_seed(0)
    low = torch.rand(2, 12, 2, dtype=F64, device=DEVICE)
    a, b = torch.cat([low, low + 0.3 + torch.rand(2, 12, 2, dtype=F64, device=DEVICE)], -1)
    return a.requires_grad_(), b.requires_grad_(), kind, 1e-7


def gt_args():
    criterion, _, _, shapes, rows = small_yolo11()
    targets = ty.Targets.from_yolo(rows, (32, 32))
    return criterion, [side for shape in shapes for side in shape], targets


def yolo11_assign_args():
    _, shapes, gt = gt_args()
    _, dist, scores, _, _ = small_yolo11()
    levels = (shapes, [8.0, 16.0])
    return dist, scores, gt.image_index, gt.labels, gt.boxes_xyxy, *levels, 8, 10, 2, 0.5, 6.0, 0.0


def yolo11_loss_args(reg_max=8, dtype=F64, weights=None):
    _, shapes, gt = gt_args()
    torch.manual_seed(0)
    dist = torch.rand(2, 20, 4 * reg_max, dtype=dtype, device=DEVICE)
    scores = torch.randn(2, 20, 3, dtype=dtype, device=DEVICE)
    levels = (shapes, [8.0, 16.0])
    target_row, target_score, sums, _ = ops.yolo11_assign(
        dist, scores, gt.image_index, gt.labels, gt.boxes_xyxy, *levels, reg_max, 10, None, 0.5, 6.0, 0.0
    )
    assert (target_row >= 0).any()
    return (
        dist.requires_grad_(), scores.requires_grad_(), target_row, target_score, sums.clamp(min=1),
        gt.labels, gt.boxes_xyxy, weights, *levels, reg_max, [7.5, 0.5, 1.5],
    )  # fmt: skip


def yolox_assign_args(dtype=torch.float32):
    _, shapes, gt = gt_args()
    _, preds, _, _ = small_yolox()
    return preds.to(dtype), gt.image_index, gt.labels, gt.boxes_xyxy, gt.boxes_xywh, shapes, [8.0, 16.0], "center", 1.5


def yolox_loss_args(iou_loss="iou", use_l1=True):
    _, shapes, gt = gt_args()
    args = yolox_assign_args(F64)
    target_row, matched_iou, counts = ops.yolox_assign(*args)
    assert counts[0] > 0
    return (
        args[0].requires_grad_(), target_row, matched_iou, counts[0].double(), gt.labels, gt.boxes_xywh,
        shapes, [8.0, 16.0], iou_loss, 5.0, torch.tensor(float(use_l1), device=DEVICE),
    )  # fmt: skip


def padded_args():
    points, strides = ty.make_anchors([(4, 4), (2, 2)], (8, 16), device=DEVICE)
    points = points * strides[:, None]
    boxes = torch.cat([points - 6, points + 7], -1).repeat(2, 1, 1)
    gt = torch.tensor([[[2.0, 2, 20, 20], [8, 8, 30, 24]], [[0.0, 0, 9, 9], [0, 0, 0, 0]]], device=DEVICE)
    return torch.rand(2, 20, 3, device=DEVICE), boxes, points, strides, torch.tensor([[0, 2], [1, 0]], device=DEVICE), gt


def assign_args():
    scores, boxes, points, _, labels, gt = padded_args()
    image_index = torch.tensor([0, 0, 1, -1], device=DEVICE)
    return scores, boxes, points, image_index, labels.reshape(-1), gt.reshape(-1, 4), 10, None, 1.0, 6.0, 0.0, 1e-9


def simota_args():
    scores, boxes, points, strides, labels, gt = padded_args()
    image_index, gt = torch.tensor([0, 0, 1, -1], device=DEVICE), gt.reshape(-1, 4)
    gt_xywh = reference.xyxy_to_xywh(gt)
    return scores, scores[..., 0], boxes, points, strides, image_index, labels.reshape(-1), gt, gt_xywh, "center", 1.5


def metric_args():
    scores, boxes, points, _, labels, gt = padded_args()
    mask = torch.tensor([[True, True], [True, False]], device=DEVICE)
    return scores, boxes, points, labels, gt, mask, 1.0, 6.0, 0.0


CASES = {
    "unpack_rows": lambda: (small_yolo11()[-1], 64.0, 32.0),
    "decode_dfl": decode_args,
    "decode_yolox": lambda: decode_args()[:3],
    "bbox_iou": lambda: box_args("ciou"),
    "align_metric": metric_args,
    "select_topk_candidates": lambda: (torch.rand(2, 3, 9, device=DEVICE), 4, None),
    "task_aligned_assign": assign_args,
    "yolo11_assign": yolo11_assign_args,
    "yolo11_loss": yolo11_loss_args,
    "simota_assign": simota_args,
    "yolox_assign": yolox_assign_args,
    "yolox_loss": yolox_loss_args,
}


def criterion_inputs(system, wants_grad=True):
    """Inputs of a whole criterion, with raw rows."""
    if system == "yolo11":
        _, dist, scores, shapes, rows = small_yolo11()
        levels = of.Levels(tuple(side for shape in shapes for side in shape), (8.0, 16.0))
        rule = of.TaskAligned(10, None, 0.5, 6.0, 0.0, 1e-9)
        return of.YOLO11(dist, scores, [rows], None, levels, 8, rule, (7.5, 0.5, 1.5), wants_grad)
    _, preds, shapes, rows = small_yolox()
    levels = of.Levels(tuple(side for shape in shapes for side in shape), (8.0, 16.0))
    return of.YOLOX(preds, [rows], torch.ones((), device=DEVICE), levels, of.SimOTA("center", 1.5), "iou", 5.0, wants_grad)


CRITERIA = {"yolo11_criterion": "yolo11", "yolox_criterion": "yolox"}


def inputs_of(name):
    return criterion_inputs(CRITERIA[name]) if name in CRITERIA else getattr(flat, name)(*CASES[name]())


@pytest.mark.parametrize("name", [*CASES, *CRITERIA])
def test_opcheck(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        operation = getattr(_ops, name)
        torch.library.opcheck(operation.operator, tuple(operation.flat(inputs_of(name))))


@pytest.mark.parametrize("with_strides", [True, False])
def test_gradcheck_decode_dfl(with_strides):
    dist, points, strides, reg_max = decode_args()
    assert torch.autograd.gradcheck(lambda d: ops.decode_dfl(d, points, strides if with_strides else None, reg_max), dist)


def test_gradcheck_decode_yolox():
    preds, points, strides, _ = decode_args()
    assert torch.autograd.gradcheck(lambda p: ops.decode_yolox(p, points, strides), preds)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_gradcheck_bbox_iou(kind):
    a, b, _, eps = box_args(kind)
    correction = held_weight(a, b) if kind == "ciou" else lambda a, b: 0
    assert torch.autograd.gradcheck(lambda a, b: ops.bbox_iou(a, b, kind, eps) + correction(a, b), (a, b))


@pytest.mark.parametrize("reg_max", [1, 8])
@pytest.mark.parametrize("has_weights", [True, False])
def test_gradcheck_yolo11_loss(reg_max, has_weights):
    weights = torch.tensor([1.0, 2.0, 0.5], device=DEVICE) if has_weights else None
    dist, scores, *rest = yolo11_loss_args(reg_max, weights=weights)
    row, score, normaliser, _, gt_boxes, _, *levels, gains = rest
    correction = held_weight_of_loss(dist, row, score, normaliser, gt_boxes, *levels, gains[0])
    assert torch.autograd.gradcheck(lambda d, s: ops.yolo11_loss(d, s, *rest)[0] + correction(d), (dist, scores))


@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
@pytest.mark.parametrize("use_l1", [True, False])
def test_gradcheck_yolox_loss(iou_loss, use_l1):
    preds, *rest = yolox_loss_args(iou_loss, use_l1)
    assert torch.autograd.gradcheck(lambda p: ops.yolox_loss(p, *rest)[0], preds)


class TinyDetector(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_model_and_criterion_compile_as_one_graph(system):
    torch.manual_seed(0)
    x = torch.randn(2, 20, 4, device=DEVICE)
    if system == "yolo11":
        criterion, _, _, shapes, rows = small_yolo11()
        model = TinyDetector(35).to(DEVICE)

        def step(x, rows):
            out = model(x)
            return criterion(out[..., :32], out[..., 32:], shapes, rows)
    else:
        criterion, _, shapes, rows = small_yolox(use_l1=True)
        model = TinyDetector(8).to(DEVICE)

        def step(x, rows):
            return criterion(model(x), shapes, rows)

    expected = step(x, rows)
    expected.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        out = torch.compile(step, fullgraph=True)(x, rows)
        out.loss.backward()
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_another_number_of_boxes_needs_no_new_compile(system):
    criterion, *preds, shapes, rows = small_yolo11() if system == "yolo11" else small_yolox()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for count in (2, 3, 4, 5, 8):
        more = rows[torch.arange(count, device=DEVICE) % len(rows)]
        torch.testing.assert_close(compiled(*preds, shapes, more).loss, criterion(*preds, shapes, more).loss)
    assert counter.frame_count == 2  # for the first number of boxes and for any


def test_switching_l1_needs_no_new_compile():
    criterion, preds, shapes, rows = small_yolox()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    assert compiled(preds, shapes, rows).l1 == 0
    criterion.use_l1 = True
    assert compiled(preds, shapes, rows).l1 > 0
    assert counter.frame_count == 1


@pytest.mark.parametrize("system", ["yolo11", "yolox"])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_value_is_needed_on_the_host(system, num_rows):
    """With fake tensors on a GPU any look at a value or a size that depends on one raises."""
    with FakeTensorMode():
        rows = torch.zeros(num_rows, 6, device="cuda")
        if system == "yolo11":
            preds = torch.zeros(2, 20, 64, device="cuda"), torch.zeros(2, 20, 3, device="cuda")
            criterion = ty.YOLO11Loss(3, strides=(8, 16))
        else:
            preds = (torch.zeros(2, 20, 8, device="cuda"),)
            criterion = ty.YOLOXLoss(3, strides=(8, 16))
        out = criterion(*preds, [(4, 4), (2, 2)], rows)
        for targets in (
            ty.Targets.from_padded(torch.zeros(2, 4, device="cuda"), torch.zeros(2, 4, 4, device="cuda")),
            ty.Targets.from_list([{"boxes": torch.zeros(3, 4, device="cuda"), "labels": torch.zeros(3, device="cuda")}] * 2),
        ):
            criterion(*preds, [(4, 4), (2, 2)], targets)
    assert out.loss.device.type == "cuda"
    assert all(x.shape == () for x in out)


def test_assigners_need_no_value_on_the_host():
    with FakeTensorMode():
        zeros = lambda *shape: torch.zeros(*shape, device="cuda")  # noqa: E731
        gt = (zeros(2, 4, 1), zeros(2, 4, 4), zeros(2, 4, 1))
        result = ty.TaskAlignedAssigner(num_classes=3)(zeros(2, 20, 3), zeros(2, 20, 4), zeros(20, 2), *gt)
        assert result.target_scores.shape == (2, 20, 3)
        args = zeros(2, 20, 3), zeros(2, 20), zeros(2, 20, 4), zeros(20, 2), zeros(20)
        assert ty.SimOTAAssigner(num_classes=3)(*args, *gt).num_fg.shape == ()
