"""h in parts of K: the parts, their sum in the next launch, and how many there are."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import kernels
from lora_kernels.algebra import masks
from lora_kernels.hardware.tiles import Tile, parts_for, tiles_for
from lora_kernels.strategies import tiled
from tests.support.oracle import DEVICE, MATRIX_INSTRUCTIONS, Case, inputs, judge_layer

TILE = tiles_for("any", 4, 3, tf32=False).project if MATRIX_INSTRUCTIONS else Tile(32, 0, 32, 1, 1)
OPTIONS = {"tile": TILE, "precision": "ieee"}


def projected(given, parts, seed=None, layers=2):
    lora_A = (given.lora_A, 2 * given.lora_A)[:layers]
    return kernels.project(given.x, lora_A, dropout=0.3, seed=seed, parts=parts, **OPTIONS)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_the_parts_are_the_sum_and_the_mask_is_the_same(parts, dropped):
    given = inputs(Case(M=37, N=40, K=203, R=3), torch.float32)
    seed = torch.tensor([77], device=DEVICE) if dropped else None
    whole, mask = projected(given, 1, seed)
    h, same = projected(given, parts, seed)
    steps = -(-203 // TILE.k)
    assert h.shape == (-(-steps // -(-steps // parts)), 2, 37, 3) and h.dtype == torch.float32
    torch.testing.assert_close(h.sum(0), whole, rtol=1e-5, atol=1e-5)
    if dropped:
        assert torch.equal(mask, same)
        keep = masks.unpack(mask[1], 203)
        exact = torch.where(keep, given.x, 0).double() @ (2 * given.lora_A.double()).T / 0.7
        torch.testing.assert_close(h.sum(0)[1].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N", [20, 70])
@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_next_launch_adds_the_parts_and_keeps_the_sum(dtype, gemm, N):
    """The first block of columns stores the sum: the only one at N = 20, one of three at 70."""
    given = inputs(Case(M=37, N=N, K=203, R=3, adapter=dtype), dtype)
    parts, _ = projected(given, 4)
    x, w, v = (given.x,), (given.weight,) * 2, (given.lora_B, given.lora_B)
    tile = Tile(32, 32, 32, 4 if MATRIX_INSTRUCTIONS else 1, 1)
    options = {"scale": 0.5, "gemm": gemm, "tile": tile, "precision": "ieee"}
    outs, h = kernels.low_rank_gemm(x, w, parts, v, **options)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(h, total.to(dtype))
    expected, same = kernels.low_rank_gemm(x, w, h, v, **options)
    assert same is h and all(map(torch.equal, outs, expected))


@pytest.mark.parametrize("strategy", ["split", "hybrid"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layers_in_parts_keep_the_contract(monkeypatch, strategy, dropout):
    from lora_kernels import lora_linear

    monkeypatch.setattr(tiled, "_parts", lambda *_: 4)
    seen = []
    project = kernels.project

    def spy(*args, **kwargs):
        h, mask = project(*args, **kwargs)
        seen.append(h.shape[0])
        return h, mask

    monkeypatch.setattr(kernels, "project", spy)
    case = Case(M=65, N=40, K=300, R=3, dropout=dropout)

    def layer(x, weight, lora_A, lora_B, bias):
        options = {"scale": case.scale, "dropout": dropout, "strategy": strategy}
        return lora_linear(x, weight, lora_A, lora_B, bias=bias, **options)

    judge_layer(layer, case, torch.float32)
    assert seen and set(seen) == {4}


def test_how_many_parts():
    tile = Tile(32, 0, 64, 4, 3)
    assert parts_for(2048, 1, 768, tile, 132) == 4  # 64 programs: 8 would do, 768 is 12 steps
    assert parts_for(4096, 1, 4096, tile, 132) == 4  # 128 programs, four times 132 at most
    assert parts_for(8192, 3, 4096, tile, 132) == 1
    assert parts_for(512, 1, 4096, tile, 132) == 8
    assert parts_for(16, 1, 64, tile, 132) == 1  # one step
