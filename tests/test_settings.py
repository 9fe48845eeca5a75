"""Settings that make no sense are refused where they are given, with the argument's name."""

import math

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox

NAN, INF = math.nan, math.inf
WHOLE = [0, -1, 2.5, 10.0, NAN, "3", True]
REAL = [-1.0, NAN, INF, "3", None]
POSITIVE = [0, *REAL]
STRIDES = [8, (), (8, 0), (8, -16), (8, NAN), (8, INF), ("8", 16), None]
YOLO11, YOLOX = ty.YOLO11Loss, ty.YOLOXLoss
ASSIGNER, SIMOTA = ty.TaskAlignedAssigner, ty.SimOTAAssigner


def decode_dfl(reg_max):
    return ty.decode_dfl(torch.zeros(1, 2, 8), torch.zeros(2, 2), reg_max=reg_max)


def bbox_iou(eps):
    return ty.bbox_iou(torch.zeros(2, 4), torch.zeros(2, 4), eps=eps)


def select(topk):
    return ty.select_topk_candidates(torch.zeros(1, 2, 3), topk)


def align_metric(**changes):
    tensors = torch.rand(1, 4, 2), torch.rand(1, 4, 4), torch.rand(4, 2)
    gt = torch.tensor([[1]]), torch.tensor([[[2.0, 2, 20, 20]]]), torch.ones(1, 1)
    return ty.align_metric(*tensors, *gt, **{"alpha": 1.0, "beta": 6.0, **changes})


def with_classes(criterion):
    return lambda **settings: criterion(**{"num_classes": 3, **settings})


def table():
    cases = [
        (YOLO11, {"num_classes": WHOLE}),
        (with_classes(YOLO11), {"reg_max": WHOLE, "topk": WHOLE, "topk2": WHOLE, "strides": STRIDES}),
        (with_classes(YOLO11), dict.fromkeys(["alpha", "beta", "box_gain", "cls_gain", "dfl_gain", "min_box_side"], REAL)),
        (
            with_classes(YOLO11),
            {"class_weights": [[1.0, 1, 1], torch.ones(2), torch.ones(3).long()]},
        ),
        (with_classes(YOLO11), {"process_group": [2, "x"]}),
        (YOLOX, {"num_classes": WHOLE}),
        (with_classes(YOLOX), {"strides": STRIDES, "center_radius": POSITIVE, "iou_gain": REAL, "process_group": [2, "x"]}),
        (with_classes(YOLOX), {"candidates": ["box", None], "iou_loss": ["ciou", None]}),
        (ASSIGNER, {"topk": WHOLE, "topk2": WHOLE, "num_classes": WHOLE}),
        (ASSIGNER, dict.fromkeys(["alpha", "beta", "eps", "min_box_side"], REAL)),
        (SIMOTA, {"num_classes": WHOLE, "center_radius": POSITIVE, "candidates": ["box", None]}),
        (decode_dfl, {"reg_max": WHOLE}),
        (bbox_iou, {"eps": REAL}),
        (select, {"topk": WHOLE}),
        (align_metric, dict.fromkeys(["alpha", "beta", "min_box_side"], REAL)),
        (lambda strides: ty.make_anchors([(4, 4), (2, 2)], strides), {"strides": STRIDES}),
    ]
    for call, arguments in cases:
        for argument, values in arguments.items():
            for value in values:
                yield pytest.param(call, argument, value, id=f"{argument}={value!r}")


@pytest.mark.parametrize(("call", "argument", "value"), [*table()])
def test_settings_are_named(call, argument, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must .*, got"):
        call(**{argument: value})


@pytest.mark.parametrize("make", [small_yolo11, small_yolox])
@pytest.mark.parametrize(
    "shapes",
    [None, 4, [4, 2], [(4, 4), None], [(4, 4), (2,)], [(4, 4), (2, 2, 1)], [(4, 4), (2, 0)], [(4, 4), (2, -2)],
     [(4.0, 4.0), (2.0, 2.0)], [(4, 4), (NAN, 2)], [("4", "4"), (2, 2)], [(4, 4)], [(4, 4), (2, 3)], []],
    ids=repr,
)  # fmt: skip
def test_feat_shapes_are_named(make, shapes):
    criterion, *preds, _, rows = make()
    with pytest.raises((TypeError, ValueError), match=r"^feat_shapes must .*, got"):
        criterion(*preds, shapes, rows)


@pytest.mark.parametrize("make", [small_yolo11, small_yolox])
def test_feat_shapes_of_every_kind(make):
    np = pytest.importorskip("numpy")
    criterion, *preds, shapes, rows = make()
    expected = criterion(*preds, shapes, rows).loss
    for kind in (tuple, np.array, torch.tensor, lambda x: [torch.Size(s) for s in x], lambda x: [torch.tensor(s) for s in x]):
        assert torch.equal(criterion(*preds, kind(shapes), rows).loss, expected)


@pytest.mark.parametrize("how", ["to_empty", "meta and to_empty", "reset"])
def test_buffers_are_filled_again(how):
    weights = torch.tensor([1.0, 2.0, 0.5])

    def made(criterion):
        if how == "meta and to_empty":
            criterion = criterion.to("meta")
        if how == "reset":
            for x in criterion.buffers():
                x.fill_(NAN)
            criterion.reset_parameters()
            return criterion
        return criterion.to_empty(device=DEVICE)

    assert made(YOLOX(3, use_l1=True))._l1_gain == 1
    assert made(YOLOX(3))._l1_gain == 0
    assert made(YOLO11(3, class_weights=weights.clone())).class_weights.tolist() == weights.tolist()


def test_a_criterion_made_on_meta_has_its_switch():
    with torch.device("meta"):
        criterion = YOLOX(3, use_l1=True)
    assert criterion.to_empty(device=DEVICE)._l1_gain == 1
    criterion.use_l1 = False
    assert criterion.to("meta").to_empty(device=DEVICE)._l1_gain == 0


def test_changed_class_weights_stay_changed():
    criterion = YOLO11(3, class_weights=torch.ones(3))
    criterion.class_weights = torch.tensor([1.0, 2.0, 3.0])
    assert criterion.double().class_weights.tolist() == [1, 2, 3]
    criterion.class_weights.mul_(2)
    assert criterion.float().to_empty(device=DEVICE).class_weights.tolist() == [2, 4, 6]
