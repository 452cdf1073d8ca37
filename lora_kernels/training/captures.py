"""What captured calls have in common: a CUDA graph each signature, plain calls where none can be.

There is a graph for each signature: shapes, dtypes, values that are no tensors, the mode of the
model, autocast, the rows of `adapter_rows`, and the memory of every parameter. The first two calls
with a signature are plain, which also compiles what is still to compile. The third is captured, and
from then on the graph is replayed. So nothing is computed twice.

Each replay draws fresh random numbers, but not those that a plain call would draw: with dropout a
run with graphs is another sample than one without, and a resumed run another than an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..hardware import capture

WARM_UP = 2  # plain calls before a capture


@dataclass
class Graph:
    """A captured call: it reads `inputs`, and leaves `outputs` and `grads` in memory of its own.

    Where backward is a graph of its own, `slopes` are the gradients of the outputs that it reads.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any
    grads: list[Tensor | None]
    backward: Callable[[], None] | None = None
    slopes: tuple[Tensor | None, ...] = ()


class Captures:
    """Calls of `function(model, ...)`, replayed from CUDA graphs where that can be.

    There are at most `limit` graphs; further signatures run as they are. On a CPU all do. `reasons`
    says why calls ran as they are, and how many did.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], limit: int) -> None:
        self.model = arguments.module("model", model)
        self.function = arguments.function("function", function)
        self.limit = arguments.integer("limit", limit, least=0)
        self.reasons: dict[str, int] = {}
        self._graphs: dict[Any, Graph] = {}
        self._made = 0  # graphs, those included that are forgotten
        self._calls: dict[Any, int] = {}
        self._refused: dict[Any, str] = {}
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; a replay returns copies, which the next one leaves alone."""
        tensors: list[Tensor] = []
        shape = taken_apart((args, kwargs), tensors)
        key = (shape, tuple(_signature(each) for each in tensors), self._state())
        graph = self._graphs.get(key)
        if graph is None:
            reason = self._why_not(key, tensors)
            if reason is None:
                graph = self._captured(key, shape, tensors)
                reason = self._refused.get(key)
            if graph is None:
                self.reasons[str(reason)] = self.reasons.get(str(reason), 0) + 1
                return self._run(*args, **kwargs)
        for buffer, given in zip(graph.inputs, tensors, strict=True):
            buffer.copy_(given, non_blocking=True)
        return self._replayed(graph)

    def forget(self) -> None:
        """Let go of all graphs and of their memory."""
        self._graphs.clear()
        self._calls.clear()
        self._pool = None

    def __str__(self) -> str:
        plain = [f"{count} steps ran as they are: {why}" for why, count in self.reasons.items()]
        return "\n".join([f"{self._made} CUDA graphs", *plain])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """A plain call."""
        return self.function(self.model, *args, **kwargs)

    def _capture(self, run: Callable[[], Any], inputs: list[Tensor]) -> Graph:
        """The graph of `run`, a plain call on the inputs."""
        raise NotImplementedError

    def _replayed(self, graph: Graph) -> Any:
        """Replay a graph whose inputs are filled; what the call returns."""
        raise NotImplementedError

    def _state(self) -> tuple[Any, ...]:
        """All but the inputs that a graph depends on. (One walk: of RoBERTa-base 0.3 ms.)"""
        state: list[Any] = []
        for module in self.model.modules():
            state.append(module.training)
            if (adapters := module.__dict__.get("adapters")) is not None:  # several in one layer
                state.append(getattr(adapters, "given", None))
            for tensors in (module._parameters, module._buffers):
                for t in tensors.values():
                    if t is not None:
                        state.append((t.data_ptr(), t.requires_grad))
        kind = self._device().type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return (*state, *autocast, torch.is_grad_enabled())

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _why_not(self, key: Any, tensors: list[Tensor]) -> str | None:
        """Why this call runs as it is; None if it is to be captured."""
        if not _has_graphs(self._device()):
            return f"the model is on {self._device()}: CUDA graphs need a GPU"
        if key in self._refused:
            return self._refused[key]
        if any(t.requires_grad for t in tensors):
            return "an input asks for a gradient, which would stay in the graph's memory"
        if len(self._graphs) >= self.limit:
            return f"{self.limit} graphs are captured already (limit)"
        if len(self._calls) > 64 * self.limit:  # of signatures that came once or twice
            self._calls.clear()
        self._calls[key] = self._calls.get(key, 0) + 1
        return f"warm-up, {WARM_UP} for a signature" if self._calls[key] <= WARM_UP else None

    def _captured(self, key: Any, shape: Any, tensors: list[Tensor]) -> Graph | None:
        """The graph of a signature; None where the call cannot be captured, which is remembered."""
        device = self._device()
        inputs = [torch.empty_like(t, device=device).copy_(t) for t in tensors]
        args, kwargs = put_together(shape, iter(inputs))
        parameters = list(self.model.parameters())
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None  # so that backward makes new ones, in the memory of the graph
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = self._capture(lambda: self._run(*args, **kwargs), inputs)
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            self._refused[key] = f"the step cannot be captured: {text[0]}"
            self._pool = None
            return None
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        self._graphs[key], self._made = graph, self._made + 1
        return graph

    def _add(self, grads: Iterable[Tensor | None]) -> None:
        """Add the gradients of a replay to those of the parameters; none is the graph's memory."""
        first: tuple[list[Tensor], list[Tensor]] = ([], [])
        more: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p, grad in zip(self.model.parameters(), grads, strict=True):
            if grad is None:
                continue
            if p.grad is None:
                p.grad = torch.empty_like(grad)
                target = first
            else:
                target = more
            target[0].append(p.grad)
            target[1].append(grad)
        with torch.no_grad():
            if first[0]:
                _each("copy_", *first)
            if more[0]:
                _each("add_", *more)


def captured(run: Callable[[], object], pool: Any) -> Callable[[], None]:
    """The replay of `run` as a CUDA graph, in the memory of the pool."""
    return capture.captured(run, warm_up=0, pool=pool)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _each(name: str, targets: list[Tensor], values: list[Tensor]) -> None:
    """target.copy_(value), or add_, of each pair: at once where torch has its private operator."""
    at_once = getattr(torch, f"_foreach_{name}", None)
    if at_once is not None:
        at_once(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        getattr(target, name)(value)


class _Place:
    """Where a tensor was."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place)

    def __hash__(self) -> int:
        return 0


_PLACE = _Place()


def taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a place for each tensor, hashable; the tensors go to `tensors`, in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _PLACE
    if isinstance(value, Mapping):
        return dict, tuple((name, taken_apart(each, tensors)) for name, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple, tuple(taken_apart(each, tensors) for each in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    raise TypeError(f"a step takes tensors, numbers and text, not {type(value).__name__}")


def put_together(shape: Any, tensors: Any) -> Any:
    """The inverse of `taken_apart`."""
    if shape is _PLACE:
        return next(tensors)
    kind, content = shape
    if kind is dict:
        return {name: put_together(each, tensors) for name, each in content}
    if kind is tuple:
        return tuple(put_together(each, tensors) for each in content)
    return content


def _signature(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype


def copied(value: Any) -> Any:
    """The value with a copy of every tensor."""
    tensors: list[Tensor] = []
    shape = taken_apart(value, tensors)
    return put_together(shape, iter([t.clone() for t in tensors]))
