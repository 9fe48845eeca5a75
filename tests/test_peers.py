"""The same loss and gradients as other projects' criteria, run as black boxes.

The inputs keep clear of what a peer leaves to chance: equal metrics, and sides of boxes that run through an anchor point.
YOLOX's float32 result is itself up to 1.5e-5 off where boxes are narrow, so the standard is its result in float64.
Ultralytics' computes in float32 only.
"""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import triton_yolo as ty
from bench import peers
from bench.cases import STRIDES, Case, has_coco, make_case, yolo11_preds, yolox_preds
from tests.compare import assert_close
from tests.tools.voc import read_boxes

pytestmark = pytest.mark.peers
DATA = Path(os.environ["TRITON_YOLO_DATA"]) if "TRITON_YOLO_DATA" in os.environ else None
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
IMAGES = 4
OFF_GRID = 0.1  # pixels: the annotations are whole numbers, and so are the anchor points


@pytest.fixture(autouse=True, scope="module")
def _installed():
    for name in ("ultralytics", "yolox"):
        if not peers.is_installed(name):
            pytest.skip(f"{name} is not installed; `make peers` installs it")


@pytest.fixture(params=["coco", "lognormal"])
def case(request):
    if request.param == "coco" and not has_coco(DATA):
        pytest.skip("COCO box sizes: TRITON_YOLO_DATA names no folder with coco_boxes.json")
    return make_case(request.param, batch_size=IMAGES, imgsz=320, num_classes=80, data=DATA)


def without_image(case: Case, image: int | None) -> Case:
    """Drop the boxes of an image, or of all."""
    return case._replace(rows=case.rows[:0] if image is None else case.rows[case.rows[:, 0] != image])


def noise_like(preds: Sequence[Tensor]) -> list[Tensor]:
    """What an untrained network puts out."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator) * 0.5 - (x.shape[1] == 80) * 4 for x in preds]


@functools.cache
def criterion_of(config: str) -> Callable:
    return peers.ultralytics_model(config, 80).init_criterion()


def gradients(loss: Tensor, preds: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, preds, allow_unused=True, materialize_grads=True))


def compare_yolo11(
    criterion: Callable, loss: ty.YOLO11Loss, preds: Sequence[Tensor], feat_shapes: Sequence[tuple[int, int]], rows: Tensor
) -> None:
    preds = [x.detach().requires_grad_() for x in preds]
    expected, items = criterion(peers.ultralytics_preds(*preds, feat_shapes), peers.ultralytics_batch(rows))
    output = loss(*(x.transpose(1, 2) for x in preds), feat_shapes, rows)
    assert_close(output.loss, expected.sum(), "loss")
    for name, actual, item in zip(("box", "cls", "dfl"), output[1:4], items.values(), strict=True):
        assert_close(actual, item, name)
    expected_grads = gradients(expected.sum(), preds)
    for name, actual, grad in zip(("boxes", "classes"), gradients(output.loss, preds), expected_grads, strict=True):
        assert_close(actual, grad, f"gradient of {name}")
    if len(rows):
        assert output.num_fg > 0


def yolo11_loss(num_classes: int, **options) -> ty.YOLO11Loss:
    return ty.YOLO11Loss(num_classes, strides=STRIDES, min_box_side=STRIDES[1], **options)


@pytest.mark.parametrize("is_learnt", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_yolo11(case, is_learnt, weighted):
    preds = yolo11_preds(case)
    preds = preds if is_learnt else noise_like(preds)
    criterion = copy.copy(criterion_of("yolo11n.yaml"))
    weights = torch.linspace(0.5, 2, case.num_classes) if weighted else None
    criterion.class_weights = weights
    compare_yolo11(criterion, yolo11_loss(80, class_weights=weights), preds, case.feat_shapes, case.rows)


@pytest.mark.parametrize("image", [0, IMAGES - 1, None])
def test_yolo11_without_boxes(case, image):
    preds, case = yolo11_preds(case), without_image(case, image)
    compare_yolo11(criterion_of("yolo11n.yaml"), yolo11_loss(80), preds, case.feat_shapes, case.rows)


YOLO26_BRANCHES = {"one2many": {"topk": 10}, "one2one": {"topk": 7, "topk2": 1}}


@pytest.mark.parametrize("branch", YOLO26_BRANCHES)
@pytest.mark.parametrize("is_learnt", [True, False])
def test_yolo26(case, branch, is_learnt):
    preds = yolo11_preds(case._replace(reg_max=1))
    preds = preds if is_learnt else noise_like(preds)
    criterion = getattr(criterion_of("yolo26n.yaml"), branch)
    loss = yolo11_loss(80, reg_max=1, **YOLO26_BRANCHES[branch])
    compare_yolo11(criterion, loss, preds, case.feat_shapes, case.rows)


@pytest.mark.parametrize("image", [0, None])
@pytest.mark.parametrize("branch", YOLO26_BRANCHES)
def test_yolo26_without_boxes(case, branch, image):
    preds, case = yolo11_preds(case._replace(reg_max=1)), without_image(case, image)
    criterion = getattr(criterion_of("yolo26n.yaml"), branch)
    loss = yolo11_loss(80, reg_max=1, **YOLO26_BRANCHES[branch])
    compare_yolo11(criterion, loss, preds, case.feat_shapes, case.rows)


@pytest.fixture(params=[0, 1, 2])
def bccd(request) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 256, 320) of blood cells and their YOLO rows."""
    if DATA is None or not (DATA / "bccd").is_dir():
        pytest.skip("blood cells: TRITON_YOLO_DATA names no folder with bccd/")
    cv2 = pytest.importorskip("cv2")
    names = (DATA / "bccd/ImageSets/Main/val.txt").read_text().split()[request.param * IMAGES :][:IMAGES]
    images, rows = [], []
    for index, name in enumerate(names):
        pixels = cv2.imread(str(DATA / f"bccd/JPEGImages/{name}.jpg"))
        images.append(torch.from_numpy(cv2.resize(pixels, (320, 256))).permute(2, 0, 1) / 255)
        for label, x, y, width, height in read_boxes(DATA / f"bccd/Annotations/{name}.xml", BCCD_CLASSES):
            rows.append([index, label, x + OFF_GRID / 320, y + OFF_GRID / 320, width, height])
    return torch.stack(images), torch.tensor(rows)


