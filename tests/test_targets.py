"""Ground truth is checked where it enters; values on the CPU only, since elsewhere that would synchronise."""

import inspect
import warnings

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _ops

ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on the CPU only: elsewhere it would synchronise")
CRITERIA = pytest.mark.parametrize("small", [small_yolo11, small_yolox])


def one_box(**changes) -> ty.Targets:
    fields = dict(
        image_index=torch.tensor([0], device=DEVICE),
        labels=torch.tensor([1], device=DEVICE),
        boxes_xyxy=torch.tensor([[8.0, 8, 24, 24]], device=DEVICE),
        boxes_xywh=torch.tensor([[16.0, 16, 16, 16]], device=DEVICE),
    )
    return ty.Targets(**{**fields, **changes})


def on_device(*values, dtype=None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@CRITERIA
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": on_device(1, 1, 1)}, ValueError, r"targets\.labels must have shape \(1,\), got \(3,\)"),
        ({"image_index": on_device(0, 0, 0)}, ValueError, r"targets\.labels must have shape \(3,\), got \(1,\)"),
        ({"image_index": on_device(0, 0, 0), "labels": on_device(1, 1, 1)}, ValueError,
         r"targets\.boxes_xyxy must have shape \(3, 4\), got \(1, 4\)"),
        ({"image_index": on_device([0])}, ValueError, r"targets\.image_index must have shape \(N,\), got \(1, 1\)"),
        ({"boxes_xyxy": on_device(1.0, 1, 2, 2)}, ValueError, r"targets\.boxes_xyxy must have shape \(1, 4\), got \(4,\)"),
        ({"boxes_xywh": torch.zeros(2, 4, device=DEVICE)}, ValueError, r"targets\.boxes_xywh must have shape"),
        ({"image_index": on_device(0.0)}, TypeError, r"targets\.image_index must be int64, got torch\.float32"),
        ({"labels": on_device(1, dtype=torch.int32)}, TypeError, r"targets\.labels must be int64, got torch\.int32"),
        ({"boxes_xyxy": torch.ones(1, 4, device=DEVICE).half()}, TypeError,
         r"targets\.boxes_xyxy must be float32 or float64, got torch\.float16"),
        ({"boxes_xywh": torch.ones(1, 4, device=DEVICE).long()}, TypeError, r"targets\.boxes_xywh must be float32 or"),
        ({"labels": torch.ones(1, device="meta", dtype=torch.int64)}, ValueError, r"targets\.labels must be on .*, got meta"),
        ({"boxes_xywh": torch.ones(1, 4, device="meta")}, ValueError, r"targets\.boxes_xywh must be on .*, got meta"),
        ({"labels": [1]}, TypeError, r"targets\.labels must be a tensor, got list"),
    ],
)  # fmt: skip
def test_every_field_of_hand_made_targets_is_checked(small, changes, error, message):
    criterion, *preds, shapes, _ = small()
    criterion(*preds, shapes, one_box())
    with pytest.raises(error, match=message):
        criterion(*preds, shapes, one_box(**changes))


WHAT = ("image indices", "labels")
NOT_WHOLE = [0.5, -0.5, float("nan"), float("inf"), float("-inf")]


@ON_CPU
@CRITERIA
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", NOT_WHOLE)
def test_rows_without_whole_numbers_raise(small, column, value):
    criterion, *preds, shapes, rows = small()
    rows[0, column] = value
    with pytest.raises(ValueError, match=rf"targets must have whole {WHAT[column]}, got \[{value}\]"):
        criterion(*preds, shapes, rows)
    with pytest.raises(ValueError, match=f"rows of targets must have whole {WHAT[column]}"):
        ty.Targets.from_yolo(rows, 32)


@ON_CPU
@pytest.mark.parametrize("value", NOT_WHOLE)
def test_labels_that_are_not_whole_raise(value):
    labels, boxes = torch.tensor([[value, 1.0]]), torch.tensor([[[2.0, 2, 9, 9], [3, 3, 8, 8]]])
    with pytest.raises(ValueError, match=r"^labels must have whole labels"):
        ty.Targets.from_padded(labels, boxes)
    with pytest.raises(ValueError, match=r"^labels of targets must have whole labels"):
        ty.Targets.from_list([{"boxes": boxes[0], "labels": torch.ones(2)}, {"boxes": boxes[0], "labels": labels[0]}])
    points, strides = ty.make_anchors([(4, 4)], (8,))
    padded = labels, boxes, torch.ones(1, 2)
    preds = torch.rand(1, 16, 3), torch.rand(1, 16, 4), points * 8
    with pytest.raises(ValueError, match="gt_labels must have whole labels"):
        ty.TaskAlignedAssigner(num_classes=3)(*preds, *padded)
    with pytest.raises(ValueError, match="gt_labels must have whole labels"):
        ty.SimOTAAssigner(num_classes=3)(preds[0], preds[0][..., 0], *preds[1:], strides, *padded)
    with pytest.raises(ValueError, match="gt_labels must have whole labels"):
        ty.align_metric(*preds, *padded, alpha=1, beta=6)
    padding = torch.tensor([[False, True]])
    assert ty.Targets.from_padded(labels, boxes, padding).labels[1] == 1


