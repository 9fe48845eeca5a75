"""SimOTA assignment (YOLOX, arXiv 2107.08430): every ground truth against the anchors that take part in its image."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import working, working_dtype
from .._signatures import GroundTruth, SimOTAAssign, SimOTAAssignment
from .boxes import overlap
from .memory import row_parts
from .pairs import expand, in_order, point_pairs, valid_rows
from .task_aligned import is_inside

INFEASIBLE_COST = 1e6
MAX_DYNAMIC_K = 10
_BLOCK = 1 << 14  # pairs at a time: they stay in the processor's cache, and crowded images do not grow the memory
_PART = 1 << 12  # pairs whose costs are computed at a time: of everything here they take the most numbers a pair


class Regions(NamedTuple):
    """Where a ground truth may find anchors: ``points`` (2, A) and ``strides`` (A,) in pixels, and the rule.

    The finders give supersets of the pairs (rows, anchors) near centres (n, 2) or in boxes from low (n, 2) to high (n, 2),
    row after row, and the anchors of each in order.
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
        """Whether points (2, P) may be matched with rows (P,), one each, at no extra cost."""
        in_centre = self.in_centre(points, strides, rows.centres)
        return in_centre if self.candidates == "center" else in_centre & is_inside(points, rows.boxes, 0.0)

    def find(self, rows: "_Rows", batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which anchors (B, A) take part in their image; the feasible pairs, of the nth row and an anchor."""
        takes_part = torch.zeros(batch_size, len(self.strides), dtype=torch.bool, device=self.points.device)
        nth, anchors = self.find_near(rows.centres.T)
        kept = self.in_centre(self.points[:, anchors], self.strides[anchors], rows.centres[:, nth])
        nth, anchors = nth[kept], anchors[kept]
        takes_part[rows.images[nth], anchors] = True
        if self.candidates == "box_and_center":
            in_box, inner = self.find_in_box(rows.boxes[:2].T, rows.boxes[2:].T)
            kept = is_inside(self.points[:, inner], rows.boxes[:, in_box], 0.0)
            takes_part[rows.images[in_box[kept]], inner[kept]] = True
            kept = is_inside(self.points[:, anchors], rows.boxes[:, nth], 0.0)
            nth, anchors = nth[kept], anchors[kept]
        return takes_part, nth, anchors


class _Rows(NamedTuple):
    """Valid ground truths in order of image: their ids, images, labels, boxes (4, n) and centres (2, n)."""

    ids: Tensor
    images: Tensor
    labels: Tensor
    boxes: Tensor
    centres: Tensor

    def take(self, index: Tensor) -> "_Rows":
        return _Rows(self.ids[index], self.images[index], self.labels[index], self.boxes[:, index], self.centres[:, index])


class _Members(NamedTuple):
    """Anchors (M,) that take part, image after image.

    ``table`` (9, M) holds what every pair needs, so that it is gathered at once: box, point, stride, objectness probability
    and the cost of no class.
    """

    images: Tensor
    anchors: Tensor
    table: Tensor

    @property
    def boxes(self) -> Tensor:
        return self.table[:4]

    @property
    def background_cost(self) -> Tensor:
        return self.table[8]

    def take(self, index: Tensor) -> "_Members":
        return _Members(self.images[index], self.anchors[index], self.table.index_select(1, index))


class _Choice(NamedTuple):
    """What rows (n,) choose from: ``number`` (n,) of the ``members``, beginning with the one at ``first`` (n,)."""

    rows: Tensor
    first: Tensor
    number: Tensor
    members: Tensor

    @staticmethod
    def of_pairs(rows: _Rows, nth: Tensor, member: Tensor) -> "_Choice":
        """Every row chooses from its pairs; these are in order of row."""
        number = nth.bincount(minlength=len(rows.ids))
        return _Choice(torch.arange(len(number), device=nth.device), number.cumsum(0) - number, number, member)

    @staticmethod
    def of_images(rows: _Rows, members: _Members, index: Tensor) -> "_Choice":
        """Every row chooses from those of the members ``index`` (m,) that are in its image."""
        images = members.images[index]
        first, end = (torch.searchsorted(images, rows.images, right=right) for right in (False, True))
        return _Choice(torch.arange(len(first), device=index.device), first, end - first, index)

    def take(self, index: Tensor) -> "_Choice":
        return _Choice(self.rows[index], self.first[index], self.number[index], self.members)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Some rows (n,) at a time with their pairs (P,): which of the rows, place in its list, member."""
        for block in _row_blocks(self.number):
            nth, place = expand(self.number[block])
            yield self.rows[block], nth, place, self.members[self.first[block][nth] + place]


_Cost = Callable[[Tensor, Tensor], Tensor]  # of pairs (P,) of the nth row and a member


def simota_assign(x: SimOTAAssign) -> SimOTAAssignment:
    points, strides = working(x.points), working(x.strides)

    def find_near(centres: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.arange(0, device=points.device)
        found = [(none, none)]
        for stride in strides.unique():
            (of_stride,) = (strides == stride).nonzero(as_tuple=True)
            reach = 1.001 * x.assigner.radius * stride
            rows, nth = point_pairs(centres - reach, centres + reach, points[of_stride])
            found.append((rows, of_stride[nth]))
        return in_order(torch.cat([rows for rows, _ in found]), torch.cat([anchors for _, anchors in found]), len(points))

    def find_in_box(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return point_pairs(low, high, points)

    regions = Regions(points.T.contiguous(), strides, *x.assigner, find_near, find_in_box)
    gt = GroundTruth(*x.targets)
    target_row, matched_iou = match(x.cls_logits, x.obj_logits, lambda *at: x.boxes[at], regions, gt)
    return SimOTAAssignment(target_row, matched_iou.to(working_dtype(x.boxes.dtype)))


def match(
    cls_logits: Tensor, obj_logits: Tensor, boxes_at: Callable[[Tensor, Tensor], Tensor], regions: Regions, gt: GroundTruth
) -> tuple[Tensor, Tensor]:
    """Row of every anchor (B, A), int32, -1 for background; its IoU with it, 0 for background.

    ``boxes_at`` gives the predicted boxes (M, 4) at images and anchors (M,).
    """
    batch_size, _, num_classes = cls_logits.shape
    gt_boxes, gt_xywh = gt.boxes_xyxy.to(regions.points.dtype), gt.boxes_xywh.to(regions.points.dtype)
    ids = valid_rows(gt._replace(boxes_xyxy=gt_boxes), batch_size, num_classes)
    ids = ids[gt.image_index[ids].sort(stable=True).indices]
    rows = _Rows(ids, gt.image_index[ids], gt.labels[ids], gt_boxes[ids].T.contiguous(), gt_xywh[ids, :2].T.contiguous())
    takes_part, nth, anchors = regions.find(rows, batch_size)
    members = _gather_members(cls_logits, obj_logits, boxes_at, regions, takes_part)
    places = members.images * takes_part.shape[1] + members.anchors
    member = torch.searchsorted(places, rows.images[nth] * takes_part.shape[1] + anchors)

    def cost_of(nth: Tensor, member: Tensor) -> Tensor:
        parts = zip(nth.split(_PART), member.split(_PART), strict=True)
        return torch.cat([_costs(rows.take(n), members.take(m), cls_logits, regions) for n, m in parts])

    winner = _choose_rows(rows, members, nth, member, cost_of)
    positive = (winner >= 0).nonzero().squeeze(1)
    at, winner = (members.images[positive], members.anchors[positive]), winner[positive]
    target_row = torch.full_like(takes_part, -1, dtype=torch.int32)
    target_row[at] = rows.ids[winner].int()
    matched_iou = torch.zeros_like(takes_part, dtype=members.boxes.dtype)
    matched_iou[at] = _iou(rows.boxes[:, winner], members.boxes[:, positive])
    return target_row, matched_iou


def _choose_rows(rows: _Rows, members: _Members, nth: Tensor, member: Tensor, cost_of: _Cost) -> Tensor:
    """The row (M,) of each member, -1 for background; the feasible pairs are of the nth row and a member.

    A feasible pair of a cheap member costs less than any infeasible one, whatever its class and IoU. So infeasible pairs
    matter only to rows with fewer of those than they take, and to contested members without any.
    """
    is_cheap = (members.background_cost < INFEASIBLE_COST / 2)[member]
    anything = _Choice.of_images(rows, members, torch.arange(len(members.images), device=nth.device))
    feasible = _Choice.of_pairs(rows, nth, member)
    k = _dynamic_ks(rows, members, anything)
    is_enough = nth[is_cheap].bincount(minlength=len(k)) >= k
    choices = [feasible.take(is_enough), anything.take(~is_enough & (anything.number > 0))]
    winner, contested = _claim(choices, k, members, cost_of)

    is_settled = torch.zeros_like(contested).index_fill_(0, member[is_cheap], True)
    kept = (contested & is_settled)[member]
    feasible = _Choice.of_pairs(rows, nth[kept], member[kept])
    anything = _Choice.of_images(rows, members, (contested & ~is_settled).nonzero().squeeze(1))
    return _cheapest_rows([feasible, anything], members, cost_of).where(contested, winner)


def _dynamic_ks(rows: _Rows, members: _Members, choice: _Choice) -> Tensor:
    """Dynamic k (n,) of every row."""
    result = torch.ones_like(rows.ids)
    for block in _row_blocks(choice.number):
        number = choice.number[block, None]
        place = torch.arange(int(number.max()), device=number.device)
        member = (choice.first[block, None] + place).clamp(max=len(members.images) - 1)
        boxes = members.boxes.index_select(1, member.flatten()).unflatten(1, member.shape)
        result[block] = dynamic_k(_iou(rows.boxes[:, block, None], boxes).where(place < number, 0))
    return result


def _claim(choices: list[_Choice], k: Tensor, members: _Members, cost_of: _Cost) -> tuple[Tensor, Tensor]:
    """A row (M,) that takes each member, -1 if none does, and whether several do."""
    winner = torch.full_like(members.images, -1)
    num_claims = torch.zeros_like(members.images)
    for rows, nth, place, member in chain.from_iterable(choice.blocks() for choice in choices):
        pair_cost = cost_of(rows[nth], member)
        cost = pair_cost.new_full((len(rows), int(place.max()) + 1), torch.inf)
        cost[nth, place] = pair_cost
        is_claim = cheapest_k(cost, k[rows])[nth, place]
        claimed = member[is_claim]
        num_claims.index_add_(0, claimed, torch.ones_like(claimed))
        winner[claimed] = rows[nth[is_claim]]
    return winner, num_claims > 1


def _cheapest_rows(choices: list[_Choice], members: _Members, cost_of: _Cost) -> Tensor:
    """The row (M,) to which each member costs least, -1 if none may choose it."""
    cheapest = torch.full_like(members.table[0], torch.inf)
    result = torch.full_like(members.images, -1)
    for rows, nth, _, member in chain.from_iterable(choice.blocks() for choice in choices):
        cost = cost_of(rows[nth], member)
        best = torch.full_like(cheapest, torch.inf).scatter_reduce_(0, member, cost, "amin")
        is_best = cost == best[member]
        none = torch.iinfo(result.dtype).max
        row = torch.full_like(result, none).scatter_reduce_(0, member[is_best], rows[nth[is_best]], "amin")
        # Only a strictly cheaper row displaces one from an earlier block, so equal costs go to the lower slot.
        is_cheaper = (best < cheapest) | ((result < 0) & (row < none))
        cheapest, result = best.where(is_cheaper, cheapest), row.where(is_cheaper, result)
    return result


def _gather_members(
    cls_logits: Tensor, obj_logits: Tensor, boxes_at: Callable[[Tensor, Tensor], Tensor], regions: Regions, takes_part: Tensor
) -> _Members:
    images, anchors = takes_part.nonzero().unbind(-1)
    obj_probs = working(obj_logits[images, anchors]).sigmoid()
    background_cost = torch.empty_like(obj_probs)
    for part in row_parts(images, cls_logits.shape[2]):
        cls = working(cls_logits[images[part], anchors[part]])
        background_cost[part] = -_log_not(_joint_probability(cls, obj_probs[part, None])).sum(-1)
    rest = torch.stack([regions.strides[anchors], obj_probs, background_cost])
    return _Members(images, anchors, torch.cat([working(boxes_at(images, anchors)).T, regions.points[:, anchors], rest]))


def _costs(rows: _Rows, members: _Members, cls_logits: Tensor, regions: Regions) -> Tensor:
    """Cost (P,) of pairs of a row (P,) and a member (P,), infinite rather than NaN."""
    boxes, points, (strides, obj_probs, background_cost) = members.boxes, members.table[4:6], members.table[6:]
    label_logits = cls_logits[rows.images, members.anchors, rows.labels]
    probs = _joint_probability(working(label_logits), obj_probs)
    # BCE against the one-hot class differs from that against no class by two terms.
    cost = background_cost + _log_not(probs) - probs.log().clamp(min=-100)
    cost = cost + 3.0 * -torch.log(_iou(rows.boxes, boxes) + 1e-8)
    cost = cost.where(regions.is_feasible(points, strides, rows), cost + INFEASIBLE_COST)
    return cost.where(cost < torch.inf, torch.inf)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (4, ...), 0 where it is undefined."""
    ious = overlap(a.movedim(0, -1), b.movedim(0, -1), "iou", 0.0)
    return ious.where(ious > 0, 0)


def _joint_probability(cls_logits: Tensor, obj_probs: Tensor) -> Tensor:
    return (cls_logits.sigmoid() * obj_probs).sqrt()


def _log_not(probs: Tensor) -> Tensor:
    """log(1 - p), not below -100."""
    return torch.log1p(-probs).clamp(min=-100)


def dynamic_k(ious: Tensor) -> Tensor:
    """How many anchors each row of (n, P) takes: the sum of its largest IoUs, of integers so that no order matters."""
    largest = ious.topk(min(MAX_DYNAMIC_K, ious.shape[1]), dim=1).values
    return ((largest * 2.0**52).long().sum(1) >> 52).clamp(min=1)


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
