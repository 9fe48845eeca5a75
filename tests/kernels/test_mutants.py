"""The kernels' tests tested: every planted mistake must make one fail. They run kernels, so ``TRITON_INTERPRET=1``."""

from pathlib import Path

import pytest

from tests.tools.mutation import REPOSITORY, Mutant, planted, run, sampled
from triton_yolo.kernels.launch import INTERPRETED

KERNELS = "triton_yolo/kernels"
LAUNCHES, VALUES = "tests/kernels/test_launches.py::test", "tests/kernels/test_values.py::test"
OBB_ = "tests/test_obb.py::test"
OBB = "tests/kernels/test_obb.py::test_parts_beside_the_eager_backend"
YOLO11, YOLOX, IOU, STAGES = (f"{LAUNCHES}_{name}" for name in ("yolo11", "yolox", "bbox_iou", "padded_stages"))
PROB_IOU, KEYPOINTS = f"{LAUNCHES}_prob_iou", f"{LAUNCHES}_keypoint_loss"
DECODE, DECODE_X, UNPACK = (f"{LAUNCHES}_{name}" for name in ("decode_dfl", "decode_yolox", "unpack_rows"))
SIMOTA, CLASSES = f"{LAUNCHES}_simota_with_points_in_any_order", f"{LAUNCHES}_classes_of_several_tiles"
TILES = f"{LAUNCHES}_tile_sizes_leave_no_trace_in_the_assignment"
TILES_X = f"{LAUNCHES}_tile_sizes_leave_no_trace_in_yolox_assignment"
ANY_YOLOX = "tests/test_losses.py::test_yolox_loss"
CRITERION = "tests/kernels/test_criteria.py::test_yolo11_is_the_sum_of_its_parts"
CRITERION_X = "tests/kernels/test_criteria.py::test_yolox_is_the_sum_of_its_parts"
FAR, BROKEN, BROKEN_X = (
    f"{VALUES}_{name}"
    for name in ("addresses_past_two_to_the_31", "no_number_stays_at_its_anchor", "no_number_of_yolox_stays_at_its_anchor")
)
TAKES_PART = f"{VALUES}_no_number_of_yolox_shows_where_all_anchors_have_it"
CROWD, CLAMPED = (
    f"{VALUES}_{name}" for name in ("small_boxes_among_many_that_want_the_same_anchors", "logarithms_of_the_cost_are_clamped")
)
MASKS, MASKS_BROKEN = (f"tests/kernels/test_masks.py::test_{name}" for name in ("mask_loss", "no_number_shows_everywhere"))
LOG_NOT = f"{VALUES}_log_of_one_minus_a_probability"

