"""Criteria of other projects as black boxes, for the tests and the benchmarks: loaders and the layouts they take."""

import importlib
import importlib.metadata
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SETTINGS = os.path.join(tempfile.gettempdir(), f"triton-yolo-peers-{os.getuid()}")


def is_installed(name: str) -> bool:
    return find_spec(name) is not None


def ultralytics_model(config: str, num_classes: int) -> nn.Module:
    """Build a detector with random weights, e.g. of ``"yolo11n.yaml"``; its ``init_criterion()`` is the peer."""
    with contained():
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel, OBBModel, SegmentationModel

        kinds = {"obb": OBBModel, "seg": SegmentationModel}
        task = config.partition("-")[2].partition(".")[0]
        model = kinds.get(task, DetectionModel)(config, ch=3, nc=num_classes, verbose=False)
    model.args = get_cfg()
    return model.train()


def ultralytics_pose_model(config: str, num_classes: int, num_keypoints: int = 17, num_dims: int = 3) -> nn.Module:
    """The same with keypoints, e.g. of ``"yolo11n-pose.yaml"``."""
    with contained():
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import PoseModel

        shape = (num_keypoints, num_dims)
        model = PoseModel(config, ch=3, nc=num_classes, data_kpt_shape=shape, verbose=False)
    model.args = get_cfg()
    return model.train()


def ultralytics_assigner(num_classes: int, *, topk: int, alpha: float, beta: float) -> nn.Module:
    """The assigner of the detection criterion, which widens boxes to its second stride, 16 px."""
    with contained():
        from ultralytics.utils.tal import TaskAlignedAssigner

        return TaskAlignedAssigner(topk=topk, num_classes=num_classes, alpha=alpha, beta=beta)


def ultralytics_oriented() -> tuple[Any, Any, type[nn.Module]]:
    """ProbIoU of boxes one by one and of all pairs, and the assigner of oriented boxes."""
    with contained():
        from ultralytics.utils.metrics import batch_probiou, probiou
        from ultralytics.utils.tal import RotatedTaskAlignedAssigner

        return probiou, batch_probiou, RotatedTaskAlignedAssigner


def ultralytics_keypoint_loss() -> type[nn.Module]:
    """The loss of keypoints alone, made of their sigmas."""
    with contained():
        from ultralytics.utils.loss import KeypointLoss

        return KeypointLoss


def ultralytics_preds(
    pred_dist: Tensor, pred_scores: Tensor, feat_shapes: Sequence[tuple[int, int]], **more: Tensor
) -> dict[str, Any]:
    """What the criterion takes as predictions, from (B, 4R, A) and (B, C, A); of oriented boxes also ``angle`` (B, 1, A), of
    keypoints ``kpts`` (B, K * D, A).
    """
    features = [pred_dist.new_empty(len(pred_dist), 1, *shape) for shape in feat_shapes]
    return {"boxes": pred_dist, "scores": pred_scores, "feats": features, **more}


def ultralytics_batch(rows: Tensor) -> dict[str, Tensor]:
    """What the criterion takes as targets, from YOLO rows (N, 6), or (N, 7) with an angle."""
    return {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}


def yolox_head(num_classes: int, strides: Sequence[int], *, iou_loss: str = "iou", use_l1: bool = False) -> nn.Module:
    """Build the head whose ``get_losses`` is the peer. Its layers are not used."""
    with contained():
        (head_of,) = yolox_models("YoloxHead")
        head = head_of(num_classes, width=0.125, strides=list(strides))
    head.iou_loss.loss_type = iou_loss
    head.use_l1 = use_l1
    return head


def libreyolo_yolox_head(num_classes: int, strides: Sequence[int]) -> nn.Module:
    """LibreYOLO's counterpart of ``yolox_head``."""
    with contained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from libreyolo.models.yolox.nn import YOLOXHead

        return YOLOXHead(num_classes, width=0.125, strides=list(strides))


def libreyolo_yolo9_criterion(num_classes: int, reg_max: int, strides: Sequence[int], imgsz: int, device: torch.device) -> Any:
    """LibreYOLO's YOLOv9 criterion, of maps (B, 4R + C, H, W) and padded targets (B, G, 5)."""
    with contained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from libreyolo.models.yolo9.loss import YOLO9Loss

        return YOLO9Loss(num_classes, reg_max, list(strides), [imgsz, imgsz], device)


