"""Arithmetic of PTX on numpy arrays: no result depends on a lane other than its own."""

from collections.abc import Callable
from typing import Any

import numpy as np

TYPES: dict[str, type] = {
    "pred": np.bool_,
    "f16": np.float16,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
    **{f"{sign}{8 * size}": np.dtype(f"{code}{size}").type for size in (1, 2, 4, 8) for sign, code in ("bu", "uu", "si")},
}

Operation = Callable[..., Any]


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = value.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(value), 0x7FFF, rounded >> np.uint32(16)).astype(np.uint16)


def convert(values: list[np.ndarray], how: list[str], to: str, source: str) -> np.ndarray:
    """``cvt.how.to.source``; two values are packed, the first one above."""
    if to in ("bf16x2", "f16x2"):
        high, low = (convert([value], how, to[:-2], source).view(np.uint16).astype(np.uint32) for value in values)
        return high << np.uint32(16) | low
    (value,) = values
    value = from_bfloat16(value) if source == "bf16" else value
    if to == "bf16":
        return to_bfloat16(value)
    rounding = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
    for name in set(how) & set(rounding):
        value = rounding[name](value)
    dtype = TYPES[to]
    if to[0] in "su" and value.dtype.kind == "f":
        return _saturated(value, dtype)
    return value.astype(dtype)


def _saturated(value: np.ndarray, dtype: type) -> np.ndarray:
    """Whole numbers as integers: the nearest that there is, 0 for NaN."""
    limits = np.iinfo(dtype)
    inside = (value >= limits.min) & (value < 2.0 ** (8 * dtype().itemsize - (limits.min < 0)))
    result = np.where(inside, value, 0).astype(dtype)
    return np.where(inside | np.isnan(value), result, np.where(value < 0, limits.min, limits.max)).astype(dtype)


def _extremum(of_numbers: Operation, of_zeros: Operation) -> Operation:
    """Of two or three: a number rather than NaN; 0 above -0."""

    def choose(a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
        if more:
            return choose(choose(a, b), *more)
        if a.dtype.kind != "f":
            return of_numbers(a, b)
        bits = f"u{a.dtype.itemsize}"
        return np.where(a == b, of_zeros(a.view(bits), b.view(bits)).view(a.dtype), of_numbers(a, b))

    return choose


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(object)) // np.where(b == 0, 1, np.abs(b.astype(object)))  # towards 0
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -quotient, quotient)).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A * b + c, rounded once: float32 through float64, float64 through a wider type, where the last bit may be off."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, shifted, shifted >> a.dtype.type(1)).astype(a.dtype)


def _extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = np.uint32(8 * a.dtype.itemsize)
    return _shift_right(_shift_left(a, bits - position - length), bits - length)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of b and a; with its highest bit a selector repeats the sign of the byte."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice >= 8, (byte >> np.uint32(7)) * np.uint32(255), byte).astype(np.uint32)
        result = result | byte << np.uint32(8 * i)
    return result


def _reciprocal(a: np.ndarray) -> np.ndarray:
    """The upper half of a float64, as the hardware gives it."""
    return ((1 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}"))


def _upper_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    return ((a.astype(object) * b.astype(object)) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _through_double(function: Operation) -> Operation:
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


def in_pairs(operation: Operation) -> Operation:
    """The operation on both halves of 64 bits, each a float32."""

    def apply(*values: np.ndarray) -> np.ndarray:
        low, high = (
            operation(*((value >> np.uint64(shift)).astype(np.uint32).view(np.float32) for value in values))
            for shift in (0, 32)
        )
        return low.view(np.uint32).astype(np.uint64) | high.view(np.uint32).astype(np.uint64) << np.uint64(32)

    return apply


OPERATIONS: dict[tuple[str, ...], Operation] = {
    ("add",): np.add, ("sub",): np.subtract, ("mul",): np.multiply, ("mul", "lo"): np.multiply, ("mul", "hi"): _upper_half,
    ("div",): _divide,
    ("rem",): _remainder, ("fma",): _fused, ("mad", "lo"): lambda a, b, c: a * b + c,
    ("mul", "wide"): lambda a, b: _wide(a) * _wide(b), ("mad", "wide"): lambda a, b, c: _wide(a) * _wide(b) + c,
    ("min",): _extremum(np.fmin, np.bitwise_or), ("max",): _extremum(np.fmax, np.bitwise_and),
    ("max", "relu"): lambda a, b: np.maximum(np.maximum(a, b), 0), ("abs",): np.abs, ("neg",): np.negative,
    ("and",): np.bitwise_and, ("or",): np.bitwise_or, ("xor",): np.bitwise_xor, ("not",): np.invert,
    ("shl",): _shift_left, ("shr",): _shift_right, ("bfe",): _extract_bits, ("prmt",): _permute,
    ("popc",): np.bitwise_count, ("selp",): lambda a, b, choice: np.where(choice, a, b),
    ("ex2",): _through_double(np.exp2), ("lg2",): _through_double(np.log2), ("sqrt",): _through_double(np.sqrt),
    ("rsqrt",): _through_double(lambda a: 1 / np.sqrt(a)), ("rcp",): _reciprocal,
}  # fmt: skip

COMPARISONS: dict[str, Operation] = {
    "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "equ": lambda a, b: ~((a < b) | (a > b)), "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
# Of numbers only; integers have no NaN.
COMPARISONS["ne"] = lambda a, b: (a < b) | (a > b)