MEANT = {
    "eps missing from the union": (Mutant("overlap", "_a + _b", "_a", 0, 2, at="union"), IOU),
    "negative heights not turned": (Mutant("shape_angle", "(_a < 0) != (_b < 0)", "_a != _a"), IOU),
    "a tie's derivative goes to one side": (Mutant("overlap_derivative", "tl.where(_a == _b, 0.5, _c)", "tl.where(_a == _b, 1.0, _c)", 0, 4), IOU),
    "boxes that touch overlap on one side": (Mutant("overlap_derivative", "tl.where(_a == 0, _b / 2, 0.0)", "tl.where(_a == 0, _b, 0.0)", 0, 2), IOU),
    "fast exponential of a small distance": (Mutant("one_less_exp", "tl.where(_a < 0.5, _b, _c)", "_c"), PROB_IOU),
    "angles as they come": (Mutant("_half_turns", "tl.floor(_a)", "0.0 * _a"), f"{PROB_IOU}_of_any_angle"),
    "angles of ground truth forgotten": (Mutant("load_oriented_rows", "_a + _b.to(tl.int64) * _c + 4 * _d", "_a + _b.to(tl.int64) * _c + 3 * _d"), f"{LAUNCHES}_oriented_boxes"),
    "half a turn is none": (Mutant("heading", "tl.where(_a, -_b, _b)", "_b", 0, 2), OBB),
    "walks as if boxes were upright": (Mutant("_around", "_a * _b + _c * _d", "_a", 0, 2), OBB),
    "two pixels are too short": (Mutant("_is_gt", "_a >= PACK.MIN_SIDE", "_a > PACK.MIN_SIDE", 0, 2), f"{OBB_}_rows_shorter_than_two_pixels_are_ignored"),
    "angles that are infinite count": (Mutant("_is_gt", "tl.abs(_a) < float('inf')", "_a == _a", 4, 5), f"{OBB_}_rows_shorter_than_two_pixels_are_ignored"),
    "infinite predicted angles hidden": (Mutant("_yolo11_prepare_kernel", "_a[None, :] * 0.0", "_a[None, :] * 0.0 * 0"), f"{OBB_}_a_prediction_that_is_no_number_shows"),
    "distances in the frame of the image": (Mutant("_target_sides", "_a * _b + _c * _d", "_a"), OBB),
    "the angle moves no centre": (Mutant("_oriented_gradient", "_a + _b * _c - _d * _e", "_a"), OBB),
    "long boxes turn as hard as square ones": (Mutant("_roundness", "tl.log(_a) / 3", "tl.log(_a) / 300"), OBB),
    "log of one minus p as it stands": (Mutant("log_rest", "tl.where(_a <= 0.5, _b, _c)", "_c"), LOG_NOT),
    "infinite logits hidden": (Mutant("split_softplus", "_a + tl.abs(_a) + _b * 0.0", "tl.maximum(_b, 0.0)"), BROKEN_X),
    "infinite class logits hidden": (Mutant("_yolo11_class_kernel", "tl.sum(_a.to(_b) * 0.0)", "0.0"), BROKEN),
    "similarity of COCO's keypoints for all": (Mutant("_per_variance", "_a == _b", "_a == _a"), KEYPOINTS),
    "positives left with gaps among keypoints": (Mutant("_leave_positives", "_a - 1", "_a"), KEYPOINTS),
    "unseen keypoints count": (Mutant("_load_truth", "_a & _b & (_c != 0)", "_a & _b"), KEYPOINTS),
    "flags of all lanes": (Mutant("_keypoint_positives_kernel", "tl.where(_a, _b, 0.0)", "_b"), KEYPOINTS),
    "keypoints of positives may hold anything": (Mutant("_keypoint_positives_kernel", "_a + (_b * 0.0 + _c * 0.0)", "_a"), "tests/test_keypoints.py::test_no_number_of_a_positive_shows_everywhere"),
    "masks: a box begins at the pixel that it begins in": (Mutant("_edge", "tl.ceil(_a)", "tl.floor(_a)"), MASKS),
    "masks: a sum over pixels, not a mean": (Mutant("_pack_pixels", "1 / _a", "1 + 0 * _a"), MASKS),
    "masks: a tile skips groups": (Mutant("_mask_prototype_kernel", "_a > _b", "_a > _b + 1", 2, 3), MASKS),
    "masks: a tile looks for what covers all of it": (Mutant("_mask_prototype_kernel", "_a < _b + COLUMNS", "_a < _b + 1"), MASKS),
    "masks: pixels beside the box count": (Mutant("_error", "tl.where(_a, _b - _c, 0.0)", "_b - _c"), MASKS),
    "masks: a group has no end": (Mutant("load_group", "_a < tl.load(_b + 1)", "_a >= 0"), MASKS),
    "masks: what does not fit a group is left": (Mutant("_mask_group_kernel", "_a % GROUP == 0", "_a == 0"), MASKS),
    "masks: a positive comes before itself": (Mutant("_mask_sort_kernel", "_a[None, :] < _b[:, None]", "_a[None, :] <= _b[:, None]", 1, 2), MASKS),
    "masks: parts left out": (Mutant("_mask_merge_kernel", "_a * _b // _c < _d", "_a * _b // _c + 1 < _d"), MASKS),
    "masks: infinite logits hidden": (Mutant("_mask_prototype_kernel", "tl.load(_a).to(_b) + tl.load(_c)", "tl.load(_a).to(_b)"), MASKS_BROKEN),
    "bins not masked": (Mutant("side_logits", "tl.where(_a, _b, float('-inf'))", "_b"), DECODE),
    "store not masked": (Mutant("_decode_dfl_kernel", "_a[:, None]", "_a[:, None] | True", 2, 3), DECODE),
    "channel address in 32 bits": (Mutant("side_logits", "_a.to(tl.int64)", "_a", 0, 2), FAR),
    "only the first level": (Mutant("rectangle_cells", "_a * _b", "2 * _a * _b", at="before"), YOLO11),
    "ties to the higher index": (Mutant("ordered", "_n - _a", "_a"), YOLO11),
    "the list forgets the worst's place": (Mutant("_worst_of", "tl.min(_a, 1)[:, None]", "tl.max(_a, 1)[:, None]", 0, 2), TILES),
    "one candidate too many": (Mutant("empty_list", "_a < _b", "_a <= _b", 1, 2), YOLO11),
    "contested places listed by every late claim": (Mutant("claim_owned", "_a & (_b < CONTESTED)", "_a", 1, 2), CROWD),
    "conflict unseen": (Mutant("claim_owned", "_a >= 0", "_a > 1000"), YOLO11),
    "conflict by row only": (Mutant("contest", "pack(_a, _b, _c)", "pack(_a * 0, _b, _c)"), f"{VALUES}_contested_anchor_goes_to_the_higher_overlap_in_either_order"),
    "contested list not cleared": (Mutant("_clear", "tl.store(_a, 0)", "tl.store(_a, 1)"), YOLO11),
    "a short walk reads the list": (Mutant("load_contested", "tl.where(_a, _b, _c)", "_b"), CROWD),
    "claims of other rows": (Mutant("_owned_pairs", "_a + _b.row.to(tl.int64) * _c + _d", "_a + _d"), YOLO11),
    "dropped anchors stay": (Mutant("_settle", "tl.where(_a, _b, -1)", "_b + 0 * tl.where(_a, _b, -1)"), YOLO11),
    "no widening": (Mutant("widened", "_a > 0", "_a > 100"), f"{VALUES}_short_sides_are_widened_for_the_candidate_test"),
    "places past K are merged": (Mutant("merged", "tl.where(_a < _b, _c, none(_c))", "_c"), TILES_X),
    "members listed more than once": (Mutant("_enlist", "_a & ((_b & _c) == 0)", "_a"), YOLOX),
    "k at least two": (Mutant("_dynamic_k", "tl.maximum(_a, 1)", "tl.maximum(_a, 2)"), YOLOX),
    "k rounded": (Mutant("_dynamic_k", "_a >> 52", "(_a + (1 << 51)) >> 52"), YOLOX),
    "infeasible pairs cost nothing": (Mutant("_INFEASIBLE_COST", "_n", "0.0"), YOLOX),
    "logarithms not clamped": (Mutant("_clamped", "tl.where(_a < -100, -100.0, _a)", "tl.where(_a < -1000, -1000.0, _a)"), CLAMPED),
    "conflict to the dearest": (Mutant("_simota_contest_kernel", "-_a", "_a"), YOLOX),
    "box logits of positives may hold anything": (Mutant("_box_terms", "_a * 0.0 + _b + _c + _d", "_a * 0.0"), TAKES_PART),
    "class logits of positives may hold anything": (Mutant("_class_terms", "tl.fma(_a, 0.0, _b)", "_b"), TAKES_PART),
    "a place with many large IoUs forgets some": (Mutant("_list_ious", "tl.min(_a) == 0", "tl.min(_a) < 0", 0, 2), TILES_X),
    "contested anchors counted twice": (Mutant("claim_owned", "_a & ~_b", "_a"), YOLOX),
    "positives left with gaps": (Mutant("_leave", "_a - 1", "_a"), CRITERION_X),
    "class target is one": (Mutant("class_losses", "_a - _b * _c", "_a - _b"), YOLOX),
    "L1 always on": (Mutant("store_terms", "tl.where(_a > 0, _b, 0.0)", "_b"), YOLOX),
    "gradient of IoU, not of its square": (Mutant("box_gradient", "-2 * _a", "0 * _a - 1"), YOLOX),
    "objectness gradient only on positives": (Mutant("store_logit_gradient", "_a | _b", "_b"), YOLOX),
    "DFL target not clamped": (Mutant("_bin_target", "_a - 0.01", "_a + 1"), YOLO11),
    "product of softplus without what is small": (Mutant("_yolo11_class_kernel", "tl.fma(_a, 1 + _b, _b)", "_a + _b"), CLASSES),
    "weights of the positives forgotten": (Mutant("load_labels", "tl.load(_a + _b, mask=_c, other=0.0)", "tl.load(_a + 0 * _b, mask=_c, other=0.0)", 0, 2), YOLO11),
    "batch size forgotten backward": (Mutant("loss_scale", "_a / _b", "1 / _b"), YOLO11),
}  # fmt: skip

