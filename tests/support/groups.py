"""Groups of layers of any shape, dtype and layout, drawn by hypothesis, run and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.algebra import masks, reference
from lora_kernels.algebra.operands import Settings, Weights
from lora_kernels.autograd.function import mask_of as packed_masks
from lora_kernels.autograd.functional import lora_linears
from tests.support.oracle import DEVICE

# Reproducible in CI: the examples are a function of the test alone. Shrinking takes minutes.
PROPERTY = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VIEWS = ("plain", "transposed", "columns", "rows", "slice")
SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40, 48, 64, 70)
NAMES = ("x", "lora_A", "lora_B", "bias")


@dataclass(frozen=True)
class GroupCase:
    """A group of layers of widths `Ns` that read one x, how its tensors lie, what is asked for."""

    M: int
    Ns: tuple[int, ...]
    K: int
    R: int
    dtype: torch.dtype = torch.float32
    adapter: torch.dtype = torch.float32
    dropout: float = 0.0
    bias: bool = True
    x: str = "plain"
    weight: str = "plain"
    lora: str = "plain"
    dy: tuple[str, ...] = ("plain",) * 3
    wanted: frozenset[str] = frozenset(NAMES)

    @property
    def G(self) -> int:
        return len(self.Ns)


@st.composite
def group_cases(
    draw, dropout=(0.0, 0.1, 0.5, 0.9), smallest=1, views_of_dy=(*VIEWS, "row", "scalar")
):
    sizes = st.sampled_from([size for size in SIZES if size >= smallest])
    dtype = draw(st.sampled_from(DTYPES))
    bias = draw(st.booleans())
    possible = NAMES if bias else NAMES[:3]
    return GroupCase(
        M=draw(sizes),
        Ns=tuple(draw(st.lists(sizes, min_size=1, max_size=3))),
        K=draw(sizes),
        R=draw(st.sampled_from((1, 2, 3, 5, 8, 13, 16, 17, 33))),
        dtype=dtype,
        adapter=draw(st.sampled_from((dtype, torch.float32))),
        dropout=draw(st.sampled_from(dropout)),
        bias=bias,
        x=draw(st.sampled_from(VIEWS)),
        weight=draw(st.sampled_from(VIEWS)),
        lora=draw(st.sampled_from(VIEWS)),
        dy=tuple(draw(st.sampled_from(views_of_dy)) for _ in range(3)),
        wanted=frozenset(draw(st.sets(st.sampled_from(possible)))),
    )


def laid(tensor: Tensor, view: str) -> Tensor:
    """The same values lying otherwise in memory; of "row" and "scalar" the first of them alone."""
    rows, columns = tensor.shape

    def inside(shape: tuple[int, int], *at: slice) -> Tensor:
        return tensor.new_full(shape, math.nan)[at].copy_(tensor)

    if view == "transposed":  # as a Conv1D weight
        return tensor.T.contiguous().T
    if view == "columns":
        return inside((rows, 2 * columns + 1), slice(None), slice(1, None, 2))
    if view == "rows":
        return inside((2 * rows + 1, columns), slice(1, None, 2))
    if view == "slice":
        return inside((rows + 2, columns + 5), slice(1, -1), slice(3, -2))
    if view == "row":
        return tensor[:1].expand(rows, columns)
    if view == "scalar":
        return tensor[:1, :1].expand(rows, columns)
    return tensor.contiguous()


@dataclass
class Tensors:
    x: Tensor
    weight: tuple[Tensor, ...]
    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    dy: tuple[Tensor, ...]

    def layers(self) -> tuple[Weights, ...]:
        """Each layer's tensors."""
        biases = self.bias or (None,) * len(self.weight)
        return tuple(map(Weights, self.weight, biases, self.lora_A, self.lora_B))

    def leaves(self, wanted) -> dict[str, Tensor]:
        """The tensors whose gradients are asked for."""
        found = {"dx": self.x} if "x" in wanted else {}
        for name in NAMES[1:]:
            if name in wanted:
                found |= {f"d{name}{g}": t for g, t in enumerate(getattr(self, name))}
        return found

    def to(self, dtype: torch.dtype, device: torch.device | str = DEVICE) -> Tensors:
        """The same as other leaves, those that are of another dtype or elsewhere copied."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)

        groups = (self.weight, self.lora_A, self.lora_B, self.bias, self.dy)
        return Tensors(cast(self.x), *(tuple(cast(t) for t in group) for group in groups))


def tensors(case: GroupCase, seed: int, *, whole: bool) -> Tensors:
    """-1, 0 and 1, or normal numbers with a low-rank term as large as the frozen one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, view: str, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        if whole:
            values = torch.randint(-1, 2, (rows, columns), generator=generator).float()
        else:
            values = torch.randn(rows, columns, generator=generator) * std
        return laid(values.to(DEVICE, dtype), view)

    # The weights of a group are of one layout: slices of one, as those of GPT-2's c_attn.
    N, K, R, G = sum(case.Ns), case.K, case.R, case.G
    weight = draw(N, K, case.weight, case.dtype, K**-0.5).split(case.Ns)
    lora_A = draw(G * R, K, case.lora, case.adapter, K**-0.5).split(R)
    lora_B = draw(N, R, case.lora, case.adapter, R**-0.5).split(case.Ns)
    bias = draw(1, N, "plain", case.dtype)[0].split(case.Ns) if case.bias else ()
    x = draw(case.M, K, case.x, case.dtype)
    dy = [draw(case.M, n, view, case.dtype) for n, view in zip(case.Ns, case.dy, strict=False)]

    def leaves(name: str, group) -> tuple[Tensor, ...]:
        return tuple(t.detach().requires_grad_(name in case.wanted) for t in group)

    return Tensors(
        *leaves("x", [x]), weight, leaves("lora_A", lora_A), leaves("lora_B", lora_B),
        leaves("bias", bias), tuple(dy),
    )  # fmt: skip


SCALE = 0.5


def run(given: Tensors, case: GroupCase, strategy: str, scale: float = SCALE) -> dict[str, Tensor]:
    """y of each layer and the gradients that are wanted."""
    y = lora_linears(given.x, given.layers(), Settings(scale, case.dropout, strategy))
    return results(y, given, case)


def results(y: tuple[Tensor, ...], given: Tensors, case: GroupCase) -> dict[str, Tensor]:
    leaves = given.leaves(case.wanted)
    gradients = torch.autograd.grad(y, list(leaves.values()), given.dy) if leaves else ()
    assert all(each.requires_grad == bool(leaves) for each in y) or case.wanted == {"bias"}
    found = {f"y{g}": each.detach() for g, each in enumerate(y)}
    return found | dict(zip(leaves, gradients, strict=True))


def mask_of(given: Tensors, case: GroupCase, strategy: str) -> Tensor | None:
    """The mask that the next call draws; torch's generator is left as it was."""
    if not case.dropout:
        return None
    x = given.x.detach().requires_grad_()
    with torch.random.fork_rng():  # of every device
        (y, *_) = lora_linears(x, given.layers(), Settings(1.0, case.dropout, strategy))
    return masks.unpack(packed_masks(y), case.K)


def expected(given: Tensors, case: GroupCase, keep: Tensor | None, scale: float = SCALE):
    """The same by the reference, in the dtype of x."""
    y = tuple(
        reference.forward(
            given.x, given.weight[g], given.lora_A[g], given.lora_B[g],
            bias=given.bias[g] if case.bias else None, scale=scale,
            keep=None if keep is None else keep[g], dropout=case.dropout,
        )
        for g in range(case.G)
    )  # fmt: skip
    return results(y, given, case)
