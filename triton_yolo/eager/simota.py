"""SimOTA assignment (YOLOX, arXiv 2107.08430): every ground truth against the anchors that take part in its image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working
from .boxes import bbox_iou
from .pairs import point_pairs, valid_rows
from .task_aligned import is_inside

INFEASIBLE_COST = 1e6
MAX_DYNAMIC_K = 10
_BLOCK = 1 << 14  # pairs at a time: they stay in the processor's cache, and crowded images do not grow the memory


class Regions(NamedTuple):
    """Where a ground truth may find anchors: ``points`` (2, A) and ``strides`` (A,) in pixels, and the rule.

    The finders give supersets of the pairs (rows, anchors) near centres (n, 2) or in boxes from low (n, 2) to high (n, 2).
    """

    points: Tensor
    strides: Tensor
    candidates: str
    radius: float
    find_near: Callable[[Tensor], tuple[Tensor, Tensor]]
    find_in_box: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def in_centre(self, points: Tensor, strides: Tensor, centres: Tensor) -> Tensor:
        """Whether points (2, ...) are nearer to ``centres`` (2, ...) than the radius on both axes."""
        return torch.maximum((points[0] - centres[0]).abs(), (points[1] - centres[1]).abs()) < self.radius * strides

    def is_feasible(self, points: Tensor, strides: Tensor, rows: "_Rows") -> Tensor:
        """Whether pairs (n, P) of rows (n,) and points (2, n, P) may be matched at no extra cost."""
        in_centre = self.in_centre(points, strides, rows.centres[..., None])
        if self.candidates == "center":
            return in_centre
        return in_centre & is_inside(points, rows.boxes[..., None], 0.0)

    def takes_part(self, rows: "_Rows", batch_size: int) -> Tensor:
        """Which anchors (B, A) take part in their image."""
        result = torch.zeros(batch_size, len(self.strides), dtype=torch.bool, device=self.points.device)
        nth, anchors = self.find_near(rows.centres.T)
        kept = self.in_centre(self.points[:, anchors], self.strides[anchors], rows.centres[:, nth])
        result[rows.images[nth[kept]], anchors[kept]] = True
        if self.candidates == "box_and_center":
            nth, anchors = self.find_in_box(rows.boxes[:2].T, rows.boxes[2:].T)
            kept = is_inside(self.points[:, anchors], rows.boxes[:, nth], 0.0)
            result[rows.images[nth[kept]], anchors[kept]] = True
        return result


class _Rows(NamedTuple):
    """Valid ground truths in order of image: their ids, images, labels, boxes (4, n) and centres (2, n)."""

    ids: Tensor
    images: Tensor
    labels: Tensor
    boxes: Tensor
    centres: Tensor

    def take(self, index: Tensor | slice) -> "_Rows":
        return _Rows(self.ids[index], self.images[index], self.labels[index], self.boxes[:, index], self.centres[:, index])


class _Members(NamedTuple):
    """Anchors (M,) that take part, image after image; ``number`` and ``first`` (B,) say which are whose.

    ``table`` (9, M) holds what every pair needs, so that it is gathered at once: box, point, stride, objectness probability
    and the cost of no class.
    """

    images: Tensor
    anchors: Tensor
    number: Tensor
    first: Tensor
    table: Tensor

    @property
    def boxes(self) -> Tensor:
        return self.table[:4]

    def take(self, index: Tensor) -> "_Members":
        images = self.images[index]
        number = images.bincount(minlength=len(self.number))
        return _Members(images, self.anchors[index], number, number.cumsum(0) - number, self.table[:, index])


def simota_assign(
    cls_logits: Tensor, obj_logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor,
    image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor, candidates: str, radius: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    points, strides = working(points), working(strides)

    def find_near(centres: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for stride in strides.unique():
            (of_stride,) = (strides == stride).nonzero(as_tuple=True)
            reach = 1.001 * radius * stride
            rows, nth = point_pairs(centres - reach, centres + reach, points[of_stride])
            found.append((rows, of_stride[nth]))
        return torch.cat([rows for rows, _ in found]), torch.cat([anchors for _, anchors in found])

    def find_in_box(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return point_pairs(low, high, points)

    regions = Regions(points.T.contiguous(), strides, candidates, radius, find_near, find_in_box)
    return match(
        cls_logits, obj_logits, lambda images, anchors: boxes[images, anchors], regions,
        image_index, labels, gt_boxes, gt_xywh,
    )  # fmt: skip


def match(
    cls_logits: Tensor, obj_logits: Tensor, boxes_at: Callable[[Tensor, Tensor], Tensor], regions: Regions,
    image_index: Tensor, labels: Tensor, gt_boxes: Tensor, gt_xywh: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row of every anchor (B, A), int32, -1 for background, and its IoU with it, 0 for background.

    ``boxes_at`` gives the predicted boxes (M, 4) at images and anchors (M,).
    """
    batch_size, _, num_classes = cls_logits.shape
    gt_boxes, gt_xywh = gt_boxes.to(regions.points.dtype), gt_xywh.to(regions.points.dtype)
    ids = valid_rows(image_index, labels, gt_boxes, batch_size, num_classes)
    ids = ids[image_index[ids].sort(stable=True).indices]
    rows = _Rows(ids, image_index[ids], labels[ids], gt_boxes[ids].T.contiguous(), gt_xywh[ids, :2].T.contiguous())
    takes_part = regions.takes_part(rows, batch_size)
    members = _gather_members(cls_logits, obj_logits, boxes_at, regions, takes_part)
    rows = rows.take(members.number[rows.images] > 0)
    winner, contested = _claim(rows, members, cls_logits, regions)
    contested = contested.nonzero().squeeze(1)
    winner[contested] = _cheapest_rows(rows, members.take(contested), cls_logits, regions)

    positive = (winner >= 0).nonzero().squeeze(1)
    at, winner = (members.images[positive], members.anchors[positive]), winner[positive]
    target_row = torch.full_like(takes_part, -1, dtype=torch.int32)
    target_row[at] = rows.ids[winner].int()
    matched_iou = torch.zeros_like(takes_part, dtype=members.boxes.dtype)
    matched_iou[at] = _iou(rows.boxes[:, winner], members.boxes[:, positive])
    return target_row, matched_iou


