"""Two elementwise kernels, which draw packed masks and apply one: dropout around vendor GEMMs.

    mask [G, M, K / 8] bytes from a seed       out = D(t), or out + D(t)        t, out [M, K]

They need no matrix instruction, so they also run on sm_75, where the other kernels do not. In plain
torch (`algebra/masks.py`) drawing moves 8 bytes an element, where this kernel writes 1/8 of a byte,
and the device waits until the host has read the seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import masks
from .launch import launch
from .plan import Out, Plan, planned
from .tiles import cast, draw_keep, index_type, load_keep, pack


@triton.jit(do_not_specialize=["M", "threshold"])
def _draw_masks(
    seed_ptr, mask_ptr, M, stride_mask, threshold,
    INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    # A program draws [BLOCK_M, BLOCK_BYTES] bytes of the mask of one segment (one layer's mask).
    segment = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    columns = tl.program_id(2) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    packed = pack(draw_keep(tl.load(seed_ptr), rows, columns, segment, threshold))
    # The masks lie as [G, M, stride_mask]: row r of segment s is row s * M + r of them all.
    tl.store(
        mask_ptr + (segment.to(INDEX) * M + rows)[:, None] * stride_mask + columns[None, :],
        packed.to(tl.uint8),
        mask=(rows < M)[:, None] & (columns < stride_mask)[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def _apply_mask(
    t_ptr, mask_ptr, out_ptr, M, K, stride_tm, stride_tk, stride_mask, stride_om,
    INDEX: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program masks a tile [BLOCK_M, BLOCK_K] of t.
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    first = tl.program_id(1) * BLOCK_K
    columns = (first + tl.arange(0, BLOCK_K)).to(INDEX)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    t_ptrs = t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tk
    t = tl.load(t_ptrs, mask=inside, other=0.0)
    keep = load_keep(mask_ptr, rows, first, M, stride_mask, BLOCK_M, BLOCK_K)
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :]
    kept = tl.where(keep, t, 0.0)
    if ADD:
        # The sum is rounded once, at the store: half precision is added in fp32. Only `library`
        # takes fp64, which is added as it is.
        WIDE: tl.constexpr = tl.float64 if t.dtype == tl.float64 else tl.float32
        kept = kept.to(WIDE) + tl.load(out_ptrs, mask=inside, other=0.0).to(WIDE)
    tl.store(out_ptrs, cast(kept, out_ptr.dtype.element_ty), mask=inside)


def draw_masks(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Tensor:
    """The packed masks [groups, rows, ceil(columns / 8)] of `seed`, those that `project` draws."""
    return launch(_plan_draw, (seed,), groups, rows, columns, dropout)[0]


def _plan_draw(seed: Tensor, groups: int, rows: int, columns: int, dropout: float) -> Plan:
    width = masks.packed_width(columns)
    mask = Out((groups, rows, width), torch.uint8)
    block_m, block_bytes = 16, 64
    return planned(
        _draw_masks, (triton.cdiv(rows, block_m), groups, triton.cdiv(width, block_bytes)),
        (mask,), rows, width, masks.threshold(dropout),
        INDEX=index_type((mask,)), BLOCK_M=block_m, BLOCK_BYTES=block_bytes,
    )  # fmt: skip


def apply_mask(t: Tensor, mask: Tensor, onto: Tensor | None = None) -> Tensor:
    """t [M, K] where the packed mask [M, ceil(K / 8)] keeps it, else 0: D(t) without its scale.

    Returned in t's dtype; with `onto`, added to it in place. t may have any strides, the columns of
    `onto` lie side by side.
    """
    if onto is None:
        return launch(_plan_apply, (t, mask), None)[0]
    launch(_plan_apply, (t, mask, onto))
    return onto


def _plan_apply(t: Tensor, mask: Tensor, onto: Tensor | None) -> Plan:
    M, K = t.shape
    allocated = Out((M, K), t.dtype)
    out = allocated if onto is None else onto
    # 32 rows spilled registers where 8 does not divide the bytes of a mask's row (sm_86, sm_89).
    block_m, block_k = 16, 128
    return planned(
        _apply_mask, (triton.cdiv(M, block_m), triton.cdiv(K, block_k), 1),
        (allocated,) if onto is None else (),
        M, K, *t.stride(), mask.stride(0), out.stride()[0],
        INDEX=index_type((t, out)), ADD=onto is not None, BLOCK_M=block_m, BLOCK_K=block_k,
    )  # fmt: skip
