"""Ground truth in every form: what is wrong with it is found, and named as the caller knows it."""

import math

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _ops
from triton_yolo import _signatures as of

ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="values are looked at on the CPU only: elsewhere it would synchronise")
SYSTEMS = pytest.mark.parametrize("make", [small_yolo11, small_yolox])
BOX = [[2.0, 2.0, 20.0, 20.0]]
HAND_MADE = {"image_index": [0], "labels": [1], "boxes_xyxy": BOX, "boxes_xywh": [[11.0, 11.0, 18.0, 18.0]]}


def hand_made(**changes) -> ty.Targets:
    fields = {name: torch.tensor(value, device=DEVICE) for name, value in HAND_MADE.items()}
    return ty.Targets(**{**fields, **changes})


def row(**changes: float) -> torch.Tensor:
    return torch.tensor([list({"image": 0.0, "label": 1.0, "cx": 0.5, "cy": 0.5, "w": 0.7, "h": 0.6, **changes}.values())])


@SYSTEMS
def test_hand_made_targets_work(make):
    criterion, *preds, shapes, _ = make()
    expected = criterion(*preds, shapes, ty.Targets.from_padded(torch.tensor([[1], [0]]), torch.tensor([BOX, [[0.0] * 4]])))
    assert torch.equal(criterion(*preds, shapes, hand_made()).loss, expected.loss)


@SYSTEMS
@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("image_index", torch.zeros(3).long(), ValueError, r"targets.labels must have shape \(3,\), got \(1,\)"),
        ("image_index", torch.zeros(1), TypeError, "targets.image_index must be int64, got torch.float32"),
        ("image_index", torch.zeros(1).int(), TypeError, "targets.image_index must be int64, got torch.int32"),
        ("image_index", torch.tensor(0), ValueError, r"targets.image_index must have shape \(N,\), got \(\)"),
        ("image_index", None, TypeError, "targets.image_index must be a tensor, got NoneType"),
        ("image_index", torch.zeros(1, device="meta").long(), ValueError, "targets.image_index must be on .*, got meta"),
        ("labels", torch.zeros(3).long(), ValueError, r"targets.labels must have shape \(1,\), got \(3,\)"),
        ("labels", torch.ones(1), TypeError, "targets.labels must be int64, got torch.float32"),
        ("labels", [1], TypeError, "targets.labels must be a tensor, got list"),
        ("labels", torch.zeros(1, device="meta").long(), ValueError, "targets.labels must be on .*, got meta"),
        ("boxes_xyxy", torch.zeros(2, 4), ValueError, r"targets.boxes_xyxy must have shape \(1, 4\), got \(2, 4\)"),
        ("boxes_xyxy", torch.zeros(1, 4).int(), TypeError, "targets.boxes_xyxy must be float16, .* got torch.int32"),
        ("boxes_xyxy", torch.zeros(1, 4, device="meta"), ValueError, "targets.boxes_xyxy must be on .*, got meta"),
        ("boxes_xywh", torch.zeros(1, 5), ValueError, r"targets.boxes_xywh must have shape \(1, 4\), got \(1, 5\)"),
        ("boxes_xywh", torch.zeros(1, 4).long(), TypeError, "targets.boxes_xywh must be float16, .* got torch.int64"),
        ("boxes_xywh", torch.zeros(1, 4, device="meta"), ValueError, "targets.boxes_xywh must be on .*, got meta"),
    ],
)
def test_hand_made_targets_are_checked(make, field, value, error, message):
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        value = value.to(DEVICE)
    criterion, *preds, shapes, _ = make()
    with pytest.raises(error, match=message):
        criterion(*preds, shapes, hand_made(**{field: value}))


@SYSTEMS
@ON_CPU
@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("value", [-0.5, 0.5, math.nan, math.inf, -math.inf])
def test_indices_and_labels_are_whole(make, column, value):
    criterion, *preds, shapes, _ = make()
    rows = row(**{column: value})
    with pytest.raises(ValueError, match=r"targets must have whole image indices and labels, got \["):
        criterion(*preds, shapes, rows)
    with pytest.raises(ValueError, match=r"rows must have whole image indices and labels, got \["):
        ty.Targets.from_yolo(rows, 32)


@SYSTEMS
@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("value", [-0.5, 0.5, math.nan, math.inf, -math.inf])
def test_rows_that_are_not_whole_are_ignored_where_values_are_not_looked_at(make, column, value, monkeypatch):
    for operation in (_ops.unpack_rows, _ops.yolo11_criterion, _ops.yolox_criterion):
        monkeypatch.setattr(operation, "_check", None)
    criterion, *preds, shapes, rows = make()
    expected = criterion(*preds, shapes, rows[:0]).loss
    rows = row(**{column: value}).to(DEVICE)
    assert torch.equal(criterion(*preds, shapes, rows).loss, expected)
    assert torch.equal(criterion(*preds, shapes, ty.Targets.from_yolo(rows, 32)).loss, expected)
    assert not _ops.unpack_rows(of.UnpackRows(rows, 32.0, 32.0)).image_index[0] >= 0


