"""choose: which strategy, which tiles, and the reason in words; what is remembered of it."""

from __future__ import annotations

import dataclasses
import operator
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import STRATEGIES, FusedLoRALinear, lora_linear
from lora_kernels.algebra.operands import Operands, Settings, Weights
from lora_kernels.hardware import tiles
from lora_kernels.strategies.choose import _decide, choose, decide
from lora_kernels.strategies.problem import FEW_ELEMENTS, Problem, has_triton
from tests.support.oracle import DEVICE

HALF = Problem(2048, 768, 768, 8, torch.bfloat16, "sm_86")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CARDS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
TRITON = tuple(name for name in STRATEGIES if name != "library")


def changed(**changes) -> Problem:
    return dataclasses.replace(HALF, **changes)


@pytest.fixture
def fresh_plans():
    """Nothing remembered of other tests, and nothing left for them."""
    _decide.cache_clear()
    yield
    _decide.cache_clear()


@pytest.fixture
def no_triton(monkeypatch, fresh_plans):
    def absent(name, *rest):
        assert name == "triton"

    monkeypatch.setattr("lora_kernels.strategies.problem.find_spec", absent)
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


# ---------------------------------------------------------------- each row


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_named_by_the_caller_is_taken(name):
    choice = choose(HALF, name)
    assert choice.strategy == name and choice.reason == "named by the caller"
    assert (choice.tiles is None) == (name == "library")


NF4 = {
    "auto": ("library", "bitsandbytes' product of NF4, LoRA is added to it", {}),
    "split": ("split", "named by the caller; an estimate, not a measurement: faster than", {}),
    "split at rank 33": ("split", "named by the caller", {"R": 33}),
    "fused": ("library", "fused was asked for, but: it reads no NF4 weight; bitsandbytes'", {}),
    "hybrid": ("library", "hybrid was asked for, but: it reads no NF4 weight; bitsandbytes'", {}),
    "split of a ragged row": ("library", "past the end of a row: K is 96", {"K": 96}),
    "split of ragged columns": ("library", "where 64 does not divide N", {"N": 800}),
    "split in float32": ("library", "not in torch.float32", {"dtype": torch.float32}),
    "split on AMD": ("library", "NF4 is read on NVIDIA cards alone", {"arch": "gfx942"}),
    "split at a high rank": ("library", "rank 129 is over 128", {"R": 129}),
}


@pytest.mark.parametrize("case", NF4)
def test_a_weight_in_nf4(case):
    strategy, reason, changes = NF4[case]
    choice = choose(changed(nf4=True, **changes), case.split(" ", maxsplit=1)[0])
    assert choice.strategy == strategy and reason in choice.reason
    if choice.tiles:
        gemms = choice.tiles.low_rank_gemm, choice.tiles.low_rank_gemm_dx
        assert gemms == (tiles.NF4_GEMM["R" in changes],) * 2
        plain = choose(changed(**changes), "split").tiles
        assert plain and choice.tiles.project == plain.project
    assert changed(nf4=True).key == f"{HALF.key}-nf4" and "NF4" in str(changed(nf4=True))


def test_each_row_wins_somewhere_and_says_by_how_much():
    """The shapes that the design gives to each; `library` is the answer where Triton cannot."""
    for K, R, dropout in product((256, 768, 4096, 14336), (4, 16, 64), (False, True)):
        for M, arch in product((16, 512, 8192), CARDS):
            choice = choose(changed(M=M, N=K, K=K, R=R, dropout=dropout, arch=arch))
            assert STRATEGIES[choice.strategy].supports(changed(dropout=dropout)) is None
            assert STRATEGIES[choice.strategy].summary in choice.reason
            assert "us forward + backward" in choice.reason
    won = {
        choose(changed(M=M, N=K, K=K, arch=arch, dropout=dropout, segments=segments)).strategy
        for M, K, arch, dropout, segments in product(
            (16, 512, 8192), (256, 768, 4096), CARDS, (False, True), (1, 3)
        )
    }
    assert {"split", "fused", "hybrid"} <= won


