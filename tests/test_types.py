"""No type but that of the inputs decides anything: neither the default one, nor one that a device may not have."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference as ref
import triton_yolo as ty
from tests.conftest import DEVICE
from tests.operations import INPUTS
from tests.test_assigners import assigner_args, both_assignments
from tests.test_losses import small_yolo11, small_yolox, with_gradients
from triton_yolo import eager


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def core_results(yolo11: tuple, yolox: tuple, padded: tuple) -> list[Tensor]:
    """Both criteria, both assigners and the stages, by the package and by the reference."""
    dist, scores, shapes, rows = yolo11
    preds, *_ = yolox
    options = dict(strides=(8, 16), use_l1=True, iou_loss="giou")
    found = []
    for criterion, reference in (
        (ty.YOLO11Loss(3, strides=(8, 16), reg_max=8), lambda *a: ref.yolo11_loss(*a, strides=(8, 16), reg_max=8)),
        (ty.YOLO11Loss(3, strides=(8, 16), reg_max=8, topk2=1, min_box_side=16.0), None),
    ):
        for function in filter(None, (criterion, reference)):
            out, grads = with_gradients(lambda d, s, f=function: f(d, s, shapes, rows), dist, scores)
            found += [*out, *grads]
    for function in (ty.YOLOXLoss(3, **options), lambda *a: ref.yolox_loss(*a, **options)):
        out, grads = with_gradients(lambda p, f=function: f(p, shapes, rows), preds)
        found += [*out, *grads]
    found += both_assignments(*padded)
    class_scores, objectness, boxes, points, strides, labels, gt, mask = padded
    found += ref.task_aligned_assign(class_scores, boxes, points, labels, gt, mask)
    found += ref.simota_assign(class_scores, objectness, boxes, points, strides, labels, gt, mask)
    for module in (ty, ref):
        metric, overlaps = module.align_metric(class_scores, boxes, points, labels, gt, mask, alpha=0.5, beta=6.0)
        found += [metric, overlaps, module.select_topk_candidates(metric, 3, mask)]
        found += [module.decode_dfl(dist, points, reg_max=8, strides=strides), module.decode_yolox(preds, points, strides)]
        found += [module.bbox_iou(boxes[0], boxes[1].flip(0), kind=kind) for kind in ("iou", "giou", "diou", "ciou")]
        oriented = torch.cat([boxes[0], boxes[0, :, :1]], 1)
        found.append(module.prob_iou(oriented, oriented.flip(0), floor=0.01))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_type_decides_nothing(dtype):
    args = (small_yolo11()[1:], small_yolox()[1:], assigner_args())
    want = core_results(*args)
    with default_dtype(dtype):
        have = core_results(*args)
    for number, (a, b) in enumerate(zip(have, want, strict=True)):
        assert a.dtype == b.dtype, number
        assert torch.equal(a, b), number


class Float64Makers(TorchDispatchMode):
    """The operations that made something in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                self.found.append(str(func))
        return out


@pytest.mark.parametrize("name", INPUTS)
def test_eager_makes_no_float64_of_float32(name):
    """Some devices have none."""
    x = INPUTS[name](torch.float32)
    with Float64Makers() as makers:
        getattr(eager, name)(x)
    assert makers.found == []
    assert makers.count > 1


def test_float64_is_seen():
    with Float64Makers() as makers:
        torch.zeros(2, device=DEVICE).double()
    assert makers.found
