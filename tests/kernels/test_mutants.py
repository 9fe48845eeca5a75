"""The kernels' tests tested: every planted mistake must make one fail. They run kernels, so ``TRITON_INTERPRET=1``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from triton_yolo.kernels.launching import INTERPRETED

ROOT = Path(__file__).parent.parent.parent


class Mutant(NamedTuple):
    path: str
    old: str
    new: str
    test: str


LAUNCHES, VALUES = "tests/kernels/test_launches.py", "tests/kernels/test_values.py"
YOLO11, IOU, STAGES = f"{LAUNCHES}::test_yolo11", f"{LAUNCHES}::test_bbox_iou", f"{LAUNCHES}::test_padded_stages"
YOLOX, SIMOTA, DECODE_X = (
    f"{LAUNCHES}::test_yolox",
    f"{LAUNCHES}::test_simota_with_points_in_any_order",
    f"{LAUNCHES}::test_decode_yolox",
)
CLASSES = f"{LAUNCHES}::test_classes_of_several_tiles"
TILES, REPEATS = f"{LAUNCHES}::test_tile_sizes_leave_no_trace_in_the_assignment", f"{LAUNCHES}::test_few_rows"

MUTANTS = {
    "eps missing from the union": Mutant("boxes", "- inter + EPS\n    result", "- inter\n    result", IOU),
    "aspect ratio of the wrong box": Mutant("boxes", "wb * ha - wa * hb,", "wa * hb - wb * ha + wa,", IOU),
    "negative heights not turned": Mutant("boxes", "flip = (ha < 0) != (hb < 0)", "flip = ha != ha", IOU),
    "a tie's derivative goes to one side": Mutant("boxes", "tl.where(ax1 == bx1, 0.5,", "tl.where(ax1 == bx1, 1.0,", IOU),
    "boxes that touch overlap on one side": Mutant("boxes", "overlap_w == 0, d_overlap_w / 2, 0.0", "overlap_w == 0, d_overlap_w, 0.0", IOU),
    "enclosing area smaller than the union": Mutant("boxes", "enclosing_w * (enclosing_h + 2 * EPS) + EPS\n            result", "enclosing_w * enclosing_h + EPS\n            result", IOU),
    "background's gradient finite after a logit that is not": Mutant("yolo11", "zero = tl.where(scale == scale, 0.0, scale)", "zero = tl.where(scale == scale, 0.0, 0.0)", f"{VALUES}::test_no_number_stays_at_its_anchor"),
    "infinite logits hidden": Mutant("boxes", "return half + tl.abs(half) + x * 0.0, tl", "return tl.maximum(x, 0.0), tl", f"{VALUES}::test_no_number_stays_at_its_anchor"),
    "bins not masked": Mutant("decode", "    if R != RP:\n        logits = tl.where((bins < R)[:, None], logits, float(\"-inf\"))\n", "", f"{LAUNCHES}::test_decode_dfl"),
    "store not masked": Mutant("decode", "boxes_ptr + offs, boxes, mask=mask_a[:, None])", "boxes_ptr + offs, boxes)", f"{LAUNCHES}::test_decode_dfl"),
    "channel address in 32 bits": Mutant("decode", "(side * R + bins).to(tl.int64)[:, None] * stride[2] + offs_a.to(tl.int64)[None, :] * stride[1]\n    logits", "(side * R + bins)[:, None] * stride[2] + offs_a.to(tl.int64)[None, :] * stride[1]\n    logits", f"{VALUES}::test_addresses_past_two_to_the_31"),
    "class address in 32 bits": Mutant("yolo11", "offs_c.to(tl.int64)[None, :] * logits_stride[2]", "offs_c[None, :] * logits_stride[2]", f"{VALUES}::test_addresses_past_two_to_the_31"),
    "level's cells counted from the first level": Mutant("grid", "is_past, anchors - start, index", "is_past, anchors, index", YOLO11),
    "rectangle starts a cell late": Mutant("grid", "- 0.501), 0)", "+ 0.499), 0)", YOLO11),
    "rectangle ends a cell early": Mutant("grid", "- 0.499) + 1, 0)", "- 0.499), 0)", YOLO11),
    "only the first level": Mutant("grid", "before += level_columns * level_rows", "before += 2 * level_columns * level_rows", YOLO11),
    "ties to the higher index": Mutant("topk", "return key, (0x7FFFFFFF - index).to(tl.int32)", "return key, index.to(tl.int32)", YOLO11),
    "one candidate too many": Mutant("topk", "place < K, tl.full((), -(1 << 31), tl.int32)", "place <= K, tl.full((), -(1 << 31), tl.int32)", YOLO11),
    "the list forgets the worst's place": Mutant("topk", "worst = tl.min(best, 1)[:, None]", "worst = tl.max(best, 1)[:, None]", TILES),
    "contested place not cleared": Mutant("rows", "    tl.store(best_ptr + cell, tl.full(cell.shape, LOWEST, tl.int64), mask=is_second)\n", "", YOLO11),
    "contested places listed by every late claim": Mutant("rows", "is_second = is_late & (earlier < CONTESTED)", "is_second = is_late", f"{VALUES}::test_small_boxes_among_many_that_want_the_same_anchors"),
    "contested list not cleared": Mutant("task_aligned", "tl.store(num_contested_ptr + image, 0)", "tl.store(num_contested_ptr + image, 1)", YOLO11),
    "contested list of YOLOX not cleared": Mutant("simota", "tl.store(num_contested_ptr + image, 0)", "tl.store(num_contested_ptr + image, 1)", YOLOX),
    "a short walk reads the list": Mutant("pairs", "        anchor = tl.where(is_listed, anchor, cell)\n", "", f"{VALUES}::test_small_boxes_among_many_that_want_the_same_anchors"),
    "contested only where it was claimed": Mutant("task_aligned", "mask & is_inside(x, y, wide, EPS)", "mask & is_inside(x, y, wide, EPS) & (x != x)", YOLO11),
    "contested claims of the winner counted twice": Mutant("task_aligned", "tl.where(is_claim, is_ours & (state == row), won)", "is_ours & ((state == row) | won)", YOLO11),
    "claims of other rows": Mutant("task_aligned", "row.to(tl.int64) * CLAIMS + nth", "0 * row.to(tl.int64) * CLAIMS + nth", YOLO11),
    "conflict unseen": Mutant("rows", "mask=is_claim, sem=\"relaxed\") >= 0)", "mask=is_claim, sem=\"relaxed\") > 1000)", YOLO11),
    "conflict by row only": Mutant("rows", "key, order = pack(value, offs_g", "key, order = pack(value * 0, offs_g", f"{VALUES}::test_contested_anchor_goes_to_the_higher_overlap_in_either_order"),
    "no tie break in float64": Mutant("task_aligned", "for is_tie_break in (False, True) if", "for is_tie_break in (False,) if", f"{VALUES}::test_equal_overlaps_go_to_the_lower_row_whatever_the_order"),
    "dropped anchors stay": Mutant("task_aligned", "tl.where(stays, row, -1), mask=is_ours", "tl.where(is_ours, row, -1), mask=is_ours", YOLO11),
    "no widening": Mutant("pairs", "if MIN_SIDE > 0:", "if MIN_SIDE > 100:", f"{VALUES}::test_short_sides_are_widened_for_the_candidate_test"),
    "claims race": Mutant("rows", "is_late = is_claim & (tl.atomic_max(target_row_ptr + cell, row, mask=is_claim, sem=\"relaxed\") >= 0)", "is_late = is_claim & (tl.load(target_row_ptr + cell, mask=is_claim, other=-1) >= 0)\n    tl.store(target_row_ptr + cell, row, mask=is_claim)", YOLO11),
    "padding counted": Mutant("rows", "is_gt = is_box & (image >= 0)", "is_gt = is_box & (image >= -9)", YOLO11),
    "zero metrics are selected": Mutant("topk", "return (key > none(key)) & ((key > worst)", "return ((key > worst)", STAGES),
    "DFL target not clamped": Mutant("yolo11", "R - 1 - 0.01, target", "R + 1.0, target", YOLO11),
    "share by the wrong side": Mutant("yolo11", "_of_side(side, x_share, y_share, x_share, y_share)\n            distance", "_of_side(side, y_share, x_share, y_share, x_share)\n            distance", "tests/kernels"),
    "background gradient not written": Mutant("yolo11", "tl.where(is_pos[None, :], grad, zero), offs_a, mask_a,", "grad, offs_a, is_pos,", YOLO11),
    "log of one minus p as it stands": Mutant("boxes", "tl.where(p <= 0.5, -_log1p(p / rest), tl.log(rest))", "tl.log(rest)", f"{VALUES}::test_log_of_one_minus_a_probability"),
    "keys of negative values not turned": Mutant("topk", "key = bits ^ ((bits >> 31) & 0x7FFFFFFF)", "key = bits", YOLOX),
    "float64 keys of negative values not turned": Mutant("topk", "key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)", "key = bits", YOLOX),
    "rank counts equal keys": Mutant("topk", "is_better = (other > own) |", "is_better = (other >= own) |", YOLOX),
    "a rectangle that does not reach": Mutant("grid", "middle - REACH * STRIDE)", "middle - STRIDE)", YOLOX),
    "size not halved in the gradient of raw boxes": Mutant("decode", "(y2 - y1) / 2 * tl.exp(raw[3])", "(y2 - y1) * tl.exp(raw[3])", DECODE_X),
    "no exponential in the gradient of raw boxes": Mutant("decode", "(x2 - x1) / 2 * tl.exp(raw[2])", "(x2 - x1) / 2", DECODE_X),
    "gradient of other channels not written": Mutant("decode", "    start = 4\n    while start < CHANNELS:", "    start = 5\n    while start < CHANNELS:", DECODE_X),
    "centre region includes its edge": Mutant("simota", "(tl.abs(y - centre[1]) < reach)", "(tl.abs(y - centre[1]) <= reach)", YOLOX),
    "inside the box is enough": Mutant("simota", "is_feasible = in_centre & in_box", "is_feasible = in_box", YOLOX),
    "only the centre region takes part": Mutant("simota", "takes_part = in_centre | in_box", "takes_part = in_centre", f"{VALUES}::test_anchors_in_the_box_take_part_in_the_paper_mode"),
    "infeasible pairs cost nothing": Mutant("simota", "tl.where(is_feasible, cost, cost + _INFEASIBLE_COST)", "cost", YOLOX),
    "logarithms not clamped": Mutant("simota", "tl.where(logs < -100, -100.0, logs)", "tl.where(logs < -1000, -1000.0, logs)", f"{VALUES}::test_logarithms_of_the_cost_are_clamped"),
    "cost without the class": Mutant("simota", "- _clamped(tl.log(probs))", "", YOLOX),
    "cost without the other classes": Mutant("simota", "cost = cost + _clamped(log_not(probs))", "cost = _clamped(log_not(probs))", YOLOX),
    "an undefined cost is no pair": Mutant("simota", "tl.where(cost < float(\"inf\"), cost, float(\"inf\")).to(DTYPE)", "cost", f"{VALUES}::test_no_number_of_yolox_stays_at_its_anchor"),
    "overlap weighs once": Mutant("simota", "cost + 3 * -tl.log(", "cost + 1 * -tl.log(", YOLOX),
    "k at least two": Mutant("simota", "tl.maximum(tl.sum(ious, 1) >> 52, 1)", "tl.maximum(tl.sum(ious, 1) >> 52, 2)", YOLOX),
    "k rounded": Mutant("simota", "tl.sum(ious, 1) >> 52", "(tl.sum(ious, 1) + (1 << 51)) >> 52", YOLOX),
    "k from three overlaps": Mutant("simota", "largest, largest_order = empty_list(BLOCK_G * PARTS, _MAX_DYNAMIC_K, _LIST, DTYPE)", "largest, largest_order = empty_list(BLOCK_G * PARTS, 3, _LIST, DTYPE)", YOLOX),
    "k from feasible pairs": Mutant("simota", "key = tl.where(mask & (iou > 0), key, none(key))", "key = tl.where(mask & (iou > 0) & (cost < 1e5), key, none(key))", YOLOX),
    "conflict to the dearest": Mutant("simota", "anchor, -cost, offs_g", "anchor, cost, offs_g", YOLOX),
    "conflict among feasible rows only": Mutant("simota", "-cost, offs_g, mask,", "-cost, offs_g, mask & (cost < 1e5),", YOLOX),
    "members of other images": Mutant("rows", "tl.load(anchors[0] + image * A + nth, mask", "tl.load(anchors[0] + 0 * image * A + nth, mask", YOLOX),
    "members listed more than once": Mutant("simota", "is_new = mask & (", "is_new = mask & (mask | ", YOLOX),
    "members not cleared": Mutant("simota", "tl.store(num_members_ptr + image, 0)", "tl.store(num_members_ptr + image, 1)", YOLOX),
    "certain classes cost nothing": Mutant("simota", "tl.where(probs >= 1, 100.0, 0.0)", "tl.where(probs >= 1, 0.0, 0.0)", f"{VALUES}::test_logarithms_of_the_cost_are_clamped"),
    "product of softplus without what is small": Mutant("yolo11", "tl.fma(excess, e, excess + e)", "excess + e", CLASSES),
    "product of probabilities without what is small": Mutant("simota", "tl.fma(probs, rest, p), tl", "p + probs, tl", f"{VALUES}::test_small_probabilities_of_several_tiles_add_up"),
    "places past K are merged": Mutant("topk", "tl.where(place < K, best, none(best))", "best", YOLO11),
    "weights of the positives forgotten": Mutant("yolo11", "        hit *= tl.load(weights_ptr + label, mask", "        hit *= tl.load(weights_ptr + 0 * label, mask", YOLO11),
    "words not cleared": Mutant("simota", "tl.zeros((BLOCK_A // 32,), tl.int32), mask=word < num_words)", "tl.zeros((BLOCK_A // 32,), tl.int32), mask=word < num_words - 1)", YOLOX),
    "padding counted as ground truth": Mutant("simota", "tl.sum(info[2].to(tl.int64))", "tl.sum((offs_g < N).to(tl.int64))", YOLOX),
    "anchors that take part may hold anything": Mutant("simota", "if state == _BROKEN:", "if state == -3:", f"{VALUES}::test_no_number_of_yolox_shows_where_it_takes_part"),
    "states that are not finite stay": Mutant("simota", "tl.maximum(state, -1))", "state)", f"{VALUES}::test_no_number_of_yolox_shows_where_it_takes_part"),
    "poison unseen": Mutant("simota", "            cls_poison += logits * 0.0\n", "", f"{VALUES}::test_no_number_of_yolox_stays_at_its_anchor"),
    "conflict ties to the higher row in float64": Mutant("simota", "for is_tie_break in (False, True) if dtype", "for is_tie_break in (False,) if dtype", YOLOX),
    "class target is one": Mutant("yolox", "target = tl.where(offs_c[None, :] == label[:, None], score[:, None], 0.0)", "target = tl.where(offs_c[None, :] == label[:, None], 1.0, 0.0)", YOLOX),
    "classes of background": Mutant("yolox", "cls += tl.where(mask, cross", "cls += tl.where((offs_c < C)[None, :], cross", YOLOX),
    "L1 always on": Mutant("yolox", "tl.where(tl.load(l1_gain_ptr) > 0, l1, 0.0)", "l1", YOLOX),
    "L1 without gradient": Mutant("yolox", "tl.where(is_l1, _sign(raw[3] - raw_target[3]), 0.0)", "0.0", YOLOX),
    "L1 target without the cell": Mutant("yolox", "gt_x / stride - x,", "gt_x / stride,", YOLOX),
    "IoU not squared": Mutant("yolox", "box = 1 - iou * iou", "box = 1 - iou", YOLOX),
    "gradient of IoU, not of its square": Mutant("yolox", "slope = -2 * iou", "slope = 0 * iou - 1", YOLOX),
    "normaliser forgotten backward": Mutant("yolox", "tl.load(grad_ptr).to(DTYPE) / tl.load(normaliser_ptr).to(DTYPE)", "tl.load(grad_ptr).to(DTYPE)", YOLOX),
    "batch size forgotten backward": Mutant("yolo11", "* tl.load(normaliser_ptr + 1).to(DTYPE) /", "/", YOLO11),
    "objectness gradient only on positives": Mutant("yolox", "is_logit = is_obj | (is_pos", "is_logit = (is_obj & is_pos[:, None]) | (is_pos", YOLOX),
    "class gradient off by a channel": Mutant("yolox", "channel == 5 + label[:, None]", "channel == 4 + label[:, None]", YOLOX),
    "normaliser held after a class logit that is not finite": Mutant("yolo11", "tl.store(held_ptr, normaliser)", "tl.store(held_ptr, tl.load(normaliser_ptr))", f"{VALUES}::test_no_number_stays_at_its_anchor"),
    "class weight forgotten backward": Mutant("yolo11", "        error = error * tl.load(weights_ptr + offs_c", "        error = error * tl.load(weights_ptr + 0 * offs_c", YOLO11),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_can_still_be_planted(name: str):
    source = (ROOT / "triton_yolo/kernels" / f"{MUTANTS[name].path}.py").read_text()
    assert source.count(MUTANTS[name].old) == 1


@pytest.mark.mutants
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistake_is_noticed(name: str, tmp_path: Path):
    if not INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter, which needs TRITON_INTERPRET=1")
    mutant = MUTANTS[name]
    for folder in ("triton_yolo", "reference", "tests", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "triton_yolo/kernels" / f"{mutant.path}.py"
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.path} has {source.count(mutant.old)} times {mutant.old!r}"
    path.write_text(source.replace(mutant.old, mutant.new))
    ignored = [f"--ignore=tests/kernels/test_{name}.py" for name in ("compile", "traffic", "mutants")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *ignored, mutant.test],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1, f"survived or did not run:\n{run.stdout[-2000:]}"