@CRITERIA
def test_what_a_row_without_an_image_says_does_not_matter(small):
    criterion, *preds, shapes, rows = small()
    padding = rows.new_tensor([[-1, torch.nan, torch.inf, 0, 900, 1], [-7, 99, 0, 0, 0, 0]])
    with_padding = criterion(*preds, shapes, torch.cat([rows, padding]))
    assert torch.equal(with_padding.loss, criterion(*preds, shapes, rows).loss)


@CRITERIA
@pytest.mark.parametrize(("dtype", "below"), [(torch.float16, 2048), (torch.bfloat16, 256)])
def test_types_that_round_indices_are_refused(small, dtype, below):
    rows = small()[-1]
    criterion_type = ty.YOLO11Loss if small is small_yolo11 else ty.YOLOXLoss
    message = f"targets must be of a wider type than {dtype}, which rounds whole numbers from {below}"

    def call(batch_size: int, num_classes: int):
        channels = (4, num_classes) if small is small_yolo11 else (5 + num_classes,)
        preds = [torch.zeros(batch_size, 1, c, device=DEVICE) for c in channels]
        options = {"reg_max": 1} if small is small_yolo11 else {}
        return criterion_type(num_classes, strides=(8,), **options)(*preds, [(1, 1)], rows.to(dtype))

    call(below, 3)
    call(2, below)
    with pytest.raises(ValueError, match=message):
        call(below + 1, 3)
    with pytest.raises(ValueError, match=message):
        call(2, below + 1)


@ON_CPU
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 2049), (torch.bfloat16, 257)])
def test_indices_and_labels_that_a_type_rounds_raise(dtype, value):
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]]).to(dtype)
    for column in range(2):
        wrong = rows.clone()
        wrong[0, column] = value
        with pytest.raises(ValueError, match=f"rows of targets must have {WHAT[column]} below {value - 1}"):
            ty.Targets.from_yolo(wrong, 64)
    with pytest.raises(ValueError, match=f"labels must have labels below {value - 1}"):
        ty.Targets.from_padded(torch.tensor([[value]]).to(dtype), torch.tensor([[[2.0, 2, 9, 9]]]))


def test_float16_labels_of_many_classes_are_refused_by_assigners():
    points, _ = ty.make_anchors([(1, 1)], (8,), device=DEVICE)
    labels, boxes, mask = (torch.ones(1, 1, n, device=DEVICE) for n in (1, 4, 1))
    preds = torch.rand(1, 1, 2049, device=DEVICE), torch.rand(1, 1, 4, device=DEVICE), points * 8
    with pytest.raises(
        ValueError, match=r"gt_labels must be of a wider type than torch\.float16, which rounds whole numbers from 2048"
    ):
        ty.TaskAlignedAssigner(num_classes=2049)(*preds, labels.half(), boxes, mask)


@CRITERIA
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", NOT_WHOLE)
def test_rows_without_whole_numbers_are_nobodys_where_values_are_not_looked_at(small, column, value, monkeypatch):
    for operation in (_ops.unpack_rows, _ops.yolo11_criterion, _ops.yolox_criterion):
        monkeypatch.setattr(operation, "_check", None)  # as on a GPU
    criterion, *preds, shapes, rows = small()
    expected = criterion(*preds, shapes, rows[:0]).loss
    row = torch.tensor([[0, 1, 0.5, 0.5, 0.7, 0.6]], device=DEVICE)
    row[0, column] = value
    assert torch.equal(criterion(*preds, shapes, row).loss, expected)
    assert torch.equal(criterion(*preds, shapes, ty.Targets.from_yolo(row, 32)).loss, expected)


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
def test_a_list_in_either_format(box_format):
    """Centre (10, 20), 4 wide and 6 high: corners (8, 17) and (12, 23)."""
    xywh, xyxy = torch.tensor([[10.0, 20, 4, 6]]), torch.tensor([[8.0, 17, 12, 23]])
    boxes = xyxy if box_format == "xyxy" else xywh
    of_image = [{"boxes": boxes[:0], "labels": torch.tensor([])}, {"boxes": boxes, "labels": torch.tensor([2])}]
    targets = ty.Targets.from_list(of_image, box_format=box_format)
    assert (targets.image_index.tolist(), targets.labels.tolist()) == ([1], [2])
    assert torch.equal(targets.boxes_xyxy, xyxy)
    assert torch.equal(targets.boxes_xywh, xywh)


PIXELS = torch.tensor([[[8.0, 8, 24, 24], [0, 0, 9, 5]]])
BROKEN = torch.cat([PIXELS, PIXELS * torch.nan], 1)


