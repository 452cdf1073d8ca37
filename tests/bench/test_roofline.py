"""The roofline and the cost model: bytes and operations by hand, and predictions of both."""

from __future__ import annotations

import pytest

from bench import __main__ as command
from bench import records, roofline
from bench.cases import LAYERS, Case
from bench.costs import PROVIDERS, launches_of, minimum
from lora_kernels.hardware import cost
from lora_kernels.hardware.cards import CARDS
from lora_kernels.strategies import choose

# 4096 x 768 by 768 x 768 at rank 16 in bf16 with dropout: worked out by hand.
HAND = Case(LAYERS["roberta-base.query"], 4096, 16, 0.1, "bfloat16")
MK = MN = 4096 * 768
NK, MR, RK = 768 * 768, 4096 * 16, 16 * 768


def test_floor_bytes_and_flops_by_hand():
    forward, backward = launches_of("floor", HAND, "forward_backward", CARDS["RTX 3070"])
    assert forward.bytes == backward.bytes == 2 * (MK + NK + MN) == 13_762_560
    assert forward.flops == 2 * 4096 * 768 * 768 == 4_831_838_208
    assert minimum(HAND, "forward_backward").bytes == 2 * 13_762_560


def test_peft_bytes_by_hand():
    card = CARDS["RTX 3070"]
    half = launches_of("peft-bf16-adapter", HAND, "forward_backward", card)
    assert len(half) == 6 + 8  # as docs/kernels.md counts them
    forward = 13_762_560 + 5 * MK + 2 * 2 * (MK + RK + MR) + 2 * 2 * MN + 3 * 2 * MN
    assert sum(launch.bytes for launch in half[:6]) == forward
    single = {launch.kernel: launch for launch in launches_of("peft", HAND, "forward", card)}
    assert single["h"].bytes == 4 * (MK + RK + MR) and single["h"].exact
    assert single["cast x"].bytes == 6 * MK


def test_prediction_by_hand():
    card = CARDS["RTX 3070"]
    share = roofline.Efficiency(0.5, 0.5, "test")
    found = roofline.predict(card, "floor", HAND, "forward", share)
    memory_us = 13_762_560 / (448e9 * 0.5) * 1e6
    # 768 tiles of 64 x 64 on 46 multiprocessors are 17 waves; such tiles are 6 % slower.
    compute_us = 4_831_838_208 / (40.6e12 * 0.5) * 1e6 * 1.06 * 17 * 46 / 768
    assert found.launches == 1
    assert found.microseconds == pytest.approx(max(memory_us, compute_us) + cost.GAP_US)


@pytest.mark.parametrize("card", ["RTX 3070", "H200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_roofline_and_choose_predict_the_same(card, dtype, dropout):
    case = Case(LAYERS["llama-8b.q_proj"], 2048, 8, dropout, dtype)
    row = CARDS[card]
    (N,) = case.layer.N
    problem = choose.Problem(
        2048, N, case.layer.K, 8, case.torch_dtype, row.arch, dropout > 0, dtype == "tf32", gpu=card
    )
    share = roofline.efficiency(row, dtype, [])
    for name in choose.STRATEGIES:
        found = roofline.predict(row, name, case, "forward_backward", share)
        if found is not None:
            assert found.microseconds == choose.predict(problem, name)


def test_more_work_never_costs_less():
    share = roofline.Efficiency(0.85, 0.7, "test")
    for card in CARDS.values():
        if card.arch == "sm_75":
            continue
        for name in LAYERS:
            case = Case(LAYERS[name], 4096)
            floor = roofline.predict(card, "floor", case, "forward_backward", share)
            group = len(case.layer.N) > 1  # ours may read x once where the floor reads it thrice
            for provider in PROVIDERS:
                found = roofline.predict(card, provider, case, "forward_backward", share)
                if found is not None and provider != "floor" and not group:
                    assert found.microseconds > floor.microseconds, (card.name, name, provider)


def test_roofline_prints_predictions(tmp_path, capsys):
    results = ["--results", str(tmp_path)]
    assert command.main(["roofline", "--gpu", "RTX 3070", "--kernels", *results]) == 0
    out = capsys.readouterr().out
    assert "RTX 3070 (sm_86): PREDICTION, not a measurement" in out
    assert "assumed: no card has been measured" in out
    assert "checked against no card" in out
    assert command.main(["roofline", "--gpu", "RTX 2080 Ti", *results]) == 0
    assert "no fast bfloat16 on sm_75" in capsys.readouterr().out
    assert command.main(["roofline", "--gpu", "GTX 1080"]) == 2
    assert command.main(["roofline", "--case", "nothing"]) == 2


def kernel_row(**changes):
    row = {"suite": "kernels", "case": HAND.layer.name, "provider": "floor", "mode": "graph"}
    row |= {"direction": "forward_backward", "M": 4096, "N": 768, "K": 768, "R": 16, "noise": 0.0}
    row |= {"dtype": "bfloat16", "dropout": 0.1, "status": "timed", "median_us": 50.0}
    row |= {"floor_ratio": 1.0, "gpu": "NVIDIA H200", "device": "cuda"}
    return row | {"copy_gb_per_s": 2400.0, "matrix_tflops": 494.7, **changes}


def test_roofline_is_checked_against_measured_cards(tmp_path, capsys):
    rows = [kernel_row(), kernel_row(provider="split", median_us=80.0)]
    share = roofline.efficiency(CARDS["H200"], "bfloat16", rows)
    assert share == roofline.Efficiency(0.5, 0.5, "measured on H200")
    assert roofline.efficiency(CARDS["RTX 3070"], "bfloat16", rows).source == "measured on H200"
    records.write(tmp_path / "nvidia-h200-kernels.json", rows)
    assert command.main(["roofline", "--gpu", "H200", "--results", str(tmp_path)]) == 0
    predicted = roofline.predict(CARDS["H200"], "split", HAND, "forward_backward", share)
    error = predicted.microseconds / 80 - 1
    assert f"split               median {error:+.0%}" in capsys.readouterr().out
