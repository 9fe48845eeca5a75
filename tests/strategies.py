"""All generated input: values on coarse grids, so that ties are common, exact in float32 and shrink to few numbers."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import DEVICE

EIGHTHS = st.integers(-32, 32).map(lambda i: i / 8)
STRIDES = (8, 16, 32, 64, 128)


def spread(values: list[float], shape: tuple[int, ...], jitter: float = 0.0) -> Tensor:
    """Fill a tensor with ``values`` in a fixed irregular order; ``jitter`` > 0 makes every element distinct."""
    index = torch.arange(max(1, torch.Size(shape).numel()), dtype=torch.int64)
    chosen = torch.tensor(values, dtype=torch.float32)[(index * 2654435761 // 512) % len(values)]
    noise = torch.frac(index.double() * 0.6180339887498949).float()
    return (chosen + jitter * noise)[: torch.Size(shape).numel()].reshape(shape).to(DEVICE)


@st.composite
def tensors(draw, shape, values=EIGHTHS, jitters=(0.0, 0.25)):
    palette = draw(st.lists(values, min_size=1, max_size=6))
    return spread(palette, shape, draw(st.sampled_from(jitters)))


@st.composite
def boxes(draw, shape, size: float = 64.0):
    """Boxes xyxy in pixels on a grid of half pixels; some are empty, some reach out of the image."""
    number = torch.Size(shape).numel()
    corner = st.integers(-8, int(2 * size)).map(lambda i: i / 2)
    side = st.one_of(st.integers(0, int(size)), st.integers(2, 24)).map(lambda i: i / 2)
    pool = draw(st.lists(st.tuples(corner, corner, side, side), min_size=1, max_size=max(1, min(number, 6))))
    chosen = torch.tensor(pool)[(torch.arange(number) * 2654435761 // 512) % len(pool)].reshape(*shape, 4)
    return torch.cat([chosen[..., :2], chosen[..., :2] + chosen[..., 2:]], -1).to(DEVICE)


@st.composite
def oriented_boxes(draw, number: int):
    """Boxes (cx, cy, w, h, angle), angles in eighths."""
    low, high = draw(boxes((number,))).split(2, 1)
    return torch.cat([(low + high) / 2, high - low, draw(tensors((number, 1), jitters=(0.0,)))], 1)


@st.composite
def pyramids(draw, max_levels: int = 3, max_side: int = 8):
    """(feat_shapes, strides) of one to ``max_levels`` levels, not square in general."""
    levels = draw(st.integers(1, max_levels))
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    shapes = [(max(1, height >> level), max(1, width >> level)) for level in range(levels)]
    return shapes, STRIDES[:levels]


@st.composite
def rows(draw, batch_size: int, num_classes: int, max_rows: int = 8):
    """YOLO rows (N, 6), unsorted, with padding rows, empty boxes and boxes that leave the image. Exact in float32."""
    one_row = st.tuples(
        st.integers(-1, batch_size - 1),
        st.integers(0, num_classes - 1),
        *(st.integers(-1, 17).map(lambda i: i / 16) for _ in range(2)),
        *(st.one_of(st.integers(0, 16), st.integers(1, 6)).map(lambda i: i / 16) for _ in range(2)),
    )
    drawn = draw(st.lists(one_row, max_size=max_rows))
    return torch.tensor(drawn, dtype=torch.float32).reshape(-1, 6).to(DEVICE)


class AssignerCase(NamedTuple):
    scores: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    gt_labels: Tensor
    gt_boxes: Tensor
    mask: Tensor

    def double(self) -> "AssignerCase":
        return AssignerCase(*(x.double() if x.is_floating_point() else x for x in self))


@st.composite
def assigner_cases(draw, max_gt: int = 5):
    """Padded ground truth and decoded predictions in pixels."""
    from reference import make_anchors

    shapes, strides = draw(pyramids())
    points, point_strides = make_anchors(shapes, strides, device=DEVICE)
    batch_size, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    num_gt, num_anchors = draw(st.integers(0, max_gt)), len(points)
    points = points * point_strides[:, None]
    size = 8.0 * max(shapes[0])
    gt = draw(boxes((batch_size, num_gt), size)) if num_gt else torch.zeros(batch_size, 0, 4, device=DEVICE)
    # Predictions are near the ground truth, or near the anchor, or anywhere.
    pred = draw(boxes((batch_size, num_anchors), size))
    where = spread(draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=4)), (batch_size, num_anchors, 1))
    around = torch.cat([points - 1.5 * point_strides[:, None], points + 2 * point_strides[:, None]], -1)
    pred = torch.where(where == 1, around, pred)
    if num_gt:
        nearest = gt[:, torch.arange(num_anchors, device=DEVICE) % num_gt] + spread([0.0, 0.5, -1.0], (num_anchors, 4))
        pred = torch.where(where == 2, nearest, pred)
    probs = st.integers(0, 8).map(lambda i: i / 8)
    scores = draw(tensors((batch_size, num_anchors, num_classes), probs, jitters=(0.0, 0.0625))).clamp(0, 1)
    labels = spread(draw(st.lists(st.integers(0, num_classes - 1).map(float), min_size=1, max_size=4)), (batch_size, num_gt, 1))
    mask = spread(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=3)), (batch_size, num_gt, 1)) > 0
    return AssignerCase(scores, pred, points, point_strides, labels.long(), gt, mask)


class YOLO11Case(NamedTuple):
    pred_dist: Tensor
    pred_scores: Tensor
    feat_shapes: list[tuple[int, int]]
    rows: Tensor
    options: dict


@st.composite
def yolo11_cases(draw, dtype: torch.dtype = torch.float32):
    """Raw predictions in a random layout, rows, and the criterion's options."""
    shapes, strides = draw(pyramids(max_side=6))
    batch_size, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    reg_max = draw(st.sampled_from([1, 2, 3, 8, 16, 17]))
    num_anchors = sum(h * w for h, w in shapes)
    options = dict(
        strides=strides,
        reg_max=reg_max,
        topk=draw(st.sampled_from([1, 3, 10, 13])),
        topk2=draw(st.sampled_from([None, 1, 2])),
        alpha=draw(st.sampled_from([0.5, 1.0])),
        beta=draw(st.sampled_from([6.0, 2.0])),
        min_box_side=draw(st.sampled_from([0.0, 16.0])),
    )
    if draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=3))
        options["class_weights"] = spread(weights, (num_classes,))
    # One huge logit a side makes the expectation exactly an integer: boxes on a grid, ties that are exact.
    is_hard = draw(st.booleans()) and reg_max > 1
    shape = (batch_size, num_anchors, 4, reg_max)
    if is_hard:
        bins = spread(draw(st.lists(st.integers(0, reg_max - 1).map(float), min_size=1, max_size=4)), shape[:3]).long()
        dist = 300.0 * torch.nn.functional.one_hot(bins, reg_max)
    else:
        values = EIGHTHS if reg_max > 1 else st.integers(0, 24).map(lambda i: i / 8)
        dist = draw(tensors(shape, values, jitters=(0.25,)))
    scores = draw(tensors((batch_size, num_anchors, num_classes), jitters=(0.0, 0.25)))
    dist, scores = draw(layouts(dist.flatten(2).to(dtype))), draw(layouts(scores.to(dtype)))
    return YOLO11Case(dist, scores, shapes, draw(rows(batch_size, num_classes)), options)


