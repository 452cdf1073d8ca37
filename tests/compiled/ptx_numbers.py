"""What PTX instructions compute, an array of all threads at a time (see ptx.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.compiled.ptx_memory import Array

TYPES = {"f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8"} | {
    f"{kind}{bits}": f"{'i' if kind == 's' else 'u'}{bits // 8}"
    for kind in "bus"
    for bits in (8, 16, 32, 64)
}


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Array) -> Array:
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def shift(a: Array, by: Array) -> Array:
        size = a.dtype.itemsize * 8
        by = by.astype(np.uint64)
        over, by = by >= size, np.minimum(by, size - 1).astype(a.dtype)
        moved = a << by if left else a >> by
        return np.where(over & (left or a.dtype.kind == "u"), a.dtype.type(0), moved)

    return shift


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "sqrt": np.sqrt, "mov": lambda a: a,
    "shl": _shift(left=True), "shr": _shift(left=False),
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "div": lambda a, b: (a / b if a.dtype.kind == "f" else np.trunc(a / b)).astype(a.dtype),
    "rem": np.fmod, "mad": lambda a, b, c: a * b + c,
}  # fmt: skip
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b and a; a nibble's top bit asks for copies of the sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def extract(a: Array, start: Array, length: Array, signed: bool) -> Array:
    """bfe: a field of bits, with its top bit spread if signed."""
    wide = a.astype(np.int64) & 0xFFFFFFFF
    start, length = start.astype(np.int64), length.astype(np.int64)
    field = (wide >> start) & ((np.int64(1) << length) - 1)
    if signed:
        field = np.where(field >> (length - 1) & 1, field - (np.int64(1) << length), field)
    return field.astype(np.uint32)
