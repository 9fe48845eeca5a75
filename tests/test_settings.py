"""Settings and sizes that make no sense are refused where they are given, with the argument's name."""

import inspect

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_errors import ON_CPU, yolo11_call
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo.integrations import ultralytics


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE)


NUMBERS = {  # calls by the number that they are given, and the name of that argument
    "num_classes": [ty.YOLO11Loss, ty.YOLOXLoss, lambda x: ty.TaskAlignedAssigner(num_classes=x),
                    lambda x: ty.SimOTAAssigner(num_classes=x)],
    "reg_max": [lambda x: ty.YOLO11Loss(3, reg_max=x), lambda x: ty.decode_dfl(zeros(1, 2, 8), zeros(2, 2), reg_max=x)],
    "topk": [lambda x: ty.YOLO11Loss(3, topk=x), ty.TaskAlignedAssigner,
             lambda x: ty.select_topk_candidates(zeros(1, 2, 3), x)],
    "topk2": [lambda x: ty.YOLO11Loss(3, topk2=x), lambda x: ty.TaskAlignedAssigner(topk2=x)],
}  # fmt: skip
REALS = {
    "alpha": [lambda x: ty.YOLO11Loss(3, alpha=x), lambda x: ty.TaskAlignedAssigner(alpha=x), lambda x: metric(alpha=x)],
    "beta": [lambda x: ty.YOLO11Loss(3, beta=x), lambda x: ty.TaskAlignedAssigner(beta=x), lambda x: metric(beta=x)],
    "eps": [lambda x: ty.TaskAlignedAssigner(eps=x), lambda x: ty.bbox_iou(zeros(2, 4), zeros(2, 4), eps=x),
            lambda x: ty.prob_iou(zeros(2, 5), zeros(2, 5), eps=x)],
    "floor": [lambda x: ty.prob_iou(zeros(2, 5), zeros(2, 5), floor=x)],
    "min_box_side": [lambda x: ty.YOLO11Loss(3, min_box_side=x), lambda x: ty.TaskAlignedAssigner(min_box_side=x),
                     lambda x: metric(min_box_side=x)],
    "box_gain": [lambda x: ty.YOLO11Loss(3, box_gain=x)],
    "cls_gain": [lambda x: ty.YOLO11Loss(3, cls_gain=x)],
    "dfl_gain": [lambda x: ty.YOLO11Loss(3, dfl_gain=x)],
    "iou_gain": [lambda x: ty.YOLOXLoss(3, iou_gain=x)],
    "center_radius": [lambda x: ty.YOLOXLoss(3, center_radius=x), lambda x: ty.SimOTAAssigner(center_radius=x)],
    "strides": [lambda x: ty.YOLO11Loss(3, strides=(8, x)), lambda x: ty.YOLOXLoss(3, strides=[x]),
                lambda x: ty.make_anchors([(1, 1)], [x])],
    "imgsz": [lambda x: ty.Targets.from_yolo(zeros(1, 6), x), lambda x: ty.Targets.from_yolo(zeros(1, 6), (64, x))],
}  # fmt: skip
NAN, INF = float("nan"), float("inf")


def metric(**options):
    args = zeros(1, 2, 3), zeros(1, 2, 4), zeros(2, 2), zeros(1, 1), zeros(1, 1, 4), zeros(1, 1)
    return ty.align_metric(*args, **{"alpha": 1.0, "beta": 6.0, **options})


@pytest.mark.parametrize(
    ("name", "call", "value"),
    [(name, call, x) for name, calls in NUMBERS.items() for call in calls for x in (0, -1, 2.5, 10.0, NAN, "3", torch.ones(2))]
    + [(name, call, x) for name, calls in REALS.items() for call in calls
       for x in (-1, NAN, INF, -INF, 1e39, 10**400, "3", torch.ones(3))],
)  # fmt: skip
def test_wrong_numbers_are_named(name, call, value):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be "):
        call(value)


