"""Layers that read the same x run as one problem: query, key and value; gate and up.

The model stays as it is: every projection keeps its name, its parameters and its own `forward`. The
first member that is called with an x computes y for all members, and the others fetch theirs when
they are called with that very x. So x is read once, three launches become one, and backward sums dx
in one accumulator.

Nothing is assumed of the caller, and nothing is learned from earlier calls of the parent. So
gradient checkpointing recomputes what forward did, and a resumed run draws the masks of the
uninterrupted one. A round

    starts  when a member is called for which no result waits: it computes for all, and the results
            of the others wait;
    goes on when one of the others comes. With the same x it fetches its result. With another x
            (cross attention) its result is dropped with a warning, and it runs alone;
    ends    when every member has come, or when their parent is called again. What an interrupted
            call left behind is dropped then.

Members are held by weak references, so a group keeps no layer alive.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from ..algebra.operands import PackWeights, Parts, Weights
from ..algebra.packs import first_of
from ..autograd.autocast import autocast_dtype
from ..autograd.few import is_few
from ..autograd.functional import lora_linears
from ..autograd.packs import packed_linears
from ..strategies.problem import Problem
from .base import is_fake
from .sharded import is_gathered_alone, is_part

_APART = (
    "layers that are grouped for their names (query, key and value, say) got different tensors in "
    "one call of their block: results were computed and dropped. The numbers are right, the time "
    "is lost: LoRAConfig(group=False), or fuse_peft(model, group=False), saves it"
)
_SHARDED = (
    "layers that would run as a group (query, key and value, say) run one by one: each is sharded "
    "by itself, so only a part of its siblings is here. Under FSDP make their block one unit; "
    "DeepSpeed's ZeRO-3 gathers layer by layer"
)


class LoRALayer(Protocol):
    """A layer with LoRA: a FusedLoRALinear, or what `fuse_peft` made of a layer of PEFT's."""

    group: Group | None  # the siblings that read the same x
    in_features: int
    out_features: int
    rank: int  # of each range of columns

    def own(self) -> Parts | None:
        """Its tensors, and its settings as in training; None if it runs unfused."""

    def parts(self, *asked: Any) -> Parts | None:
        """Its tensors and settings in a call now; None if it runs unfused (merged, say).

        `asked` is what the call asks besides, if anything: whose rows a mixed batch of PEFT's has.
        """


def layout_of(layer: LoRALayer) -> tuple[Any, ...] | None:
    """What layers must have in common to run as a group; None if this one runs alone."""
    own = layer.own()
    if own is None or own.settings.columns is not None:
        return None
    layouts = [
        None if t is None else (t.dtype, t.device, t.stride()) for t in _tensors(own.weights)
    ]
    return layer.rank, layer.in_features, own.settings, *layouts


def problem_of(layer: LoRALayer, M: int, dtype: torch.dtype | None = None) -> Problem:
    """What a call on M tokens asks of `choose`, for the layer's whole group if it is in one.

    `dtype` is that of the activations (default: the weight's). Raises ValueError if the layer runs
    unfused.
    """
    own = layer.own()
    if own is None:
        raise ValueError("a layer that runs unfused asks for no strategy")
    weight, settings = own.weights.weight, own.settings
    x = weight.new_empty(()).expand(M, layer.in_features)
    # How the rows of a pack are divided is not known here.
    few = settings.pack is None and is_few(x, settings)
    alone = layer.group is None or layer.group.apart or few
    members = [layer] if alone else layer.group.members  # type: ignore[union-attr]
    found = [member for member in members if member.own() is not None]
    now = layer.parts()
    return Problem.on(
        weight.device, M, max(each.out_features for each in found), layer.in_features,
        layer.rank, dtype or weight.dtype,
        dropout=now is not None and now.settings.dropout > 0,
        segments=len(settings.columns or members), columns=settings.columns is not None,
    )  # fmt: skip


def _tensors(weights: Weights | PackWeights) -> Iterator[Tensor | None]:
    """The tensors of a layer, one after another."""
    for each in weights:
        if isinstance(each, tuple):
            yield from each
        else:
            yield each


class _Waiting(NamedTuple):
    """Outputs computed for members that have not called yet.

    `results` holds, by the member's id, y and the `_state` of the adapter that made it: y is valid
    only while that is unchanged. `call` is what else must be the same when the member comes.
    """

    x: Tensor
    call: Any
    results: dict[int, tuple[Tensor, Any]]