def libreyolo_maps(pred_dist: Tensor, pred_scores: Tensor, feat_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """What that criterion takes as predictions, from (B, 4R, A) and (B, C, A)."""
    levels = torch.cat([pred_dist, pred_scores], 1).split([height * width for height, width in feat_shapes], 2)
    return [level.unflatten(2, shape) for level, shape in zip(levels, feat_shapes, strict=True)]


def libreyolo_targets(rows: Tensor, batch_size: int) -> Tensor:
    """Padded class and corners (B, G, 5), 0-1 of the image, from YOLO rows (N, 6)."""
    per_image = [rows[rows[:, 0] == image, 1:] for image in range(batch_size)]
    label, centre, size = nn.utils.rnn.pad_sequence(per_image, batch_first=True).split([1, 2, 2], 2)
    return torch.cat([label, centre - size / 2, centre + size / 2], 2)


def yolox_models(*names: str) -> list[type]:
    """Classes of the fork by their names, or Megvii's."""
    from yolox import models

    megvii = {"YoloPafpn": "YOLOPAFPN", "YoloxHead": "YOLOXHead", "YoloxModule": "YOLOX"}
    return [getattr(models, name if hasattr(models, name) else megvii[name]) for name in names]


def yolox_losses(head: nn.Module, preds: Tensor, feat_shapes: Sequence[tuple[int, int]], labels: Tensor) -> tuple[Any, ...]:
    """Decode raw (B, A, 5 + C) as the head does and take its losses: loss, iou, obj, cls, l1, positives per box.

    ``labels`` (B, G, 5) are (class, cx, cy, w, h) in pixels, rows of zeros behind the last box.
    """
    grids, strides = [], []
    for (height, width), stride in zip(feat_shapes, head.strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grids.append(torch.stack([x, y], -1).reshape(1, -1, 2).to(preds))
        strides.append(preds.new_full((1, height * width), float(stride)))
    stride = torch.cat(strides, 1)[..., None]
    decoded = torch.cat([(preds[..., :2] + torch.cat(grids, 1)) * stride, preds[..., 2:4].exp() * stride, preds[..., 4:]], -1)
    raw_boxes = list(preds[..., :4].split([s.shape[1] for s in strides], 1)) if head.use_l1 else []
    x, y = ([grid[..., axis] for grid in grids] for axis in (0, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch.cuda.amp.autocast\(args...\)` is deprecated", FutureWarning)
        losses = head.get_losses(None, x, y, strides, labels, decoded, raw_boxes, preds.dtype)
    return tuple(losses.values()) if isinstance(losses, dict) else losses


def yolox_labels(rows: Tensor, batch_size: int, imgsz: tuple[int, int]) -> Tensor:
    """Padded labels (B, G, 5) in pixels from YOLO rows (N, 6)."""
    height, width = imgsz
    per_image = [rows[rows[:, 0] == image, 1:] for image in range(batch_size)]
    labels = nn.utils.rnn.pad_sequence(per_image, batch_first=True)
    return labels * labels.new_tensor([1, width, height, width, height])


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (n, 4) that no better one overlaps by more, best first."""
    order = scores.argsort(descending=True, stable=True)
    low, high = boxes[order].split(2, 1)
    area = (high - low).prod(1)
    intersection = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0).prod(2)
    overlaps = intersection > iou_threshold * (area[:, None] + area - intersection)
    is_kept = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if is_kept[i]:
            is_kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[is_kept]


@contextmanager
def contained() -> Iterator[None]:
    """Keep a peer's import from the user's settings, the network, the environment (it sets OMP_NUM_THREADS) and torchvision."""
    os.makedirs(_SETTINGS, exist_ok=True)
    os.environ.update(YOLO_CONFIG_DIR=_SETTINGS, YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
    environment = dict(os.environ)
    is_stub = "torchvision" not in sys.modules
    if is_stub:
        sys.meta_path.insert(0, _TorchvisionStub)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if is_stub:
            sys.meta_path.remove(_TorchvisionStub)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _TorchvisionStub(MetaPathFinder, Loader):
    """Stands in for a module that the peers import: their losses call nothing of it, their validation ``nms``."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, cls(), is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = importlib.metadata.version("torchvision")
        if module.__name__ == "torchvision":
            importlib.import_module("torchvision.ops")  # which the peers do not import by its name
        elif module.__name__ == "torchvision.ops":
            module.nms = nms
