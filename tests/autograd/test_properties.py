"""Properties of every strategy over shapes, strides, dtypes, ranks, p, groups and wanted gradients.

On small whole numbers every sum is exact in any order, so results must be right to the bit,
whatever the tile. On random numbers the contract of `oracle` holds. Gaps in memory between the
elements of a strided tensor are NaN: reading one of them is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import STRATEGIES, lora_linear
from lora_kernels.algebra import masks, reference
from lora_kernels.autograd.functional import lora_linears
from tests.support.oracle import DEVICE, YARDSTICKS, coarser, judge

# Reproducible in CI: the examples are a function of the test alone. Shrinking takes minutes.
PROPERTY = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VIEWS = ("plain", "transposed", "columns", "rows", "slice")
SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40, 48, 64, 70)
NAMES = ("x", "lora_A", "lora_B", "bias")


@dataclass(frozen=True)
class Layers:
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
def layers(draw, dropout=(0.0, 0.1, 0.5, 0.9), smallest=1, views_of_dy=(*VIEWS, "row", "scalar")):
    sizes = st.sampled_from([size for size in SIZES if size >= smallest])
    dtype = draw(st.sampled_from(DTYPES))
    bias = draw(st.booleans())
    possible = NAMES if bias else NAMES[:3]
    return Layers(
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


def tensors(case: Layers, seed: int, *, whole: bool) -> Tensors:
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


def run(given: Tensors, case: Layers, strategy: str, scale: float = SCALE) -> dict[str, Tensor]:
    """y of each layer and the gradients that are wanted."""
    y = lora_linears(
        given.x, given.weight, given.lora_A, given.lora_B, given.bias,
        scale=scale, dropout=case.dropout, training=True, strategy=strategy,
    )  # fmt: skip
    return results(y, given, case)


def results(y: tuple[Tensor, ...], given: Tensors, case: Layers) -> dict[str, Tensor]:
    leaves = given.leaves(case.wanted)
    gradients = torch.autograd.grad(y, list(leaves.values()), given.dy) if leaves else ()
    assert all(each.requires_grad == bool(leaves) for each in y) or case.wanted == {"bias"}
    found = {f"y{g}": each.detach() for g, each in enumerate(y)}
    return found | dict(zip(leaves, gradients, strict=True))


def mask_of(given: Tensors, case: Layers, strategy: str) -> Tensor | None:
    """The mask that the next call draws; torch's generator is left as it was."""
    if not case.dropout:
        return None
    x = given.x.detach().requires_grad_()
    with torch.random.fork_rng():  # of every device
        (y, *_) = lora_linears(
            x, given.weight, given.lora_A, given.lora_B, given.bias,
            scale=1.0, dropout=case.dropout, training=True, strategy=strategy,
        )  # fmt: skip
    return masks.unpack(y.grad_fn.saved_tensors[2], case.K)


def expected(given: Tensors, case: Layers, keep: Tensor | None, scale: float = SCALE):
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


EVERY_VIEW_OF_DY = Layers(
    33, (17, 40, 1), 31, 3, weight="transposed", x="columns", dy=("scalar", "transposed", "slice")
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=layers(dropout=(0.0, 0.5)), seed=st.integers(0, 99))
@example(case=EVERY_VIEW_OF_DY, seed=0)
@settings(PROPERTY, max_examples=16)
def test_whole_numbers_are_exact(strategy, case, seed):
    torch.manual_seed(seed)
    given_ = tensors(case, seed, whole=True)
    keep = mask_of(given_, case, strategy)
    actual = run(given_, case, strategy)
    exact = expected(given_.to(torch.float64), case, keep)
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        dtype = case.adapter if "lora" in name else case.dtype
        assert actual[name].dtype == dtype and actual[name].shape == value.shape, name
        assert torch.equal(actual[name], value.to(dtype)), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=layers(smallest=15, views_of_dy=VIEWS), seed=st.integers(0, 99))
