"""Packed masks: round trip, keep rate, independence, for every strategy that draws them."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.algebra import masks
from lora_kernels.algebra.operands import Operands, Settings, Weights
from lora_kernels.hardware.tiles import tiles_for
from lora_kernels.strategies import library
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem
from lora_kernels.strategies.table import STRATEGIES
from tests.support.oracle import DEVICE, Case, inputs, judge_layer

TILES = tiles_for("cpu" if DEVICE.type == "cpu" else "any", 4, 3, tf32=False)


def drawn(strategy: str, rows: int, columns: int, dropout: float) -> torch.Tensor:
    """The keep mask of one layer call by a strategy."""
    case = Case(M=rows, N=8, K=columns, R=2, dropout=dropout)
    given = inputs(case, torch.float32)
    problem = Problem.on(DEVICE, rows, 8, columns, 2, torch.float32, dropout=True)
    choice = choose(problem, strategy)
    assert choice.strategy == strategy, choice.reason
    with torch.no_grad():
        operands = Operands.of([Weights(given.weight, None, given.lora_A, given.lora_B)])
        _, _, mask = STRATEGIES[strategy].forward(
            given.x, operands, Settings(1.0, dropout), masks.draw_seed(DEVICE), choice.tiles
        )
    assert mask.dtype == torch.uint8 and mask.shape == (1, rows, masks.packed_width(columns))
    return masks.unpack(mask[0], columns)


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_unpack_reads_bit_j_of_byte_q_as_column_8q_plus_j(columns):
    keep = torch.rand(5, columns) < 0.5
    packed = torch.zeros(5, masks.packed_width(columns), dtype=torch.uint8)
    for column in range(columns):
        packed[:, column // 8] |= keep[:, column].to(torch.uint8) << (column % 8)
    assert torch.equal(masks.unpack(packed, columns), keep)


@pytest.mark.parametrize("columns", [1, 8, 13])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_lanes_drop_exactly(columns, dtype):
    t = torch.randn(70, columns).to(dtype)
    t[::7] = math.inf
    mask = masks.draw(torch.tensor([8]), 1, 70, columns, 0.5)[0]
    lanes = masks.unpack_lanes(mask, columns, dtype)
    dropped = (t.view(lanes.dtype) & lanes).view(dtype)
    assert torch.equal(dropped, torch.where(masks.unpack(mask, columns), t, 0))


@pytest.mark.parametrize("columns", [5, 64])
def test_the_ends_of_dropout(columns):
    seed = torch.tensor([3])
    assert [masks.threshold(p) for p in (1e-6, 0.25, 1 - 1e-6)] == [0, 1 << 14, (1 << 16) - 1]
    for dropout, rate in ((1e-6, 1.0), (1 - 1e-6, 1 / 65536)):  # to 16 bits: never, almost always
        mask = masks.draw(seed, 2, 900, columns, dropout)
        assert mask.shape == (2, 900, masks.packed_width(columns))
        kept = masks.unpack(mask, columns).double().mean().item()
        assert kept == pytest.approx(rate, abs=1e-4 if rate < 1 else 0)
    assert masks.draw(seed, 1, 0, columns, 0.5).numel() == 0
    # Two chances from the same seed: whatever the smaller keeps, the larger keeps as well.
    rare, usual = (masks.unpack(masks.draw(seed, 1, 99, 99, p), 99) for p in (0.7, 0.3))
    assert (rare <= usual).all() and rare.sum() < usual.sum()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_keep_rate_in_every_bit_row_and_column(strategy, dropout):
    torch.manual_seed(1)
    rows, columns = 256, 128
    keep = drawn(strategy, rows, columns, dropout).double()
    spread = math.sqrt(dropout * (1 - dropout))
    n = rows * columns
    assert abs(keep.mean() - (1 - dropout)) < 5 * spread / math.sqrt(n)
    for average, count in ((keep.mean(0), rows), (keep.mean(1), columns)):
        z = (average - (1 - dropout)) * math.sqrt(count) / spread
        assert z.abs().max() < 5.5  # the largest of 256 standard normals
        assert 0.6 < z.square().mean() < 1.5  # neither clumped nor evenly dealt out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_and_neighbours_are_independent(strategy):
    torch.manual_seed(2)
    first, second = (drawn(strategy, 256, 128, 0.5).double() - 0.5 for _ in range(2))
    limit = 5 / math.sqrt(first.numel()) * 0.25
    pairs = {
        "two calls": (first, second),
        "columns": (first[:, 1:], first[:, :-1]),
        "bytes": (first[:, 8:], first[:, :-8]),
        "tiles": (first[:, 32:], first[:, :-32]),
        "rows": (first[1:], first[:-1]),
        "row tiles": (first[32:], first[:-32]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < limit, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_torch_seed_reproduces_the_mask(strategy):
    torch.manual_seed(3)
    first, second = drawn(strategy, 40, 24, 0.3), drawn(strategy, 40, 24, 0.3)
    torch.manual_seed(3)
    assert torch.equal(drawn(strategy, 40, 24, 0.3), first)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- masks drawn by Triton alone

SHAPES = [(1, 1), (17, 8), (33, 7), (40, 131), (5, 600)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_are_those_that_project_draws(shape):
    kernels = pytest.importorskip("lora_kernels.kernels")
    (M, K), seed = shape, torch.tensor([-5], device=DEVICE)
    x, A = torch.ones(M, K, device=DEVICE), tuple(torch.ones(2, 3, K, device=DEVICE))
    _, mask = kernels.project(x, A, tile=TILES.project, precision="ieee", dropout=0.3, seed=seed)
    drawn_alone = kernels.draw_masks(seed, 2, M, K, 0.3)
    assert torch.equal(masks.unpack(drawn_alone, K), masks.unpack(mask, K))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_is_applied_and_added(shape, dtype, transposed):
    kernels = pytest.importorskip("lora_kernels.kernels")
    M, K = shape
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(shape[::-1] if transposed else shape, generator=generator).to(DEVICE, dtype) / 3
    t = t.T if transposed else t
    mask = masks.draw(masks.draw_seed(DEVICE), 1, M, K, 0.5)[0]
    kept = torch.where(masks.unpack(mask, K), t, 0)
    assert torch.equal(kernels.apply_mask(t, mask), kept)
    whole = torch.randn(M, K + 3, generator=generator).to(DEVICE, dtype) * 1.1
    onto, before = whole[:, :K], whole.clone()
    assert kernels.apply_mask(t, mask, onto=onto) is onto
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(onto, (before[:, :K].to(wide) + kept.to(wide)).to(dtype))
    assert torch.equal(whole[:, K:], before[:, K:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_library_with_masks_by_triton(dtype, monkeypatch):
    """What a card does, on whatever device this is."""
    pytest.importorskip("triton")
    monkeypatch.setattr(library, "_launches_masks", lambda device: True)
    case = Case(M=70, N=40, K=33, R=3, dropout=0.25)

    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scale=case.scale, dropout=0.25,
            strategy="library",
        )  # fmt: skip

    judge_layer(layer, case, dtype)
    torch.manual_seed(3)
    expected = drawn("split", 40, 24, 0.3)
    torch.manual_seed(3)
    assert torch.equal(drawn("library", 40, 24, 0.3), expected), "the mask of every strategy"


def test_the_threshold_is_the_probability_in_65536ths():
    assert masks.threshold(0.5) == 32768
    assert masks.threshold(0.1) == 6554
    assert masks.threshold(0.0) == 0
