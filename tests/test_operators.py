"""The operations as PyTorch's machinery sees them: schemas, fakes, gradients, compilation, no value needed on the host."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_yolo as ty
from tests import operations
from tests.conftest import DEVICE
from tests.gradients import held_weight, held_weight_of_loss
from tests.operations import INPUTS, OPERATIONS, same, tensors_of, with_tensors
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _backend, _ops

F64 = torch.float64
EVERY_OPERATION = pytest.mark.parametrize("name", INPUTS)


def test_every_operation_has_inputs():
    assert set(INPUTS) == set(OPERATIONS)


@EVERY_OPERATION
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_opcheck(name, dtype):
    operation, x = OPERATIONS[name], INPUTS[name](dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        torch.library.opcheck(operation.operator, tuple(operation.flat(x)))


@pytest.mark.parametrize("name", ["yolo11_criterion", "yolox_criterion", "keypoint_loss", "mask_loss"])
def test_opcheck_without_gradients(name):
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)._replace(wants_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        torch.library.opcheck(operation.operator, tuple(operation.flat(x)))


def test_opcheck_of_oriented_boxes():
    x = operations.rotated_task_aligned_assign(torch.float32)
    assert (_ops.task_aligned_assign(x).target_row >= 0).sum() > 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        torch.library.opcheck(_ops.task_aligned_assign.operator, tuple(_ops.task_aligned_assign.flat(x)))


@EVERY_OPERATION
def test_inputs_survive_the_operator(name):
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)
    again = operation.nested([list(value) if isinstance(value, tuple) else value for value in operation.flat(x)])
    assert [(type(a), type(b)) for a, b in zip(again, x, strict=True) if type(a) is not type(b)] == []
    assert all(a is b for a, b in zip(tensors_of(again), tensors_of(x), strict=True))
    assert with_tensors(again, torch.numel) == with_tensors(x, torch.numel)


@EVERY_OPERATION
def test_fake_outputs_are_like_the_real_ones(name):
    """Also of a device that is not here, where no value can be looked at."""
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)
    wanted = operation.run(x)
    with FakeTensorMode():
        fake = with_tensors(x, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        outputs = operation.run(fake)
    for have, want in zip(outputs, wanted, strict=True):
        assert (have.dtype, have.shape, have.stride()) == (want.dtype, want.shape, want.stride())
        assert have.device.type == "cuda"


@EVERY_OPERATION
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients_change_no_bit(name, mode):
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)
    wanted = operation.run(x)
    leaves = with_tensors(x, lambda t: t.clone().requires_grad_(t.is_floating_point()))
    with mode():
        outputs = operation(leaves)
    assert same(outputs, wanted)
    assert not any(output.requires_grad for output in outputs)


@EVERY_OPERATION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit(name, dtype):
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)
    wanted = operation.run(x)
    with torch.autocast(DEVICE.type, dtype=dtype):
        assert same(operation.run(x), wanted)
        assert same(operation.run_operator(operation.flat(x)), wanted)


@EVERY_OPERATION
def test_the_operator_gives_what_the_backend_gives(name):
    operation, x = OPERATIONS[name], INPUTS[name](torch.float32)
    function = getattr(_backend.implementation(DEVICE), name)
    wanted = function(x)
    assert type(wanted) is operation.outputs
    assert same(operation.run_operator(operation.flat(x)), wanted)
    assert same(operation.run(x), wanted)


@pytest.mark.parametrize("with_strides", [True, False])
def test_gradcheck_decode_dfl(with_strides):
    x = operations.decode_dfl(F64, has_strides=with_strides)
    assert torch.autograd.gradcheck(lambda d: _ops.decode_dfl(x._replace(pred_dist=d)).boxes, x.pred_dist.requires_grad_())


def test_gradcheck_decode_yolox():
    x = operations.decode_yolox(F64)
    assert torch.autograd.gradcheck(lambda p: _ops.decode_yolox(x._replace(preds=p)).boxes, x.preds.requires_grad_())


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_gradcheck_bbox_iou(kind):
    x = operations.bbox_iou(F64, kind)
    correction = held_weight(x.a, x.b) if kind == "ciou" else lambda a, b: 0
    inputs = x.a.requires_grad_(), x.b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _ops.bbox_iou(x._replace(a=a, b=b)).overlaps + correction(a, b), inputs)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_gradcheck_prob_iou(floor):
    x = operations.prob_iou(F64, floor)
    inputs = x.a.requires_grad_(), x.b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _ops.prob_iou(x._replace(a=a, b=b)).overlaps, inputs)


@pytest.mark.parametrize("reg_max", [1, 8])
@pytest.mark.parametrize("has_weights", [True, False])
def test_gradcheck_yolo11_loss(reg_max, has_weights):
    weights = torch.tensor([1.0, 2.0, 0.5], device=DEVICE) if has_weights else None
    x = operations.yolo11_loss(F64, reg_max, weights)
    correction = held_weight_of_loss(x)
    inputs = x.pred_dist.requires_grad_(), x.pred_scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda d, s: _ops.yolo11_loss(x._replace(pred_dist=d, pred_scores=s)).loss + correction(d), inputs
    )


@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
@pytest.mark.parametrize("use_l1", [True, False])
def test_gradcheck_yolox_loss(iou_loss, use_l1):
    x = operations.yolox_loss(F64, iou_loss, use_l1=use_l1)
    assert torch.autograd.gradcheck(lambda p: _ops.yolox_loss(x._replace(preds=p)).loss, x.preds.requires_grad_())


@pytest.mark.parametrize("num_dims", [2, 3])
def test_gradcheck_keypoint_loss(num_dims):
    x = operations.keypoint_loss(F64, num_dims)
    inputs = x.pred_keypoints.requires_grad_(), x.other_loss.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, o: _ops.keypoint_loss(x._replace(pred_keypoints=p, other_loss=o)).loss, inputs)


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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("system", ["yolo11", "yolox"])
def test_another_number_of_boxes_needs_no_new_compile(system):
    criterion, *preds, shapes, rows = small_yolo11() if system == "yolo11" else small_yolox()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for count in (2, 3, 4, 5, 8):
        more = rows[torch.arange(count, device=DEVICE) % len(rows)]
        torch.testing.assert_close(compiled(*preds, shapes, more).loss, criterion(*preds, shapes, more).loss)
    assert counter.frame_count == 2  # for the first number of boxes and for any


@pytest.mark.usefixtures("fresh_compiler")
def test_switching_l1_needs_no_new_compile():
    criterion, preds, shapes, rows = small_yolox()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    assert compiled(preds, shapes, rows).l1 == 0
    criterion.use_l1 = True
    assert compiled(preds, shapes, rows).l1 > 0
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_l1_is_switched_inside_a_graph():
    criterion, preds, shapes, rows = small_yolox()

    def switched(is_on):
        criterion.use_l1 = is_on
        return criterion(preds, shapes, rows).l1

    compiled = torch.compile(switched, fullgraph=True, backend="eager")
    assert compiled(True) > 0
    assert compiled(False) == 0


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


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_fakes_need_no_backend_that_runs(backend):
    with ty.backend(backend), FakeTensorMode():
        preds = torch.zeros(2, 20, 8, requires_grad=True)
        ty.YOLOXLoss(3, strides=(8, 16))(preds, [(4, 4), (2, 2)], torch.zeros(3, 6)).loss.backward()
    assert preds.grad.shape == (2, 20, 8)


def test_assigners_need_no_value_on_the_host():
    with FakeTensorMode():
        zeros = lambda *shape: torch.zeros(*shape, device="cuda")  # noqa: E731
        gt = (zeros(2, 4, 1), zeros(2, 4, 4), zeros(2, 4, 1))
        result = ty.TaskAlignedAssigner(num_classes=3)(zeros(2, 20, 3), zeros(2, 20, 4), zeros(20, 2), *gt)
        assert result.target_scores.shape == (2, 20, 3)
        rotated = ty.RotatedTaskAlignedAssigner(num_classes=3)
        result = rotated(zeros(2, 20, 3), zeros(2, 20, 5), zeros(20, 2), gt[0], zeros(2, 4, 5), gt[2])
        assert result.target_bboxes.shape == (2, 20, 5)
        args = zeros(2, 20, 3), zeros(2, 20), zeros(2, 20, 4), zeros(20, 2), zeros(20)
        assert ty.SimOTAAssigner(num_classes=3)(*args, *gt).num_fg.shape == ()
