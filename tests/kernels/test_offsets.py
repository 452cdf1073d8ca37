"""Offsets past 2^31 elements, by address arithmetic: tensors that are far apart, not large.

Memory is reserved and never filled: only the pages that are touched exist. Every tensor starts in
the middle of what is reserved, so an offset that wraps around reads a zero instead of crashing, and
the comparison with the same numbers lying close together, which must agree to the bit, fails.
"""

from __future__ import annotations

import builtins
import math
import mmap
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.oracle import DEVICE

triton = pytest.importorskip("triton")

from lora_kernels import kernels
from lora_kernels.algebra import masks
from lora_kernels.hardware.tiles import Tile
from lora_kernels.kernels.tiles import index_type

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or sys.platform != "linux", reason="reserves host memory, as Linux does"
)

LIMIT = 1 << 31
MARGIN = 6 * LIMIT  # further than any sum of wrapped offsets leads
TILE = {"tile": Tile(32, 32, 32, 1, 1), "precision": "ieee"}
_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on


def reserved(elements: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, with more of them before and after, in memory only where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    size = elements + 2 * MARGIN
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve address space: {error}")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=size)[MARGIN : MARGIN + elements]


def far(near: Tensor, layout: str) -> Tensor:
    """The same numbers with rows, or columns, so far apart that the last lies past 2^31."""
    apart = (1 << 28) + 8
    stride = {"rows": (apart, 1), "columns": (1, apart)}[layout]
    reach = sum((size - 1) * step for size, step in zip(near.shape, stride, strict=True))
    assert LIMIT < reach < MARGIN
    return reserved(reach + 1, near.dtype).as_strided(near.shape, stride).copy_(near)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


M, N, K, R, G = 37, 33, 42, 11, 2
SEED = torch.tensor([7])


def tensors() -> dict[str, tuple[Tensor, ...]]:
    """Two layers' tensors; x is the first's alone where a kernel takes one x."""
    torch.manual_seed(0)
    shapes = {
        "x": (M, K), "dy": (M, N), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R),
        "h": (M, R), "dh": (M, R),
    }  # fmt: skip
    return {name: tuple(normal(*shape) for _ in range(G)) for name, shape in shapes.items()}


def transposed(group: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.T for t in group)


def mask() -> Tensor:
    return masks.draw(SEED, G, M, K, 0.25)[0]


def project(x, lora_A, **_):
    return kernels.project(x[0], lora_A, dropout=0.25, seed=SEED, **TILE)


def low_rank_gemm_forward(x, weight, h, lora_B, gemm=True, **_):
    return kernels.low_rank_gemm(
        x[:1], weight, torch.stack(h), lora_B, scale=0.5, gemm=gemm, **TILE
    )[0]


def low_rank_gemm_backward(dy, weight, dh, lora_A, gemm=True, **_):
    return kernels.low_rank_gemm(
        dy, transposed(weight), torch.stack(dh), transposed(lora_A), scale=0.5, mask=mask(),
        gemm=gemm, **TILE,
    )[0]  # fmt: skip


def low_rank_forward(**given):
    return low_rank_gemm_forward(**given, gemm=False)


def low_rank_backward(**given):
    return low_rank_gemm_backward(**given, gemm=False)


def fused_gemm_forward(x, weight, lora_A, lora_B, **_):
    y, h = kernels.fused_gemm(x[:1], weight, lora_A, lora_B, h_scale=1.0, scale=0.5, **TILE)
    return *y, h


def fused_gemm_backward(dy, weight, lora_A, lora_B, **_):
    dx, dh = kernels.fused_gemm(
        dy, transposed(weight), transposed(lora_B), transposed(lora_A), h_scale=0.5, scale=1.5,
        mask=mask(), **TILE,
    )  # fmt: skip
    return *dx, dh


def output_gradients(dy, h, lora_B, **_):
    dh, dlora_B = kernels.output_gradients(dy, torch.stack(h), lora_B, scale=0.5, splits=2, **TILE)
    return dh, dlora_B


GRADIENTS = {
    "dlora_A": kernels.Gradient(torch.float32, 0.75),
    "dlora_B": kernels.Gradient(torch.float32, 0.5),
}


def parameter_gradients(x, dh, dy, h, **_):
    return kernels.parameter_gradients(
        x[0], torch.stack(dh), dy, torch.stack(h), mask=mask(), splits=2, **GRADIENTS, **TILE
    )


def apply_mask(x, **_):
    return (kernels.apply_mask(x[0], mask()[0]),)


def row_gains(weight, lora_A, lora_B, **_):
    lengths = (kernels.row_gains(w, a, b, torch.ones(N), 0.5, precision="ieee") for w, a, b in
               zip(weight, lora_A, lora_B, strict=True))  # fmt: skip
    return [each for pair in lengths for each in pair]


def scale_columns_backward(dy, **_):
    return kernels.scale_columns_backward(dy[0], dy[1].contiguous(), torch.ones(N))


