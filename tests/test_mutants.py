"""The tests tested: every planted mistake must make a test fail. `make mutants`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    path: str
    old: str
    new: str
    test: str


BOXES, PAIRS, DECODE = "triton_yolo/eager/boxes.py", "triton_yolo/eager/pairs.py", "triton_yolo/eager/decode.py"
ASSIGN, YOLO11 = "triton_yolo/eager/task_aligned.py", "triton_yolo/eager/yolo11.py"
SIMOTA, YOLOX = "triton_yolo/eager/simota.py", "triton_yolo/eager/yolox.py"
IOU, DECODING = "tests/test_stages.py::test_bbox_iou", "tests/test_stages.py::test_decode_dfl"
METRIC, TOPK = "tests/test_stages.py::test_align_metric", "tests/test_stages.py::test_select_topk_candidates"
TAL, SIM = "tests/test_assigners.py::test_task_aligned_assigner", "tests/test_assigners.py::test_simota_assigner"
INFEASIBLE = "tests/test_assigners.py::test_simota_where_infeasible_anchors_may_win"
LOSS11, LOSSX = "tests/test_losses.py::test_yolo11_loss", "tests/test_losses.py::test_yolox_loss"
REFERENCE = "tests/test_reference.py"

MUTANTS = {
    "no eps in the union": Mutant(BOXES, "+ wb * hb - inter + eps\n    iou =", "+ wb * hb - inter\n    iou =", IOU),
    "eps in the widths": Mutant(BOXES, "by2 - by1 + eps\n    inter_w", "by2 - by1 + eps\n    wa = wa + eps\n    inter_w", IOU),
    "no eps in CIoU's weight": Mutant(BOXES, "(1 - iou + v + eps) * v", "(1 - iou + v) * v", IOU),
    "aspect ratio upside down": Mutant(BOXES, "torch.atan(wb / hb) - torch.atan(wa / ha)).square()\n    return", "torch.atan(hb / wb) - torch.atan(wa / ha)).square()\n    return", IOU),
    "CIoU's weight is not constant": Mutant(BOXES, "d_angle = weight *", "d_angle = 2 * weight *", IOU),
    "a tie's gradient goes to one side": Mutant(BOXES, "is_own.float() + 0.5 * is_tie.float()", "is_own.float() + is_tie.float()", IOU),
    "boxes that touch overlap on one side": Mutant(BOXES, "torch.where(x == 0, grad / 2, 0)", "torch.where(x == 0, grad, 0)", "tests/test_stages.py::test_gradient_of_touching_boxes_is_half_of_that_of_an_intersection"),
    "enclosing area smaller than the union": Mutant(BOXES, "enclosing_w * (enclosing_h + 2 * eps) + eps\n        return", "enclosing_w * enclosing_h + eps\n        return", "tests/test_stages.py::test_giou_of_flat_boxes"),
    "intersection not clamped": Mutant(BOXES, "- torch.maximum(ax1, bx1)).clamp_(min=0)", "- torch.maximum(ax1, bx1))", IOU),
    "bins start at one": Mutant(DECODE, "probs @ torch.arange(logits.shape[-1],", "probs @ torch.arange(1, 1 + logits.shape[-1],", DECODING),
    "right and left swapped": Mutant(DECODE, "[points - distances[..., :2], points + distances[..., 2:]]", "[points - distances[..., 2:], points + distances[..., :2]]", DECODING),
    "YOLOX's size not halved in the gradient": Mutant(DECODE, "(high - low) / 2 *", "(high - low) *", "tests/test_stages.py::test_decode_yolox"),
    "candidates on the edge": Mutant(ASSIGN, "points[1])) > eps", "points[1])) >= 0", LOSS11),
    "no widening": Mutant(ASSIGN, "is_short = high - low < min_side", "is_short = high - low < 0", TAL),
    "alpha and beta swapped": Mutant(ASSIGN, "power(scores, alpha) * power(overlaps, beta)", "power(scores, beta) * power(overlaps, alpha)", METRIC),
    "zero metrics are claimed": Mutant(ASSIGN, "kept = (metric > 0).nonzero()", "kept = (metric >= 0).nonzero()", TAL),
    "one candidate too many": Mutant(ASSIGN, "by_row[rank < topk]", "by_row[rank <= topk]", TOPK),
    "ties to the higher anchor": Mutant(ASSIGN, "(torch.iinfo(bits.dtype).max - bits).sort(stable=True).indices", "(torch.iinfo(bits.dtype).max - bits).flip(0).sort(stable=True).indices.neg() + len(bits) - 1", TOPK),
    "conflict among claimants only": Mutant(ASSIGN, "contested = (num_claims > 1)[cells].nonzero().squeeze(1)", "contested = claims[(num_claims > 1)[cells[claims]]]", TAL),
    "conflict ties to the higher slot": Mutant(ASSIGN, 'rows[contested].int(), "amin"', 'rows[contested].int(), "amax"', TAL),
    "conflict by metric": Mutant(ASSIGN, "overlaps[contested], \"amax\")\n    contested = contested[overlaps[contested]", "metric[contested], \"amax\")\n    contested = contested[metric[contested]", TAL),
    "second top-k forgotten": Mutant(ASSIGN, "    if topk2 is not None:", "    if False:", TAL),
    "largest overlap not applied": Mutant(ASSIGN, "metric * max_overlap[rows] /", "metric /", TAL),
    "grid starts a cell late": Mutant(PAIRS, "- 0.501).ceil()", "+ 0.499).ceil()", LOSS11),
    "grid ends a cell early": Mutant(PAIRS, "- 0.499).floor() + 1)", "- 0.499).floor())", LOSS11),
    "parts cut through images": Mutant(PAIRS, "(per_image.cumsum(0) - per_image, _PART, rounding_mode=\"floor\")[images]", "(num_pairs[rows].cumsum(0), _PART, rounding_mode=\"floor\")", "tests/test_losses.py::test_crowded_batch_is_cut_by_images_without_a_trace"),
    "gradients finite after a logit that is not": Mutant(YOLO11, "if normaliser.isnan().any():", "if False:", "tests/test_losses.py::test_yolo11_shows_a_prediction_that_is_no_number"),
    "DFL target not clamped below the last bin": Mutant(YOLO11, "- 1 - 0.01)", "- 1)", LOSS11),
    "DFL weights swapped": Mutant(YOLO11, "low + 1 - distances, distances - low", "distances - low, low + 1 - distances", LOSS11),
    "L1 by the wrong side of the image": Mutant(YOLO11, "new_tensor([width, height, width, height])", "new_tensor([height, width, height, width])", LOSS11),
    "class weight forgotten on positives": Mutant(YOLO11, "hits = _weighted(logits * pos.scores, class_weights, labels[pos.rows]).sum()", "hits = (logits * pos.scores).sum()", LOSS11),
    "batch size forgotten": Mutant(YOLO11, "return normaliser[1] * items.sum(), items", "return items.sum(), items", LOSS11),
    "infinite logits hidden": Mutant(YOLO11, "normaliser = normaliser.where(is_finite(logits), torch.nan)", "pass", "tests/test_losses.py::test_yolo11_shows_a_prediction_that_is_no_number"),
    "centre region includes its edge": Mutant(SIMOTA, "< self.radius * strides", "<= self.radius * strides", SIM),
    "dynamic k at least two": Mutant(SIMOTA, "sum(1) >> 52).clamp(min=1)", "sum(1) >> 52).clamp(min=2)", SIM),
    "logarithm not clamped": Mutant(SIMOTA, "probs.log().clamp(min=-100)", "probs.log().clamp(min=-1)", SIM),
    "infeasible pairs cost nothing": Mutant(SIMOTA, "INFEASIBLE_COST = 1e6", "INFEASIBLE_COST = 0.0", SIM),
    "equal costs to the higher anchor": Mutant(SIMOTA, "(is_equal & (is_equal.cumsum(1) <= room))", "(is_equal & (is_equal.flip(1).cumsum(1).flip(1) <= room))", SIM),
    "later blocks win ties": Mutant(SIMOTA, "(best < cheapest) |", "(best <= cheapest) |", "tests/test_assigners.py::test_crowded_image_is_cut_into_blocks_without_a_trace"),
    "infeasible anchors are never claimed": Mutant(SIMOTA, ".bincount(minlength=len(k)) >= k", ".bincount(minlength=len(k)) >= 1", INFEASIBLE),
    "feasible anchors are always cheaper": Mutant(SIMOTA, "members.background_cost < INFEASIBLE_COST / 2", "members.background_cost < torch.inf", INFEASIBLE),
    "costs that are no number are feasible": Mutant(SIMOTA, "members.background_cost < INFEASIBLE_COST / 2", "~(members.background_cost >= INFEASIBLE_COST / 2)", INFEASIBLE),
    "dear feasible anchors are forgotten": Mutant(SIMOTA, "    anything = _Choice.of_images(rows, members, torch.arange", "    nth, member, is_cheap = nth[is_cheap], member[is_cheap], is_cheap[is_cheap]\n    anything = _Choice.of_images(rows, members, torch.arange", INFEASIBLE),
    "conflict among feasible rows only": Mutant(SIMOTA, "[feasible, anything], members, cost_of)", "[feasible], members, cost_of)", INFEASIBLE),
    "anchors that take part may hold anything": Mutant(YOLOX, "is_whole = is_whole & is_finite(preds[images[part], anchors[part]])", "pass", "tests/test_losses.py::test_yolox_shows_a_prediction_that_is_no_number_where_it_takes_part"),
    "class target is one": Mutant(YOLOX, "pos.label_logits[part] * pos.ious[part]", "pos.label_logits[part]", LOSSX),
    "L1 without its small constant or the cell": Mutant(YOLOX, "gt_cell[:, :2] - corner", "gt_cell[:, :2] - corner - 0.5", LOSSX),
    "objectness gradient only on positives": Mutant(YOLOX, "        result[..., 4][block] = working(preds[..., 4][block]).sigmoid().mul_(scale)\n", "        pass\n", LOSSX),
    "reference: eps in the widths": Mutant("reference/boxes.py", "wa, ha = ax2 - ax1,", "wa, ha = ax2 - ax1 + eps,", REFERENCE),
    "reference: conflict to the higher slot": Mutant("reference/task_aligned.py", "overlaps.where(candidates, -1), dim=1, descending=True, stable=True)[:, :1]", "overlaps.where(candidates, -1).flip(1), dim=1, descending=True, stable=True)[:, :1].neg() + overlaps.shape[1] - 1", REFERENCE),
    "reference: conflict among all slots": Mutant("reference/task_aligned.py", "overlaps.where(candidates, -1)", "overlaps", REFERENCE),
    "reference: DFL target not clamped": Mutant("reference/dfl.py", "reg_max - 1 - 0.01", "reg_max - 1 - 0.5", REFERENCE),
}  # fmt: skip


@pytest.mark.mutants
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistake_is_noticed(name: str, tmp_path: Path):
    mutant = MUTANTS[name]
    for folder in ("triton_yolo", "reference", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / mutant.path).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.path} has {source.count(mutant.old)} times {mutant.old!r}"
    (tmp_path / mutant.path).write_text(source.replace(mutant.old, mutant.new))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.test],
        cwd=tmp_path, env={**os.environ, "HYPOTHESIS_PROFILE": "mutants"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1, f"survived or did not run:\n{run.stdout[-2000:]}"