REFUSALS = {
    "Turing": ({"arch": "sm_75"}, TRITON, "no matrix instructions for sm_75"),
    "Volta": ({"arch": "sm_70"}, TRITON, "no matrix instructions for sm_70"),
    "another device": ({"arch": "mps"}, TRITON, "no kernels for the device mps"),
    "fp64": ({"dtype": torch.float64}, TRITON, "no kernel for torch.float64"),
    "rank": ({"R": tiles.MAX_RANK + 1}, TRITON, "rank 129 is over 128"),
    "no rows": ({"M": 0}, TRITON, "nothing to compute"),
    "no columns": ({"N": 0}, TRITON, "nothing to compute"),
    "no features": ({"K": 0}, TRITON, "nothing to compute"),
    "columns": ({"columns": True, "segments": 2}, ("fused",), "columns: every one of them"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_strategy_cannot_do_falls_back_with_the_reason(name):
    changes, strategies, words = REFUSALS[name]
    problem = changed(**changes)
    for strategy in strategies:
        assert words in STRATEGIES[strategy].supports(problem)
        choice = choose(problem, strategy)
        assert choice.strategy != strategy
        assert STRATEGIES[choice.strategy].supports(problem) is None
        assert choice.reason.startswith(f"{strategy} was asked for, but: ")
        assert words in choice.reason
    if strategies == TRITON:
        choice = choose(problem)
        assert choice.strategy == "library" and words in choice.reason and choice.tiles is None
    assert choose(problem, "library").reason == "named by the caller"


def test_the_largest_rank_is_still_taken():
    for name in TRITON:
        assert STRATEGIES[name].supports(changed(R=tiles.MAX_RANK)) is None


def test_without_triton_everything_is_the_library(no_triton):
    for arch, strategy in product((*CARDS, "cpu"), ("auto", *TRITON)):
        choice = choose(changed(arch=arch), strategy)
        assert choice.strategy == "library" and choice.tiles is None
        if arch != "cpu" or strategy != "auto":
            assert "Triton is not installed" in choice.reason
    x, weight = torch.randn(5, 7), torch.randn(4, 7)
    lora_A, lora_B = torch.randn(3, 7, requires_grad=True), torch.randn(4, 3)
    y = lora_linear(x, weight, lora_A, lora_B, strategy="split")
    torch.testing.assert_close(y, x @ weight.T + x @ lora_A.T @ lora_B.T)
    assert y.grad_fn.call.strategy.name == "library"


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_cpu_never_gets_a_triton_strategy_from_auto(monkeypatch, fresh_plans, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    for M, K, dtype, dropout in product((1, 4096), (64, 4096), DTYPES, (False, True)):
        problem = Problem(M, K, K, 8, dtype, "cpu", dropout)
        assert choose(problem).strategy == "library"
        for name in TRITON:
            taken = choose(problem, name).strategy == name
            assert taken == (interpret == "1" and dtype is not torch.float64)
    if interpret == "0":
        assert "TRITON_INTERPRET=1" in choose(problem, "split").reason


@pytest.mark.skipif(DEVICE.type != "cpu", reason="is about tensors of the CPU")
def test_a_layer_on_a_cpu_runs_the_library():
    for layer in (FusedLoRALinear(8, 6, rank=2), FusedLoRALinear(8, 6, rank=2, dropout=0.5)):
        assert layer(torch.randn(FEW_ELEMENTS, 8)).grad_fn.call.strategy.name == "library"


@pytest.mark.parametrize("arch", ["sm_199", "sm_130", "gfx9999", "gfx90a"])
def test_an_unknown_card_gets_tiles_that_fit_every_card(arch):
    safe = {key[1:]: row for key, row in tiles.DEFAULT_TILES.items() if key[0] == "any"}
    for dtype, R, dropout, strategy in product(
        DTYPES[:3], (1, 8, 33, 128), (False, True), ("auto", *STRATEGIES)
    ):
        choice = choose(changed(arch=arch, dtype=dtype, R=R, dropout=dropout), strategy)
        if strategy in TRITON:
            assert choice.strategy == strategy
        if choice.tiles is not None:
            row = safe[dtype.itemsize, R > 32]
            assert choice.tiles.project == row.project and choice.tiles.low_rank == row.low_rank
            assert choice.tiles.output_gradients == row.output_gradients
            assert choice.tiles.parameter_gradients == row.parameter_gradients
            for kernel in ("low_rank_gemm", "fused_gemm"):
                for use in (kernel, f"{kernel}_dx"):
                    assert getattr(choice.tiles, use) in getattr(row, kernel)


def test_every_choice_can_compute_its_problem():
    for arch, dtype, M, R, dropout, tf32 in product(
        (*CARDS, "sm_75", "cpu", "mps"), DTYPES, (0, 1, 300), (1, 129), (False, True), (False, True)
    ):
        problem = Problem(M, 40, 24, R, dtype, arch, dropout, tf32)
        for strategy in ("auto", *STRATEGIES):
            choice = choose(problem, strategy)
            assert STRATEGIES[choice.strategy].supports(problem) is None
            assert choice.reason and (choice.tiles is None) == (choice.strategy == "library")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [("spilt", "'split'"), ("Library", "'library'"), ("autos", "'auto'"), ("hybird", "'hybrid'")],
)
def test_an_unknown_strategy_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"unknown strategy '{name}'.*did you mean {hint}"):
        choose(HALF, name)


def test_an_unknown_strategy_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match="auto, library, split, fused, hybrid") as caught:
        choose(HALF, "xyz")
    assert "did you mean" not in str(caught.value)


