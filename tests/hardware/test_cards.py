"""The tables of cards and architectures: their numbers agree, and a card is found by its name."""

from __future__ import annotations

import pytest

from lora_kernels.hardware.cards import ARCHITECTURES, CARDS, card_of, nearest


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_a_matrix_rate_is_what_multiprocessors_and_clock_give(card):
    """FLOPs a clock of one multiprocessor, dense, half operands into float32 sums."""
    per_clock = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "gfx942": 2048}.get(card.arch, 512)
    assert card.processors * per_clock * card.boost * 1e-3 == pytest.approx(card.half, rel=0.02)
    assert card.tf32 is None or card.tf32 == pytest.approx(card.half / 2, rel=0.01)
    if "RTX" in card.name:  # two FLOPs a core: 64 cores in a Turing multiprocessor, 128 later
        cores = 64 if card.arch == "sm_75" else 128
        single = card.processors * 2 * cores * card.boost * 1e-3
        assert single == pytest.approx(card.single, rel=0.02)


def test_cards_are_told_apart():
    assert card_of("NVIDIA GeForce RTX 3070 Ti") is CARDS["RTX 3070 Ti"]
    assert card_of("NVIDIA GeForce RTX 3070") is CARDS["RTX 3070"]
    assert card_of("NVIDIA A100-SXM4-80GB") is CARDS["A100"]
    for other in ("CPU AMD EPYC", "NVIDIA RTX A1000", "NVIDIA GH200 480GB"):
        assert card_of(other) is None
    assert nearest("NVIDIA H200", "sm_90").name == "H200"
    assert nearest("an unknown card", "sm_89").name == "RTX 4090"
    assert nearest("", "sm_87").name == "RTX 3090"


def test_every_card_has_its_architecture_and_stands_for_no_other():
    of_arch = {
        arch: [card for card in CARDS.values() if card.arch == arch] for arch in ARCHITECTURES
    }
    assert sum(map(len, of_arch.values())) == len(CARDS)
    for arch, row in ARCHITECTURES.items():
        assert CARDS[row.card] in (of_arch[arch] or CARDS.values()), arch