# launcher -> the tensors whose layout is the caller's
LAUNCHERS = {
    project: ("x", "lora_A"),
    low_rank_gemm_forward: ("x", "weight", "lora_B"),
    low_rank_gemm_backward: ("dy", "weight", "lora_A"),
    low_rank_forward: ("lora_B",),
    low_rank_backward: ("lora_A",),
    fused_gemm_forward: ("x", "weight", "lora_A", "lora_B"),
    fused_gemm_backward: ("dy", "weight", "lora_A", "lora_B"),
    output_gradients: ("dy", "lora_B"),
    parameter_gradients: ("x", "dy"),
    apply_mask: ("x",),
    row_gains: ("weight", "lora_A", "lora_B"),
    scale_columns_backward: ("dy",),
}
CASES = [
    pytest.param(launcher, name, layout, id=f"{launcher.__name__}-{name}-{layout}")
    for launcher, names in LAUNCHERS.items()
    for name in names
    for layout in ("rows", "columns")
]


@pytest.mark.parametrize(("launcher", "name", "layout"), CASES)
def test_far_tensors_give_the_bits_of_near_ones(launcher, name, layout):
    """weight with far columns is a Conv1D weight [K, N] with far rows, seen through its .T."""
    given = tensors()
    near = launcher(**given)
    moved = launcher(**given | {name: tuple(far(t, layout) for t in given[name])})
    for a, b in zip(moved, near, strict=True):
        assert torch.equal(a, b)
        assert (b != 0).float().mean() > 0.5, "zeros would hide a read of nothing"


@pytest.fixture
def last_programs_of_a_large_launch(monkeypatch):
    """New tensors are reserved; of a long axis of the grid, or a long loop, the end alone runs."""

    def ends(*bounds):
        whole = builtins.range(*bounds)
        return whole[-2:] if len(whole) > 4096 else whole

    def empty(*shape, dtype, device):
        size = math.prod(shape[0] if isinstance(shape[0], tuple) else shape)
        return reserved(size, dtype).view(*shape)

    monkeypatch.setattr("triton.runtime.interpreter.range", ends, raising=False)
    monkeypatch.setattr("lora_kernels.kernels.gradients.range", ends, raising=False)
    monkeypatch.setattr(torch, "empty", empty)


ROWS = 32 + 5  # the rows that the last two programs compute, of which the last is ragged


def tail(rows: int, near: Tensor) -> Tensor:
    """[rows, P] of zeros that end in `near`."""
    whole = reserved(rows * near.shape[1], near.dtype).view(rows, near.shape[1])
    whole[-near.shape[0] :] = near
    return whole


def group_tail(rows: int, near: Tensor) -> Tensor:
    """[1, rows, P] likewise."""
    return tail(rows, near)[None]


@pytest.mark.parametrize("large", ["h", "mask"])
def test_project_writes_past_the_limit(last_programs_of_a_large_launch, large):
    width, rank, rows = {"h": (16, 128, 1 << 24), "mask": (72, 3, 1 << 28)}[large]
    rows += 5
    x, lora_A = normal(ROWS, width), normal(rank, width)
    seed = None if large == "h" else SEED
    h, mask = kernels.project(tail(rows, x), (lora_A,), dropout=0.0, seed=seed, **TILE)
    assert max(h.numel(), 0 if mask is None else mask.numel()) > LIMIT
    expected, _ = kernels.project(x, (lora_A,), **TILE)
    assert torch.equal(h[0, -ROWS:], expected[0])
    if mask is not None:
        assert (mask[0, -ROWS:] == 255).all(), "nothing is dropped at p = 0"


def test_masks_are_drawn_and_applied_past_the_limit(last_programs_of_a_large_launch):
    rows = (1 << 28) + 5
    mask = kernels.draw_masks(SEED, 1, rows, 72, 0.0)
    assert mask.numel() > LIMIT and (mask[0, -5:] == 255).all()
    assert (mask[0, 100:200] == 0).all(), "the first programs did not run"
    count = 16 + 5  # the rows of the last two programs here
    t = normal(count, 16)
    large, bits = tail((1 << 27) + 5, t), torch.full((count, 2), 85, dtype=torch.uint8)
    assert large.numel() > LIMIT
    out = kernels.apply_mask(large, tail((1 << 27) + 5, bits))
    assert torch.equal(out[-count:], kernels.apply_mask(t, bits))
    assert (out[-count:] == t).float().mean() == 0.5


def test_columns_are_scaled_past_the_limit(last_programs_of_a_large_launch):
    count = 64 + 5  # the rows of the last two programs of the gradients
    rows, p, dy, gain = (1 << 27) + 5, normal(count, 16), normal(count, 16), torch.randn(16)
    large = tail(rows, p)
    assert large.numel() > LIMIT
    y, expected = (kernels.scale_columns(each, gain, None) for each in (large, p))
    assert torch.equal(y[-21:], expected[-21:])
    dp, dgain = kernels.scale_columns_backward(tail(rows, dy), large, gain)
    near = kernels.scale_columns_backward(dy, p, gain)
    assert torch.equal(dp[-count:], near[0])
    torch.testing.assert_close(dgain[-2:].sum(0), near[1].sum(0))


