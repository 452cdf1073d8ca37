"""A pack: the rows of one x [M, K] belong to C adapters, a block of rows to each.

    y_c = x_c weight^T + bias + scales[c] * D_c(x_c) lora_A_c^T lora_B_c^T    for every adapter c

x_c are rows edges[c] to edges[c + 1] of x. The frozen product is one for all rows. Adapters may
differ in rank, scale and dropout; one of rank 0 has no LoRA in this layer.

What differs among adapters stands in small tables in device memory (`table`), which kernels read.
So a kernel is neither compiled anew nor launched more often for another number of adapters. A block
of rows of a kernel belongs to one adapter: none straddles two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import masks


class Pack(NamedTuple):
    """What differs among C adapters: `edges` are C + 1, the rest has C entries.

    `streams` gives the seeds of their masks (`autograd.packs.Streams`). Where the examples of an x
    do not lie in blocks, `order` has the places, along the first dimension of x, of the examples of
    the first adapter, then of the second, and so on.
    """

    edges: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    names: tuple[str, ...] = ()
    streams: Any = None
    order: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """The widest rank R: h is [G, M, R], and zero past an adapter's own rank."""
        return max(self.ranks)

    @property
    def kept_scales(self) -> tuple[float, ...]:
        """Dropout's 1 / (1 - p) of each adapter."""
        return tuple(1 / (1 - p) for p in self.dropouts)

    @property
    def counts(self) -> list[int]:
        """How many rows each adapter has."""
        return [last - first for first, last in pairwise(self.edges)]

    def of(self, adapters: Sequence[int]) -> Pack:
        """The pack of some of the adapters, whose blocks have been brought together."""
        edges = tuple(accumulate((self.counts[c] for c in adapters), initial=0))
        fields: Any = (self.ranks, self.scales, self.dropouts, self.names)
        ranks, scales, dropouts, names = (tuple(f[c] for c in adapters) for f in fields)
        return Pack(edges, ranks, scales, dropouts, names, self.streams)

    def rows(self) -> Iterator[tuple[int, slice]]:
        """The adapters that have rows, and these rows."""
        for c, (first, last) in enumerate(pairwise(self.edges)):
            if first < last:
                yield c, slice(first, last)

    def runs(self, length: int) -> tuple[tuple[int, int, int, int], ...]:
        """The rows as runs of at most `length`: (adapter, first row, last row + 1, its edge)."""
        return tuple(
            (c, first, min(first + length, rows.stop), rows.start)
            for c, rows in self.rows()
            for first in range(rows.start, rows.stop, length)
        )

    def sums(self, length: int) -> tuple[tuple[int, int, int, int], ...]:
        """Of each adapter (first run, last run + 1, the ranks of those before it, its rank)."""
        counts = [-(-count // length) for count in self.counts]
        ends = list(accumulate(counts, initial=0))
        before = accumulate(self.ranks, initial=0)
        return tuple(zip(ends, ends[1:], before, self.ranks, strict=False))


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_IN_GRAPHS: set[Tensor] = set()


def table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` in device memory; made once, so that a step copies nothing to the device.

    A CUDA graph reads it at every replay, so one that was captured is never forgotten.
    """
    found = _table(values, dtype, device)
    if is_capturing():
        _IN_GRAPHS.add(found)
    return found


@lru_cache(maxsize=4096)
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C] in device memory."""
    return table(values, torch.float32, device)


def integers(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """int32, of any shape, in device memory."""
    return table(values, torch.int32, device)


def thresholds(pack: Pack, device: torch.device) -> Tensor:
    """`masks.threshold` of each adapter, int32 [C] in device memory."""
    return integers(tuple(map(masks.threshold, pack.dropouts)), device)


def places(segments: tuple[tuple[Tensor | None, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """[C][G]: how many elements lie between a tensor and the first that is there of its segment.

    Of every segment there is a tensor for each adapter, None for one without LoRA. The tensors may
    lie anywhere: an address is an address.
    """
    columns = []
    for each in segments:
        base = first_of(each).data_ptr()
        columns.append([0 if t is None else _elements(t, t.data_ptr() - base) for t in each])
    return tuple(zip(*columns, strict=True))


def first_of(tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The first tensor that is there."""
    return next(t for t in tensors if t is not None)


def gradients_of(flat: Tensor, parameters: Sequence[Tensor | None], adapters: int) -> Any:
    """The flat gradients of all adapters, one behind the other, as those of the parameters.

    `parameters` are those of every layer, one layer after another, as the result is.
    """
    layers = len(parameters) // adapters
    order = [g * adapters + c for c in range(adapters) for g in range(layers)]
    there = [i for i in order if parameters[i] is not None]
    found: list[Tensor | None] = [None] * len(parameters)
    for i, piece in zip(there, flat.split([parameters[i].numel() for i in there]), strict=True):  # type: ignore[union-attr]
        found[i] = piece.view(parameters[i].shape)  # type: ignore[union-attr]
    return tuple(found)


def _elements(t: Tensor, distance: int) -> int:
    """A distance in bytes in elements of t; ValueError where it is not a whole number of them."""
    count, rest = divmod(distance, t.element_size())
    if rest:
        raise ValueError(f"a {t.dtype} parameter is not aligned to its {t.element_size()} bytes")
    return count
