"""Bytes and FLOPs of every provider, kernel by kernel, written once as arithmetic.

M, K, R as in the algebra; N of each of the G projections that read one x; e bytes an element of x,
w an element of an adapter; P is R padded to what a matrix instruction takes. Every tensor counts
once a kernel: what a kernel reads again is taken to come from cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lora_kernels.tuning import rank_block

from .cases import Case

TILE = 128  # columns of an output tile: how often the fused kernel repeats x lora_A^T
SPLITS = 64  # row ranges of a column gradient, at most; one for 256 rows
# Bytes an element of x that plain torch moves in lora_kernels.masks: `draw` walks over its int64
# lanes (2 bytes an element) 60 bytes' worth and packs in 8; `unpack` looks bytes up: 1.1, and x's
# own 2 bytes out.
DRAW_BYTES, UNPACK_BYTES = 68, 3


class Kernel(NamedTuple):
    """One launch; `exact` marks float32 products, which have no matrix instructions."""

    name: str
    bytes: float
    flops: float = 0.0
    exact: bool = False


class Shape(NamedTuple):
    """The letters above."""

    M: int
    K: int
    N: tuple[int, ...]
    R: int
    P: int
    e: int
    w: int
    mask: float  # bytes of one packed mask; 0 without dropout

    @property
    def G(self) -> int:
        """How many projections."""
        return len(self.N)


def shape_of(case: Case, adapter_bytes: int = 4) -> Shape:
    """The letters of a case."""
    M, K = case.M, case.layer.K
    mask = M * K / 8 if case.dropout else 0.0
    return Shape(
        M, K, case.layer.N, case.R, rank_block(case.R), case.torch_dtype.itemsize, adapter_bytes,
        mask,
    )  # fmt: skip


def gemm(s: Shape, N: int, name: str = "gemm") -> Kernel:
    """[M, K] by [K, N] in the dtype of x."""
    return Kernel(name, s.e * (s.M * s.K + N * s.K + s.M * N), 2 * s.M * N * s.K)


def minimum(case: Case, direction: str) -> Kernel:
    """What the frozen layer cannot do without: x and the weights read once, y (and dx) written."""
    s = shape_of(case)
    total = sum(s.N)
    one = s.e * (s.M * s.K + total * s.K + s.M * total)
    passes = 1 if direction == "forward" else 2
    return Kernel("minimum", passes * one, passes * 2 * s.M * total * s.K)


def floor_forward(s: Shape) -> list[Kernel]:
    """y of each projection."""
    return [gemm(s, N) for N in s.N]


def floor_backward(s: Shape) -> list[Kernel]:
    """dx of each projection, added up by autograd."""
    adds = [Kernel("add dx", 3 * s.e * s.M * s.K)] * (s.G - 1)
    return [gemm(s, N, "dx") for N in s.N] + adds


def _project(s: Shape) -> Kernel:
    """x once for all projections; h and the packed mask of each."""
    moved = s.e * s.M * s.K + s.G * (s.w * s.R * s.K + s.e * s.M * s.R + s.mask)
    return Kernel("project", moved, s.G * 2 * s.M * s.K * s.P)


def _low_rank_terms(s: Shape) -> tuple[float, float]:
    """Bytes and FLOPs that h lora_B^T adds to the forward GEMMs."""
    total = sum(s.N)
    return s.G * s.e * s.M * s.R + s.w * total * s.R, 2 * s.M * total * s.P


def _input_terms(s: Shape) -> tuple[float, float]:
    """Bytes and FLOPs that D (dh lora_A) adds to dx."""
    return s.G * (s.e * s.M * s.R + s.w * s.R * s.K + s.mask), s.G * 2 * s.M * s.K * s.P


def _all_gemms(s: Shape) -> tuple[float, float]:
    """One launch for all projections: x (or dx) moves once."""
    total = sum(s.N)
    return s.e * (s.M * s.K + total * s.K + s.M * total), 2 * s.M * total * s.K


def _seeded(name: str, s: Shape, terms: tuple[float, float]) -> Kernel:
    moved, flops = _all_gemms(s)
    return Kernel(name, moved + terms[0], flops + terms[1])


def _splits(s: Shape) -> int:
    return max(1, min(SPLITS, s.M // 256))


def _output_gradients(s: Shape, want_dh: bool = True) -> list[Kernel]:
    """dy once; float32 partial sums of dlora_B by row range, and of dh by column block."""
    total = sum(s.N)
    partial = 4 * _splits(s) * total * s.R
    moved = s.e * s.M * total + s.G * s.e * s.M * s.R + s.w * total * s.R + partial
    kernels = [Kernel("sum dlora_B", partial + s.w * total * s.R)]
    flops = 2 * s.M * total * s.P
    if want_dh:
        blocks = 4 * s.M * s.R * sum(-(-N // TILE) for N in s.N)
        kernels.append(Kernel("sum dh", blocks + s.G * s.e * s.M * s.R))
        moved, flops = moved + blocks, 2 * flops
    return [Kernel("output gradients", moved, flops), *kernels]


def _input_gradients(s: Shape) -> list[Kernel]:
    """x once for all projections, with each one's dh and mask."""
    partial = 4 * _splits(s) * s.G * s.K * s.R
    moved = s.e * s.M * s.K + s.G * (s.mask + s.e * s.M * s.R) + partial
    return [
        Kernel("input gradients", moved, s.G * 2 * s.M * s.K * s.P),
        Kernel("sum dlora_A", partial + s.w * s.G * s.R * s.K),
    ]


