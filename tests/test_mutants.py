"""The tests tested: every planted mistake must make a test fail. `make mutants`."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tools.mutation import REPOSITORY, Mutant, planted, run, sampled

EAGER, REFERENCE = "triton_yolo/eager", "reference"
STAGES, ASSIGNERS, LOSSES = "tests/test_stages.py::test", "tests/test_assigners.py::test", "tests/test_losses.py::test"
IOU, DECODING, DECODING_X = f"{STAGES}_bbox_iou", f"{STAGES}_decode_dfl", f"{STAGES}_decode_yolox"
PROB_IOU = f"{STAGES}_prob_iou"
METRIC, TOPK = f"{STAGES}_align_metric", f"{STAGES}_select_topk_candidates"
TAL, SIM = f"{ASSIGNERS}_task_aligned_assigner", f"{ASSIGNERS}_simota_assigner"
INFEASIBLE = f"{ASSIGNERS}_simota_where_infeasible_anchors_may_win"
COSTS = f"{SIM} {ASSIGNERS}_logarithm_of_a_probability_of_nothing_costs_a_hundred"
LOSS11, LOSSX = f"{LOSSES}_yolo11_loss", f"{LOSSES}_yolox_loss"
KEYPOINTS, OF_KEYPOINTS = "tests/test_keypoints.py::test", "tests/test_keypoint_reference.py"
MASKS, OF_MASKS = "tests/test_masks.py::test", "tests/test_mask_reference.py"
OBB = "tests/test_obb.py::test"
SPECIFICATION, ORIENTED = "tests/test_reference.py", "tests/test_oriented_reference.py"


class Planted(NamedTuple):
    mutant: Mutant
    test: str
    root: str = EAGER


MEANT = {
    "no eps in the union": Planted(Mutant("overlap", "_a + _b", "_a", 0, 2, at="union"), IOU),
    "aspect ratio upside down": Planted(Mutant("overlap", "torch.atan(_a / _b)", "torch.atan(_b / _a)", 0, 2), IOU),
    "a tie's gradient goes to one side": Planted(Mutant("share", "_n * _a", "_a"), IOU),
    "boxes that touch overlap on one side": Planted(Mutant("_above_zero", "_a / 2", "_a"), f"{STAGES}_gradient_of_touching_boxes_is_half_of_that_of_an_intersection"),
    "enclosing area smaller than the union": Planted(Mutant("overlap", "_a + 2 * _b", "_a", at="enclosing_area"), f"{STAGES}_giou_of_flat_boxes"),
    "intersection not clamped": Planted(Mutant("overlap", "_a.clamp_(min=0)", "_a", 0, 2), IOU),
    "alpha and beta swapped": Planted(Mutant("pair_metric", "power(_a, _b) * power(_c, _d)", "power(_a, _d) * power(_c, _b)"), METRIC),
    "no widening": Planted(Mutant("widen", "_a < _b", "_a < 0"), TAL),
    "ties to the higher anchor": Planted(Mutant("topk_per_row", "_a.sort(stable=True).indices", "_a.flip(0).sort(stable=True).indices.neg() + len(_a) - 1", at="by_metric"), TOPK),
    "conflict among claimants only": Planted(Mutant("match", "_a.index_select(0, _b).nonzero().squeeze(1)", "claims[_a[_b[claims]]]"), f"{ASSIGNERS}_contested_anchor_goes_to_the_best_candidate_although_it_claimed_another"),
    "conflict ties to the higher slot": Planted(Mutant("match", "'amin'", "'amax'"), TAL),
    "conflict by metric": Planted(Mutant("match", "_a.new_zeros(_b).scatter_reduce_(0, _c[_d], _e[_d], 'amax')", "_a.new_zeros(_b).scatter_reduce_(0, _c[_d], -_e[_d], 'amax')"), TAL),
    "second top-k forgotten": Planted(Mutant("match", "_a is not None", "False"), TAL),
    "largest overlap not applied": Planted(Mutant("match", "_a * _b[_c] / _d", "_a / _d"), TAL),
    "parts cut through images": Planted(Mutant("by_images", "torch.div(_a, _b, rounding_mode='floor')[_c]", "torch.div(10 * torch.arange(len(_c)), _b, rounding_mode='floor')"), f"{LOSSES}_crowded_batch_is_cut_by_images_without_a_trace"),
    "gradients finite after a logit that is not": Planted(Mutant("gradients_of", "_a.isnan()", "False"), f"{LOSSES}_yolo11_shows_a_prediction_that_is_no_number"),
    "infinite logits hidden": Planted(Mutant("loss_of", "_a.where(ends.are_finite(), _b)", "_a"), f"{LOSSES}_yolo11_shows_a_prediction_that_is_no_number"),
    "DFL weights swapped": Planted(Mutant("Positives.soft_bins", "(_a, _b, _c)", "(_a, _c, _b)"), LOSS11),
    "L1 by the wrong side of the image": Planted(Mutant("Positives.__init__", "[_a, _b, _a, _b]", "[_b, _a, _b, _a]"), LOSS11),
    "class weight forgotten on positives": Planted(Mutant("loss_of", "_weighted(_a * _b, _c, _d)", "_a * _b"), LOSS11),
    "batch size forgotten": Planted(Mutant("loss_of", "_a[1] * _b", "_b"), LOSS11),
    "infeasible pairs cost nothing": Planted(Mutant("INFEASIBLE_COST", "_n", "0.0"), SIM),
    "equal costs to the higher anchor": Planted(Mutant("cheapest_k", "_a.cumsum(1)", "_a.flip(1).cumsum(1).flip(1)"), SIM),
    "later blocks win ties": Planted(Mutant("_cheapest_rows", "_a < _b", "_a <= _b", 0, 3, at="is_cheaper"), f"{ASSIGNERS}_crowded_image_is_cut_into_blocks_without_a_trace"),
    "feasible anchors are always cheaper": Planted(Mutant("_choose_rows", "_a / 2", "torch.inf"), INFEASIBLE),
    "conflict among feasible rows only": Planted(Mutant("_choose_rows", "_cheapest_rows([_a, _b], _c, _d)", "_cheapest_rows([_a], _c, _d)"), INFEASIBLE),
    "positives may hold anything": Planted(Mutant("yolox_assign", "_a & is_finite(_b)", "_a"), f"{LOSSES}_only_a_chosen_cell_shows_that_its_logits_are_no_numbers"),
    "class target is one": Planted(Mutant("_loss", "_a[_c] * _b[_c]", "_a[_c]"), LOSSX),
    "oriented: turned boxes cross by the wrong axis": Planted(Mutant("_Pair.measures", "_a.mul_(self.sin)", "_a.mul_(self.cos)"), PROB_IOU),
    "oriented: a gradient past the bounds": Planted(Mutant("ProbOverlap.derivative", "_a.masked_fill(_b, 0)", "_a"), f"{STAGES}_equal_oriented_boxes_overlap_fully_with_no_way_up"),
    "oriented: rectangles around boxes as if upright": Planted(Mutant("upright_bounds", "_a * _b + _a.flip(1) * _c", "_a"), f"{ASSIGNERS}_oriented_boxes_have_the_points_on_their_diagonals"),
    "oriented: edges are outside": Planted(Mutant("is_inside_oriented", "_a <= _b", "_a < _b", 0, 2), f"{ASSIGNERS}_points_on_the_edge_of_an_oriented_box_are_candidates"),
    "oriented: points beside a box overlap it by nothing": Planted(Mutant("_pairs_of_points", "torch.cat(_a).nonzero()", "(torch.cat(_a) | True).nonzero()"), f"{ASSIGNERS}_points_beside_an_oriented_box_are_no_candidates_where_overlaps_do_not_count"),
    "oriented: strips end outside": Planted(Mutant("_trim", "_a[_b].bincount(minlength=len(_c))", "_a.bincount(minlength=len(_c))"), f"{OBB}_no_anchor_inside_a_box_is_missed"),
    "products of too many factors": Planted(Mutant("_LOW", "_n", "100"), f"{LOSSES}_without_targets_every_logit_costs_its_softplus"),
    "oriented: spans without a hair": Planted(Mutant("span_oriented", "_n * (_a + _b + _c + _d)", "0 * (_a + _b + _c + _d)"), f"{OBB}_no_anchor_inside_a_box_is_missed"),
    "keypoints: a gradient where nothing is left": Planted(Mutant("_Positives.slopes", "_a.where(_b > 0, 0)", "_a"), f"{KEYPOINTS}_a_huge_number_costs_as_much_as_it_can_and_pulls_no_more"),
    "keypoints: all count as visible": Planted(Mutant("_Truth.__init__", "_a != 0", "_a == _a"), f"{KEYPOINTS}_keypoint_loss"),
    "keypoints: positives may hold anything": Planted(Mutant("keypoint_loss", "_a.where(_b, torch.nan)", "_a"), f"{KEYPOINTS}_no_number_of_a_positive_shows_everywhere"),
    "keypoints: gradients of float16 too soon": Planted(Mutant("held_gradient", "_a == torch.float16", "False"), f"{KEYPOINTS}_gradients_of_float16_wait_for_the_loss_scale", "triton_yolo/_signatures"),
    "reference: keypoints unseen by sign": Planted(Mutant("is_visible", "_a != 0", "_a > 0"), OF_KEYPOINTS, REFERENCE),
    "reference: keypoints at the centre of the cell": Planted(Mutant("decode_keypoints", "_a - 0.5", "_a"), OF_KEYPOINTS, REFERENCE),
    "reference: mean over all keypoints": Planted(Mutant("keypoint_distance", "_a.sum(-1).clamp(min=1)", "_a.shape[1]"), OF_KEYPOINTS, REFERENCE),
    "masks: a box begins at the pixel that it begins in": Planted(Mutant("_rectangles", "_a.ceil()", "_a.floor()"), f"{MASKS}_mask_loss"),
    "masks: a sum over pixels, not a mean": Planted(Mutant("_rectangles", "1 / _a", "1 + 0 * _a"), f"{MASKS}_mask_loss"),
    "masks: the number of another row": Planted(Mutant("_Image.mask", "_a == _b", "_a == _b + 1"), f"{MASKS}_a_mask_by_hand"),
    "masks: a large logit's small loss is rounded": Planted(Mutant("_cross_entropy", "_a.sum() + F.softplus(_b).sum()", "(_a + F.softplus(_b) + 64 - 64).sum()"), f"{MASKS}_a_small_loss_of_large_logits_keeps_its_digits"),
    "masks: infinite logits hidden": Planted(Mutant("mask_loss", "not _a and (not _b)", "False"), f"{MASKS}_what_is_not_finite_shows_inside_a_box"),
    "masks: rows numbered in the batch": Planted(Mutant("numbers_in_images", "_a - torch.searchsorted(_b, _b)", "_a"), f"{MASKS}_rows_are_numbered_in_their_images", "triton_yolo/masks.py"),
    "reference: masks of a box with its last pixel": Planted(Mutant("inside", "_a < _b", "_a <= _b", 0, 2), OF_MASKS, REFERENCE),
    "reference: masks by the area inside the image": Planted(Mutant("mask_loss", "(_a - _b).prod(1)", "_a.prod(1)"), OF_MASKS, REFERENCE),
    "oriented: two pixels are too short": Planted(Mutant("is_valid", "_a >= _b", "_a > _b", 2, 3), f"{OBB}_rows_shorter_than_two_pixels_are_ignored", "triton_yolo"),
    "oriented: infinite angles hidden": Planted(Mutant("yolo11_obb_assign", "_a & is_finite(_b)", "_a"), f"{OBB}_a_prediction_that_is_no_number_shows"),
    "oriented: distances in the frame of the image": Planted(Mutant("OrientedPositives.locate", "turned(_a.T, -_b[:, 4])", "turned(_a.T, 0 * _b[:, 4])"), f"{OBB}_loss"),
    "oriented: long boxes turn as hard as square ones": Planted(Mutant("OrientedPositives.locate", "_a / 3", "_a / 300"), f"{OBB}_loss"),
    "oriented: the angle moves no centre": Planted(Mutant("OrientedPositives.gradients", "_a + _b * _c - _d * _e + _f", "_a + _f"), f"{OBB}_loss"),
    "reference: eps in the widths": Planted(Mutant("bbox_iou", "(_a - _b, _c - _d + _e)", "(_a - _b + _e, _c - _d + _e)", 0, 2), SPECIFICATION, REFERENCE),
    "reference: conflict among all slots": Planted(Mutant("resolve_conflicts", "_a.where(_b, -1)", "_a"), SPECIFICATION, REFERENCE),
    "reference: covariance of the other turn": Planted(Mutant("covariance", "(_a - _b) * _c * _d", "(_b - _a) * _c * _d"), ORIENTED, REFERENCE),
    "reference: distances in the frame of the image": Planted(Mutant("sides_from", "turn(_a, -_b)", "turn(_a, 0 * _b)"), ORIENTED, REFERENCE),
    "reference: DFL target not clamped": Planted(Mutant("dfl_loss", "_a - _n", "_a - 0.5", 0, 2), SPECIFICATION, REFERENCE),
}  # fmt: skip

# Any slip in these functions; so many of them are tried.
SLIPS = {
    "overlap": (IOU, 2), "overlap_derivative": (IOU, 3), "ProbOverlap.derivative": (PROB_IOU, 2), "expectation_backward": (LOSS11, 1), "boxes_from_distances": (DECODING, 1),
    "yolox_raw_grad": (DECODING_X, 1), "is_inside": (SIM, 1), "topk_per_row": (TOPK, 2), "grid_pairs": (LOSS11, 2),
    "point_pairs": (TAL, 1), "Regions.in_centre": (SIM, 1), "_costs": (COSTS, 2), "dynamic_k": (SIM, 1),
    "_Positives.slopes": (f"{KEYPOINTS}_keypoint_loss", 1), "cheapest_k": (SIM, 1), "boxes_from_raw": (DECODING_X, 1), "_gather_members": (SIM, 1),
}  # fmt: skip
ALIKE = {"point_pairs: _a > _b -> _a >= _b": "the test of each pair follows", "point_pairs: _a < _b -> _a <= _b": "the same"}
"""Slips that change no result, and why."""

PLANTED = {
    **MEANT,
    **{
        str(mutant): Planted(mutant, test)
        for function, (test, number) in SLIPS.items()
        for mutant in sampled(function, REPOSITORY / EAGER, number, list(ALIKE))
    },
}


@pytest.mark.mutants
@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake_is_noticed(name: str, tmp_path: Path):
    mutant, test, root = PLANTED[name]
    done = run(mutant, root, test, tmp_path, HYPOTHESIS_PROFILE="mutants")
    assert done.returncode == 1, f"survived or did not run:\n{done.output[-2000:]}"


@pytest.mark.mutants
def test_mistake_elsewhere_is_not_noticed(tmp_path: Path):
    mutant, _, root = PLANTED["DFL weights swapped"]
    done = run(mutant, root, IOU, tmp_path)
    assert done.returncode == 0, done.output[-2000:]


@pytest.mark.parametrize("name", PLANTED)
def test_mistake_can_still_be_planted(name: str):
    mutant, _, root = PLANTED[name]
    planted(mutant, REPOSITORY / root)
