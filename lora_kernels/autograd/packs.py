"""Layers whose rows belong to several adapters (`algebra.packs`), and their random streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra import masks
from ..algebra.columns import check_columns, widths
from ..algebra.operands import Operands, PackWeights, Settings
from ..algebra.packs import Pack, first_of, table
from ..strategies.choose import decide
from ..strategies.table import check_strategy
from .autocast import autocast_dtype
from .few import computed_in, few_and_many, few_packed, takes
from .function import Call, apply, as_rows, refuse_transforms

_KEPT = 1024  # what that many calls began with is kept for a checkpoint that recomputes them


class Streams:
    """A random stream for each adapter: what seeds its dropout masks, call after call.

    On a CPU an adapter's stream is that of `torch.manual_seed` with the adapter's seed, as a run of
    this adapter alone draws it. So the masks are those of that run.

    Every call also draws a number from torch's own generator, as a lone layer does. A checkpoint
    that recomputes a call rewinds that generator, draws the same number, and gets the same seeds.
    On a GPU the host cannot read that number without waiting: there an adapter's seed is the number
    XOR its own. Masks are then those of the same adapter alone in a pack, under the same
    `torch.manual_seed`.

    RuntimeError where a checkpoint recomputes a call that is forgotten: 1,024 calls are kept.
    """

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self.seeds = dict(seeds)
        self.generators = {name: torch.Generator().manual_seed(s) for name, s in seeds.items()}
        self._begun: dict[int, dict[str, Tensor]] = {}  # a call's number: states of generators
        self._forgot = False

    def at_call(self, names: Iterable[str], rows: Iterable[int]) -> list[torch.Generator]:
        """The generators of a call on a CPU, in the order of the names, where each has to begin."""
        number = int(masks.draw_seed(torch.device("cpu")))
        if self._forgot and number not in self._begun and in_backward():
            raise RuntimeError(
                f"a checkpoint recomputes a layer that was called more than {_KEPT} layer calls "
                "ago: its masks are not known any more; call backward sooner, or checkpoint less"
            )
        call = self._begun.setdefault(number, {})
        found = []
        for name, count in zip(names, rows, strict=True):
            generator = self.generators[name]
            if name in call:  # a checkpoint recomputes the call; the stream itself has gone on
                generator = torch.Generator().set_state(call[name])
            elif count:
                call[name] = generator.get_state()
            found.append(generator)
        while len(self._begun) > _KEPT:
            self._forgot = True
            self._begun.pop(next(iter(self._begun)))
        return found

    def draw(self, names: Iterable[str], rows: Iterable[int], device: torch.device) -> Tensor:
        """Seeds int64 [C], in the order of the names; an adapter without rows draws none."""
        if device.type != "cpu":
            own = tuple(_mixed(self.seeds[name]) for name in names)
            return masks.draw_seed(device) ^ table(own, torch.int64, device)
        rows = tuple(rows)
        streams = zip(self.at_call(names, rows), rows, strict=True)
        seeds = [int(masks.draw_seed(device, each)) if count else 0 for each, count in streams]
        return torch.tensor(seeds, dtype=torch.int64)

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        del self.seeds[name], self.generators[name]


def in_backward() -> bool | None:
    """Whether autograd is at work in this thread: then a forward is a recomputation.

    None on a torch that does not tell.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    return None if task is None else task() != -1


class SharedStream:
    """torch's own generator, for all adapters: what seeds the masks of PEFT's mixed batches."""

    def at_call(self, names: Iterable[str], rows: Iterable[int]) -> list[None]:
        """None for each adapter: torch's own generator."""
        return [None for _ in names]

    def draw(self, names: Iterable[str], rows: Iterable[int], device: torch.device) -> Tensor:
        """Seeds int64 [C], in the order of the names."""
        return masks.draw_seed(device, count=len(tuple(names)))