def test_strategies_are_rows_that_nobody_can_change():
    assert all(row.name == name and row.summary for name, row in STRATEGIES.items())
    with pytest.raises(TypeError):
        STRATEGIES["mine"] = STRATEGIES["split"]
    with pytest.raises(TypeError):
        del STRATEGIES["split"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        STRATEGIES["split"].name = "mine"


def test_a_problem_in_words():
    assert str(HALF) == "M=2048 N=768 K=768 R=8 bfloat16 sm_86"
    assert str(Problem(1, 2, 3, 4, torch.float32)) == "M=1 N=2 K=3 R=4 float32 cpu"
    grouped = changed(segments=3, dropout=True, dtype=torch.float16)
    assert str(grouped) == "3 layers, M=2048 N=768 K=768 R=8 float16 sm_86, dropout"


def test_the_problem_of_this_machine():
    problem = Problem.on(DEVICE, 5, 6, 7, 2, torch.float16, dropout=True, segments=2)
    assert (problem.M, problem.N, problem.K, problem.R) == (5, 6, 7, 2)
    assert problem.dropout and problem.segments == 2 and not problem.tf32
    assert problem.arch == "cpu" if DEVICE.type == "cpu" else problem.arch.startswith("sm_")
    assert Problem.on(torch.device("meta"), 5, 6, 7, 2, torch.half, dropout=False).arch == "meta"


# ---------------------------------------------------------------- what is remembered


def planned(
    M: int, *, device=DEVICE, N=24, K=16, R=3, dtype=torch.float32, dropout=0.0, segments=1,
    columns=None, strategy="split",
):  # fmt: skip
    """What `decide` says of a call; x may lie on a device that is not here."""
    x = SimpleNamespace(device=device, dtype=dtype, shape=(M, K), dim=lambda: 2)
    shapes = (N, K), (R, K), (N, R)
    weight, lora_A, lora_B = (torch.empty(shape, device="meta") for shape in shapes)
    operands = Operands.of([Weights(weight, None, lora_A, lora_B)] * segments)
    return decide(x, operands, Settings(1.0, dropout, strategy, columns))


@pytest.fixture
def choices(monkeypatch, fresh_plans) -> list[Problem]:
    """The problems that `choose` is asked about."""
    asked: list[Problem] = []
    original = choose

    def counted(problem, *rest):
        asked.append(problem)
        return original(problem, *rest)

    monkeypatch.setattr("lora_kernels.strategies.choose.choose", counted)
    return asked


def test_a_new_length_of_a_bucket_is_the_same_plan(choices):
    first = planned(129)
    assert all(planned(M) is first for M in range(129, 257))
    assert len(choices) == 1
    assert planned(257) is not first and planned(128) is not first
    assert [problem.M for problem in choices] == [256, 512, 128]
    for M in (0, 1, 2):
        planned(M)
    assert [problem.M for problem in choices[3:]] == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"N": 25}, {"K": 17}, {"R": 4}, {"dtype": torch.float16}, {"dropout": 0.1}, {"segments": 2},
        {"columns": ((0, 8), (8, 24))},
        {"strategy": "auto"},
    ],
    ids=str,
)  # fmt: skip
def test_all_that_a_choice_depends_on_is_part_of_the_plan(choices, change):
    planned(200)
    planned(200, **change)
    assert len(choices) == 2


