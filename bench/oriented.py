"""The criterion of oriented boxes, each implementation on the head's own layout."""

from collections.abc import Callable
from functools import partial

import reference

from . import peers
from .cases import STRIDES, Case, oriented_of
from .competitors import MIN_BOX_SIDE, OURS, Step, Target, graphed, ours, step_of


def _reference(case: Case, target: Target) -> Step:
    options = {"strides": STRIDES, "reg_max": case.reg_max, "min_box_side": MIN_BOX_SIDE}
    return step_of("yolo11-obb", partial(reference.yolo11_obb_loss, **options), case, target)


def _ultralytics(case: Case, target: Target) -> Step:
    criterion = peers.ultralytics_model("yolo11n-obb.yaml", case.num_classes).to(target.device).init_criterion()
    rows, *preds = oriented_of(case)
    dist, angle, scores = leaves = tuple(map(target.leaf, preds))
    batch, inputs = (
        peers.ultralytics_batch(rows.to(target.device)),
        peers.ultralytics_preds(dist, scores, case.feat_shapes, angle=angle),
    )
    return Step(lambda: criterion(inputs, batch)[0].sum(), leaves, target.device)


ORIENTED: dict[str, dict[str, Callable[[Case, Target], Step]]] = {
    "yolo11-obb": {
        OURS: partial(ours, "yolo11-obb"),
        "ultralytics": _ultralytics,
        "reference": _reference,
        f"CUDA graph of {OURS}": partial(graphed, partial(ours, "yolo11-obb")),
    }
}