@settings(PROPERTY, max_examples=8)
def test_random_numbers_keep_the_contract(strategy, case, seed):
    """Runs are pooled until every result has 64 rows: fewer errors make no RMS.

    No size is below 15: for narrow fp32 products a vendor's GEMM has a kernel for each layout, of
    another accuracy than the one that eager got.
    """
    runs = []
    for repeat in range(-(-64 // min(case.M, case.K, *case.Ns))):
        torch.manual_seed(seed + repeat)
        given_ = tensors(case, seed + repeat, whole=False)
        keep = mask_of(given_, case, strategy)
        actual = run(given_, case, strategy)
        eager = expected(given_.to(case.dtype), case, keep)
        exact = expected(given_.to(torch.float64), case, keep)
        if YARDSTICKS > 1:
            keep = None if keep is None else keep.cpu()
            other = expected(given_.to(case.dtype, "cpu"), case, keep)
            eager = {name: coarser(eager[name], other[name], exact[name]) for name in exact}
        runs.append((actual, eager, exact))
    for name in runs[0][0]:
        pooled = [
            torch.cat([results[name] for results in each]) for each in zip(*runs, strict=True)
        ]
        judge(name, *pooled, independent=len(runs) * case.M * case.R)


# ---------------------------------------------------------------- algebra, exact on whole numbers

WHOLE = layers(dropout=(0.0,)).map(
    lambda case: Layers(**vars(case) | {"dtype": torch.float32, "wanted": frozenset(NAMES[:3])})
)
ALGEBRA = settings(PROPERTY, max_examples=4)


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=WHOLE)
@ALGEBRA
def test_results_are_affine_in_the_scale(strategy, case):
    """f(5) = f(0) + 5 (f(1) - f(0)), where f(0) is the frozen layer."""
    given_ = tensors(case, 1, whole=True)
    zero, one, five = (run(given_, case, strategy, scale) for scale in (0.0, 1.0, 5.0))
    assert_same(five, {name: zero[name] + 5 * (one[name] - zero[name]) for name in zero})
    for g in range(case.G):
        assert (zero[f"dlora_A{g}"] == 0).all() and (zero[f"dlora_B{g}"] == 0).all()
        bias = given_.bias[g] if case.bias else None
        frozen = torch.nn.functional.linear(given_.x, given_.weight[g], bias)
        assert torch.equal(zero[f"y{g}"], frozen)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=WHOLE, dropout=st.sampled_from((0.0, 0.5)))
@ALGEBRA
def test_a_zero_lora_b_is_the_frozen_layer(strategy, case, dropout):
    case = Layers(**vars(case) | {"dropout": dropout})
    given_ = tensors(case, 2, whole=True)
    for lora_B in given_.lora_B:
        lora_B.detach().zero_()
    actual = run(given_, case, strategy)
    dx = sum(dy @ weight for dy, weight in zip(given_.dy, given_.weight, strict=True))
    assert torch.equal(actual["dx"], dx)
    for g in range(case.G):
        bias = given_.bias[g] if case.bias else None
        frozen = torch.nn.functional.linear(given_.x, given_.weight[g], bias)
        assert torch.equal(actual[f"y{g}"], frozen)
        assert (actual[f"dlora_A{g}"] == 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=WHOLE, data=st.data())
@ALGEBRA
def test_rows_do_not_depend_on_their_place(strategy, case, data):
    given_ = tensors(case, 3, whole=True)
    order = torch.tensor(data.draw(st.permutations(range(case.M))), device=DEVICE)
    moved = tensors(case, 3, whole=True)
    moved.x = given_.x.detach()[order].requires_grad_()
    moved.dy = tuple(dy[order] for dy in given_.dy)
    straight, permuted = run(given_, case, strategy), run(moved, case, strategy)
    for name in straight:  # y and dx move along; the sums over rows stay
        if not name.startswith("dlora"):
            straight[name] = straight[name][order]
    assert_same(permuted, straight)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=WHOLE, extra=st.integers(1, 20))
@ALGEBRA
def test_zero_ranks_change_nothing(strategy, case, extra):
    given_ = tensors(case, 4, whole=True)
    padded = tensors(case, 4, whole=True)
    padded.lora_A = tuple(
        torch.cat([A.detach(), A.new_zeros(extra, case.K)]).requires_grad_() for A in given_.lora_A
    )
    padded.lora_B = tuple(
        torch.cat([B.detach(), B.new_zeros(len(B), extra)], 1).requires_grad_()
        for B in given_.lora_B
    )
    wide = run(padded, case, strategy)
    for g in range(case.G):
        for name, axis in ((f"dlora_A{g}", 0), (f"dlora_B{g}", 1)):
            kept, rest = wide[name].split([case.R, extra], axis)
            wide[name] = kept
            assert (rest == 0).all(), "zero times zero"
    assert_same(wide, run(given_, case, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=WHOLE.filter(lambda case: case.G > 1))
@ALGEBRA
def test_a_group_is_its_members_one_by_one(strategy, case):
    given_ = tensors(case, 5, whole=True)
    together = run(given_, case, strategy)
    alone: dict[str, Tensor] = {}
    dx = 0
    for g in range(case.G):
        y = lora_linear(
            given_.x, given_.weight[g], given_.lora_A[g], given_.lora_B[g],
            bias=given_.bias[g] if case.bias else None, scale=SCALE, strategy=strategy,
        )  # fmt: skip
        wanted = given_.x, given_.lora_A[g], given_.lora_B[g]
        dx_g, dlora_A, dlora_B = torch.autograd.grad(y, wanted, given_.dy[g])
        dx = dx + dx_g
        alone |= {f"y{g}": y.detach(), f"dlora_A{g}": dlora_A, f"dlora_B{g}": dlora_B}
    assert_same(together, {"dx": dx, **alone})