def test_training_on_batches_of_any_length_decides_once(choices):
    layer = FusedLoRALinear(16, 24, rank=3, strategy="split", device=DEVICE)
    for length in (33, 64, 40, 57):
        layer(torch.randn(length, 16, device=DEVICE)).sum().backward()
    assert len(choices) == 1


def test_empty_batches_and_fp64_run_in_the_library(choices):
    for M, dtype in ((0, torch.float32), (5, torch.float64)):
        layer = FusedLoRALinear(16, 24, rank=3, strategy="split", device=DEVICE, dtype=dtype)
        y = layer(torch.randn(M, 16, device=DEVICE, dtype=dtype))
        assert y.shape == (M, 24) and y.grad_fn.call.strategy.name == "library"


def test_torch_s_setting_for_tf32_decides_anew(monkeypatch, fresh_plans):
    monkeypatch.setattr("lora_kernels.strategies.problem.architecture", lambda device: "sm_86")
    monkeypatch.setattr("lora_kernels.strategies.problem._gpu", lambda device: "")
    monkeypatch.setattr("lora_kernels.strategies.problem.processors", lambda device: 46)
    cuda = torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        precisions = {}
        for setting in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(setting)
            precisions[setting] = planned(64, device=cuda)[1].precision
            # Under fp16 it says how products with a side of R take fp32 adapters.
            assert planned(64, device=cuda, dtype=torch.float16)[1].precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@pytest.mark.parametrize("where", ["backends", "backends.cuda.matmul"])
def test_the_newer_setting_for_tf32_is_read_too(monkeypatch, fresh_plans, where):
    """The Trainer uses it (`tf32=True`, or torch_compile); torch's older getter then raises."""
    monkeypatch.setattr("lora_kernels.strategies.problem.architecture", lambda device: "sm_86")
    monkeypatch.setattr("lora_kernels.strategies.problem._gpu", lambda device: "")
    monkeypatch.setattr("lora_kernels.strategies.problem.processors", lambda device: 46)
    cuda, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    owner = operator.attrgetter(where)(torch)
    before = owner.fp32_precision, matmul.fp32_precision
    matmul.fp32_precision = "none"  # follow the wider setting
    try:
        for setting in ("ieee", "tf32", "ieee"):
            owner.fp32_precision = setting
            assert planned(64, device=cuda)[1].precision == setting
            layer = FusedLoRALinear(16, 24, rank=3, device=DEVICE)
            layer(torch.randn(5, 16, device=DEVICE)).sum().backward()
    finally:
        owner.fp32_precision, matmul.fp32_precision = before
