"""The compiled kernels, run instruction by instruction, compute what float64 says.

Run by test_launch.py. All is as on a card but the card: the strategies, the shipped tiles and
Triton's compiler; then a machine on the host (ptx.py) runs the PTX of each launch on the tensors
that it was given, and faults on what a sanitizer would find. ptxas and the card are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from lora_kernels import kernels, lora_linear
from lora_kernels.algebra import masks
from lora_kernels.algebra.columns import unfold
from lora_kernels.algebra.operands import PackWeights, Parts, Settings, Weights
from lora_kernels.algebra.packs import Pack
from lora_kernels.autograd import function, functional
from lora_kernels.autograd.functional import lora_layer
from lora_kernels.autograd.packs import Streams, packed_linears
from lora_kernels.hardware.tiles import Tile, shipped, tiles_for
from lora_kernels.kernels import launch
from lora_kernels.strategies.table import STRATEGIES
from lora_kernels.tools.absent_card import AbsentCard
from tests.compiled import ptx
from tests.support.groups import GroupCase, expected, mask_of, run, tensors
from tests.support.nf4 import judge_nf4
from tests.support.oracle import Case, judge_layer

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


class Card(AbsentCard):
    """A card whose programs the host runs."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.launched: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        super().launcher_cls(source, metadata)
        path = get_cache_manager(metadata.hash).get_file(f"{source.name}.ptx")
        assert path is not None
        program = ptx.parse(Path(path).read_text())

        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launched.append(program.name)
            memory = ptx.Memory()
            given = list(flat(tuple(source.signature.values()), arguments, memory))
            scratch = 0, 0  # Triton's own memory, of which our kernels have none
            ptx.launch(program, (x, y, z), [*given, *scratch], metadata.shared, memory)

        return run


def flat(types: Any, values: Any, memory: ptx.Memory) -> Iterator[Any]:
    """The arguments that reach the kernel, pointers as addresses of what it may touch."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value, memory)
        elif isinstance(value, torch.Tensor):
            yield memory.own(value).data_ptr()
        elif kind != "constexpr":
            yield value


@pytest.fixture
def on(monkeypatch, many_tokens):
    """Called with an architecture and a strategy: layers on the CPU run on such a card.

    With its shipped tiles, but for those given by the name of their kernel.
    """

    def begin(arch: str, strategy: str, dtype: torch.dtype, R: int, **given: Tile) -> Card:
        card = Card(arch)
        tiles = tiles_for(arch, dtype.itemsize, R, tf32=dtype is FULL)
        group_dx, *_ = shipped(arch, dtype.itemsize, R).group_dx  # taken for one layer as well
        tiles = tiles._replace(**{"low_rank_gemm_dx": group_dx, **given})
        monkeypatch.setattr(driver, "_active", card)
        # A cached launch has addresses where this card looks for tensors (see launches.py).
        monkeypatch.setattr(launch, "CACHED", False)
        row = STRATEGIES[strategy]
        monkeypatch.setattr("lora_kernels.autograd.functional.decide", lambda *_: (row, tiles))
        return card

    return begin


ARCH = os.environ.get("COMPILED_FOR", "sm_86")
TRITON = ("split", "fused", "hybrid")
CASES = [
    Case(130, 144, 160, 8, dropout=0.1, adapter=FULL),
    Case(150, 45, 77, 3, dropout=0.1, x="strided"),
    Case(70, 136, 96, 16, weight="conv1d"),
    Case(266, 80, 64, 40, dropout=0.5, bias=False, adapter=FULL),
    Case(1, 16, 40, 1, dropout=0.1),  # a pooler of one row: sums of a single element
    Case(65, 1, 1, 1),
]


@pytest.mark.parametrize("strategy", TRITON)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_and_every_gradient(on, case, strategy):
    """Half precision, in turn; exact fp32 is added up in another order than a CPU's GEMM does."""
    dtype = (HALF, BRAIN)[(CASES.index(case) + TRITON.index(strategy)) % 2]
    card = on(ARCH, strategy, dtype, case.R)

    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scale=case.scale, dropout=case.dropout
        )

    judge_layer(layer, case, dtype)
    assert {"_column_gradients", "_add_partials"} < set(card.launched)
    assert ("_fused_gemm" in card.launched) == (strategy == "fused")


RANGE = [
    Case(130, 144, 160, 8, dropout=0.1, adapter=FULL, B=1e-4, dy=1e-4),
    Case(270, 45, 77, 40, adapter=FULL, B=0.5, dy=150.0, agree=True),
]


