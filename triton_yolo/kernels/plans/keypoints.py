"""Launches of the keypoints' loss."""

import torch

from ..._signatures import KeypointLoss, KeypointLossOutputs
from ..arguments import Grid, Tensor2, compute_type, tensor3
from ..keypoints import (
    FILL_BLOCK,
    Counts,
    Gradients,
    Kind,
    Results,
    Truth,
    _keypoint_fill_kernel,
    _keypoint_positives_kernel,
    _keypoint_total_kernel,
    tile_sizes,
)
from ..launch import INTERPRETED, Launch, Plan, Run, Workspace, cdiv, new, run
from ..reduce import TOTAL_SIZES


class _KeypointPlan(Plan):
    def __init__(self, x: KeypointLoss, out: KeypointLossOutputs, num_rows: int) -> None:
        (batch_size, num_anchors, _), dtype = x.pred_keypoints.shape, out.loss.dtype
        kind, num_keypoints = compute_type(dtype), len(x.sigmas)
        self.count = batch_size * num_anchors if num_rows else 0
        tile, num_warps = tile_sizes(self.count, num_keypoints)
        self.programs = cdiv(self.count, tile.SLOTS)
        self.positives = Launch(
            _keypoint_positives_kernel, num_warps, STRIDES=x.levels.strides,
            KIND=Kind(x.sigmas, x.num_dims, x.gt_keypoints.shape[2]), TILE=tile, DTYPE=kind,
        )  # fmt: skip
        self.fill = Launch(_keypoint_fill_kernel, 4, BLOCK=FILL_BLOCK)
        self.total = Launch(_keypoint_total_kernel, K=num_keypoints, DTYPE=kind, **TOTAL_SIZES)
        self.num_grads = out.grad_pred_keypoints.numel() if x.wants_grad else 0
        self.grid, self.batch_size = Grid(x.levels.feat_shapes, num_anchors), batch_size
        self.size = x.levels.image_size if x.is_normalised else (1.0, 1.0)
        used = {self.total: True, self.positives: self.programs, self.fill: self.num_grads}
        buffers = {"places": (torch.int32, self.count), "partial": (dtype, 2 * self.programs)}
        super().__init__(Workspace(buffers), *[launch for launch, is_used in used.items() if is_used])

    def launch(self, run: Run) -> None:
        x, out, address = run.x, run.out, run.address
        grads, slopes = None, None
        if x.wants_grad:
            grads = new(Gradients, (address(out.grad_pred_keypoints), self.num_grads, address(out.grad_other_loss)))
            slopes = tensor3(address, out.grad_pred_keypoints)
            if self.num_grads:
                self.fill(run.stream, (cdiv(self.num_grads, FILL_BLOCK), 1, 1), grads.ptr, self.num_grads)
        images = None if x.num_images is None else address(x.num_images)
        counts = new(Counts, (address(x.num_fg), images, self.batch_size))
        if self.programs:
            sizes = new(Tensor2, (address(x.gt_sizes), *x.gt_sizes.stride()))
            truth = new(Truth, (address(x.target_row), tensor3(address, x.gt_keypoints), sizes))
            self.positives(
                run.stream, (self.programs, 1, 1), run.buffers.partial, run.buffers.places, slopes,
                tensor3(address, x.pred_keypoints), truth, counts, self.grid, *self.size, *x.gains, self.count,
            )  # fmt: skip
        programs = 1 if grads is None or INTERPRETED else 8, 1, 1
        results = new(Results, (address(out.loss), (address(out.pose), address(out.kobj))))
        self.total(
            run.stream, programs, results, grads, run.buffers.partial, address(x.other_loss), counts, *x.gains, self.programs
        )


def keypoint_loss(x: KeypointLoss) -> KeypointLossOutputs:
    out = x.allocate()
    run(_KeypointPlan, x, out, x.gt_keypoints.shape[0])
    return out
