"""A forward and its backward as two CUDA graphs, where the loss between them is not the graph's.

Losses that are computed elsewhere, by several adapters each for its own rows or by code that no
graph can hold, then take the outputs as they take those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .captures import Captures, Graph, captured, put_together, taken_apart


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


class GraphedForward(Captures):
    """forward(*args, **kwargs) = function(model, *args, **kwargs), replayed from a CUDA graph.

    `function` returns tensors, alone or in tuples and dicts (those of transformers become plain
    ones); by default it is the model's call. Backward from them, in any code that follows, replays
    a second graph, which adds to p.grad. `GraphedStep` says what is captured, and when.

    The graphs share memory, so there is one backward, and it comes before the next forward:
    RuntimeError where it does not. In a replay hooks of parameters do not run, and autograd.grad
    finds no parameters. TypeError where the function returns anything but tensors, numbers, text.

    >>> forward = GraphedForward(model, lambda model, **batch: model(**batch).logits)
    >>> F.cross_entropy(forward(**batch), labels).backward()
    """

    def __init__(
        self, model: nn.Module, function: Callable[..., Any] = _call, *, limit: int = 8
    ) -> None:
        super().__init__(model, function, limit)
        self.latest: object = None  # what the last replay of a forward is known by

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        found: list[Tensor] = []
        shape = taken_apart(super()._run(*args, **kwargs), found)
        return put_together(shape, iter(found))

    def _capture(self, run: Callable[[], Any], inputs: list[Tensor]) -> Graph:
        outputs: list[Any] = []
        slopes: list[Tensor | None] = []

        def forward() -> None:
            outputs[:] = [run()]

        def backward() -> None:
            pairs = zip(_tensors(outputs[0]), slopes, strict=True)
            ys, dys = zip(*[(y, dy) for y, dy in pairs if dy is not None], strict=True)
            # Outside of autocast, as torch asks for.
            with torch.autocast(self._device().type, enabled=False):
                torch.autograd.backward(ys, dys)

        # Casts that autocast keeps would be read at every replay, and those of a graph by others.
        torch.clear_autocast_cache()
        try:
            replay, again = captured(forward, self._pool), None
            left: list[Tensor] = []
            shape = taken_apart(outputs[0], left)
            slopes += [torch.zeros_like(y) if y.requires_grad else None for y in left]
            if any(each is not None for each in slopes):
                again = captured(backward, self._pool)
        finally:
            torch.clear_autocast_cache()
        grads = [p.grad for p in self.model.parameters()]
        kept = put_together(shape, iter([y.detach() for y in left]))
        outputs.clear()
        return Graph(replay, inputs, kept, grads, again, tuple(slopes))

    def _replayed(self, graph: Graph) -> Any:
        left: list[Tensor] = []
        shape = taken_apart(graph.outputs, left)
        anchor = torch.zeros((), requires_grad=True)  # so that the outputs ask for a gradient
        self.latest = object()
        found = _Replay.apply(anchor, self, graph, left)
        return put_together(shape, iter(found))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    taken_apart(value, found)
    return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, owner: GraphedForward, graph: Graph, outputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        graph.replay()
        ctx.owner, ctx.graph, ctx.call = owner, graph, owner.latest
        found = tuple([y.clone() for y in outputs])
        pairs = zip(found, graph.slopes, strict=True)
        ctx.mark_non_differentiable(*[y for y, slope in pairs if slope is None])
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a graph has no second derivative: leave out create_graph=True")
        owner, graph = ctx.owner, ctx.graph
        if ctx.call is not owner.latest:
            raise RuntimeError(
                "another call of GraphedForward has taken the memory that this backward reads, or "
                "it is a second one: call backward once, before the next forward"
            )
        owner.latest = None
        for buffer, given in zip(graph.slopes, slopes, strict=True):
            if buffer is not None:
                buffer.copy_(given)
        graph.backward()
        owner._add(graph.grads)
        return None, None, None, None
