import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.tools.meter import Meter, OutOfBoundsError, WriteRaceError


@triton.jit
def add_kernel(out_ptr, a_ptr, b_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    a = tl.load(a_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, a + tl.load(b_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def everyone_writes_kernel(out_ptr, IS_ATOMIC: tl.constexpr):
    if IS_ATOMIC:
        tl.atomic_add(out_ptr, 1)
    else:
        tl.store(out_ptr, 1)


@pytest.mark.usefixtures("interpreted")
class TestMeter:
    def test_bytes_of_a_vector_addition_are_exact(self):
        a, b, out = torch.rand(3, 100).unbind()
        with Meter() as meter:
            add_kernel[(2,)](out, a, b, 100, BLOCK=64)
        (launch,) = meter.launches
        assert (launch.programs, launch.loaded, launch.stored, launch.unique) == (2, 800, 400, 1200)
        assert launch.sectors >= 1200
        np.testing.assert_array_equal(out, a + b)

    def test_a_reach_past_the_end_is_found(self):
        a, b, out = torch.rand(100), torch.rand(99), torch.empty(100)
        with Meter(), pytest.raises(OutOfBoundsError, match="add_kernel"):
            add_kernel[(2,)](out, a, b, 100, BLOCK=64)

    def test_two_programs_storing_to_one_address_are_found(self):
        out = torch.zeros(1, dtype=torch.int32)
        with Meter(), pytest.raises(WriteRaceError, match="everyone_writes_kernel"):
            everyone_writes_kernel[(2,)](out, IS_ATOMIC=False)
        with Meter():
            everyone_writes_kernel[(2,)](out, IS_ATOMIC=True)
