"""The cost model: bytes and FLOPs of every launch by hand, and the order of strategies by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import STRATEGIES
from lora_kernels.hardware import cost
from lora_kernels.hardware.cards import CARDS
from lora_kernels.hardware.tiles import Tile, tiles_for
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import Problem

DOCS = (Path(__file__).resolve().parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
# 4096 x 768 by 768 x 768 at rank 16 in bf16 with dropout: the numbers of docs/kernels.md.
SIZE = cost.Size(4096, 768, (768,), 16, True, 2)
X = Y = 4096 * 768 * 2
W, H, MASK, SMALL = 768 * 768 * 2, 4096 * 16 * 2, 4096 * 768 / 8, 16 * 768 * 4
SHIPPED = tiles_for("sm_86", 2, 16, tf32=False)


def test_bytes_and_flops_by_hand():
    project, gemm, dB, sum_B, dA, sum_A, dx = cost.launches("split", SIZE, SHIPPED, processors=82)
    assert project.bytes == X + H + SMALL + MASK and project.flops == 2 * 4096 * 768 * 16
    assert gemm.bytes == X + W + H + SMALL + Y
    assert gemm.flops == 2 * 4096 * 768 * 768 + 2 * 4096 * 768 * 16
    blocks = 6  # 768 columns / 128
    partials_h = 4 * blocks * 4096 * 16
    partials = partials_A = 4 * 32 * 768 * 16  # 4096 rows / (4 blocks of 32)
    assert dB.bytes == Y + H + SMALL + partials + partials_h and dB.flops == 2 * 2 * 4096 * 768 * 16
    assert sum_B.bytes == partials + partials_h + SMALL + H
    assert dA.bytes == X + H + MASK + partials_A and sum_A.bytes == partials_A + SMALL
    assert dx.bytes == Y + W + H + SMALL + MASK + X
    moved = [launch.bytes for launch in (project, gemm, dB, sum_B, dA, sum_A, dx)]
    assert [round(sum(part) / 1e6) for part in (moved[:2], moved[2:])] == [21, 37]
    floor = (X + W + Y) / (1008 * 0.85e3)
    assert cost.microseconds([gemm], CARDS["RTX 4090"], torch.bfloat16) > floor


def test_a_group_reads_x_once_whatever_its_widths():
    group = replace(SIZE, N=(768, 256, 256))
    project, gemm = cost.launches("split", group, SHIPPED, processors=82, backward=False)
    assert project.bytes == X + 3 * (H + 16 * 768 * 4 + MASK)
    widths = 768 + 256 + 256
    assert gemm.bytes == X + 3 * H + widths * (768 * 2 + 4096 * 2 + 16 * 4)
    alone = cost.launches("library", group.layers()[1], SHIPPED, 82)
    draw, *each = cost.launches("library", group, SHIPPED, 82)  # masks are drawn in one launch
    assert draw.bytes == 3 * MASK and len(each) == 3 * (len(alone) - 1)


def test_the_time_of_a_gemm_counts_its_last_wave():
    """96 tiles of 128 x 128 on 46 multiprocessors take 3 waves, where 96 / 46 would do."""
    card = CARDS["RTX 3070"]
    plain = cost.Launch("gemm", 0, 1e9)
    ours = plain._replace(out=(2048, (768,)), tile=Tile(128, 128, 32, 8, 3))
    vendor, waves = ours._replace(tile=None, vendor=True), 9 * 46 / 384  # in tiles of 64 x 64
    times = [
        cost.microseconds([each], card, torch.bfloat16) - cost.GAP_US - each.filling(card)
        for each in (plain, ours, plain._replace(vendor=True), vendor)
    ]
    assert times[1] / times[0] == pytest.approx(3 * 46 / 96)
    assert times[3] / times[2] == pytest.approx(1.06 * waves)


def test_every_strategy_has_a_cost():
    assert set(cost.COSTS) == set(STRATEGIES)


def test_the_cost_model_prefers_what_the_design_expects():
    big = Problem(4096, 14336, 4096, 16, torch.bfloat16, "sm_90", dropout=True)
    small = Problem(2048, 768, 768, 8, torch.bfloat16, "sm_90", dropout=False)
    dropped = Problem(2048, 768, 768, 8, torch.bfloat16, "sm_86", dropout=True, segments=3)
    assert choose(big).strategy == "hybrid"
    assert choose(small).strategy == "split"  # fused is a few percent faster: a tie
    assert choose(dropped).strategy == "split"


@pytest.mark.parametrize("card", ["RTX 3070", "RTX 3090", "RTX 4090", "RTX 5090", "A100", "H100"])
def test_where_nf4_should_pay_is_what_the_document_says(card):
    least, most = cost.nf4_tokens(CARDS[card])
    assert least < most and f"| {card} | {least:,} | {most:,} |" in DOCS


def test_nf4_pays_for_more_tokens_where_memory_is_slow_and_instructions_are_fast():
    card = CARDS["RTX 3090"]
    least, most = cost.nf4_tokens(card)
    slow = cost.nf4_tokens(replace(card, memory=card.memory / 2))
    assert slow == pytest.approx((2 * least, 2 * most), abs=1)
    wide = cost.nf4_tokens(replace(card, processors=2 * card.processors))
    assert least < wide[0] < most == wide[1]
