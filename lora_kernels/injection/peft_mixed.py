"""Mixed batches in the layers of a fused PEFT model: each example has an adapter, by its name.

PEFT's hooks hand the names to its layers. A fused layer makes a pack of them (`algebra.packs`): one
frozen product for all rows, and each adapter's own product on its rows. `peft_calls` says who may
train so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..algebra.operands import PackWeights, Parts, Settings
from ..algebra.packs import Pack, table
from ..autograd.absent import with_zero_gradients
from ..autograd.packs import SharedStream, packed_linears
from ..layers.sharded import is_part
from .peft_state import OFF, Plain, part_reason, plain_adapter, state_reason, tell

_STREAM = SharedStream()


class Rows(NamedTuple):
    """Whose examples a batch holds: `names` and `counts` of its blocks, in the order of the names.

    Where the examples of a name do not lie together, `order` has the places of the examples, block
    after block, and `back` the way back; else both are None.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    order: tuple[int, ...] | None
    back: tuple[int, ...] | None


@lru_cache(maxsize=1024)
def rows_of(adapter_names: tuple[str, ...]) -> Rows:
    """The blocks of a batch with these names, in the order in which they first come."""
    names = tuple(dict.fromkeys(adapter_names))
    counts = tuple([adapter_names.count(name) for name in names])
    order = tuple(sorted(range(len(adapter_names)), key=lambda i: names.index(adapter_names[i])))
    if order == tuple(range(len(order))):
        return Rows(names, counts, None, None)
    return Rows(names, counts, order, tuple(sorted(range(len(order)), key=order.__getitem__)))


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; in code that is compiled it breaks the graph, which must not keep the names."""
    if not torch.compiler.is_compiling():
        return function
    outside: Callable[..., Any] = torch.compiler.disable(function)
    return outside


class UntrainableError(ValueError):
    """A layer cannot train the mixed batch that it was given, for a reason in words."""

    def __init__(self, layer: nn.Module, reason: str) -> None:
        super().__init__(f"a mixed batch cannot train this layer: {reason}")
        self.layer, self.reason = layer, reason


def absent(owners: Iterable[Any], names: tuple[str, ...]) -> list[Tensor]:
    """The parameters below `owners` (adapter -> module) of adapters without rows in a mixed batch.

    None in a process alone, where an adapter without rows has no gradient. Where processes train
    together, other ones may have rows of it, and all need the same gradients.
    """
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not names or not together:
        return []
    found: list[Tensor] = []
    for own in owners:
        for name, each in own.items():
            if name not in names:
                found += each.parameters() if isinstance(each, nn.Module) else [each]
    return found


class MixedLayer:
    """What a fused layer does with the arguments that PEFT's hooks add to a call."""

    group: Any
    strategy: str
    fallen: str | None
    training: bool
    lora_A: Any
    lora_B: Any
    use_dora: dict[str, bool]

    def called_with(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """y of a mixed batch; of a call with other arguments, by PEFT's own forward."""
        given = [name for name, value in kwargs.items() if value is not None]
        if not args and not given:
            return self.forward(x)  # type: ignore[attr-defined, no-any-return]
        if args or given != ["adapter_names"]:
            reason: str | None = f"it is called with {', '.join(given) or 'more than x'}"
        else:
            names = tuple(kwargs["adapter_names"])
            self._check_forward_args(x, adapter_names=names)  # type: ignore[attr-defined]
            found = eager(self._packed)(x, names)
            if isinstance(found, Tensor):
                return with_zero_gradients(found, self._absent(names))
            reason = found
            if reason is not None and self.training:
                raise UntrainableError(self, reason)  # type: ignore[arg-type]
        if reason is not None:
            tell(self, reason)
        y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return with_zero_gradients(y, self._absent(tuple(kwargs.get("adapter_names") or ())))

    def _absent(self, names: tuple[str, ...]) -> list[Tensor]:
        """What shall have a gradient of zero after a mixed batch with these names."""
        owners = [getattr(self, each) for each in self.adapter_layer_names]  # type: ignore[attr-defined]
        return absent(owners, names)

    def _packed(self, x: Tensor, names: tuple[str, ...]) -> Tensor | str | None:
        """y; a reason why it cannot run fused; None where no row has LoRA in this layer."""
        asked = rows_of(names), x.shape[1:-1].numel()
        parts = mixed_parts(self, *asked)
        if not isinstance(parts, Parts):
            return parts
        self.fallen = None
        if self.group is not None and (y := self.group.output(self, x, parts, *asked)) is not None:
            return y  # type: ignore[no-any-return]
        (y,) = packed_linears(x, (parts.weights,), parts.settings)
        return y


def mixed_parts(layer: Any, rows: Rows, tokens: int) -> Parts | str | None:
    """The tensors and settings for a batch of examples of `tokens` rows of x each.

    A reason in words where the layer cannot run fused, None where no row has LoRA in it.
    """
    if (reason := state_reason(layer)) is not None:
        return None if reason in OFF else reason  # merged or disabled: PEFT says or does it
    found: dict[str, Plain] = {}
    for name in rows.names:
        if name not in layer.lora_A:
            continue
        plain = plain_adapter(layer, name)
        if isinstance(plain, str):
            return plain
        if plain.quantised or plain.magnitude is not None:
            return f"adapter {name!r} is DoRA, or its weight is quantised"
        if layer.lora_B[name].bias is not None:
            return f"adapter {name!r} has a bias of its own (lora_bias)"
        if is_part(plain.weights):
            return part_reason(plain.weights)
        found[name] = plain
    if not found:
        return None
    weight, bias, *_ = next(iter(found.values())).weights
    own = [found.get(name) for name in rows.names]
    lora_A = tuple([None if each is None else each.weights.lora_A for each in own])
    lora_B = tuple([None if each is None else each.weights.lora_B for each in own])
    dtypes = {str(t.dtype) for t in (*lora_A, *lora_B) if t is not None}
    if len(dtypes) > 1:
        return f"its adapters differ in dtype: {', '.join(sorted(dtypes))}"
    pack = Pack(
        tuple([edge * tokens for edge in accumulate(rows.counts, initial=0)]),
        tuple([0 if A is None else A.shape[0] for A in lora_A]),
        tuple([0.0 if each is None else each.scale for each in own]),
        tuple([0.0 if each is None else _dropout(each.dropout) for each in own]),
        rows.names,
        _STREAM,
        rows.order,
    )
    settings = Settings(1.0, max(pack.dropouts), layer.strategy, None, pack)
    return Parts(PackWeights(weight, bias, lora_A, lora_B), settings)


def _dropout(module: nn.Module) -> float:
    return getattr(module, "p", 0.0) if module.training else 0.0


class MixedHead:
    """What `fuse_peft` adds to a module of `modules_to_save`: each copy gets its adapter's rows.

    An adapter that has no copy of it gets the original, as it does alone.
    """

    original_module: nn.Module
    modules_to_save: nn.ModuleDict
    disable_adapters: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own forward; of a mixed batch the outputs, in the order of its examples."""
        names = kwargs.pop("adapter_names", None)
        if names is None or self.disable_adapters:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return eager(self._mixed)(tuple(names), args, kwargs)

    def _mixed(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Any) -> Tensor:
        self._check_forward_args(*args, adapter_names=names)  # type: ignore[attr-defined]
        x, *others = args or (None,)
        every = (*others, *kwargs.values())
        if not isinstance(x, Tensor) or any(isinstance(each, Tensor) for each in every):
            raise ValueError(
                f"a {type(self.original_module).__name__} of modules_to_save gets other than one "
                "tensor, by position: a mixed batch cannot tell whose rows the others have"
            )
        rows = rows_of(names)
        if rows.order is not None and rows.back is not None:
            x = x.index_select(0, table(rows.order, torch.int64, x.device))
        pieces = []
        edges = pairwise(accumulate(rows.counts, initial=0))
        for name, (first, last) in zip(rows.names, edges, strict=True):
            module = self.original_module
            if name in self.modules_to_save:
                module = self.modules_to_save[name]
            pieces.append(module(x[first:last], *others, **kwargs))
        y = with_zero_gradients(torch.cat(pieces), absent([self.modules_to_save], names))
        return (
            y if rows.back is None else y.index_select(0, table(rows.back, torch.int64, y.device))
        )
