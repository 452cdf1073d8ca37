"""Bytes and FLOPs of the floor and of the peers, beside those of our strategies.

Ours are counted in `lora_kernels.hardware.cost`. Letters and rule are the same here: a launch moves
each of its tensors once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_kernels.algebra.operands import rank_dtype
from lora_kernels.hardware import cost
from lora_kernels.hardware.cards import Card
from lora_kernels.hardware.cost import Launch, Size
from lora_kernels.hardware.tiles import Outputs, tiles_for

from .cases import Case


def size_of(case: Case, adapter: int = 4) -> Size:
    """The sizes of a case; `adapter` is bytes per element of lora_A and lora_B."""
    layer, dtype = case.layer, case.torch_dtype
    rank = rank_dtype(dtype, torch.float32 if adapter == 4 else dtype).itemsize
    return Size(case.M, layer.K, layer.N, case.R, case.dropout > 0, dtype.itemsize, adapter, rank)


def minimum(case: Case, direction: str) -> Launch:
    """The frozen layer's least: x and weights read once, y written; as much again for dx."""
    s = size_of(case)
    passes = 1 if direction == "forward" else 2
    return Launch("minimum", passes * (s.x + s.weight + s.y), passes * s.gemm, vendor=True)


def _gemm(s: Size, name: str = "gemm") -> Launch:
    out = s.M, (s.K,) if name == "dx" else s.N
    return Launch(name, s.x + s.weight + s.y, s.gemm, vendor=True, out=out)


def floor_forward(s: Size) -> list[Launch]:
    """y of each projection."""
    return [_gemm(t) for t in s.layers()]


def floor_backward(s: Size) -> list[Launch]:
    """dx of each projection, added up by autograd."""
    return [_gemm(t, "dx") for t in s.layers()] + [Launch("add dx", 3 * s.x)] * (len(s.N) - 1)


def _thin(s: Size, columns: int, name: str) -> Launch:
    """A product among [M, columns], [R, columns] and [M, R], in the adapter's dtype."""
    moved = s.adapter * (s.M * columns + s.R * columns + s.M * s.R)
    exact = s.adapter > s.element
    return Launch(name, moved, 2 * s.M * columns * s.R, vendor=True, exact=exact)


def _passes(s: Size, columns: int, name: str, narrow: int, wide: int) -> Launch:
    """An elementwise kernel on [M, columns]: `narrow` in x's dtype, `wide` in the adapter's."""
    return Launch(name, (narrow * s.element + wide * s.adapter) * s.M * columns)


def _dropout(s: Size) -> Launch:
    return Launch("dropout", (2 * s.adapter + 1) * s.M * s.K)


def peft_forward(s: Size) -> list[Launch]:
    """A kernel for each operation; with float32 adapters on half weights x and y are cast, too."""
    found, cast = [], s.adapter > s.element
    for t in s.layers():
        (N,) = t.N
        found.append(_gemm(t))
        found += [_passes(t, t.K, "cast x", 1, 1)] * cast
        found += [_dropout(t)] * t.dropout
        found += [_thin(t, t.K, "h"), _thin(t, N, "h lora_B")]
        found += [_passes(t, N, "scale", 0, 2), _passes(t, N, "add", 1, 2)]
        found += [_passes(t, N, "cast y", 1, 1)] * cast
    return found


def peft_backward(s: Size) -> list[Launch]:
    """The kernels of autograd, in its order."""
    found, cast = [], s.adapter > s.element
    for g, t in enumerate(s.layers()):
        (N,) = t.N
        found += [_passes(t, N, "cast dy", 1, 1)] * (2 * cast)
        found.append(_passes(t, N, "scale dy", 0, 2))
        found += [_thin(t, N, "dlora_B"), _thin(t, N, "dh")]
        found += [_thin(t, t.K, "dlora_A"), _thin(t, t.K, "dh lora_A")]
        found += [_dropout(t)] * t.dropout
        found += [_passes(t, t.K, "cast dx", 1, 1)] * cast
        found.append(_gemm(t, "dx"))
        found += [Launch("add dx", 3 * t.x)] * (2 if g else 1)
    return found


Cost = Callable[[Size], list[Launch]]
# No row for compiled PEFT: which kernels torch.compile makes is not known beforehand.
PEERS: dict[str, tuple[Cost, Cost]] = {
    "floor": (floor_forward, floor_backward),
    "peft": (peft_forward, peft_backward),
    "peft-bf16-adapter": (peft_forward, peft_backward),
}
PROVIDERS = (*PEERS, *cost.COSTS)


def launches_of(provider: str, case: Case, direction: str, card: Card) -> list[Launch]:
    """Every launch of a provider on a card. KeyError for one that has no row."""
    backward = direction == "forward_backward"
    if provider in PEERS:
        s = size_of(case, 4 if provider == "peft" else case.torch_dtype.itemsize)
        first, second = PEERS[provider]
        return first(s) + (second(s) if backward else [])
    s = size_of(case)
    aligned = all(size % 16 == 0 for size in (s.K, *s.N))
    tiles = tiles_for(
        card.arch, s.element, s.R, tf32=case.dtype == "tf32", aligned=aligned,
        outputs=Outputs(s.M, s.N, s.K, card.processors),
    )  # fmt: skip
    return cost.launches(provider, s, tiles, card.processors, backward=backward)