class KeypointCase(NamedTuple):
    preds: Tensor
    target_row: Tensor
    keypoints: Tensor
    boxes: Tensor
    feat_shapes: list[tuple[int, int]]
    options: dict


@st.composite
def keypoint_cases(draw, dtype: torch.dtype = torch.float32):
    """Raw keypoints in a random layout, an assignment, and ground truth of which some is not visible."""
    shapes, strides = draw(pyramids(max_side=5))
    batch_size, num_rows = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    num_keypoints, num_dims = draw(st.sampled_from([1, 3, 17])), draw(st.sampled_from([2, 3]))
    num_anchors = sum(h * w for h, w in shapes)
    preds = draw(tensors((batch_size, num_anchors, num_keypoints * num_dims), jitters=(0.0, 0.25)))
    chosen = draw(st.lists(st.integers(-2, num_rows - 1).map(float), min_size=1, max_size=6))
    row = spread(chosen, (batch_size, num_anchors)).int().clamp(min=-1)
    size = 8.0 * max(shapes[0])
    places = draw(tensors((num_rows, num_keypoints, 2), st.integers(-4, 36).map(lambda i: i / 32), jitters=(0.0,))) * size
    flags = spread(draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=4)), (num_rows, num_keypoints, 1))
    keypoints = torch.cat([places, flags], 2) if draw(st.booleans()) else places
    options = dict(strides=strides, pose_gain=draw(st.sampled_from([12.0, 1.0])), kobj_gain=draw(st.sampled_from([1.0, 0.0])))
    if draw(st.booleans()):
        options["sigmas"] = [(1 + k % 5) / 16 for k in range(num_keypoints)]
    gt_boxes = draw(boxes((num_rows,), size)) if num_rows else torch.zeros(0, 4, device=DEVICE)
    return KeypointCase(draw(layouts(preds.to(dtype))), row, keypoints, gt_boxes, shapes, options)