@pytest.mark.parametrize("strategy", TRITON)
@pytest.mark.parametrize("case", RANGE, ids=str)
def test_float16_loses_no_range_of_wider_adapters(on, case, strategy):
    on(ARCH, strategy, HALF, case.R)

    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scale=case.scale, dropout=case.dropout
        )

    judge_layer(layer, case, HALF)


@pytest.mark.parametrize("strategy", TRITON)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800000], ids=["nan", "inf"])
def test_rounding_to_tf32_hides_no_nan_and_no_infinity(on, bits, strategy):
    on(ARCH, strategy, HALF, 8)
    x, weight = torch.ones(32, 32, dtype=HALF), torch.zeros(32, 32, dtype=HALF)
    lora_A, lora_B = torch.ones(8, 32), torch.ones(32, 8)
    lora_A.view(torch.int32)[0, 0] = bits
    y = lora_linear(x, weight, lora_A, lora_B)
    assert (y.isnan() if bits > 0x7F800000 else y.isposinf()).all()


@pytest.mark.parametrize("strategy", TRITON)
def test_exact_float32_rounds_no_more_than_eager(on, strategy, monkeypatch):
    """A chain of FMAs that started from the low-rank product would."""
    case = Case(64, 64, 80, 8, dropout=0.5)
    tiles = tiles_for(ARCH, 4, case.R, tf32=False)
    on(ARCH, strategy, FULL, case.R)
    monkeypatch.setattr(
        "lora_kernels.autograd.functional.decide", lambda *_: (STRATEGIES[strategy], tiles)
    )

    def layer(x, weight, lora_A, lora_B, bias):
        return lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scale=case.scale, dropout=case.dropout
        )

    judge_layer(layer, case, FULL)


GROUPS = {
    "tf32": GroupCase(40, (33, 70), 72, 8, FULL, FULL, dropout=0.5, dy=("plain", "slice")),
    "fp16": GroupCase(
        140, (136, 24, 40), 96, 8, HALF, FULL, dropout=0.5, x="slice", dy=("slice", "plain", "row")
    ),
    "frozen lora_A": GroupCase(40, (32, 48), 64, 3, HALF, wanted=frozenset(("x", "lora_B"))),
    "frozen x": GroupCase(40, (32,), 64, 16, HALF, wanted=frozenset(("lora_A", "lora_B"))),
}


@pytest.mark.parametrize("strategy", TRITON)
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_whole_numbers_are_exact(on, case, strategy):
    on(ARCH, strategy, case.dtype, case.R)
    given = tensors(case, 0, whole=True)
    keep = mask_of(given, case, strategy)
    actual = run(given, case, strategy)
    exact = expected(given.to(torch.float64), case, keep)
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.equal(actual[name].double(), value), name


@pytest.mark.parametrize("strategy", ("split", "hybrid"))
def test_ranges_of_columns(on, strategy):
    on(ARCH, strategy, HALF, 4)
    columns, N, K = ((0, 40), (64, 90)), 100, 48

    def whole(*shape):
        return torch.randint(-2, 3, shape).to(HALF)

    x, weight, bias, dy = whole(70, K), whole(N, K), whole(N), whole(70, N)
    lora_A, lora_B = whole(8, K), whole(66, 4)
    leaves = [each.requires_grad_() for each in (x, lora_A, lora_B)]
    settings = Settings(0.5, 0.0, strategy, columns)
    y = lora_layer(x, Parts(Weights(weight, bias, lora_A, lora_B), settings))
    actual = (y, *torch.autograd.grad(y, leaves, dy))
    x, lora_A, lora_B = leaves = [each.detach().double().requires_grad_() for each in leaves]
    update = unfold(lora_B, columns, N) @ lora_A
    y = x @ (weight.double() + 0.5 * update).T + bias
    for found, exact in zip(actual, (y, *torch.autograd.grad(y, leaves, dy.double())), strict=True):
        assert torch.equal(found.double(), exact)