# Any slip in these functions; so many of them are tried.
SLIPS = {
    "overlap": (IOU, 3), "overlap_derivative": (IOU, 5), "prob_overlap_derivative": (PROB_IOU, 2), "shape_angle": (IOU, 2), "arctangent": (IOU, 1), "_log1p": (LOG_NOT, 1),
    "keypoint_slope": (KEYPOINTS, 2), "_errors": (KEYPOINTS, 2), "expectation": (DECODE, 1), "raw_corners": (DECODE_X, 1), "raw_grad": (DECODE_X, 1), "cell_centres": (YOLO11, 1),
    "cell_span": (YOLO11, 1), "rectangle_cells": (YOLO11, 2), "rectangle_size": (YOLO11, 1), "widened": (YOLO11, 1),
    "pair_overlaps": (YOLO11, 1), "pair_metrics": (YOLO11, 1), "_is_gt": (YOLOX, 1), "_load_raw_rows": (UNPACK, 2),
    "claim_owned": (YOLO11, 1), "best_of": (YOLO11, 1), "merge_parts": (TILES, 1), "_claimed_anchors": (CRITERION, 2), "winner": (YOLO11, 1), "_owned_pairs": (YOLO11, 2), "rank": (YOLOX, 1), "is_among": (YOLO11, 1),
    "in_centre": (SIMOTA, 2), "_region_cells": (ANY_YOLOX, 2), "pair_costs": (YOLOX, 2), "_true_boxes": (YOLO11, 1), "target_boxes": (YOLOX, 2),
    "side_losses": (YOLO11, 1), "write_bin_grads": (YOLO11, 2), "_bin_weight": (YOLO11, 1), "_raw_slope": (YOLOX, 1),
}  # fmt: skip
ALIKE: dict[str, str] = {}
"""Slips that change no result, and why."""

PLANTED = {
    **MEANT,
    **{
        str(mutant): (mutant, test)
        for function, (test, number) in SLIPS.items()
        for mutant in sampled(function, REPOSITORY / KERNELS, number, list(ALIKE))
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_mistake_can_still_be_planted(name: str):
    planted(PLANTED[name][0], REPOSITORY / KERNELS)


@pytest.mark.mutants
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake_is_noticed(name: str, tmp_path: Path):
    if not INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter, which needs TRITON_INTERPRET=1")
    mutant, test = PLANTED[name]
    done = run(mutant, KERNELS, test, tmp_path)
    assert done.returncode == 1, f"survived or did not run:\n{done.output[-2000:]}"