@SYSTEMS
def test_padding_may_hold_anything(make):
    criterion, *preds, shapes, rows = make()
    padding = row(image=-1.0, label=math.nan, w=math.inf).to(DEVICE)
    assert torch.equal(criterion(*preds, shapes, torch.cat([padding, rows])).loss, criterion(*preds, shapes, rows).loss)


@ON_CPU
@pytest.mark.parametrize("label", [0.5, -0.5, math.nan, math.inf])
def test_labels_of_padded_ground_truth_are_whole(label):
    labels, boxes, mask = torch.tensor([[label]]), torch.tensor([BOX]), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"^labels must be whole numbers, got \["):
        ty.Targets.from_padded(labels, boxes)
    with pytest.raises(ValueError, match=r"^labels must be whole numbers, got \["):
        ty.Targets.from_list([{"labels": labels[0], "boxes": boxes[0]}])
    assigner = ty.TaskAlignedAssigner(num_classes=2)
    with pytest.raises(ValueError, match=r"^gt_labels must be whole numbers, got \["):
        assigner(torch.rand(1, 4, 2), torch.rand(1, 4, 4), torch.rand(4, 2), labels, boxes, mask)
    assert (ty.Targets.from_padded(labels, boxes, torch.zeros(1, 1)).image_index < 0).all()


@ON_CPU
def test_assigners_say_gt_labels():
    labels, boxes, mask = torch.tensor([[2]]), torch.tensor([BOX]), torch.ones(1, 1)
    scores, pred, points = torch.rand(1, 4, 2), torch.rand(1, 4, 4), torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"^gt_labels must have labels in 0...1, got \[2\]"):
        ty.TaskAlignedAssigner(num_classes=2)(scores, pred, points, labels, boxes, mask)
    with pytest.raises(ValueError, match=r"^gt_labels must have labels in 0...1, got \[2\]"):
        ty.SimOTAAssigner(num_classes=2)(scores, scores[..., 0], pred, points, torch.ones(4), labels, boxes, mask)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2048), (torch.bfloat16, 256)])
class TestRowsOfHalfPrecision:
    def test_classes_that_the_type_cannot_tell_apart(self, dtype, limit):
        _, dist, _, shapes, _ = small_yolo11()
        rows = torch.tensor([[0, limit, 0.5, 0.5, 0.75, 0.75]], dtype=dtype, device=DEVICE)
        for num_classes in (limit + 1, limit + 2):
            criterion = ty.YOLO11Loss(num_classes, strides=(8, 16), reg_max=8)
            scores = torch.zeros(2, 20, num_classes, device=DEVICE)
            if num_classes == limit + 1:
                assert criterion(dist, scores, shapes, rows).num_fg > 0
            else:
                with pytest.raises(ValueError, match=f"targets must be of a wider type than {dtype}"):
                    criterion(dist, scores, shapes, rows)

    def test_images_that_the_type_cannot_tell_apart(self, dtype, limit):
        criterion = ty.YOLOXLoss(1, strides=(8,))
        rows = torch.tensor([[limit, 0, 0.5, 0.5, 0.75, 0.75]], dtype=dtype, device=DEVICE)
        assert criterion(torch.zeros(limit + 1, 1, 6, device=DEVICE), [(1, 1)], rows).num_fg == 1
        with pytest.raises(ValueError, match=f"targets must be of a wider type than {dtype}"):
            criterion(torch.zeros(limit + 2, 1, 6, device=DEVICE), [(1, 1)], rows)

    @ON_CPU
    @pytest.mark.parametrize("column", [0, 1])
    def test_values_beyond_are_found(self, dtype, limit, column):
        rows = torch.tensor([[0, 0, 0.5, 0.5, 0.75, 0.75]], dtype=dtype)
        rows[0, column] = limit
        assert ty.Targets.from_yolo(rows, 32)[column] == limit
        rows[0, column] = 2 * limit
        with pytest.raises(ValueError, match=f"rows must have image indices and labels up to {limit} in {dtype}"):
            ty.Targets.from_yolo(rows, 32)


def shares_padded():
    ty.Targets.from_padded(torch.tensor([[1]]), torch.tensor([[[0.1, 0.1, 0.7, 0.8]]]))


def shares_padded_xywh():
    ty.Targets.from_padded(torch.tensor([[1]]), torch.tensor([[[0.5, 0.5, 0.7, 0.8]]]), box_format="xywh")


