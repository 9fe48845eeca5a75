"""Kernels of the mask term, launched as on a GPU: inside their memory, free of races, and with the result of the eager path."""

import pytest
import torch
import triton.language as tl
from torch import Tensor

from tests.compare import assert_same
from tests.kernels.cases import laid_out
from triton_yolo import _signatures as of
from triton_yolo import eager, kernels
from triton_yolo.kernels.plans import masks as plans

HEIGHT, WIDTH = 11, 21


def make_case(dtype: torch.dtype, *, channels: int = 5, layout: str = "first", overlap_mask: bool = True) -> of.MaskLoss:
    """Two images whose tiles are not full: boxes that end in a tile, cover several, reach out of the image or have no pixel."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor(
        [[5.0, 5, 26, 14], [0, 0, 84, 44], [-9, 30, 31, 90], [41, 9, 43, 11], [38.0, 3, 79, 41], [60, 20, 72, 36]]
    )
    row = torch.full((2, 140), -1, dtype=torch.int32)
    row[0, :137:8], row[0, 5], row[0, 137], row[1, 139] = 5, 0, 1, 4
    row[1, :6] = torch.tensor([3, 2, 3, 4, 2, 2])
    coefficients, prototypes = (
        torch.randn(2, 140, channels, generator=generator),
        torch.randn(2, channels, HEIGHT, WIDTH, generator=generator),
    )
    masks = torch.randint(5, (2, HEIGHT, WIDTH), generator=generator, dtype=torch.int32)
    if not overlap_mask:
        masks = torch.rand(6, HEIGHT, WIDTH, generator=generator)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    number, scale = torch.tensor([1, 2, 1, 2, 3, 3]), torch.tensor(1 / 16, dtype=working)
    return of.MaskLoss(
        laid_out(coefficients.to(dtype), layout), channels_last(prototypes.to(dtype), layout), row, boxes.to(working), masks,
        number, scale, of.ImageSize((44, 84)), overlap_mask, True,
    )  # fmt: skip


def channels_last(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "last" else x


@pytest.mark.parametrize(
    ("dtype", "channels", "layout", "overlap_mask"),
    [
        (torch.float32, 5, "first", True), (torch.float32, 32, "last", False), (torch.float64, 1, "split", True),
        (torch.float64, 3, "first", False), (torch.float16, 40, "spread", True), (torch.bfloat16, 8, "last", True),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("meter")
def test_mask_loss(dtype, channels, layout, overlap_mask):
    x = make_case(dtype, channels=channels, layout=layout, overlap_mask=overlap_mask)
    wanted = eager.mask_loss(x)
    assert_same(kernels.mask_loss(x), wanted)
    (loss, *_) = kernels.mask_loss(x._replace(wants_grad=False))
    assert_same([loss], wanted[:1])


@pytest.mark.usefixtures("shipped_sizes")
def test_no_number_shows_everywhere():
    x = make_case(torch.float32)
    x.prototypes[1, 2, 10, 3] = torch.inf  # in a box that reaches out of the image
    assert all(out.isnan().all() for out in kernels.mask_loss(x))


@pytest.mark.usefixtures("interpreted")
def test_tile_sizes_leave_no_trace():
    """But for the order of a sum."""
    x = make_case(torch.float64, channels=3)
    assert_same(kernels.mask_loss(x), eager.mask_loss(x), tolerance=1e-13)


def test_offsets_of_an_image_have_as_many_bits_as_they_take():
    last = torch.empty(4, 32769, 1, 1, device="meta").expand(4, 32769, 256, 256)
    for size, kind in ((32768, tl.int32), (32769, tl.int64)):
        assert plans._offset_type(torch.empty(2, 3), last[:, :size].as_strided((4, size, 256, 256), (0, 65536, 256, 1))) == kind


@pytest.mark.usefixtures("meter")
def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(plans, "_offset_type", lambda *tensors: tl.int64)
    x = make_case(torch.float32, channels=6)
    assert_same(kernels.mask_loss(x), eager.mask_loss(x))


@pytest.mark.usefixtures("meter")
def test_positives_of_more_than_one_program():
    """More positives of an image than programs, and than are looked for at once."""
    x = make_case(torch.float32, channels=2)
    row = torch.full((2, 700), 3, dtype=torch.int32)
    row[0], row[1, ::50], row[1, 640] = 5, 4, 2
    row[0, 3::4] = -1
    x = x._replace(target_row=row, coefficients=x.coefficients.repeat(1, 5, 1))
    assert_same(kernels.mask_loss(x), eager.mask_loss(x))