def _mixed(seed: int) -> int:
    """A seed spread over 63 bits (SplitMix64), since those that people choose are small."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ z >> shift) * factor) & 0xFFFFFFFFFFFFFFFF
    return (z ^ z >> 31) >> 1


def packed_linears(
    x: Tensor, layers: tuple[PackWeights, ...], settings: Settings
) -> tuple[Tensor, ...]:
    """`lora_linears` where the rows of x [..., K] belong to the adapters of `settings.pack`.

    Raises as `lora_linear` does, and ValueError for rows that do not add up to x.
    """
    pack = settings.pack
    assert pack is not None
    if pack.order is not None:
        return _in_blocks(x, layers, settings, pack, pack.order)
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a layer with several adapters")
    refuse_transforms("a layer with several adapters")
    dtype = autocast_dtype(x.device)
    if not x.is_floating_point() or x.dtype is torch.float64:
        dtype = None  # autocast leaves these alone
    if dtype is not None:
        computed = computed_in(x, layers, settings, dtype)
        x = x.to(computed)
        layers = tuple([each._replace(weight=each.weight.to(computed)) for each in layers])
    for weights in layers:
        _check(x, weights, settings, pack)
    if len(layers) > 1 and len(set(map(_layout, layers))) > 1:
        return tuple([packed_linears(x, (weights,), settings)[0] for weights in layers])
    weight, bias, lora_A, lora_B = zip(*layers, strict=True)
    adapters = (_lying_flat(sum(each, ())) for each in (lora_A, lora_B))
    operands = Operands(weight, _lying_flat(bias), *adapters)
    check_strategy(settings.strategy)
    # What an adapter draws of its stream it draws as it does alone: nothing without LoRA here.
    drawing = [count if R else 0 for count, R in zip(pack.counts, pack.ranks, strict=True)]
    if takes(x, layers, settings):
        streams = pack.streams.at_call(pack.names, drawing) if settings.dropout else ()
        return few_packed(x, operands, settings, streams, dtype)
    if settings.dropout and x.device.type == "cpu" and settings.strategy == "auto":
        few, many = few_and_many(pack, x.shape[-1])
        if many and any(drawing[c] for c in few):
            return _few_and_many_apart(x, layers, settings, pack, (few, many))
    seed = pack.streams.draw(pack.names, drawing, x.device) if settings.dropout else None
    strategy, tiles = decide(x, operands, settings)
    call = Call(settings, seed, strategy, tiles, len(layers), len(pack.ranks))
    y: tuple[Tensor, ...] = apply(x, call, *operands.flatten())
    return y


def _in_blocks(
    x: Tensor, layers: tuple[PackWeights, ...], settings: Settings, pack: Pack,
    order: tuple[int, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """`packed_linears` of the examples of x brought together, and every y in the order of x."""
    if x.dim() < 2 or x.shape[0] != len(order):
        raise ValueError(f"x is {list(x.shape)}, but the adapters have {len(order)} examples")
    places = table(order, torch.int64, x.device)
    back = table(tuple(sorted(range(len(order)), key=order.__getitem__)), torch.int64, x.device)
    settings = settings._replace(pack=pack._replace(order=None))
    ys = packed_linears(x.index_select(0, places), layers, settings)
    return tuple([y.index_select(0, back) for y in ys])


def _few_and_many_apart(
    x: Tensor, layers: tuple[PackWeights, ...], settings: Settings, pack: Pack,
    parts: tuple[list[int], ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """`packed_linears` of each part of the adapters by itself.

    An adapter that alone would have few tokens (`autograd/few.py`) draws its masks in another way
    than one with many.
    """
    blocks = as_rows(x).split(pack.counts)
    found: list[list[Any]] = [[None] * len(blocks) for _ in layers]
    for part in parts:
        own = pack.of(part)
        some = tuple([_of_adapters(each, part) for each in layers])
        joined = torch.cat([blocks[c] for c in part])
        own_settings = settings._replace(pack=own, dropout=max(own.dropouts))
        for pieces, y in zip(found, packed_linears(joined, some, own_settings), strict=True):
            for c, piece in zip(part, y.split(own.counts), strict=True):
                pieces[c] = piece
    return tuple([torch.cat(pieces).view(*x.shape[:-1], -1) for pieces in found])


def _of_adapters(weights: PackWeights, adapters: list[int]) -> PackWeights:
    """The layer with some of its adapters."""
    lora_A, lora_B = (
        tuple([each[c] for c in adapters]) for each in (weights.lora_A, weights.lora_B)
    )
    return weights._replace(lora_A=lora_A, lora_B=lora_B)


def _lying_flat(tensors: Any) -> Any:
    """The tensors, contiguous: kernels know no strides of an adapter's."""
    return tuple([each if each is None else each.contiguous() for each in tensors])


def _layout(weights: PackWeights) -> Any:
    """What layers must have in common to share a launch."""
    first, bias = first_of(weights.lora_A), weights.bias
    return weights.weight.stride(), first.dtype, bias if bias is None else bias.dtype


def _check(x: Tensor, weights: PackWeights, settings: Settings, pack: Pack) -> None:
    """One error that names the values, for inputs that do not fit: ValueError, or TypeError."""
    weight, bias, lora_A, lora_B = weights
    (N, K), columns = weight.shape, settings.columns
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x is {list(x.shape)}, but weight {[N, K]} takes K = {K}")
    if x.numel() != pack.edges[-1] * K:
        raise ValueError(
            f"x has {x.numel() // K} rows of K = {K}, but the adapters' rows add up to "
            f"{pack.edges[-1]}"
        )
    if weight.dtype != x.dtype or not x.is_floating_point():
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}: cast one, or use torch.autocast"
        )
    G, width = 1, N
    if columns is not None:
        check_columns(columns, N)
        G, width = len(columns), sum(widths(columns))
    dtypes, devices = set(), {weight.device, x.device}
    for name, R, A, B in zip(pack.names, pack.ranks, lora_A, lora_B, strict=True):
        if A is None or B is None:
            continue
        if A.shape != (G * R, K) or B.shape != (width, R):
            raise ValueError(
                f"adapter {name!r} of rank {R}: lora_A must be {[G * R, K]} and lora_B "
                f"{[width, R]}: got {list(A.shape)} and {list(B.shape)}"
            )
        dtypes |= {A.dtype, B.dtype}
        devices |= {A.device, B.device}
    if len(dtypes) > 1:
        names = sorted(map(str, dtypes))
        raise TypeError(f"the adapters of a layer must have one dtype: got {names}")
    if len(devices | (set() if bias is None else {bias.device})) > 1:
        raise ValueError(
            f"x, weight, (bias,) and all adapters must share one device: got "
            f"{sorted(map(str, devices))}"
        )
