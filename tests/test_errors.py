"""Bad input is named, with what it was and what it must be."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import triton_yolo as ty
from tests.conftest import DEVICE
from tests.test_losses import small_yolo11, small_yolox
from triton_yolo import _backend, _levels

ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on the CPU only: elsewhere it would synchronise")


def yolo11_call(**changes):
    criterion, dist, scores, shapes, rows = small_yolo11()
    args = dict(pred_dist=dist, pred_scores=scores, feat_shapes=shapes, targets=rows)
    return lambda: criterion(**{**args, **changes})


def rows_with(column: int, value: float) -> torch.Tensor:
    rows = small_yolo11()[-1].clone()
    rows[0, column] = value
    return rows


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pred_dist": torch.zeros(2, 20, 30)}, ValueError, r"pred_dist must have shape \(B, A, 32\), got \(2, 20, 30\)"),
        ({"pred_dist": torch.zeros(20, 32)}, ValueError, r"pred_dist must have shape \(B, A, 32\), got \(20, 32\)"),
        ({"pred_dist": torch.zeros(2, 20, 32).int()}, TypeError, "pred_dist must be float16, .* got torch.int32"),
        ({"pred_dist": [1.0]}, TypeError, "pred_dist must be a tensor, got list"),
        ({"pred_scores": torch.zeros(2, 20, 4)}, ValueError, r"pred_scores must have shape \(2, 20, 3\), got \(2, 20, 4\)"),
        ({"pred_scores": torch.zeros(2, 20, 3).long()}, TypeError, "pred_scores must be float16"),
        ({"pred_scores": torch.zeros(2, 20, 3, device="meta")}, ValueError, "pred_scores must be on .*, got meta"),
        ({"feat_shapes": [(4, 4)]}, ValueError, r"feat_shapes must have one .* for each of the 2 strides, got \[\(4, 4\)\]"),
        ({"feat_shapes": [(4, 4), (2, 3)]}, ValueError, r"feat_shapes must .*anchors \(20\), not 22, got"),
        ({"feat_shapes": [(4, 5), (0, 2)]}, ValueError, r"feat_shapes must hold positive \(h, w\), got \[\(4, 5\), \(0"),
        ({"targets": torch.zeros(3, 5)}, ValueError, r"targets must have shape \(N, 6\), got \(3, 5\)"),
        ({"targets": torch.zeros(3, 6).int()}, TypeError, "targets must be float16"),
        ({"targets": []}, TypeError, r"targets must be an \(N, 6\) tensor or triton_yolo.Targets, .* got list"),
        ({"targets": torch.zeros(3, 6, device="meta")}, ValueError, "targets must be on .*, got meta"),
        pytest.param({"targets": rows_with(0, 2.0)}, ValueError, "image indices below .* 2, got 2", marks=ON_CPU),
        pytest.param({"targets": rows_with(1, 3.0)}, ValueError, r"labels in 0\.\.\.2, got \[3\]", marks=ON_CPU),
        pytest.param({"targets": rows_with(1, -1.0)}, ValueError, r"labels in 0\.\.\.2, got \[-1\]", marks=ON_CPU),
    ],
)  # fmt: skip
def test_yolo11_loss_names_what_is_wrong(changes, error, message):
    changes = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in changes.items()}
    yolo11_call()()  # what passed once is not looked at again; this is not that
    with pytest.raises(error, match=message):
        yolo11_call(**changes)()


@ON_CPU
def test_sizes_that_equal_known_ones_are_not_taken_for_them():
    """Their type may be wrong, and those in a tensor may change."""
    yolo11_call(feat_shapes=[(4, 4), (2, 2)])()
    with pytest.raises(ValueError, match="feat_shapes must hold whole"):
        yolo11_call(feat_shapes=[(4.0, 4.0), (2.0, 2.0)])()
    sizes = torch.tensor([[4, 4], [2, 2]])
    yolo11_call(feat_shapes=list(sizes))()
    sizes[1] = 3
    with pytest.raises(ValueError, match=r"feat_shapes must .* \(20\), not 25"):
        yolo11_call(feat_shapes=list(sizes))()


def test_sides_may_come_from_an_iterator_that_gives_them_once(monkeypatch):
    monkeypatch.setattr(_levels, "_known", {})
    expected = yolo11_call()().loss
    for _ in range(2):
        assert torch.equal(yolo11_call(feat_shapes=[map(int, "44"), iter((2, 2))])().loss, expected)
        _levels._known.clear()


def test_as_many_kinds_of_input_as_there_are(monkeypatch):
    monkeypatch.setattr(_levels, "_known", {})
    for side in range(1, _levels._MAX_KNOWN + 50):
        assert _levels.of_head({"x": torch.empty(1, side, 2)}, (2,), [(1, side)], (8.0,)).feat_shapes == (1, side)
    assert 0 < len(_levels._known) <= _levels._MAX_KNOWN


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ty.YOLO11Loss(0), "num_classes must be at least 1, got 0"),
        (lambda: ty.YOLO11Loss(3, reg_max=0), "reg_max must be at least 1, got 0"),
        (lambda: ty.YOLO11Loss(3, topk=0), "topk must be at least 1, got 0"),
        (lambda: ty.YOLO11Loss(3, topk2=0), "topk2 must be at least 1, got 0"),
        (lambda: ty.YOLO11Loss(3, class_weights=torch.ones(2)), r"class_weights must have shape \(3,\), got \(2,\)"),
        (lambda: ty.YOLOXLoss(0), "num_classes must be at least 1"),
        (lambda: ty.YOLOXLoss(3, candidates="box"), "candidates must be one of 'center', 'box_and_center', got 'box'"),
        (lambda: ty.YOLOXLoss(3, iou_loss="ciou"), "iou_loss must be one of 'iou', 'giou', got 'ciou'"),
        (lambda: ty.YOLOXLoss(3, center_radius=0), "center_radius must be finite and positive, got 0"),
        (lambda: ty.SimOTAAssigner(candidates="all"), "candidates must be one of"),
        (lambda: ty.SimOTAAssigner(num_classes=0), "num_classes must be at least 1"),
        (lambda: ty.SimOTAAssigner(center_radius=-1), "center_radius must be finite and positive"),
        (lambda: ty.TaskAlignedAssigner(topk=0), "topk must be at least 1"),
        (lambda: ty.TaskAlignedAssigner(num_classes=0), "num_classes must be at least 1"),
        (lambda: ty.make_anchors([], []), "strides must have one number a level"),
        (lambda: ty.make_anchors([(4, 4)], (0,)), "strides must be finite and positive, got 0"),
        (lambda: ty.YOLOXLoss(3, strides=[1e39]), r"strides must be finite in float32 and positive, got 1e\+39"),
        (lambda: ty.make_anchors([(4, 4, 4)], (8,)), r"feat_shapes must hold positive \(h, w\)"),
        (lambda: ty.decode_dfl(torch.zeros(1, 2, 8), torch.zeros(2, 2), reg_max=0), "reg_max must be at least 1"),
        (lambda: ty.decode_dfl(torch.zeros(1, 2, 8), torch.zeros(3, 2), reg_max=2), "anchor_points must have shape"),
        (lambda: ty.decode_dfl(torch.zeros(1, 2, 8), torch.zeros(2, 2), reg_max=2, strides=torch.zeros(3)), "strides must"),
        (lambda: ty.decode_yolox(torch.zeros(1, 2, 3), torch.zeros(2, 2), torch.zeros(2)), "preds must have at least 4"),
        (lambda: ty.bbox_iou(torch.zeros(4), torch.zeros(4), kind="cIoU"), "kind must be one of 'iou', .* got 'cIoU'"),
        (lambda: ty.bbox_iou(torch.zeros(2, 4), torch.zeros(3, 4)), r"b must broadcast with a of shape \(2, 4\), got \(3, 4\)"),
        (lambda: ty.bbox_iou(torch.zeros(2, 5), torch.zeros(2, 4)), "a must have shape"),
        (lambda: ty.RotatedTaskAlignedAssigner(topk=0), "topk must be at least 1"),
        (lambda: ty.prob_iou(torch.zeros(2, 4), torch.zeros(2, 4)), "a must have shape"),
        (lambda: ty.prob_iou(torch.zeros(2, 5), torch.zeros(3, 5)), r"b must broadcast with a of shape \(2, 5\), got \(3, 5\)"),
        (lambda: ty.select_topk_candidates(torch.zeros(1, 2, 3), 0), "topk must be at least 1"),
        (lambda: ty.select_topk_candidates(torch.zeros(1, 2, 3), 1, torch.ones(1, 3)), "mask_gt must have shape"),
        (lambda: ty.Targets.from_yolo(torch.zeros(1, 6), (1, 2, 3)), r"imgsz must be \(height, width\)"),
        (lambda: ty.Targets.from_list([]), "targets must have one mapping an image"),
        (lambda: ty.Targets.from_list([{"boxes": torch.zeros(1, 4)}]), r"targets\[0\] must have the keys"),
        (
            lambda: ty.Targets.from_list([{"boxes": torch.zeros(1, 4), "labels": torch.zeros(2)}]),
            r"targets\[0\]\['labels'\] must have shape \(1,\), got \(2,\)",
        ),
        (lambda: ty.Targets.from_padded(torch.zeros(1, 2), torch.zeros(1, 2, 4), box_format="cxcywh"), "box_format must be"),
        (lambda: ty.Targets.from_list([{}], box_format="cxcywh"), "box_format must be"),
        (lambda: ty.Targets.from_padded(torch.zeros(1, 3), torch.zeros(1, 2, 4)), "labels must have shape"),
        (lambda: ty.Targets.from_padded(torch.zeros(1, 2), torch.zeros(1, 2, 4), torch.zeros(2)), "mask must have shape"),
        (lambda: ty.Targets.from_yolo(torch.tensor([[5.0, 0, 0, 0, 1, 1]]), 64).validate(2, 3), "image indices below"),
        (lambda: ty.backend("cuda"), "name must be one of 'auto', 'triton', 'eager', got 'cuda'"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("criterion", [ty.YOLO11Loss, ty.YOLOXLoss])
def test_one_stride_is_no_sequence(criterion):
    with pytest.raises(TypeError, match="strides must be a sequence, got 8"):
        criterion(3, strides=8)


def test_yolox_loss_names_what_is_wrong():
    criterion, preds, shapes, rows = small_yolox()
    with pytest.raises(ValueError, match=r"preds must have shape \(B, A, 8\), got \(2, 20, 7\)"):
        criterion(preds[..., :7], shapes, rows)
    with pytest.raises(TypeError, match="preds must be float16"):
        criterion(preds.int(), shapes, rows)
    with pytest.raises(ValueError, match="feat_shapes must"):
        criterion(preds, [(4, 4), (2, 1)], rows)


def test_assigners_name_what_is_wrong():
    zeros = lambda *shape: torch.zeros(*shape, device=DEVICE)  # noqa: E731
    gt = (zeros(2, 4, 1), zeros(2, 4, 4), zeros(2, 4, 1))
    assigner = ty.TaskAlignedAssigner(num_classes=3)
    with pytest.raises(ValueError, match=r"pd_scores must have shape \(B, A, 3\), got \(2, 20, 2\)"):
        assigner(zeros(2, 20, 2), zeros(2, 20, 4), zeros(20, 2), *gt)
    with pytest.raises(ValueError, match=r"pd_bboxes must have shape \(2, 20, 4\)"):
        assigner(zeros(2, 20, 3), zeros(2, 19, 4), zeros(20, 2), *gt)
    with pytest.raises(ValueError, match=r"anc_points must have shape \(20, 2\)"):
        assigner(zeros(2, 20, 3), zeros(2, 20, 4), zeros(20, 3), *gt)
    with pytest.raises(ValueError, match=r"gt_labels must have shape \(2, 4, 1\), got \(2, 4, 2\)"):
        assigner(zeros(2, 20, 3), zeros(2, 20, 4), zeros(20, 2), zeros(2, 4, 2), *gt[1:])
    rotated = ty.RotatedTaskAlignedAssigner(num_classes=3)
    with pytest.raises(ValueError, match=r"pd_bboxes must have shape \(2, 20, 5\)"):
        rotated(zeros(2, 20, 3), zeros(2, 20, 4), zeros(20, 2), *gt)
    with pytest.raises(ValueError, match=r"gt_bboxes must have shape \(2, G, 5\)"):
        rotated(zeros(2, 20, 3), zeros(2, 20, 5), zeros(20, 2), *gt)
    simota = ty.SimOTAAssigner(num_classes=3)
    with pytest.raises(ValueError, match=r"strides must have shape \(20,\)"):
        simota(zeros(2, 20, 3), zeros(2, 20), zeros(2, 20, 4), zeros(20, 2), zeros(19), *gt)
    with pytest.raises(ValueError, match=r"obj_logits must have shape \(2, 20\)"):
        simota(zeros(2, 20, 3), zeros(2, 19), zeros(2, 20, 4), zeros(20, 2), zeros(20), *gt)


def test_environment_variable_is_checked():
    run = subprocess.run(
        [sys.executable, "-c", "import triton_yolo"],
        env={**os.environ, "TRITON_YOLO_BACKEND": "fast"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "TRITON_YOLO_BACKEND must be one of 'auto', 'triton', 'eager', got 'fast'" in run.stderr


def test_backend_is_chosen_from_now_on_or_for_a_block():
    metric = torch.zeros(1, 1, 2, device=DEVICE)
    run = functools.partial(_backend.implementation, metric.device)
    from triton_yolo import eager

    before = _backend.current()
    try:
        ty.backend("eager")
        assert run() is eager
        choice = ty.backend("auto")
        with choice, ty.backend("eager"):
            assert run() is eager
        assert _backend.current() == "eager"
        with pytest.raises(KeyError), ty.backend("auto"):
            raise KeyError
        assert _backend.current() == "eager"
    finally:
        ty.backend(before)


def test_boxes_in_pixels_are_noticed_in_normalised_rows():
    rows = small_yolox()[-1].cpu()
    pixels = rows * torch.tensor([1.0, 1, 320, 320, 320, 320])
    with pytest.warns(UserWarning, match="rows of targets have boxes up to .* rows are normalised to 0-1"):
        ty.Targets.from_yolo(pixels, 640)
    padding = torch.tensor([[-1.0, 0, 300, 300, 300, 300]]).expand(len(rows) + 2, 6)
    ty.Targets.from_yolo(torch.cat([rows, padding]), 640)