def test_yolo11_network_on_bccd(bccd):
    images, rows = bccd
    torch.manual_seed(0)
    network = peers.ultralytics_model("yolo11n.yaml", len(BCCD_CLASSES))
    output = network(images)
    shapes = [tuple(x.shape[2:]) for x in output["feats"]]
    loss = yolo11_loss(len(BCCD_CLASSES))
    compare_yolo11(network.init_criterion(), loss, (output["boxes"], output["scores"]), shapes, rows)


def test_yolo26_network_on_bccd(bccd):
    """Both branches with the weights that the peer gives them."""
    images, rows = bccd
    torch.manual_seed(0)
    network = peers.ultralytics_model("yolo26n.yaml", len(BCCD_CLASSES))
    criterion, output = network.init_criterion(), network(images)
    shapes = [tuple(x.shape[2:]) for x in output["one2many"]["feats"]]
    total = 0.0
    for branch, weight in (("one2many", criterion.o2m), ("one2one", criterion.o2o)):
        loss = yolo11_loss(len(BCCD_CLASSES), reg_max=1, **YOLO26_BRANCHES[branch])
        preds = output[branch]["boxes"], output[branch]["scores"]
        compare_yolo11(getattr(criterion, branch), loss, preds, shapes, rows)
        total += weight * loss(*(x.transpose(1, 2) for x in preds), shapes, rows).loss
    assert_close(total, criterion(output, peers.ultralytics_batch(rows))[0].sum(), "loss of both branches")


def compare_yolox(case: Case, preds: Tensor, iou_loss: str, use_l1: bool) -> None:
    exact = preds.detach().double().requires_grad_()
    labels = peers.yolox_labels(case.rows, case.batch_size, (case.imgsz, case.imgsz)).double()
    head = peers.yolox_head(case.num_classes, STRIDES, iou_loss=iou_loss, use_l1=use_l1)
    expected = peers.yolox_losses(head, exact, case.feat_shapes, labels)
    (expected_grad,) = gradients(expected[0], [exact])
    loss = ty.YOLOXLoss(case.num_classes, strides=STRIDES, iou_loss=iou_loss, use_l1=use_l1)
    for dtype in (torch.float64, torch.float32):
        preds = preds.detach().to(dtype).requires_grad_()
        targets = ty.Targets.from_padded(labels[..., 0], labels[..., 1:].to(dtype), box_format="xywh")
        output = loss(preds, case.feat_shapes, targets)
        # Without a box the peer reports one positive, its normaliser.
        names = output._fields if len(case.rows) else output._fields[:-1]
        for name, value in zip(names, expected, strict=False):
            actual = getattr(output, name)
            assert_close(actual, torch.as_tensor(value, dtype=torch.float64), f"{dtype} {name}")
        (grad,) = gradients(output.loss, [preds])
        for name, part in (("boxes", slice(4)), ("objectness", slice(4, 5)), ("classes", slice(5, None))):
            assert_close(grad[..., part], expected_grad[..., part], f"{dtype} gradient of {name}")


@pytest.mark.parametrize("use_l1", [False, True])
@pytest.mark.parametrize("iou_loss", ["iou", "giou"])
@pytest.mark.parametrize("is_learnt", [True, False])
def test_yolox(case, is_learnt, iou_loss, use_l1):
    preds = yolox_preds(case)
    preds = preds if is_learnt else torch.cat([*noise_like([preds[..., :4]]), *noise_like([preds[..., 4:]])], -1)
    compare_yolox(case, preds, iou_loss, use_l1)


@pytest.mark.parametrize("use_l1", [False, True])
@pytest.mark.parametrize("image", [0, None])
def test_yolox_without_boxes(case, image, use_l1):
    compare_yolox(without_image(case, image), yolox_preds(case), "iou", use_l1)