@pytest.mark.parametrize("large", ["out", "u"])
@pytest.mark.parametrize("gemm", [True, False], ids=["gemm", "low-rank"])
def test_low_rank_gemm_writes_and_reads_past_the_limit(
    last_programs_of_a_large_launch, large, gemm
):
    width, rank, rows = {"out": (32, 3, 1 << 26), "u": (16, 128, 1 << 24)}[large]
    rows += 5
    x, w, v, u = normal(ROWS, 16), normal(width, 16), normal(width, rank), normal(ROWS, rank)
    options = {"scale": 0.5, "gemm": gemm, **TILE}
    large_u = group_tail(rows, u)
    (out,), _ = kernels.low_rank_gemm((tail(rows, x),), (w,), large_u, (v,), **options)
    assert max(out.numel(), large_u.numel()) > LIMIT
    (expected,), _ = kernels.low_rank_gemm((x,), (w,), u[None], (v,), **options)
    assert torch.equal(out[-ROWS:], expected)


@pytest.mark.parametrize("large", ["out", "h"])
def test_fused_gemm_writes_past_the_limit(last_programs_of_a_large_launch, large):
    width, rank, rows = {"out": (32, 3, 1 << 26), "h": (16, 128, 1 << 24)}[large]
    rows += 5
    x, w, a, v = normal(ROWS, 16), normal(width, 16), normal(rank, 16), normal(width, rank)
    options = {"h_scale": 1.0, "scale": 0.5, **TILE}
    (out,), h = kernels.fused_gemm((tail(rows, x),), (w,), (a,), (v,), **options)
    assert max(out.numel(), h.numel()) > LIMIT
    (expected,), expected_h = kernels.fused_gemm((x,), (w,), (a,), (v,), **options)
    assert torch.equal(out[-ROWS:], expected)
    assert torch.equal(h[0, -ROWS:], expected_h[0])


def test_output_gradients_keep_partial_sums_past_the_limit(last_programs_of_a_large_launch):
    """dh is summed from a part for each block of 32 columns: here 3 x 2^30 elements in fp32."""
    rows, rank = (1 << 23) + 5, 128
    dy, lora_B = normal(ROWS, 96), normal(96, rank)
    large = tail(rows, dy)
    dh, _ = kernels.output_gradients((large,), None, (lora_B,), scale=0.5, splits=1, **TILE)
    assert large.numel() < LIMIT and 3 * dh.numel() > LIMIT
    expected, _ = kernels.output_gradients((dy,), None, (lora_B,), scale=0.5, splits=1, **TILE)
    assert torch.equal(dh[0, -2:], expected[0, -2:])  # the last block of 256 sums: 2 rows


@pytest.mark.parametrize("large", ["x", "dh"])
def test_parameter_gradients_read_past_the_limit(last_programs_of_a_large_launch, large):
    """All rows but the last are zero, so the last steps of the loop over rows are the sum."""
    width, rank, rows = {"x": (32, 3, 1 << 26), "dh": (16, 128, 1 << 24)}[large]
    rows += 5
    x, dh = normal(ROWS, width), normal(ROWS, rank)
    options = {"dy": None, "h": None, "mask": None, "splits": 1, **GRADIENTS, **TILE}
    large_x, large_dh = tail(rows, x), group_tail(rows, dh)
    assert max(large_x.numel(), large_dh.numel()) > LIMIT
    dlora_A, _ = kernels.parameter_gradients(large_x, large_dh, **options)
    expected, _ = kernels.parameter_gradients(x, dh[None], **options)
    assert torch.equal(dlora_A, expected)


@given(
    sizes=st.lists(st.integers(1, 1 << 16), min_size=2, max_size=3),
    strides=st.lists(st.integers(0, 1 << 33), min_size=3, max_size=3),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_index_type_holds_every_offset_and_is_narrow_where_it_can_be(sizes, strides):
    class Tensor:  # what index_type asks of one; no allocation is that large
        shape = torch.Size(sizes)

        def stride(self, axis=None):
            return tuple(strides[: len(sizes)]) if axis is None else strides[axis]

        def numel(self):
            return math.prod(sizes)

    last = sum((size - 1) * step for size, step in zip(sizes, strides, strict=False))
    past = sum(size * step for size, step in zip(sizes, strides, strict=False))
    name = str(index_type([None, Tensor()]))
    if last >= LIMIT:
        assert name == "int64"
    if past < LIMIT:
        assert name == "int32"


@pytest.mark.parametrize("shape", [(1 << 16, 1 << 15), (1, 1 << 31), (1 << 31, 1)])
def test_index_type_at_the_limit(shape):
    largest = torch.empty(shape, device="meta")
    assert str(index_type([largest])) == "int64"
    for axis in range(2):
        if shape[axis] > 1:
            sizes = [size // 4 if i == axis else size for i, size in enumerate(shape)]
            smaller = torch.empty(sizes, device="meta")
            assert str(index_type([smaller, None])) == "int32"
            assert str(index_type([smaller, largest])) == "int64"