@pytest.mark.parametrize(
    ("name", "call"),
    [("alpha", lambda: ty.YOLO11Loss(3, alpha=None)), ("topk", lambda: ty.YOLO11Loss(3, topk=None)),
     ("strides", lambda: ty.YOLO11Loss(3, strides=None)), ("strides", lambda: ty.YOLOXLoss(3, strides=torch.tensor(8))),
     ("strides", lambda: ty.make_anchors([(1, 1)], 8)), ("strides", lambda: ty.YOLOXLoss(3, strides=("8",))),
     ("feat_shapes", lambda: ty.make_anchors(None, (8,))), ("feat_shapes", lambda: yolo11_call(feat_shapes=None)()),
     ("feat_shapes", lambda: yolo11_call(feat_shapes=[4, 2])()),
     ("feat_shapes", lambda: yolo11_call(feat_shapes=[(4.5, 4), (2, 2)])()),
     ("feat_shapes", lambda: small_yolox()[0](zeros(2, 20, 8), None, zeros(0, 6))),
     ("process_group", lambda: ty.YOLO11Loss(3, process_group="nccl")),
     ("process_group", lambda: ty.YOLOXLoss(3, process_group=object())),
     ("class_weights", lambda: ty.YOLO11Loss(3, class_weights=[1.0, 1, 1])),
     ("class_weights", lambda: ty.YOLO11Loss(3, class_weights=torch.ones(3, device="meta"))),
     ("rows", lambda: ty.Targets.from_yolo([[0.0] * 6], 64)), ("rows", lambda: ty.Targets.from_yolo(zeros(1, 5), 64)),
     ("imgsz", lambda: ty.Targets.from_yolo(zeros(1, 6), None)), ("imgsz", lambda: ty.Targets.from_yolo(zeros(1, 6), "64")),
     ("a", lambda: ty.bbox_iou([0.0] * 4, zeros(4))), ("a", lambda: ty.bbox_iou(zeros(1)[0], zeros(4))),
     ("b", lambda: ty.bbox_iou(zeros(4), None)), ("metric", lambda: ty.select_topk_candidates(None, 1)),
     ("boxes", lambda: ty.Targets.from_padded(zeros(1, 2), None)),
     ("labels", lambda: ty.Targets.from_padded(None, zeros(1, 2, 4))),
     ("mask", lambda: ty.Targets.from_padded(zeros(1, 2), zeros(1, 2, 4), [True, False])),
     (r"targets\[1\]\['boxes'\]",
      lambda: ty.Targets.from_list([{"boxes": torch.zeros(1, 4, device=x), "labels": zeros(1)} for x in (DEVICE, "meta")])),
     (r"targets\[0\]\['labels'\]", lambda: ty.Targets.from_list([{"boxes": zeros(1, 4), "labels": [1]}])),
     ("labels", lambda: ty.Targets.from_padded(zeros(1, 2).cfloat(), zeros(1, 2, 4))),
     ("mask", lambda: ty.Targets.from_padded(zeros(1, 2), zeros(1, 2, 4), zeros(1, 2).cfloat())),
     (r"targets\[0\]\['labels'\]", lambda: ty.Targets.from_list([{"boxes": zeros(1, 4), "labels": zeros(1).cfloat()}]))],
)  # fmt: skip
def test_wrong_types_are_named(name, call):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must "):
        call()


SWITCHES = {
    "use_l1": [lambda x: ty.YOLOXLoss(3, use_l1=x), lambda x: setattr(ty.YOLOXLoss(3), "use_l1", x)],
    "overlap_mask": [lambda x: ty.YOLO11SegmentationLoss(3, overlap_mask=x),
                     lambda x: ty.mask_loss(zeros(1, 2, 1), zeros(1, 1, 4, 4), torch.full((1, 2), -1, device=DEVICE),
                                            ty.Targets.from_yolo(zeros(1, 6), 64), zeros(1, 4, 4), imgsz=64, overlap_mask=x)],
    "cuda_graph": [lambda x: ultralytics.patch(cuda_graph=x), lambda x: ultralytics.patched(cuda_graph=x).__enter__()],
}  # fmt: skip


