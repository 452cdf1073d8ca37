"""Rows of several adapters in one call, by every strategy, judged as a lone layer is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from lora_kernels.algebra import masks, reference
from lora_kernels.algebra.operands import PackWeights, Settings, Weights
from lora_kernels.algebra.packs import Pack, places
from lora_kernels.autograd import packs
from lora_kernels.autograd.function import mask_of
from lora_kernels.autograd.functional import lora_linears
from lora_kernels.autograd.packs import Streams, packed_linears
from lora_kernels.strategies import STRATEGIES, problem
from tests.support.oracle import DEVICE, PlainSums, coarser, judge

NAMES = [chr(ord("a") + c) for c in range(16)]


@dataclass(frozen=True)
class Case:
    """G layers of widths N, or G ranges of one layer's columns, for C adapters."""

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    K: int = 40
    N: tuple[int, ...] = (48,)
    columns: tuple[tuple[int, int], ...] | None = None
    dropout: float = 0.0
    bias: bool = True

    def __str__(self) -> str:
        rows, ranks, N = ("-".join(map(str, each)) for each in (self.rows, self.ranks, self.N))
        kind = "columns" if self.columns else f"N{N}"
        return f"rows{rows}-R{ranks}-{kind}-p{self.dropout}"


CASES = (
    Case((37,), (4,)),
    Case((20, 33), (8, 8), K=64, N=(64,), dropout=0.1, bias=False),
    Case((5, 0, 33, 40, 7), (1, 3, 8, 64, 3), dropout=0.2),
    Case((20, 17, 9), (3, 0, 5), K=33, N=(20, 24), dropout=0.1),
    Case((16, 16, 16), (8, 8, 8), K=64, N=(64, 64, 64), dropout=0.1),
    Case((5, 42), (3, 8), columns=((0, 16), (32, 48)), dropout=0.1),
    Case((4,) * 16, (2, 4, 8, 16) * 4, N=(32,), dropout=0.1),
)