def _claim(rows: _Rows, members: _Members, cls_logits: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
    """A row (M,) that takes each member, -1 if none does, and whether several do."""
    winner = torch.full_like(members.images, -1)
    num_claims = torch.zeros_like(members.images)
    for block in _row_blocks(members.number[rows.images]):
        is_pair, pairs, cost, ious = _pair_costs(rows.take(block), members, cls_logits, regions)
        nth, column = (cheapest_k(cost, dynamic_k(ious)) & is_pair).nonzero().unbind(-1)
        claimed = pairs[nth, column]
        num_claims.index_add_(0, claimed, torch.ones_like(claimed))
        winner[claimed] = nth + block.start
    return winner, num_claims > 1


def _cheapest_rows(rows: _Rows, members: _Members, cls_logits: Tensor, regions: Regions) -> Tensor:
    """The row (M,) of all of its image to which each member costs least."""
    (index,) = (members.number[rows.images] > 0).nonzero(as_tuple=True)
    rows = rows.take(index)
    cheapest = torch.full_like(members.table[0], torch.inf)
    result = torch.full_like(members.images, -1)
    for block in _row_blocks(members.number[rows.images]):
        is_pair, pairs, cost, _ = _pair_costs(rows.take(block), members, cls_logits, regions)
        nth, column = is_pair.nonzero().unbind(-1)
        pairs, cost = pairs[nth, column], cost[nth, column]
        best = torch.full_like(cheapest, torch.inf).scatter_reduce_(0, pairs, cost, "amin")
        is_best = cost == best[pairs]
        best_row = torch.full_like(result, len(index)).scatter_reduce_(0, pairs[is_best], nth[is_best] + block.start, "amin")
        # Only a strictly cheaper row displaces one from an earlier block, so equal costs go to the lower slot.
        is_cheaper = (best < cheapest) | ((result < 0) & (best_row < len(index)))
        cheapest, result = best.where(is_cheaper, cheapest), best_row.where(is_cheaper, result)
    return index[result]


def _gather_members(
    cls_logits: Tensor, obj_logits: Tensor, boxes_at: Callable[[Tensor, Tensor], Tensor], regions: Regions, takes_part: Tensor
) -> _Members:
    images, anchors = takes_part.nonzero().unbind(-1)
    count = takes_part.sum(1)
    obj_probs = working(obj_logits[images, anchors]).sigmoid()
    background_cost = torch.empty_like(obj_probs)
    for chunk in torch.arange(len(images), device=images.device).split(max(1, _BLOCK // cls_logits.shape[2])):
        cls = working(cls_logits[images[chunk], anchors[chunk]])
        background_cost[chunk] = -_log_not(_joint_probability(cls, obj_probs[chunk, None])).sum(-1)
    rest = torch.stack([regions.strides[anchors], obj_probs, background_cost])
    table = torch.cat([working(boxes_at(images, anchors)).T, regions.points[:, anchors], rest])
    return _Members(images, anchors, count, count.cumsum(0) - count, table)


def _pair_costs(rows: _Rows, members: _Members, cls_logits: Tensor, regions: Regions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows (n,) against the members of their images, padded to (n, P): is it a pair, its member, cost and IoU."""
    count = members.number[rows.images][:, None]
    position = torch.arange(int(count.max()), device=count.device)
    is_pair = position < count
    pairs = (members.first[rows.images][:, None] + position).where(is_pair, 0)
    table = members.table.index_select(1, pairs.flatten()).unflatten(1, pairs.shape)
    boxes, points, (strides, obj_probs, background_cost) = table[:4], table[4:6], table[6:]

    ious = _iou(rows.boxes[..., None], boxes).where(is_pair, 0)
    label_logits = cls_logits[rows.images[:, None], members.anchors[pairs], rows.labels[:, None]]
    probs = _joint_probability(working(label_logits), obj_probs)
    # BCE against the one-hot class differs from that against no class by two terms.
    cost = background_cost + _log_not(probs) - probs.log().clamp(min=-100)
    cost = cost + 3.0 * -torch.log(ious + 1e-8)
    cost = cost + INFEASIBLE_COST * ~regions.is_feasible(points, strides, rows)
    return is_pair, pairs, cost.where(is_pair & (cost < torch.inf), torch.inf), ious


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (4, ...), 0 where it is undefined."""
    ious = bbox_iou(a.movedim(0, -1), b.movedim(0, -1), "iou", 0.0)
    return ious.where(ious > 0, 0)


def _joint_probability(cls_logits: Tensor, obj_probs: Tensor) -> Tensor:
    return (cls_logits.sigmoid() * obj_probs).sqrt()


def _log_not(probs: Tensor) -> Tensor:
    """log(1 - p), not below -100."""
    return torch.log1p(-probs).clamp(min=-100)


def dynamic_k(ious: Tensor) -> Tensor:
    """How many anchors each row of (n, P) takes: the sum of its largest IoUs, in float64 so that no order matters."""
    largest = ious.topk(min(MAX_DYNAMIC_K, ious.shape[1]), dim=1).values
    return largest.double().sum(1).floor().long().clamp(min=1)


def cheapest_k(cost: Tensor, k: Tensor) -> Tensor:
    """The ``k`` (n,) cheapest of every row of (n, P), equal ones by the lower column."""
    ordered = cost.topk(min(MAX_DYNAMIC_K, cost.shape[1]), dim=1, largest=False).values
    bound = ordered.gather(1, k[:, None] - 1)
    is_below, is_equal = cost < bound, cost == bound
    room = k[:, None] - is_below.sum(1, keepdim=True)
    return is_below | (is_equal & (is_equal.cumsum(1) <= room))


def _row_blocks(num_pairs: Tensor) -> list[slice]:
    """Cut rows with so many pairs each into runs of about ``_BLOCK`` pairs when padded."""
    counts = num_pairs.tolist()
    blocks, start, widest = [], 0, 0
    for row, count in enumerate(counts):
        widest = max(widest, count)
        if row > start and widest * (row + 1 - start) > _BLOCK:
            blocks.append(slice(start, row))
            start, widest = row, count
    return [*blocks, slice(start, len(counts))] if counts else []
