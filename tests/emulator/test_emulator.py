"""The emulator runs compiled kernels as a GPU would, and notices what a GPU would not forgive."""

import re

import numpy as np
import pytest
import torch

from tests.emulator import kernels
from tests.tools.emulator import EmulationError, arithmetic, driver, emulated

TARGETS = ("cuda:75", "cuda:90")


@pytest.fixture(params=TARGETS, autouse=True)
def launches(request):
    with emulated(request.param) as launches:
        yield launches


def run(kernel, num_programs, *args, **constants):
    """Launch with contraction to fused multiply-adds: Triton 3.9 warns where nobody chose."""
    kernel[(num_programs,)](*args, **constants, enable_fp_fusion=True)


@pytest.mark.parametrize("columns", [1, 5, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(columns, dtype):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((3, columns), torch.nan)
    run(kernels.softmax_kernel, 3, out, x, columns, BLOCK=1024)
    torch.testing.assert_close(out, x.float().softmax(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.int8])
def test_transpose(dtype):
    x = torch.arange(64 * 64).reshape(64, 64).to(dtype)
    out = torch.zeros_like(x)
    run(kernels.transpose_kernel, 1, out, x, SIDE=64)
    assert torch.equal(out, x.T)


def test_programs_part_and_meet():
    x = torch.arange(1, 300, dtype=torch.int32)
    steps = torch.full_like(x, -1)
    run(kernels.collatz_kernel, 10, steps, x, len(x), BLOCK=32)

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert steps.tolist() == [collatz(n) for n in x.tolist()]


def test_programs_are_charged_for_what_they_run(launches):
    x = torch.tensor([1] * 32 + [27] * 32, dtype=torch.int32)
    run(kernels.collatz_kernel, 2, torch.empty_like(x), x, len(x), BLOCK=32)
    (launch,) = launches
    short, long = launch.instructions.tolist()
    assert launch.kernel == "collatz_kernel"
    assert long > 20 * short  # 111 steps against none


def test_atomic_operations_run_in_some_order():
    place = torch.arange(512, dtype=torch.int32) % 3
    owner, earlier = torch.full((3,), -1, dtype=torch.int32), torch.full((512,), -2, dtype=torch.int32)
    run(kernels.claim_kernel, 4, owner, earlier, place, BLOCK=128)
    assert owner.tolist() == [510, 511, 509]
    assert (earlier == -1).sum() == 3  # the first at each place
    assert earlier.unique().numel() > 3


def test_atomic_operations_whose_result_nobody_takes(monkeypatch):
    """Triton 3.9 writes them as ``red``, which has no destination."""
    load, changed = driver._load, []

    def load_changed(ptx):
        text, number = re.subn(r"\batom(\.\S+) %r\d+, ", r"red\1 ", ptx)
        changed.append(number)
        return load(text)

    monkeypatch.setattr(driver, "_load", load_changed)
    owner = torch.full((3,), -1, dtype=torch.int32)
    run(
        kernels.claim_kernel, 4, owner, torch.empty(512, dtype=torch.int32), torch.arange(512, dtype=torch.int32) % 3, BLOCK=128
    )
    assert changed[0] > 0
    assert owner.tolist() == [510, 511, 509]


# ---- what must not be


def test_out_of_bounds():
    with pytest.raises(EmulationError, match="outside of every argument"):
        run(kernels.store_kernel, 2, torch.zeros(256), torch.zeros(255), 128, BLOCK=128)


def test_misaligned(monkeypatch):
    """What was compiled for addresses that 16 divides gets others."""
    x, packed = torch.zeros(513), driver._packed
    monkeypatch.setattr(driver, "_packed", lambda kind, value: packed(kind, value[1:] if kind[0] == "*" else value))
    with pytest.raises(EmulationError, match="multiple"):
        run(kernels.store_kernel, 1, torch.zeros(513), x, 512, BLOCK=512)


def test_two_programs_store_to_one_address():
    with pytest.raises(EmulationError, match="two programs store"):
        run(kernels.store_kernel, 2, torch.zeros(256), torch.zeros(256), 64, BLOCK=128)


def test_a_program_reads_what_another_stores():
    x = torch.zeros(512)
    with pytest.raises(EmulationError, match="reads what another"):
        run(kernels.store_kernel, 2, x[128:], x, 128, BLOCK=128)


def test_every_barrier_is_missed(monkeypatch):
    """Without any one of its barriers a reduction over warps is a race."""
    x, out, texts, load = torch.randn(1, 1000), torch.empty(1, 1000), [], driver._load
    monkeypatch.setattr(driver, "_load", lambda ptx: load(texts.append(ptx) or ptx))
    run(kernels.softmax_kernel, 1, out, x, 1000, BLOCK=1024)
    pieces = texts[0].split("bar.sync")
    assert len(pieces) > 2
    for missing in range(1, len(pieces)):
        text = "bar.sync".join(pieces[:missing]) + "bar.warp.sync" + "bar.sync".join(pieces[missing:])
        monkeypatch.setattr(driver, "_load", lambda ptx, text=text: load(text))
        with pytest.raises(EmulationError, match="since the last barrier"):
            run(kernels.softmax_kernel, 1, out, x, 1000, BLOCK=1024)


def test_unknown_instructions_are_named():
    instruction = ".visible .entry f(\n)\n.reqntid 32\n{\n\tfoo.f32 %r1, %r2;\n\tret;\n}\n"
    with pytest.raises(EmulationError, match=r"unknown instruction foo\.f32"):
        driver._load(instruction)


# ---- arithmetic


def f32(*values):
    return np.array(values, np.float32)


def test_extrema_prefer_numbers_and_order_zeros():
    low, high = arithmetic.OPERATIONS["min",], arithmetic.OPERATIONS["max",]
    a, b = f32(np.nan, 1, np.nan, 0.0, -0.0), f32(2, np.nan, np.nan, -0.0, 0.0)
    np.testing.assert_array_equal(high(a, b), f32(2, 1, np.nan, 0, 0))
    assert np.signbit(low(a, b)[3:]).all()
    assert not np.signbit(high(a, b)[3:]).any()


def test_conversions_saturate():
    values = f32(np.nan, 3e9, -3e9, 1.9, -1.9)
    assert arithmetic.convert([values], ["rzi"], "s32", "f32").tolist() == [0, 2**31 - 1, -(2**31), 1, -1]
    assert arithmetic.convert([values], ["rzi"], "u32", "f32").tolist() == [0, 3000000000, 0, 1, 0]


def test_bfloat16_rounds_to_even():
    bits = arithmetic.convert([f32(1, 1 + 2**-8, 1 + 3 * 2**-8, np.nan, np.inf)], ["rn"], "bf16", "f32")
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x7FFF, 0x7F80]
    np.testing.assert_array_equal(arithmetic.from_bfloat16(bits)[:3], [1, 1, 1 + 2**-6])


def test_packed_conversion_has_the_first_above():
    assert arithmetic.convert([f32(1), f32(-2)], ["rn"], "f16x2", "f32").tolist() == [0x3C00C000]


def test_integers():
    u32 = lambda *values: np.array(values, np.uint32)  # noqa: E731
    operations = arithmetic.OPERATIONS
    assert operations["shl",](u32(1, 1), u32(31, 32)).tolist() == [2**31, 0]
    assert operations["shr",](np.array([-8, -8], np.int32), u32(1, 40)).tolist() == [-4, -1]
    assert operations["bfe",](u32(0b110100), u32(2), u32(3)).tolist() == [0b101]
    assert operations["bfe",](np.array([0b110100], np.int32), u32(2), u32(3)).tolist() == [-3]
    assert operations["prmt",](u32(0x03020100), u32(0x07060504), u32(0x5410)).tolist() == [0x05040100]
    assert operations["prmt",](u32(0x80), u32(0), u32(0x8888)).tolist() == [0xFFFFFFFF]
    assert operations["mul", "hi"](np.array([2**63], np.uint64), np.array([6], np.uint64)).tolist() == [3]
    assert operations["mul", "hi"](np.array([-7], np.int32), np.array([2**30], np.int32)).tolist() == [-2]
    assert operations["max", "relu"](np.array([-7, -7], np.int32), np.array([-2, 2], np.int32)).tolist() == [0, 2]
    assert operations["div",](np.array([-7, 7], np.int32), np.array([2, -2], np.int32)).tolist() == [-3, -3]
    assert operations["div",](u32(7, 2**32 - 1, 5), u32(2, 1, 0)).tolist() == [3, 2**32 - 1, 2**32 - 1]
    assert operations["rem",](np.array([-7, 7], np.int32), np.array([2, -2], np.int32)).tolist() == [-1, 1]
    assert operations["mul", "wide"](u32(2**31), u32(6)).tolist() == [6 * 2**31]
    assert operations["mul", "hi"](u32(2**31), u32(6)).tolist() == [3]
    assert operations["mul", "hi"](np.array([-(2**31)], np.int32), np.array([3], np.int32)).tolist() == [-2]


def test_comparisons_with_nan():
    a, b = f32(np.nan, 1), f32(1, 1)
    found = {name: compare(a, b).tolist() for name, compare in arithmetic.COMPARISONS.items()}
    assert found["ne"] == [False, False]
    assert found["neu"] == found["nan"] == [True, False]
    assert found["equ"] == found["geu"] == found["leu"] == [True, True]
    assert found["eq"] == found["num"] == [False, True]


def test_fused_multiply_add_rounds_once():
    a = f32(1 + 2**-12)
    assert arithmetic.OPERATIONS["fma",](a, a, f32(-1))[0] == np.float32(2**-11 + 2**-24)


def test_reciprocal_square_root():
    assert arithmetic.OPERATIONS["rsqrt",](f32(4, 0.25)).tolist() == [0.5, 2]


def test_pairs():
    pair = lambda low, high: f32(low, high).view(np.uint64)  # noqa: E731
    found = arithmetic.in_pairs(arithmetic.OPERATIONS["mul",])(pair(2, 3), pair(5, -7))
    assert found.view(np.float32).tolist() == [10, -21]