class Group:
    """Two or more layers that read the same x.

    With `first_only` the members share the first x of each call of their parent, and read another
    tensor after it (DeBERTa's relative positions).
    """

    def __init__(self, members: Iterable[LoRALayer], first_only: bool = False) -> None:
        self._members = tuple([ref(member) for member in members])
        self.first_only = first_only
        self.apart = False  # each member ran alone in the last call: its siblings were not whole
        self._fresh = False  # the parent was called, and has not passed an x yet
        # One attribute, so that in a model called from threads results never part from their x.
        self._waiting: _Waiting | None = None

    @property
    def members(self) -> list[LoRALayer]:
        """The layers, as far as they still exist."""
        found = [each() for each in self._members]
        return [member for member in found if member is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "first_only": self.first_only}  # what waits stays here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"], state["first_only"])  # type: ignore[misc]

    def parent_called(self, *_: Any) -> None:
        """The parent's forward begins (a pre-hook of it)."""
        self._waiting, self._fresh = None, True

    def output(self, layer: LoRALayer, x: Tensor, own: Parts, *asked: Any) -> Tensor | None:
        """y of one member, whose parts for x are `own`; None if it is to be computed alone.

        `asked` is what the call asks of every member: its `parts` get it.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and (x.is_inference() or is_few(x, own.settings)):
            return None  # in inference mode an in-place change of x could not be seen
        if compiling and not _saves_x(own):
            return None  # nor in a graph, but by autograd where it has saved x
        version = 0 if compiling else x._version  # a graph cannot compare versions
        call = version, torch.is_grad_enabled(), autocast_dtype(x.device)
        waiting = self._waiting
        if waiting is not None and (found := waiting.results.pop(id(layer), None)) is not None:
            if not waiting.results:
                self._waiting = None
            y, state = found
            if waiting.x is not x and not compiling:
                warnings.warn(_APART, stacklevel=5)
            same = waiting.x is x and waiting.call == call and state == _state(own, compiling)
            return y if same else None
        members: list[Any] = [each() for each in self._members]
        if layer not in members or None in members:
            return None  # a shallow copy (of nn.DataParallel, say), whose siblings are unknown here
        self._waiting = waiting = None
        if self.first_only and not self._fresh:
            return None
        self._fresh = False
        every = [own if member is layer else member.parts(*asked) for member in members]
        if not _alike(every, x):
            if not self.apart and not compiling and _any_part(members):
                self.apart = True
                warnings.warn(_SHARDED, stacklevel=5)
            return None
        self.apart = False
        run: Any = lora_linears if own.settings.pack is None else packed_linears
        ys = run(x, tuple([parts.weights for parts in every]), own.settings)
        results = {
            id(member): (y, _state(parts, compiling))
            for member, y, parts in zip(members, ys, every, strict=True)
        }
        y, _ = results.pop(id(layer))
        self._waiting = _Waiting(x, call, results)
        return y


def _saves_x(own: Parts) -> bool:
    """Whether backward needs x, so that torch refuses a change of x in place before it."""
    lora_A = own.weights.lora_A
    first = first_of(lora_A) if isinstance(lora_A, tuple) else lora_A
    return torch.is_grad_enabled() and first.requires_grad


def _alike(every: list[Any], x: Tensor) -> bool:
    """Whether layers with these parts can share a launch now; one that runs unfused has None.

    They could when the group was made; since then settings may have changed, and offloading may
    have taken a sibling's tensors to another device.
    """
    if None in every:
        return False
    (first, settings), device, K = every[0], x.device, x.shape[-1]
    if is_gathered_alone(first):
        return False
    for weights, others in every:
        weight = weights.weight
        if (
            others != settings
            or (weights.bias is None) != (first.bias is None)
            or weight.device != device
            or is_part(weights)
            or weight.shape[-1] != K
        ):
            return False
    return True


def _any_part(members: list[LoRALayer]) -> bool:
    """Whether a matrix of some member is not whole here, now."""
    every = [own.weights for each in members if (own := each.own()) is not None]
    return any(is_part(weights) or is_gathered_alone(weights) for weights in every)


def _state(parts: Parts, compiling: bool) -> Any:
    """What a waiting output depends on besides x: the settings, the tensors and their values."""
    if compiling:
        return parts.settings
    weight, bias, A, B = parts.weights
    frozen = _memory(weight), _memory(bias)
    if isinstance(A, tuple):
        adapters = [t for t in (*A, *B) if t is not None]
        return frozen, [(id(t), t._version) for t in adapters], parts.settings
    return frozen, id(A), A._version, id(B), B._version, parts.settings


def _memory(frozen: Tensor | None) -> tuple[int, int] | None:
    """Where a frozen tensor lies, and how often it was changed in place.

    Conv1D's weight is a new view in every call, and so are both under FSDP1: no object tells them.
    """
    if frozen is None or is_fake(frozen):
        return None
    return frozen.data_ptr(), frozen._version