def test_h_in_parts_of_K(on):
    on(ARCH, "split", HALF, 8)
    M, N, K = 70, 90, 320

    def whole(*shape, dtype=HALF):
        return torch.randint(-2, 3, shape).to(dtype)

    x, weight, lora_A, lora_B = whole(M, K), whole(N, K), whole(8, K), whole(N, 8)
    tiles = tiles_for(ARCH, 2, 8, tf32=False)
    options = {"precision": tiles.precision}
    parts, _ = kernels.project(x, (lora_A,), tile=tiles.project, parts=4, **options)
    assert parts.shape == (3, 1, M, 8)  # five steps of 64 columns, two a part
    exact = x.double() @ lora_A.double().T
    assert torch.equal(parts.sum(0)[0].double(), exact)
    (y,), h = kernels.low_rank_gemm(
        (x,), (weight,), parts, (lora_B,), scale=0.0625, tile=tiles.low_rank_gemm, **options
    )
    assert torch.equal(h[0].double(), exact.to(HALF).double())
    low_rank = 0.0625 * (h[0].double() @ lora_B.double().T)
    assert torch.equal(y.double(), (x.double() @ weight.double().T + low_rank).to(HALF).double())


NF4 = [
    Case(64, 19, 64, 1, dropout=0.3),  # a sum over the rows of the weight in a single step
    Case(130, 144, 192, 8, dropout=0.1, adapter=FULL),
    Case(70, 45, 64, 40, bias=False),
]


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", NF4, ids=str)
def test_a_weight_in_nf4(on, case, dtype):
    """With what bitsandbytes dequantises it to on a CPU."""
    card = on(ARCH, "split", dtype, case.R)
    judge_nf4(case, dtype, tiles_for(ARCH, 2, case.R, tf32=False, nf4=True), nested=dtype is BRAIN)
    assert card.launched.count("_low_rank_gemm") == 2


def test_the_library_draws_the_masks_of_the_other_strategies(on):
    on("sm_75", "split", HALF, 3)
    seed = torch.tensor([-(1 << 62) + 12345])
    mask = kernels.draw_masks(seed, 2, 37, 83, 0.3)
    t, onto = torch.randn(37, 83, dtype=HALF), torch.randn(37, 83, dtype=HALF)
    kept = torch.where(masks.unpack(mask[1], 83), t, 0)
    assert torch.equal(kernels.apply_mask(t, mask[1]), kept)
    added = (onto.float() + kept.float()).to(HALF)
    assert torch.equal(kernels.apply_mask(t, mask[1], onto=onto), added)
    on(ARCH, "split", HALF, 3)
    x, lora_A = torch.randn(37, 83, dtype=HALF), (torch.randn(3, 83),) * 2
    tile = tiles_for(ARCH, 2, 3, tf32=False).project
    _, drawn = kernels.project(x, lora_A, tile=tile, precision="ieee", dropout=0.3, seed=seed)
    assert torch.equal(drawn, mask)