@pytest.mark.parametrize("value", ["False", 1, None, torch.ones(2)])
@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in SWITCHES.items() for call in calls])
def test_what_is_neither_true_nor_false_is_named(name, call, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got "):
        call(value)


@ON_CPU
@pytest.mark.parametrize("label", [3, -1])
def test_assigners_and_metric_name_labels_out_of_range(label):
    padded = torch.full((1, 1), label), zeros(1, 1, 4), torch.ones(1, 1)
    preds = zeros(1, 2, 3), zeros(1, 2, 4), zeros(2, 2)
    for call in (
        lambda: ty.TaskAlignedAssigner(num_classes=3)(*preds, *padded),
        lambda: ty.SimOTAAssigner(num_classes=3)(preds[0], zeros(1, 2), *preds[1:], torch.ones(2), *padded),
        lambda: ty.align_metric(*preds, *padded, alpha=1, beta=6),
    ):
        with pytest.raises(ValueError, match=rf"^gt_labels must have labels in 0\.\.\.2, got \[{label}\]"):
            call()


def test_numbers_of_other_kinds_are_taken():
    np = pytest.importorskip("numpy")
    criterion = ty.YOLO11Loss(np.int64(3), strides=torch.tensor([8.0, 16.0]), reg_max=np.int32(8), topk=np.int64(10),
                              alpha=np.float16(0.5), beta=torch.tensor(6.0), box_gain=np.float64(7.5))  # fmt: skip
    expected, *args = small_yolo11()
    assert torch.equal(criterion(*args).loss, expected(*args).loss)
    assert ty.YOLOXLoss(3, use_l1=np.bool_(True)).use_l1 is True
    dist, scores, shapes, rows = args
    assert torch.equal(criterion(dist, scores, np.array(shapes), rows).loss, expected(*args).loss)


@pytest.mark.parametrize(
    ("shapes", "strides"),
    [
        ([(4, 4), (8, 8), (2, 2)], (8, 16, 32)),  # 32, 128 and 64 pixels: another order than the strides
        ([(2, 2), (4, 4), (8, 8)], (8, 16, 32)),
        ([(8, 8), (4, 4), (2, 2)], (32, 16, 8)),
        ([(8, 12), (6, 4), (2, 3)], (8, 16, 32)),  # height and width exchanged: 64 x 96 and 96 x 64 pixels
        ([(12, 8), (4, 6)], (8, 16)),
        ([(20, 20), (9, 8)], (8, 16)),  # a column and more is missing
    ],
)
def test_levels_of_another_image_size_raise(shapes, strides):
    anchors = sum(height * width for height, width in shapes)
    message = r"^feat_shapes must be sizes of one image at strides \(.*\), in their order"
    with pytest.raises(ValueError, match=message):
        ty.YOLO11Loss(3, strides=strides, reg_max=1)(zeros(1, anchors, 4), zeros(1, anchors, 3), shapes, zeros(0, 6))
    with pytest.raises(ValueError, match=message):
        ty.YOLOXLoss(3, strides=strides)(zeros(1, anchors, 8), shapes, zeros(0, 6))
    with pytest.raises(ValueError, match=message):
        ty.make_anchors(shapes, strides)


@pytest.mark.parametrize(
    ("shapes", "strides"),
    [
        ([(80, 80), (40, 40), (20, 20), (10, 10)], (8, 16, 32, 64)),
        ([(13, 25), (7, 13), (4, 7)], (8, 16, 32)),  # rounded up: 97 x 193 pixels
        ([(12, 24), (6, 12), (3, 6)], (8, 16, 32)),  # rounded down
        ([(20, 20), (9, 9)], (8, 16)),  # convolutions without padding
        ([(1, 1), (1, 1)], (8, 16)),
        ([(3, 5)], (3.5,)),
    ],
)
def test_levels_of_one_image_size_may_be_rounded(shapes, strides):
    assert len(ty.make_anchors(shapes, strides)[0]) == sum(height * width for height, width in shapes)


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
    for kind in (tuple, iter, np.array, torch.tensor, lambda x: map(torch.Size, x), lambda x: [torch.tensor(s) for s in x]):
        assert torch.equal(criterion(*preds, kind(shapes), rows).loss, expected)
        assert torch.equal(ty.make_anchors(kind([(2, 1)]), (8,))[0], torch.tensor([[0.5, 0.5], [0.5, 1.5]]))


@pytest.mark.parametrize(
    "criterion", [ty.YOLO11Loss, ty.YOLO11OBBLoss, ty.YOLO11SegmentationLoss, ty.YOLO11PoseLoss, ty.YOLOXLoss]
)
def test_arguments_are_attributes_or_are_refused_later(criterion):
    """To set what is kept under another name would change nothing."""
    made = criterion(3)
    arguments = set(inspect.signature(criterion).parameters)
    if "options" in arguments:
        arguments = arguments - {"options"} | set(inspect.signature(ty.YOLO11Loss).parameters)
    for name in arguments:
        if not hasattr(made, name):
            with pytest.raises(AttributeError, match=rf"{name} is given to {criterion.__name__} when it is made"):
                setattr(made, name, 2)
