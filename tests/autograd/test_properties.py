"""Properties of every strategy over shapes, strides, dtypes, ranks, p, groups and wanted gradients.

On small whole numbers every sum is exact in any order, so results must be right to the bit,
whatever the tile. On random numbers the contract of `oracle` holds. Gaps in memory between the
elements of a strided tensor are NaN: reading one of them is seen.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import STRATEGIES, lora_linear
from tests.support.groups import (
    NAMES,
    PROPERTY,
    SCALE,
    VIEWS,
    GroupCase,
    expected,
    group_cases,
    mask_of,
    run,
    tensors,
)
from tests.support.oracle import DEVICE, YARDSTICKS, coarser, judge

# Reproducible in CI: the examples are a function of the test alone. Shrinking takes minutes.
EVERY_VIEW_OF_DY = GroupCase(
    33, (17, 40, 1), 31, 3, weight="transposed", x="columns", dy=("scalar", "transposed", "slice")
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=group_cases(dropout=(0.0, 0.5)), seed=st.integers(0, 99))
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
@given(case=group_cases(smallest=15, views_of_dy=VIEWS), seed=st.integers(0, 99))
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

WHOLE = group_cases(dropout=(0.0,)).map(
    lambda case: GroupCase(**vars(case) | {"dtype": torch.float32, "wanted": frozenset(NAMES[:3])})
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
    case = GroupCase(**vars(case) | {"dropout": dropout})
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