class Given:
    """Tensors of a case; scales and dropouts differ among the adapters."""

    def __init__(self, case: Case, dtype: torch.dtype, adapter: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(*shape, generator=draw) * std).to(DEVICE, dtype)

        C, K = len(case.rows), case.K
        self.case, self.edges = case, tuple(accumulate(case.rows, initial=0))
        M = self.edges[-1]
        self.scales = tuple(0.5 + c / C for c in range(C))
        self.dropouts = tuple(
            case.dropout * (c % 3) / 2 if C > 1 else case.dropout for c in range(C)
        )
        self.x = normal(M, K).requires_grad_()
        self.weight = [normal(n, K, std=K**-0.5) for n in case.N]
        self.bias = [normal(n) if case.bias else None for n in case.N]
        self.dy = [normal(M, n) for n in case.N]
        ranges = case.columns
        self.adapters = []
        for n in case.N:
            width = n if ranges is None else sum(stop - start for start, stop in ranges)
            self.adapters.append(
                [
                    None
                    if R == 0
                    else (
                        normal(
                            len(ranges or "1") * R, K, std=K**-0.5, dtype=adapter
                        ).requires_grad_(),
                        normal(width, R, std=R**-0.5, dtype=adapter).requires_grad_(),
                    )
                    for R in case.ranks
                ]
            )

    def settings(self, strategy: str) -> Settings:
        C = len(self.case.rows)
        streams = Streams({name: c + 5 for c, name in enumerate(NAMES[:C])})
        pack = Pack(
            self.edges, self.case.ranks, self.scales, self.dropouts, tuple(NAMES[:C]), streams
        )
        return Settings(1.0, max(self.dropouts), strategy, self.case.columns, pack)

    def layers(self) -> tuple[PackWeights, ...]:
        return tuple(
            PackWeights(weight, bias, *zip(*(a or (None, None) for a in adapters), strict=True))
            for weight, bias, adapters in zip(self.weight, self.bias, self.adapters, strict=True)
        )

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, *(t for layer in self.adapters for a in layer if a for t in a)]

    def expected(self, mask: torch.Tensor | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """y of each layer and the gradients, adapter by adapter, in `dtype`."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves()]
        rest, ys = iter(leaves[1:]), []
        keep = None if mask is None else masks.unpack(mask, self.case.K)
        for g, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            weight, blocks = weight.to(dtype), []
            bias = bias if bias is None else bias.to(dtype)
            for c, (first, last) in enumerate(pairwise(self.edges)):
                x, R = leaves[0][first:last], self.case.ranks[c]
                y = torch.nn.functional.linear(x, weight, bias)
                own = (next(rest), next(rest)) if R else ()
                at, parts = 0, []
                for i, (start, stop) in enumerate(self.case.columns or ((0, len(weight)),)):
                    if not own:
                        break
                    A, B = own[0][i * R : (i + 1) * R], own[1][at : at + stop - start]
                    at += stop - start
                    segment = i if self.case.columns else g
                    kept = (
                        keep[segment, first:last] if keep is not None and self.dropouts[c] else None
                    )
                    dropped = reference.dropped(x, kept, self.dropouts[c])
                    parts.append((start, stop, self.scales[c] * (dropped @ A.T) @ B.T))
                for start, stop, part in parts:
                    y = torch.cat([y[:, :start], y[:, start:stop] + part, y[:, stop:]], 1)
                blocks.append(y)
            ys.append(torch.cat(blocks))
        dys = [dy.to(dtype) for dy in self.dy]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="few tokens are a matter of CPUs")
@pytest.mark.parametrize("few", [1 << 16, 20 * 40], ids=["all-few", "some-few"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.columns], ids=str)
def test_few_tokens_are_computed_and_dropped_as_by_each_adapter_alone(case, few, monkeypatch):
    monkeypatch.setattr(problem, "FEW_ELEMENTS", few)
    given = Given(case, torch.float64, torch.float64)
    ys = packed_linears(given.x, given.layers(), given.settings("auto"))
    if few == 1 << 16:
        assert type(ys[0].grad_fn).__name__ == "CatBackward0"
    found = [*ys, *torch.autograd.grad(ys, given.leaves(), given.dy, materialize_grads=True)]
    blocks = []
    for c, (first, last) in enumerate(pairwise(given.edges)):
        torch.manual_seed(c + 5)  # what `settings` seeds the streams with
        x = given.x[first:last]
        settings = Settings(given.scales[c], given.dropouts[c] if case.ranks[c] else 0.0)
        weights = [
            Weights(
                weight, bias, *(own[c] or (x.new_zeros(1, case.K), x.new_zeros(len(weight), 1)))
            )
            for n, weight, bias, own in zip(
                case.N, given.weight, given.bias, given.adapters, strict=True
            )
        ]
        blocks.append(lora_linears(x, tuple(weights), settings))
    alone = [torch.cat(each) for each in zip(*blocks, strict=True)]
    wanted = torch.autograd.grad(alone, given.leaves(), given.dy, materialize_grads=True)
    for a, b in zip(found, [*alone, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's masks are not those of a lone layer")
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_an_adapter_draws_nothing_where_it_has_no_lora(many, request):
    if many:
        request.getfixturevalue("many_tokens")
    rows = (
        3 if many else problem.FEW_ELEMENTS // 8 + 1
    )  # of an adapter without LoRA any number is few
    streams, weight = Streams({"a": 5, "b": 6}), torch.randn(12, 8)
    lora_A, lora_B = torch.randn(2, 8, requires_grad=True), torch.randn(12, 2)
    x = torch.randn(2 + rows, 8)
    for count, B_of_b in ((rows, None), (2, lora_B)):
        R = 0 if B_of_b is None else 2
        pack = Pack((0, 2, 2 + count), (2, R), (1.0, 1.0), (0.5, 0.5), ("a", "b"), streams)
        layer = PackWeights(
            weight, None, (lora_A, None if B_of_b is None else lora_A), (lora_B, B_of_b)
        )
        (y,) = packed_linears(x[: 2 + count], (layer,), Settings(1.0, 0.5, pack=pack))
    torch.manual_seed(6)
    alone = lora_linears(x[2:4], (Weights(weight, None, lora_A, lora_B),), Settings(1.0, 0.5))
    torch.testing.assert_close(y[2:], alone[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16"],
)
def test_every_strategy_computes_every_adapter(strategy, case, dtype, adapter):
    if case.columns and strategy == "fused":
        pytest.skip("fused takes no columns")
    given = Given(case, dtype, adapter)
    torch.manual_seed(0)
    y = packed_linears(given.x, given.layers(), given.settings(strategy))
    mask = mask_of(y[0])
    assert (mask is None) == (case.dropout == 0)
    actual = [*(each.detach() for each in y), *torch.autograd.grad(y, given.leaves(), given.dy)]
    exact, eager = given.expected(mask, torch.float64), given.expected(mask, dtype)
    if DEVICE.type != "cpu" and dtype is torch.float32:  # a vendor's sums are of many kinds
        with PlainSums():
            plain = given.expected(mask, dtype)
        eager = [coarser(*each) for each in zip(eager, plain, exact, strict=True)]
    G = len(case.N)
    for name, several in (
        ("y", slice(G)),
        ("dx", slice(G, G + 1)),
        ("dlora_A", slice(G + 1, None, 2)),
        ("dlora_B", slice(G + 2, None, 2)),
    ):
        # Gradients of few rows are few numbers: all adapters are judged together.
        a, e, x = (torch.cat([t.flatten() for t in r[several]]) for r in (actual, eager, exact))
        judge(f"{name} of {case}", a, e, x, len(given.x) * case.ranks[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_half_precision_under_wider_adapters_is_no_worse_than_eager(strategy, case):
    """float16 has a way of its own in each strategy: rank-sized products are float32."""
    given = Given(case, torch.float16, torch.float32)
    torch.manual_seed(0)
    y = packed_linears(given.x, given.layers(), given.settings(strategy))
    mask, G = mask_of(y[0]), len(case.N)
    actual = [*(each.detach() for each in y), *torch.autograd.grad(y, given.leaves(), given.dy)]
    exact, eager = given.expected(mask, torch.float64), given.expected(mask, torch.float16)
    assert {t.dtype for t in actual[G + 1 :]} == {torch.float32}
    for found, near, right in zip(actual, eager, exact, strict=True):
        error, yardstick = ((t.double() - right).norm() for t in (found, near))
        assert error <= 1.1 * yardstick + 1e-3 * right.norm()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's masks are not those of a lone layer")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_those_of_each_adapter_alone(strategy):
    case = Case((5, 0, 33, 7), (4, 4, 4, 4), N=(48, 48), dropout=0.2)
    given = Given(case, torch.float32, torch.float32)
    settings = given.settings(strategy)
    y = packed_linears(given.x, given.layers(), settings)
    mask = mask_of(y[0])
    for c, (first, last) in enumerate(pairwise(given.edges)):
        if first == last or not given.dropouts[c]:
            continue
        torch.manual_seed(c + 5)  # what `settings` seeds the streams with
        alone = lora_linears(
            given.x[first:last],
            tuple(
                Weights(weight, bias, *adapters[c])
                for weight, bias, adapters in zip(
                    given.weight, given.bias, given.adapters, strict=True
                )
            ),
            Settings(given.scales[c], given.dropouts[c], strategy),
        )
        assert torch.equal(mask_of(alone[0]), mask[:, first:last]), NAMES[c]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU's masks are those of a lone layer")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_those_of_a_pack_of_one(strategy):
    given = Given(Case((5, 0, 33, 7), (4, 4, 4, 4), N=(48, 48), dropout=0.2), *[torch.float32] * 2)
    settings = given.settings(strategy)
    torch.manual_seed(3)
    mask = mask_of(packed_linears(given.x, given.layers(), settings)[0])
    for c, (first, last) in enumerate(pairwise(given.edges)):
        if first == last or not given.dropouts[c]:
            continue
        pack = Pack(
            (0, last - first), (4,), given.scales[c : c + 1], given.dropouts[c : c + 1],
            (NAMES[c],), settings.pack.streams,
        )  # fmt: skip
        layers = tuple(
            each._replace(lora_A=each.lora_A[c : c + 1], lora_B=each.lora_B[c : c + 1])
            for each in given.layers()
        )
        torch.manual_seed(3)
        one = Settings(1.0, given.dropouts[c], strategy, pack=pack)
        alone = packed_linears(given.x[first:last], layers, one)
        assert torch.equal(mask_of(alone[0]), mask[:, first:last]), NAMES[c]


def test_a_recomputed_call_has_its_seeds_and_the_next_has_others():
    streams = Streams({"a": 1, "b": 2})
    state = torch.get_rng_state()
    first = streams.draw(("a", "b"), (3, 3), torch.device("cpu"))
    torch.set_rng_state(state)
    assert torch.equal(streams.draw(("a", "b"), (3, 3), torch.device("cpu")), first)
    later = streams.draw(("a", "b"), (3, 0), torch.device("cpu"))
    assert later[0] != first[0]
    third = streams.draw(("b", "a"), (3, 3), torch.device("cpu"))
    torch.manual_seed(2)
    alone = [int(masks.draw_seed(torch.device("cpu"))) for _ in range(2)]
    assert [int(first[1]), int(third[0])] == alone  # b drew nothing where it had no rows


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts launches of the interpreter")
@pytest.mark.parametrize("strategy", ["split", "fused", "hybrid"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_launches_do_not_depend_on_the_number_of_adapters(strategy, dropout, monkeypatch):
    counted = []
    launch = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *a, **k: (counted.append(self.fn.__name__), launch(self, *a, **k))[1],
    )
    launches = []
    for C in (1, 2, 16):
        counted.clear()
        case = Case((4,) * C, (4, 8) * (C // 2) or (4,), N=(32, 32, 32), dropout=dropout)
        given = Given(case, torch.float32, torch.float32)
        y = packed_linears(given.x, given.layers(), given.settings(strategy))
        torch.autograd.grad(y, given.leaves(), given.dy)
        launches.append(sorted(counted))
    assert launches[0] == launches[1] == launches[2]
    fused = 5 if dropout else 4
    assert len(launches[0]) == (fused if strategy == "fused" else 7)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's seeds are not counted by the host")
def test_a_checkpoint_of_a_call_that_is_forgotten_is_refused(monkeypatch):
    monkeypatch.setattr(packs, "_KEPT", 4)
    streams = Streams({"a": 1})

    def drawn(x):
        seed = streams.draw(("a",), (3,), torch.device("cpu"))
        return x.exp().square() * seed

    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for count in (4, 5):
        ys = [checkpoint(drawn, x, use_reentrant=False) for _ in range(count)]
        if count == 4:
            torch.stack(ys).sum().backward()
    with pytest.raises(RuntimeError, match="more than 4 layer calls ago"):
        torch.stack(ys).sum().backward()


def test_adapters_may_lie_anywhere_in_memory():
    buffer = torch.randn(100)
    tensors = buffer[10:30].view(4, 5), None, buffer[:20].view(4, 5)
    assert places((tensors, (None, buffer[:1], None))) == ((0, 0), (0, 0), (-10, 0))
    with pytest.raises(ValueError, match="not aligned"):
        places(((buffer, torch.frombuffer(bytearray(9), dtype=torch.float32, offset=1, count=2)),))


def test_what_does_not_fit_is_named():
    given = Given(CASES[1], torch.float32, torch.float32)
    layers, settings = given.layers(), given.settings("library")
    with pytest.raises(ValueError, match="add up to 53"):
        packed_linears(given.x[:-1], layers, settings)
    with pytest.raises(ValueError, match="K = 64"):
        packed_linears(given.x[:, :-1], layers, settings)
    with pytest.raises(TypeError, match=r"bfloat16 but weight is torch\.float32"):
        packed_linears(given.x.bfloat16(), layers, settings)
    (weight, bias, lora_A, lora_B), a = layers[0], layers[0].lora_A[0]
    short = PackWeights(weight, bias, (a[:-1], lora_A[1]), lora_B)
    with pytest.raises(ValueError, match=r"adapter 'a' of rank 8: lora_A must be \[8, 64\]"):
        packed_linears(given.x, (short,), settings)
    mixed = PackWeights(weight, bias, (a.double(), lora_A[1]), lora_B)
    with pytest.raises(TypeError, match="one dtype"):
        packed_linears(given.x, (mixed,), settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_examples_that_lie_mixed_up_give_what_they_give_in_blocks(strategy, dropout):
    case = Case((12, 6, 9), (3, 0, 5), N=(24, 24), dropout=dropout)
    given = Given(case, torch.float32, torch.float32)
    layers, order = given.layers(), (1, 4, 5, 7, 0, 3, 2, 6, 8)  # nine examples of three rows

    def run(order: tuple[int, ...] | None) -> list[torch.Tensor]:
        torch.manual_seed(0)  # of which a GPU makes the seeds
        settings = given.settings(strategy)
        settings = settings._replace(pack=settings.pack._replace(order=order))
        x = given.x.detach().view(9, 3, -1)
        x = x[torch.tensor(order).argsort()] if order else x
        x = x.contiguous().requires_grad_()
        ys = packed_linears(x, layers, settings)
        dy = [each.view(9, 3, -1) for each in given.dy]
        dy = [each[torch.tensor(order).argsort()] if order else each for each in dy]
        leaves = [x, *given.leaves()[1:]]
        found = [*ys, *torch.autograd.grad(ys, leaves, dy)]
        return [t[torch.tensor(order)] if order and t.dim() == 3 else t for t in found]

    for found, expected in zip(run(order), run(None), strict=True):
        assert torch.equal(found, expected)


def test_an_order_of_other_examples_is_refused():
    given = Given(Case((4, 2), (3, 3)), torch.float32, torch.float32)
    settings = given.settings("library")
    settings = settings._replace(pack=settings.pack._replace(order=(0, 2, 1)))
    with pytest.raises(ValueError, match=r"x is \[6, 40\], but the adapters have 3 examples"):
        packed_linears(given.x, given.layers(), settings)
