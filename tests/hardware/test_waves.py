"""Waves by hand, and the tiles that are taken for the layers of known models on known cards."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from lora_kernels.hardware.cards import CARDS
from lora_kernels.hardware.tiles import Outputs, Tile, shipped, tiles_for
from lora_kernels.hardware.waves import MEASURED_SLOWNESS_64, best, share, slowdown
from lora_kernels.tools.shapes import LAYERS

DOCS = (Path(__file__).resolve().parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
SHOWN = ("RTX 3070", "RTX 3070 Ti", "RTX 3090", "RTX 4090", "RTX 5090", "A100", "H100", "B200")


def test_by_hand():
    """96 tiles of 128 x 128 on 46 multiprocessors are 3 waves, 384 of 64 x 64 are 9."""
    assert share(2048, (768,), (128, 128), 46) == pytest.approx(96 / (3 * 46))
    assert share(2048, (768,), (64, 64), 46) == pytest.approx(384 / (9 * 46))
    assert share(1, (1,), (64, 64), 46) == pytest.approx(
        1 / (46 * 64 * 64)
    )  # a tile for one number
    assert share(128, (100, 100), (128, 128), 2) == pytest.approx(100 / 128)  # a tile for each
    assert slowdown(4096, (4096,), (128, 128), 1) == pytest.approx(1)
    assert slowdown(4096, (4096,), (64, 64), 1) == pytest.approx(1.06)
    assert slowdown(4096, (4096,), (64, 64), 1, "sm_90") == pytest.approx(1.6)  # measured


def test_the_best_tile():
    tiles = Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3)
    assert best(2048, (768,), tiles, 46) == tiles[1]
    assert best(8192, (8192,), tiles, 46) == tiles[0]
    assert best(2048, (768,), tiles, 46, again=64) == tiles[0]  # half as much against as much again


def taken(
    layer: str, dx: bool, M: int, card: str
) -> tuple[Tile, tuple[Tile, ...], tuple[int, ...]]:
    """The tile of a GEMM of `split`, those it was taken from, and the columns of its output."""
    sizes, row = LAYERS[layer], CARDS[card]
    outputs = Outputs(M, sizes.N, sizes.K, row.processors)
    tiles = tiles_for(row.arch, 2, 16, tf32=False, outputs=outputs)
    candidates = shipped(row.arch, 2, 16)
    if not dx:
        return tiles.low_rank_gemm, candidates.low_rank_gemm, sizes.N
    return tiles.low_rank_gemm_dx, candidates.dx_of(len(sizes.N)), (sizes.K,)


@pytest.mark.parametrize("card", SHOWN)
def test_no_tile_leaves_a_tenth_unused_where_another_would_not(card):
    if CARDS[card].arch in MEASURED_SLOWNESS_64:
        pytest.skip("measured: there a smaller tile costs more than an empty processor")
    for layer, dx, M in product(LAYERS, (False, True), (512, 1024, 2048, 4096, 8192)):
        tile, candidates, columns = taken(layer, dx, M, card)
        shares = {each: share(M, columns, each, CARDS[card].processors) for each in candidates}
        assert shares[tile] >= 0.9 or max(shares.values()) < 0.9, (layer, dx, M, shares)


def test_the_table_of_waves_is_what_is_taken():
    lines = DOCS.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| output, tokens"))
    cards = [cell.strip() for cell in lines[start].strip("|").split("|")[1:]]
    assert cards == list(SHOWN)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        what, layer, M = re.fullmatch(r"(y|dx) of `(\S+)`, ([\d,]+)", first).groups()
        found = []
        for card in cards:
            M_, processors = int(M.replace(",", "")), CARDS[card].processors
            tile, _, columns = taken(layer, what == "dx", M_, card)
            old, new = (share(M_, columns, each, processors) for each in ((128, 128), tile))
            found.append(f"{old:.2f} > {new:.2f}")
        rows.append((first, cells, found))
    assert len(rows) >= 10
    right = "\n".join(f"| {first} | {' | '.join(found)} |" for first, _, found in rows)
    assert all(cells == found for _, cells, found in rows), f"docs should say:\n{right}"
