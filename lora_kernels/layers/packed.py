"""A layer with several adapters, each on its own rows of the batch, and heads of their own.

    y_c = x_c weight^T + bias + scale_c * D_c(x_c) lora_A_c^T lora_B_c^T

One frozen product serves all rows. `Adapters` says whose rows a batch holds: all layers of a model
share one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.operands import PackWeights, Parts, Settings
from ..algebra.packs import Pack, is_capturing
from ..autograd.absent import with_zero_gradients
from ..autograd.packs import Streams, in_backward, packed_linears
from .base import plain_layer
from .examples import firsts
from .linear import FusedLoRALinear


class Adapters:
    """The adapters of a model, and the rows of each in the batch that runs.

    A batch holds a block of examples for each adapter, one after another along its first dimension:
    those that `rows` gives, else blocks of one size, in the order of `names`.
    """

    def __init__(self, seeds: Mapping[str, int]) -> None:
        self.names = list(seeds)
        self.streams = Streams(seeds)
        # The blocks of the last batch seen: whose they are, and their ends in examples and in rows.
        self.order: tuple[str, ...]
        self.examples: tuple[int, ...]
        self.edges: tuple[int, ...]
        self._forget_batch()
        self._given: dict[str, int] | None = None
        # The model's call that runs, and its examples.
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._batch: int | None = None
        self._told = False  # that a square batch does not show whose rows a layer has
        self._were_given = False

    @contextmanager
    def rows(self, given: Mapping[str, int]) -> Iterator[None]:
        """Inside, batches hold so many examples of each adapter, in this order."""
        before, self._given = self._given, dict(given)
        try:
            yield
        finally:
            self._given = before

    @property
    def given(self) -> tuple[tuple[str, int], ...] | None:
        """What `rows` gives now; a captured step (`training.GraphedStep`) is of that."""
        return None if self._given is None else tuple(self._given.items())

    def call_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called (a pre-hook of it): its first tensor says how many examples."""
        self._call = model, args, kwargs
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim())
        first = next(tensors, None)
        self._batch = None if first is None else first.shape[0]
        if self._batch is not None:
            self._blocks(self._batch)

    def call_ends(self, *_: Any) -> None:
        """The model's call is over (a hook of it)."""
        self._call = self._batch = None

    def see(self, x: Tensor, layer: PackedLoRALinear | PerAdapter) -> None:
        """Find the blocks of an x [examples, ..., K] that a layer is given."""
        if self._given is not None and is_capturing():
            raise RuntimeError(
                "a CUDA graph would replay the rows that adapter_rows gives now, whatever it gives "
                "later: capture outside of adapter_rows, with equal blocks"
            )
        lone = x.dim() == 2 and self._batch is None and self._given is None
        if x.dim() < 2 or lone or self._batch not in (None, x.shape[0]):
            raise _unlike(x, self._batch)
        counts = self._blocks(x.shape[0])
        if not layer.examples_first and x.dim() > 2:
            if x.shape[0] not in x.shape[1:-1]:
                layer.examples_first = True
            elif not self._told and max(counts.values()) < x.shape[0]:  # of more than one adapter
                self._settle(x, layer)
        tokens = x.shape[1:-1].numel()
        self.order = tuple(counts)
        self.examples = tuple(accumulate(counts.values(), initial=0))
        self.edges = tuple([edge * tokens for edge in self.examples])

    def _settle(self, x: Tensor, layer: PackedLoRALinear | PerAdapter) -> None:
        """Find out whether an x with as many examples as tokens has the examples first.

        Raises ValueError if it has not, and warns once if that cannot be told.
        """
        examples = x.shape[0]
        found: dict[Any, set[int]] | None = None
        if self._call is not None and self._batch is not None:
            layers = [
                module
                for module in self._call[0].modules()
                if isinstance(module, (PackedLoRALinear, PerAdapter))
            ]
            found = firsts(self._call, examples, {each: each.plain() for each in layers}, self)
        less = examples - 1
        for each, seen in (found or {}).items():
            each.examples_first = seen == {less}
        seen = found[layer] if found else set()
        if others := seen - {less}:
            how = f": with {less} examples its x has {others.pop()} first"
            raise _unlike(x, examples, how)
        if not seen:
            self._told = True
            warnings.warn(
                f"a batch has as many examples as tokens (x {list(x.shape)}), so a layer that "
                "takes the tokens first would not show, and would give rows to the wrong adapters; "
                "begin with a batch of another length, which shows it",
                stacklevel=2,
            )

    def _blocks(self, examples: int) -> dict[str, int]:
        """The examples of each adapter, in the order of the batch; all adapters are named."""
        given = self._given
        recomputing = in_backward()
        if given is None and self._were_given and recomputing is not False:
            raise RuntimeError(
                "a checkpoint recomputes a layer outside of adapter_rows, where the batch was said "
                "to be another one: call backward inside of `with adapter_rows(...)`"
            )
        if not recomputing:
            self._were_given = given is not None
        if given is None:
            each, rest = divmod(examples, len(self.names))
            if rest:
                raise ValueError(
                    f"{examples} examples are no equal blocks for {len(self.names)} adapters "
                    f"({', '.join(self.names)}): say whose they are with adapter_rows"
                )
            return dict.fromkeys(self.names, each)
        if sum(given.values()) != examples:
            raise ValueError(
                f"adapter_rows gives {sum(given.values())} rows ({given}), but the batch has "
                f"{examples}"
            )
        return given | {name: 0 for name in self.names if name not in given}

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self.names.remove(name)
        self.streams.drop(name)
        self._forget_batch()

    def _forget_batch(self) -> None:
        self.order = tuple(self.names)
        self.examples = self.edges = (0,) * (len(self.names) + 1)