@ON_CPU
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("boxes", lambda: ty.Targets.from_padded(torch.zeros(1, 2), PIXELS / 32)),
        ("boxes", lambda: ty.Targets.from_padded(torch.zeros(1, 2), PIXELS / 32, torch.ones(1, 2))),
        ("boxes", lambda: ty.Targets.from_padded(torch.zeros(1, 2), PIXELS / 32, torch.ones(1, 2), box_format="xywh")),
        ("boxes of targets", lambda: ty.Targets.from_list([{"boxes": PIXELS[0] / 32, "labels": torch.zeros(2)}])),
    ],
)
def test_normalised_boxes_are_noticed_where_pixels_are_expected(name, make):
    with pytest.warns(UserWarning, match=f"^{name} are at most .* px wide or away: they are in pixels here"):
        make()


@pytest.mark.parametrize("boxes", [PIXELS, PIXELS.new_zeros(1, 2, 4), -PIXELS, PIXELS[:, :0], PIXELS * torch.nan, BROKEN])
def test_other_boxes_are_not_noticed(boxes):
    ty.Targets.from_padded(torch.zeros(boxes.shape[:2]), boxes)
    ty.Targets.from_list([{"boxes": boxes[0], "labels": torch.zeros(boxes.shape[1])}])
    ty.Targets.from_padded(torch.zeros(1, 2), PIXELS / 32, torch.zeros(1, 2))  # padding


@ON_CPU
def test_warnings_point_at_the_line_of_the_caller():
    criterion, *preds, shapes, rows = small_yolo11()
    leaf = preds[0].clone().requires_grad_()
    pixels = rows * torch.tensor([1.0, 1, 320, 320, 320, 320])
    calls = [
        lambda: criterion(*preds, shapes, pixels),
        lambda: criterion(leaf, preds[1], shapes, pixels),  # through an autograd.Function
        lambda: criterion(leaf.half(), preds[1].half(), shapes, pixels),  # and through others
        lambda: ty.Targets.from_yolo(pixels, 640),
        lambda: ty.Targets.from_padded(torch.zeros(1, 2), PIXELS / 32),
        lambda: ty.Targets.from_list([{"boxes": PIXELS[0] / 32, "labels": torch.zeros(2)}]),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        first_line = inspect.getsourcelines(call)[1]
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, first_line)]


@pytest.mark.parametrize(
    "imgsz",
    [64, 64.0, torch.tensor(64), torch.tensor(64.0), (64, 64), [64.0, 64], torch.tensor([64, 64]), torch.Size([64, 64])],
)
def test_image_sizes_of_every_kind(imgsz):
    np = pytest.importorskip("numpy")
    rows = torch.tensor([[0, 1, 0.5, 0.25, 0.25, 0.125]], device=DEVICE)
    for size in (imgsz, np.int64(64), np.float32(64), np.array([64, 64])):
        assert ty.Targets.from_yolo(rows, size).boxes_xywh.tolist() == [[32.0, 16.0, 16.0, 8.0]]


def test_targets_move_to_another_device():
    targets = one_box()
    there = targets.to("meta")
    assert isinstance(there, ty.Targets)
    for before, after in zip(targets, there, strict=True):
        assert (after.device.type, after.dtype, after.shape) == ("meta", before.dtype, before.shape)
    back = targets.to("cpu").to(DEVICE)
    assert all(torch.equal(before, after) for before, after in zip(targets, back, strict=True))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"boxes": torch.ones(1, 4), "labels": torch.ones(1)},
            "targets must be a sequence of mappings, one an image, got dict",
        ),
        (torch.ones(1, 6), "targets must be a sequence of mappings, one an image, got Tensor"),
        (None, "targets must be a sequence of mappings, one an image, got NoneType"),
        ([(torch.ones(1, 4), torch.ones(1))], r"targets\[0\] must be a mapping, got tuple"),
    ],
)
def test_lists_of_anything_else_are_named(targets, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        ty.Targets.from_list(targets)


def test_images_one_after_the_other():
    image = {"boxes": torch.tensor([[2.0, 2, 9, 9]]), "labels": torch.tensor([1])}
    assert ty.Targets.from_list(image for _ in range(2)).image_index.tolist() == [0, 1]


@ON_CPU
def test_a_label_is_named_as_it_was():
    rows = torch.tensor([[0, 1e20, 0.5, 0.5, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"targets must have labels in 0...2, got \[100000002004087734272\]"):
        ty.YOLO11Loss(3, strides=(8,))(torch.zeros(1, 4, 64), torch.zeros(1, 4, 3), [(2, 2)], rows)


def test_sizes_to_validate_for_are_named():
    targets = ty.Targets.from_yolo(torch.tensor([[1, 2, 0.5, 0.5, 0.5, 0.5]]), 32)
    with pytest.raises(TypeError, match=r"batch_size must be a whole number, got 1\.5"):
        targets.validate(1.5, 3)
    with pytest.raises(TypeError, match="num_classes must be a whole number, got '3'"):
        targets.validate(2, "3")
