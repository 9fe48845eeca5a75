"""The one table of tolerances, and which assignments are decided by more than rounding."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Largest error against the specification in float64, relative to the largest expected value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Of kernels beside the eager backend, which takes the same steps in another order; two roundings of the type at least.
BETWEEN_BACKENDS = 2e-6
# Of one elementary function, relative to every single value.
OF_A_FUNCTION = {torch.float64: 1e-14, torch.float32: 1e-6}
# Of kernels' sums of the same numbers in another order, in units of the type's last place.
OF_AN_ORDER = 4
# Of a trainer's step beside the stock one: an untrained network's small class loss is itself 1.5e-5 off in their float32.
OF_A_STEP = 1e-4


def assert_close(
    actual: Tensor, expected: Tensor, what: str = "value", tolerance: float | None = None, size_of_terms: float = 1e-12
) -> None:
    """Compare the largest and the RMS error with the tolerance of ``actual``'s type.

    Where the expected values are sums that cancel, ``size_of_terms`` is what rounding is relative to.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual_64, expected_64 = actual.detach().double().cpu(), expected.detach().double().cpu()
    undefined = expected_64.isnan()
    assert torch.equal(actual_64.isnan(), undefined), f"{what}: NaN in other places than expected"
    actual_64, expected_64 = actual_64[~undefined], expected_64[~undefined]
    if expected_64.numel() == 0:
        return
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    size_of_terms = max(size_of_terms, torch.finfo(actual.dtype).tiny)  # below it a type has the same spacing everywhere
    scale = expected_64.abs().max().clamp(min=size_of_terms)
    error = (actual_64 - expected_64).abs()
    assert error.max() <= tolerance * scale, f"{what}: largest error {error.max():.3g} of {scale:.3g}"
    rms = expected_64.square().mean().sqrt().clamp(min=size_of_terms)
    assert error.square().mean().sqrt() <= tolerance * rms, f"{what}: RMS error too large"


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = BETWEEN_BACKENDS) -> None:
    """Compare what both backends return: integers and flags to the bit, numbers relative to the largest and to 1."""
    for have, want in zip(actual, expected, strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        if not want.dtype.is_floating_point:
            assert torch.equal(have, want)
        else:
            bound = max(tolerance, 2 * torch.finfo(want.dtype).eps) * max(1.0, want.abs().max().item() if want.numel() else 0)
            torch.testing.assert_close(have, want, rtol=0, atol=bound)


def assert_same_but_for_order(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Compare losses and terms of the same ground truth among other padding: kernels sum by row, eager PyTorch by anchor."""
    from tests.conftest import DEVICE
    from triton_yolo import _backend

    order = 0 if _backend.current() != "triton" and DEVICE.type == "cpu" else OF_AN_ORDER
    for have, want in zip(actual, expected, strict=True):
        rtol = order * torch.finfo(want.dtype).eps if want.dtype.is_floating_point else 0
        torch.testing.assert_close(have, want, rtol=rtol, atol=0, equal_nan=True)


def is_decided(values: Tensor, count: Tensor | int, rtol: float = 1e-5, atol: float = 0.0) -> bool:
    """Whether the ``count`` largest of every row of ``values`` (n, m), in float64, are a matter of more than rounding.

    An exact tie is decided: the tie rule says how. Values that differ by less than float32 resolves are not, beside a tie too.
    """
    if values.shape[1] < 2:
        return True
    ordered = values.double().sort(dim=1, descending=True).values
    count = torch.as_tensor(count, device=values.device).expand(len(values))
    boundary = count.clamp(1, values.shape[1] - 1)[:, None]
    inside, outside = ordered.gather(1, boundary - 1), ordered.gather(1, boundary)
    resolved = rtol * inside.abs() + atol
    is_rival = ((ordered - inside).abs() <= resolved) & (inside - outside <= resolved)
    return not bool((is_rival & (ordered != inside) & (count[:, None] < values.shape[1])).any())


def is_assignment_decided(
    metric: Tensor, overlaps: Tensor, topk: int, topk2: int | None, computed_in: torch.dtype = torch.float32
) -> bool:
    """The same for a task-aligned assignment by float64 ``metric`` and ``overlaps`` (B, G, A)."""
    import reference

    tiny = ((metric > 0) & (metric < 1e-35)) | ((overlaps > 0) & (overlaps < 1e-6))
    if tiny.any() or metric.shape[1] == 0:
        return not bool(tiny.any())
    claims = reference.select_topk_candidates(metric, topk)
    best = (overlaps * claims).amax(-1)
    if computed_in != torch.float64 and ((best > 0) & (best < 1e-2)).any():
        return False  # a CIoU of a hundredth is a difference that float32 resolves to 1e-5 of it, and it scales the loss
    if not is_decided(metric.flatten(0, 1), topk):
        return False
    contested = (claims.sum(1) > 1).flatten()
    if not is_decided(overlaps.transpose(1, 2).flatten(0, 1)[contested], 1):
        return False
    if topk2 is None:
        return True
    left = metric * reference.resolve_conflicts(claims, overlaps, (metric > 0) | (overlaps > 0))
    return is_decided(left.flatten(0, 1), topk2)