def _unlike(x: Tensor, batch: int | None, how: str = "") -> ValueError:
    return ValueError(
        f"a layer with several adapters got x {list(x.shape)} in a batch of {batch or 'unknown'} "
        f"examples{how}: it cannot tell whose rows these are (tokens first or in an order of their "
        "own, as experts have them; relative positions that all examples share; a part of the "
        "model called by itself outside of adapter_rows)"
    )


class Own(NamedTuple):
    """The settings of one adapter in a layer."""

    rank: int
    alpha: float
    scale: float
    dropout: float
    rslora: bool


class PackedLoRALinear(nn.Module):
    """A frozen linear layer with a LoRA for each of several adapters.

    Parameters: weight and bias (frozen, as in the layer replaced), `lora_A[name]` [R_c, K] and
    `lora_B[name]` [N, R_c] of each adapter that has LoRA here (with `columns` those of
    `FusedLoRALinear`). Each is a parameter like any other; together they are slices of one tensor.
    x [examples, ..., K] -> y [examples, ..., N].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, adapters: Adapters, layers: Mapping[str, FusedLoRALinear]) -> None:
        super().__init__()
        first = next(iter(layers.values()))
        self.adapters = adapters
        self.conv1d, self.columns, self.strategy = first.conv1d, first.columns, first.strategy
        self.base_class = first.base_class
        self.in_features, self.out_features = first.in_features, first.out_features
        self.weight = first.weight
        self.register_parameter("bias", first.bias)
        self.own_settings = {
            name: Own(each.rank, each.alpha, each.scale, each.dropout, each.rslora)
            for name, each in layers.items()
        }
        self.lora_A = nn.ParameterDict({name: each.lora_A for name, each in layers.items()})
        self.lora_B = nn.ParameterDict({name: each.lora_B for name, each in layers.items()})
        self.train(first.training)
        self.group: Any = None
        self.examples_first = False  # until a batch shows it
        self._known: tuple[Any, Settings] | None = None
        self.stack()

    @property
    def rank(self) -> int:
        """The widest rank; 0 without adapters."""
        return max((own.rank for own in self.own_settings.values()), default=0)

    @torch.no_grad()
    def stack(self) -> None:
        """Lay the adapters side by side in memory: lora_A as one tensor, lora_B as another."""
        for parameters in (self.lora_A, self.lora_B):
            there = list(parameters.values())
            if not there:
                continue
            flat = torch.cat([p.flatten() for p in there])
            for p, piece in zip(there, flat.split([p.numel() for p in there]), strict=True):
                p.data = piece.view(p.shape)
        self._known = None

    def drop(self, name: str) -> None:
        """Take an adapter out; does nothing if it has no LoRA here."""
        if self.own_settings.pop(name, None) is not None:
            del self.lora_A[name], self.lora_B[name]
            self.stack()

    def forward(self, x: Tensor) -> Tensor:
        """y [examples, ..., N] of x [examples, ..., K]."""
        if torch.compiler.is_compiling():  # whose rows these are is not for a graph to keep
            run: Any = torch.compiler.disable(self._run)
            return run(x)  # type: ignore[no-any-return]
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel cuts a batch anywhere, and a layer with several adapters must "
                "know whose rows it has: use one process for each GPU"
            )
        self.adapters.see(x, self)
        parts = self.parts()
        if parts is None:
            weight: Tensor = self.weight.T if self.conv1d else self.weight
            return nn.functional.linear(x, weight, self.bias)
        if self.group is not None and (y := self.group.output(self, x, parts)) is not None:
            return y  # type: ignore[no-any-return]
        (y,) = packed_linears(x, (parts.weights,), parts.settings)
        return y

    def parts(self) -> Parts | None:
        """The tensors and settings for the batch that the model saw last; None without LoRA."""
        return self._parts(self.adapters.order, self.adapters.edges, self.training)

    def own(self) -> Parts | None:
        """The tensors, and the settings as in training, for no batch in particular."""
        names = tuple(self.adapters.names)
        return self._parts(names, (0,) * (len(names) + 1), True)

    def _parts(
        self, order: tuple[str, ...], edges: tuple[int, ...], training: bool
    ) -> Parts | None:
        if not self.own_settings:
            return None
        lora_A, lora_B = self.lora_A._parameters, self.lora_B._parameters
        weights = PackWeights(
            self.weight.T if self.conv1d else self.weight,
            self.bias,
            tuple(map(lora_A.get, order)),
            tuple(map(lora_B.get, order)),
        )
        return Parts(weights, self._settings(order, edges, training))

    def _settings(self, order: tuple[str, ...], edges: tuple[int, ...], training: bool) -> Settings:
        call = order, edges, training
        if self._known is None or self._known[0] != call:
            own = [self.own_settings.get(name, _NONE) for name in order]
            pack = Pack(
                edges,
                tuple(each.rank for each in own),
                tuple(each.scale for each in own),
                tuple(each.dropout if training else 0.0 for each in own),
                order,
                self.adapters.streams,
            )
            settings = Settings(1.0, max(pack.dropouts), self.strategy, self.columns, pack)
            self._known = call, settings
        return self._known[1]

    def plain(self) -> nn.Module:
        """The frozen layer, of the same parameters."""
        layer = self._outline()
        layer.weight, layer.bias = self.weight, self.bias
        return layer  # type: ignore[no-any-return]

    def _outline(self) -> Any:
        """The frozen layer with an empty weight, since its own may be a part of itself now."""
        N, K = self.out_features, self.in_features
        shape = (K, N) if self.conv1d else (N, K)
        empty = nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device="meta"))
        return plain_layer(self.base_class, empty, None)

    def alone(self, name: str) -> nn.Module:
        """A layer with this adapter alone, of the same parameters; a plain one without LoRA."""
        layer = self._outline()
        own = self.own_settings.get(name)
        if own is not None:
            layer = FusedLoRALinear.from_linear(
                layer, rank=own.rank, alpha=own.alpha, dropout=own.dropout, rslora=own.rslora,
                strategy=self.strategy, columns=self.columns,
            )  # fmt: skip
            layer.lora_A, layer.lora_B = self.lora_A[name], self.lora_B[name]
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: {own.rank}" for name, own in self.own_settings.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, ranks={{{ranks}}}, strategy={self.strategy!r}"
            + (f", columns={self.columns}" if self.columns else "")
        )


_NONE = Own(0, 0.0, 0.0, 0.0, False)


class PerAdapter(nn.ModuleDict):
    """A module that trains in full, once for each adapter: each sees the rows of its adapter."""

    def __init__(self, adapters: Adapters, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(modules)
        self.adapters = adapters
        self.examples_first = False  # until a batch shows it

    def plain(self) -> nn.Module:
        """The module of the first adapter, which any other's is like."""
        return next(iter(self.values()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs for x [examples, ...], joined in the order of the batch."""
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise ValueError(
                f"{type(self).__name__} takes one tensor: it cannot tell which rows of the others "
                "are whose"
            )
        self.adapters.see(x, self)
        blocks = zip(self.adapters.order, pairwise(self.adapters.examples), strict=True)
        pieces: list[Tensor] = []
        absent: list[Tensor] = []
        for name, (first, last) in blocks:
            if first < last:
                pieces.append(self[name](x[first:last], *args, **kwargs))
            else:
                absent += self[name].parameters()
        return with_zero_gradients(torch.cat(pieces), absent)