def split_forward(s: Shape) -> list[Kernel]:
    """`project`, then one seeded GEMM."""
    return [_project(s), _seeded("seeded gemm", s, _low_rank_terms(s))]


def split_backward(s: Shape) -> list[Kernel]:
    """Column gradients, then dx as one seeded GEMM."""
    dx = _seeded("seeded dx", s, _input_terms(s))
    return [*_output_gradients(s), *_input_gradients(s), dx]


def fused_forward(s: Shape) -> list[Kernel]:
    """One launch; each of the N / TILE column blocks computes h anew."""
    kernel = _seeded("fused gemm", s, _low_rank_terms(s))
    again = sum(-(-N // TILE) for N in s.N) * 2 * s.M * s.K * s.P
    moved = kernel.bytes + s.G * s.w * s.R * s.K
    return [Kernel(kernel.name, moved, kernel.flops + again)]


def fused_backward(s: Shape) -> list[Kernel]:
    """dx computes dh on the way, once for each of its K / TILE column blocks."""
    kernel = _seeded("fused dx", s, _input_terms(s))
    again = -(-s.K // TILE) * 2 * s.M * sum(s.N) * s.P
    moved = kernel.bytes + s.w * sum(s.N) * s.R
    dx = Kernel(kernel.name, moved, kernel.flops + again)
    return [dx, *_output_gradients(s, want_dh=False), *_input_gradients(s)]


def hybrid_forward(s: Shape) -> list[Kernel]:
    """y starts as bias plus rank-R product; the vendor's GEMM reads it back."""
    moved, flops = _low_rank_terms(s)
    low_rank = Kernel("low-rank product", s.e * s.M * sum(s.N) + moved, flops)
    return [_project(s), low_rank, *(_onto(s, N, s.M * N) for N in s.N)]


def hybrid_backward(s: Shape) -> list[Kernel]:
    """dx starts as the masked rank-R product."""
    moved, flops = _input_terms(s)
    low_rank = Kernel("low-rank dx", s.e * s.M * s.K + moved, flops)
    onto = [_onto(s, N, s.M * s.K) for N in s.N]
    return [*_output_gradients(s), *_input_gradients(s), low_rank, *onto]


def _onto(s: Shape, N: int, result: int) -> Kernel:
    kernel = gemm(s, N, "gemm onto")
    return kernel._replace(bytes=kernel.bytes + s.e * result)


def library_forward(s: Shape) -> list[Kernel]:
    """The vendor's products; masks are drawn and unpacked by plain torch."""
    kernels = []
    for N in s.N:
        if s.mask:
            kernels.append(Kernel("draw", DRAW_BYTES * s.M * s.K))
            kernels.append(_drop(s))
        kernels += [_thin(s, s.K, "h"), gemm(s, N)]
        kernels.append(Kernel("rank-R add", s.e * (2 * s.M * N + s.M * s.R), 2 * s.M * N * s.R))
    return kernels


def library_backward(s: Shape) -> list[Kernel]:
    """The same by hand."""
    kernels = []
    for g, N in enumerate(s.N):
        kernels.append(_thin(s, N, "dh"))
        kernels.append(_onto(s, N, s.M * s.K) if g else gemm(s, N, "dx"))
        add = Kernel("rank-R add", s.e * (2 * s.M * s.K + s.M * s.R), 2 * s.M * s.K * s.R)
        kernels.append(add)
        if s.mask:
            kernels.append(Kernel("mask and add", 5 * s.e * s.M * s.K + s.M * s.K))
            kernels.append(_drop(s))
        kernels += [_thin(s, s.K, "dlora_A"), _thin(s, N, "dlora_B")]
    return kernels


def _drop(s: Shape) -> Kernel:
    return Kernel("unpack, multiply", (UNPACK_BYTES + 2 * s.e + 1) * s.M * s.K)


def _thin(s: Shape, columns: int, name: str, bytes_each: int | None = None) -> Kernel:
    """A product of [M, columns] and [R, columns], whichever way round."""
    e = bytes_each or s.e
    flops = 2 * s.M * columns * s.R
    exact = bytes_each == 4 and s.e < 4
    return Kernel(name, e * (s.M * columns + s.R * columns + s.M * s.R), flops, exact)


def peft_forward(s: Shape) -> list[Kernel]:
    """A kernel for each operation; float32 adapters on a half base also cast x and y."""
    kernels = []
    for N in s.N:
        wide = s.w > s.e
        kernels.append(gemm(s, N))
        if wide:
            kernels.append(Kernel("cast x", (s.e + s.w) * s.M * s.K))
        if s.mask:
            kernels.append(Kernel("dropout", (2 * s.w + 1) * s.M * s.K))
        kernels += [_thin(s, s.K, "h", s.w), _thin(s, N, "h lora_B", s.w)]
        kernels.append(Kernel("scale", 2 * s.w * s.M * N))
        kernels.append(Kernel("add", (s.e + 2 * s.w) * s.M * N))
        if wide:
            kernels.append(Kernel("cast y", (s.e + s.w) * s.M * N))
    return kernels


def peft_backward(s: Shape) -> list[Kernel]:
    """Autograd's kernels, in its order."""
    kernels = []
    for g, N in enumerate(s.N):
        wide = s.w > s.e
        if wide:
            kernels += [Kernel("cast dy", (s.e + s.w) * s.M * N)] * 2
        kernels.append(Kernel("scale dy", 2 * s.w * s.M * N))
        kernels += [_thin(s, N, name, s.w) for name in ("dlora_B", "dh")]
        kernels += [_thin(s, s.K, name, s.w) for name in ("dlora_A", "dh lora_A")]
        if s.mask:
            kernels.append(Kernel("dropout", (2 * s.w + 1) * s.M * s.K))
        if wide:
            kernels.append(Kernel("cast dx", (s.e + s.w) * s.M * s.K))
        kernels.append(gemm(s, N, "dx"))
        kernels += [Kernel("add dx", 3 * s.e * s.M * s.K)] * (2 if g else 1)
    return kernels


Cost = tuple[Callable[[Shape], list[Kernel]], Callable[[Shape], list[Kernel]]]
# What torch.compile makes of PEFT is its own secret: no row.
COSTS: dict[str, Cost] = {
    "floor": (floor_forward, floor_backward),
    "peft": (peft_forward, peft_backward),
    "peft-bf16-adapter": (peft_forward, peft_backward),
    "library": (library_forward, library_backward),
    "split": (split_forward, split_backward),
    "fused": (fused_forward, fused_backward),
    "hybrid": (hybrid_forward, hybrid_backward),
}


def kernels_of(provider: str, case: Case, direction: str) -> list[Kernel]:
    """Every launch of a provider. KeyError for one that has no row."""
    own_dtype = provider in ("floor", "peft-bf16-adapter")
    s = shape_of(case, case.torch_dtype.itemsize if own_dtype else 4)
    forward, backward = COSTS[provider]
    return forward(s) + (backward(s) if direction == "forward_backward" else [])
