"""The criterion of YOLOX."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _levels, _ops
from .. import _signatures as signatures
from .._signatures import YOLOX, SimOTA, YOLOXAssign
from ..assigners import CANDIDATE_MODES
from ..targets import Targets
from ._criterion import Criterion, normaliser_of, rows_of, writable


class YOLOXLossOutput(NamedTuple):
    """What ``YOLOXLoss`` returns. Only ``loss`` has a gradient.

    Attributes:
        loss: (), iou + obj + cls + l1.
        iou: (), box term with its gain.
        obj: (), objectness term.
        cls: (), classification term.
        l1: (), L1 term, 0 while it is off.
        num_fg: (), positive anchors per ground truth on this process.
    """

    loss: Tensor
    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor
    num_fg: Tensor


class YOLOXLoss(Criterion):
    """The criterion of YOLOX: SimOTA assignment, IoU loss, BCE and, late in training, L1 (arXiv 2107.08430).

    Everything is computed in float32 whatever the type of the predictions, also under autocast (in float64 for float64).
    A prediction that takes part in the loss and is NaN or infinite makes the loss, its terms and every gradient NaN, and
    changes the assignment of no other image. What takes part: every objectness logit, and the box and class logits of matched
    anchors. Among those that compete for a box (see ``SimOTAAssigner``) one whose cost is NaN is the most expensive. A finite
    prediction never makes anything NaN, however large.

    Args:
        num_classes: number of classes C.
        strides: stride of every level in pixels, in the order in which the predictions are concatenated.
        candidates: ``"center"`` or ``"box_and_center"``, see ``SimOTAAssigner``.
        center_radius: half the side of the centre region, in strides.
        iou_loss: ``"iou"`` (1 - IoU^2) or ``"giou"`` (1 - GIoU).
        iou_gain: weight of the box term.
        use_l1: whether the L1 term is on. The attribute may be changed at any time, also of a compiled criterion.
            On an accelerator move the criterion there (``.to(device)``), or the switch is written there at every step.
        process_group: see ``YOLO11Loss``.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> criterion = ty.YOLOXLoss(num_classes=3, strides=(8,))
        >>> preds = torch.zeros(2, 16, 5 + 3, requires_grad=True)
        >>> out = criterion(preds, [(4, 4)], torch.tensor([[0, 2, 0.5, 0.5, 0.6, 0.4]]))  # image, class, cx, cy, w, h
        >>> out.loss.backward()
        >>> criterion.use_l1 = True  # for the last epochs
    """

    _l1_gain: Tensor
    _made_with = frozenset({"candidates", "center_radius"})

    def __init__(
        self,
        num_classes: int,
        *,
        strides: Sequence[float] = (8, 16, 32),
        candidates: str = "center",
        center_radius: float = 1.5,
        iou_loss: str = "iou",
        iou_gain: float = 5.0,
        use_l1: bool = False,
        process_group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__(process_group)
        self.num_classes, self.strides = _checks.whole("num_classes", num_classes), _checks.reals("strides", strides)
        radius = _checks.real("center_radius", center_radius, is_positive=True)
        self.assigner = SimOTA(_checks.one_of("candidates", candidates, CANDIDATE_MODES), radius)
        self.iou_loss = _checks.one_of("iou_loss", iou_loss, ("iou", "giou"))
        self.iou_gain = _checks.real("iou_gain", iou_gain)
        self.register_buffer("_l1_gain", torch.zeros((), dtype=torch.float32), persistent=False)
        self.use_l1 = use_l1

    @property
    def use_l1(self) -> bool:
        return self._use_l1

    @use_l1.setter
    def use_l1(self, value: bool) -> None:
        # A buffer as well: what reads a number of its own is compiled, or captured in a CUDA graph, for that number.
        self._use_l1 = _checks.boolean("use_l1", value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._l1_gain = writable(self._l1_gain)
        self._l1_gain.fill_(float(self._use_l1))

    def forward(self, preds: Tensor, feat_shapes: Sequence[Sequence[int]], targets: Tensor | Targets) -> YOLOXLossOutput:
        """Assign the targets and compute the loss.

        Args:
            preds: (B, A, 5 + C) raw (dx, dy, log w, log h, objectness logit, class logits), any strides.
            feat_shapes: (height, width) of every level in cells.
            targets: (N, 6) rows of (image index, class, cx, cy, w, h), boxes normalised to 0-1 of the image, whose size is
                that of the first level times its stride; or ``Targets``, in pixels.

        Raises:
            ValueError: sizes or devices do not agree; on the CPU also for an image index or a label out of range (elsewhere
                such a row is ignored).
            TypeError: predictions or rows are not float tensors.
        """
        levels = _levels.of_head({"preds": preds}, (5 + self.num_classes,), feat_shapes, self.strides)
        rows = rows_of(targets, preds, 5)
        l1_gain: Any = self._buffers["_l1_gain"]  # a module looks for its attribute in three places first
        if l1_gain.device != preds.device:
            l1_gain = torch.full((), float(self._use_l1), dtype=torch.float32, device=preds.device)
        options = levels, self.iou_loss, self.iou_gain
        wants_grad = torch.is_grad_enabled() and preds.requires_grad
        if self._ranks.given is None and not (preds.dtype == torch.float16 and wants_grad):
            x = YOLOX(preds, rows, l1_gain, levels, self.assigner, self.iou_loss, self.iou_gain, wants_grad)
            out = _ops.yolox_criterion(x)
            return YOLOXLossOutput(*out[:6])
        with torch.no_grad():
            row, iou, counts, labels, boxes = _ops.yolox_assign(YOLOXAssign(preds, rows, levels, self.assigner))
            num_fg, num_gt, is_broken = counts.to(iou.dtype).unbind()
            normaliser = normaliser_of(num_fg.masked_fill(is_broken > 0, torch.nan), self._ranks)
        given = signatures.YOLOXLoss(preds, row, iou, normaliser, labels, boxes, l1_gain, *options)
        return YOLOXLossOutput(*_ops.yolox_loss(given), num_fg / num_gt.clamp(min=1))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, strides={self.strides}, candidates={self.assigner.candidates!r}"