GAINS = [(1, 1, 1, 1), (70, 131, 100, 19), (64, 64, 128, 16)]  # M, N, K, R


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("M", "N", "K", "R"), GAINS, ids=str)
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_the_gains_of_dora(on, M, N, K, R, conv1d, dtype):
    """In float64, from operands that TF32 holds exactly."""
    card = on(ARCH, "split", dtype, R)
    torch.manual_seed(0)
    stored = torch.randn(*((K, N) if conv1d else (N, K))).to(dtype)
    weight = stored.T if conv1d else stored
    lora_A, lora_B = (torch.randn(shape).bfloat16().float() for shape in ((R, K), (N, R)))
    magnitude, bias = torch.randn(N), torch.randn(N).to(dtype)
    exact = (weight.double() + 0.5 * lora_B.double() @ lora_A.double()).norm(dim=1)
    for precision in ("tf32", "ieee"):
        gain, length = kernels.row_gains(
            weight, lora_A, lora_B, magnitude, 0.5, precision=precision
        )
        torch.testing.assert_close(length.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(gain.double(), magnitude / exact, rtol=1e-6, atol=0)
    p, dy = torch.randn(M, N).to(dtype), torch.randn(N, M).to(dtype).T
    y = kernels.scale_columns(p, gain, bias)
    assert_rounded(y, p.double() * gain.double() + bias.double())
    dp, dgain = kernels.scale_columns_backward(dy, p, gain)
    assert_rounded(dp, dy.double() * gain.double())
    torch.testing.assert_close(dgain.sum(0), (dy.double() * p.double()).sum(0).float())
    assert card.launched.count("_row_gains") == 2 and len(card.launched) == 4


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Each number is within a rounding to its dtype, and one of the float32 before it."""
    bound = 0.51 * torch.finfo(found.dtype).eps * exact.abs()
    room = 4 * torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= bound + room).all()


# ---------------------------------------------------------------- the machine itself
def without(operation: str, monkeypatch) -> None:
    """Leave an instruction out of every program."""
    parse = ptx.parse

    def cut(text: str) -> ptx.Program:
        program = parse(text)
        nothing = "", "bar.warp.sync", ["-1"]
        kept = [nothing if each[1].startswith(operation) else each for each in program.statements]
        return program._replace(statements=kept)

    monkeypatch.setattr(ptx, "parse", cut)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("bar.sync", "no barrier"),
        ("cp.async.wait_group", "under way"),
        ("st.shared", "nothing has written"),
    ],
)
def test_what_is_missing_is_noticed(on, monkeypatch, operation, words):
    without(operation, monkeypatch)
    on("sm_86", "split", HALF, 8)
    x, weight = torch.randn(130, 96, dtype=HALF), torch.randn(64, 96, dtype=HALF)
    with pytest.raises(ptx.Fault, match=words):
        lora_linear(x, weight, torch.randn(8, 96), torch.randn(64, 8))


@pytest.mark.parametrize(("offset", "words"), [(16, "in no tensor"), (14, "not aligned")])
def test_a_bad_address_is_noticed(offset, words):
    memory = ptx.Memory()
    base = memory.own(torch.zeros(16, dtype=torch.uint8)).data_ptr()
    ((found, _, places),) = memory.at(np.array([base + 12], np.uint64), 4)
    assert len(found) == 16 and places.tolist() == [[12, 13, 14, 15]]
    with pytest.raises(ptx.Fault, match=words):
        memory.at(np.array([base + offset], np.uint64), 4)


@pytest.mark.parametrize("strategy", TRITON)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_rows_of_several_adapters(on, strategy, dropout, monkeypatch):
    """Three adapters, the first without LoRA in a layer of two: each like a lone layer, exactly."""
    card = on(ARCH, strategy, HALF, 8)
    decided = functional.decide
    monkeypatch.setattr("lora_kernels.autograd.packs.decide", decided)
    edges, ranks, K, N = (0, 20, 90, 127), (0, 3, 8), 48, (100, 64)

    def whole(*shape, dtype=HALF):
        return torch.randint(-1, 2, shape).to(dtype)

    x = whole(edges[-1], K).requires_grad_()
    stack = whole(2, sum(ranks) * (K + max(N)), dtype=FULL)
    layers, leaves, place = [], [x], [0, 0]

    def adapter(g, *shape):
        first, count = place[g], shape[0] * shape[1]
        place[g] += count
        leaves.append(stack[g, first : first + count].view(shape).requires_grad_())
        return leaves[-1]

    for g, n in enumerate(N):
        own = [(adapter(g, R, K), adapter(g, n, R)) if R else (None, None) for R in ranks]
        layers.append(PackWeights(whole(n, K), whole(n), *zip(*own, strict=True)))
    scales, dropouts = (1.0, 0.5, 0.25), (dropout, 0.0, dropout)
    streams = Streams({"a": 1, "b": 2, "c": 3})
    pack = Pack(edges, ranks, scales, dropouts, ("a", "b", "c"), streams)
    y = packed_linears(x, tuple(layers), Settings(1.0, dropout, strategy, None, pack))
    mask, dy = function.mask_of(y[0]), [whole(len(x), n) for n in N]
    actual = [*y, *torch.autograd.grad(y, leaves, dy)]
    assert "_add_splits" in card.launched
    exact = [each.detach().double().requires_grad_() for each in leaves]
    rest, expected_y = iter(exact[1:]), []
    for g, weights in enumerate(layers):
        blocks = []
        for c, R in enumerate(ranks):
            rows = slice(edges[c], edges[c + 1])
            out = exact[0][rows] @ weights.weight.double().T + weights.bias
            if R:
                lora_A, lora_B = next(rest), next(rest)
                dropped = exact[0][rows]
                if mask is not None and dropouts[c]:
                    dropped = dropped * masks.unpack(mask[g, rows], K) / (1 - dropouts[c])
                out = out + scales[c] * (dropped @ lora_A.T) @ lora_B.T
            blocks.append(out)
        expected_y.append(torch.cat(blocks))
    expected_all = [*expected_y, *torch.autograd.grad(expected_y, exact, [d.double() for d in dy])]
    for found, right in zip(actual, expected_all, strict=True):
        allowed = 2e-3 * right.abs().max().item()
        torch.testing.assert_close(found.double(), right, rtol=2e-3, atol=allowed)