def shares_list():
    ty.Targets.from_list([{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.1, 0.1, 0.7, 0.8]])}])


def shares_task_aligned():
    args = torch.rand(1, 4, 2), torch.rand(1, 4, 4), torch.rand(4, 2)
    ty.TaskAlignedAssigner(num_classes=2)(*args, torch.tensor([[1]]), torch.tensor([[[0.1, 0.1, 0.7, 0.8]]]), torch.ones(1, 1))


def pixels_from_yolo():
    ty.Targets.from_yolo(torch.tensor([[0, 1, 160.0, 160, 90, 90]]), 320)


def pixels_yolo11():
    criterion, *preds, shapes, _ = small_yolo11()
    criterion(*preds, shapes, torch.tensor([[0, 1, 160.0, 160, 90, 90]]))


def pixels_yolox_with_gradient():
    criterion, preds, shapes, _ = small_yolox()
    criterion(preds.requires_grad_(), shapes, torch.tensor([[0, 1, 160.0, 160, 90, 90]]))


WARNINGS = {
    shares_padded: "boxes are at most 0.8 px",
    shares_padded_xywh: "boxes are at most 0.8 px",
    shares_list: "boxes are at most 0.8 px",
    shares_task_aligned: "gt_bboxes are at most 0.8 px",
    pixels_from_yolo: "rows have boxes up to 160 images",
    pixels_yolo11: "targets have boxes up to 160 images",
    pixels_yolox_with_gradient: "targets have boxes up to 160 images",
}


@ON_CPU
@pytest.mark.parametrize("call", WARNINGS, ids=lambda call: call.__name__)
def test_boxes_in_another_unit_get_a_warning_at_the_callers_line(call):
    with pytest.warns(UserWarning, match=f"^{WARNINGS[call]}") as record:
        call()
    assert len(record) == 1
    assert record[0].filename == __file__
    first = call.__code__.co_firstlineno
    assert first < record[0].lineno < first + 4


def test_boxes_in_pixels_get_no_warning():
    small = [[0.0, 0.0, 1.0, 1.0], [3.0, 4.0, 9.0, 9.5]]
    ty.Targets.from_padded(torch.tensor([[1, 1]]), torch.tensor([small]))
    ty.Targets.from_list([{"labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}])
    ty.Targets.from_padded(torch.zeros(2, 3), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    "imgsz",
    [32, 32.0, torch.tensor(32), torch.tensor(32.0), (32, 32), [32.0, 32], torch.Size([32, 32]), torch.tensor([32, 32])],
    ids=repr,
)
def test_image_size_of_every_kind(imgsz):
    assert ty.Targets.from_yolo(row().to(DEVICE), imgsz).boxes_xywh.tolist() == [pytest.approx([16, 16, 22.4, 19.2])]


def test_image_size_of_numpy():
    np = pytest.importorskip("numpy")
    for imgsz in (np.int64(32), np.float32(32), np.array([32, 32]), (np.int32(32), torch.tensor(32))):
        test_image_size_of_every_kind(imgsz)


@pytest.mark.parametrize(
    "imgsz", ["32", None, (32,), (32, 32, 3), 0, -32, math.nan, math.inf, (32, "a"), (32, 0), True], ids=repr
)
def test_image_size_is_named(imgsz):
    with pytest.raises((TypeError, ValueError), match=r"^imgsz must be .*, got"):
        ty.Targets.from_yolo(row(), imgsz)


@SYSTEMS
@pytest.mark.parametrize(
    ("shapes", "num_anchors"),
    [([(2, 2), (4, 4)], 20), ([(4, 8), (4, 2)], 40), ([(8, 4), (2, 4)], 40), ([(4, 4), (8, 8)], 80)],
    ids=["levels exchanged", "sides of one level exchanged", "and the other way", "upside down"],
)
def test_levels_are_of_one_image(make, shapes, num_anchors):
    criterion, *preds, _, rows = make()
    preds = [x.new_zeros(2, num_anchors, x.shape[2]) for x in preds]
    with pytest.raises(ValueError, match=r"feat_shapes must be sizes of one image at strides \(8.0, 16.0\), in their order"):
        criterion(*preds, shapes, rows)


@SYSTEMS
@pytest.mark.parametrize("shapes", [[(5, 7), (3, 4)], [(5, 7), (2, 3)], [(4, 6), (2, 4)]], ids=repr)
def test_levels_may_differ_by_a_stride(make, shapes):
    criterion, *preds, _, rows = make()
    preds = [x.new_zeros(2, sum(h * w for h, w in shapes), x.shape[2]) for x in preds]
    assert criterion(*preds, shapes, rows).loss.isfinite()