class OBBCase(NamedTuple):
    pred_dist: Tensor
    pred_angle: Tensor
    pred_scores: Tensor
    feat_shapes: list[tuple[int, int]]
    rows: Tensor
    options: dict

    @property
    def preds(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pred_dist, self.pred_angle, self.pred_scores


@st.composite
def obb_cases(draw, dtype: torch.dtype = torch.float32):
    """The same with angles in radians, those of the rows in eighths."""
    case = draw(yolo11_cases(dtype))
    angle = draw(layouts(draw(tensors((*case.pred_dist.shape[:2], 1), jitters=(0.0, 0.25))).to(dtype)))
    rows = torch.cat([case.rows, draw(tensors((len(case.rows), 1), jitters=(0.0,)))], 1)
    return OBBCase(case.pred_dist, angle, case.pred_scores, case.feat_shapes, rows, case.options)


class YOLOXCase(NamedTuple):
    preds: Tensor
    feat_shapes: list[tuple[int, int]]
    rows: Tensor
    options: dict


@st.composite
def yolox_cases(draw, dtype: torch.dtype = torch.float32):
    """Raw predictions in a random layout, rows, and the criterion's options."""
    shapes, strides = draw(pyramids(max_side=6))
    batch_size, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    num_anchors = sum(h * w for h, w in shapes)
    mode, radius = draw(st.sampled_from([("center", 1.5), ("box_and_center", 2.5), ("center", 0.5), ("center", 4.0)]))
    options = dict(
        strides=strides,
        candidates=mode,
        center_radius=radius,
        iou_loss=draw(st.sampled_from(["iou", "giou"])),
        use_l1=draw(st.booleans()),
    )
    jitters = (0.25,) if draw(st.booleans()) else (0.0,)
    preds = torch.cat(
        [
            draw(tensors((batch_size, num_anchors, 2), st.integers(-8, 8).map(lambda i: i / 8), jitters)),
            draw(tensors((batch_size, num_anchors, 2), st.integers(-4, 12).map(lambda i: i / 8), jitters)),
            draw(tensors((batch_size, num_anchors, 1 + num_classes), EIGHTHS, jitters)),
        ],
        -1,
    )
    targets = draw(rows(batch_size, num_classes))
    return YOLOXCase(draw(layouts(preds.to(dtype))), shapes, targets, options)


@st.composite
def layouts(draw, x: Tensor):
    """The same values channel-last, channel-first, or with gaps between the rows."""
    kind = draw(st.sampled_from(["channel_last", "channel_first", "with_gaps"]))
    if kind == "channel_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "with_gaps":
        return torch.cat([x, torch.full_like(x[..., :1], torch.nan)], -1)[..., :-1]
    return x


class MaskCase(NamedTuple):
    coefficients: Tensor
    prototypes: Tensor
    target_row: Tensor
    image_index: Tensor
    boxes: Tensor
    masks: Tensor
    imgsz: tuple[int, int]
    overlap_mask: bool


@st.composite
def mask_cases(draw, dtype: torch.dtype = torch.float32):
    """Coefficients and prototypes in a random layout, rows of any image, and anchors that have some row of theirs or none."""
    batch_size, num_anchors, num_channels = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([1, 2, 5, 8, 32])),
    )
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    number = draw(st.integers(0, 6))
    gt = draw(boxes((number,), 4.0 * max(height, width))) if number else torch.zeros(0, 4, device=DEVICE)
    image_index = torch.tensor(
        draw(st.lists(st.integers(-1, batch_size - 1), min_size=number, max_size=number)), dtype=torch.int64
    )
    choices = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    is_box = (gt[:, 2:] > gt[:, :2]).all(1).cpu()
    target_row = torch.full((batch_size, num_anchors), -1, dtype=torch.int32)
    for image in range(batch_size):
        rows = [*((image_index == image) & is_box).nonzero().squeeze(1).tolist(), -1]
        for anchor in range(num_anchors):
            target_row[image, anchor] = rows[choices[(image + anchor) % len(choices)] % len(rows)]
    overlap_mask = draw(st.booleans())
    values = st.integers(0, 4).map(float) if overlap_mask else st.integers(0, 4).map(lambda i: i / 4)
    masks = draw(tensors((batch_size if overlap_mask else number, height, width), values, jitters=(0.0,)))
    coefficients = draw(tensors((batch_size, num_anchors, num_channels), jitters=(0.0, 0.25))).to(dtype)
    prototypes = draw(tensors((batch_size, num_channels, height, width), jitters=(0.0, 0.25))).to(dtype)
    if draw(st.booleans()):
        prototypes = prototypes.contiguous(memory_format=torch.channels_last)
    return MaskCase(
        draw(layouts(coefficients)), prototypes, target_row.to(DEVICE), image_index.to(DEVICE), gt, masks,
        (4 * height, 4 * width), overlap_mask,
    )  # fmt: skip
