"""A training step as a CUDA graph: the GPU no longer waits for the host.

On a small model the host is slower than the GPU: a step is some thousand launches, each of which
takes Python longer than the kernel takes the GPU. A CUDA graph holds all launches of a step, and
one call replays them.

    step = GraphedStep(model)                 # forward, and backward from the loss
    for batch in loader:
        loss = step(**batch)
        optimizer.step()
        optimizer.zero_grad()

A graph is bound to what it was captured with, so there is one for each signature: shapes, dtypes,
values that are no tensors, the mode of the model, autocast, the rows of `adapter_rows`, and the
memory of every parameter. The first two calls with a signature are plain steps, which also compile
what is still to compile. The third is captured, and from then on the graph is replayed. So nothing
is computed twice. Each replay draws fresh random numbers, but not those that a plain step would
draw: with dropout a run with graphs is another sample than one without, and a resumed run another
than an unbroken one.

What cannot be captured runs as it is, and `reasons` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware.capture import captured

WARM_UP = 2  # plain steps before a capture


def loss_and_backward(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of model(*args, **kwargs), detached, after its backward."""
    loss: Tensor = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach()


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass
class _Graph:
    """A captured step: it reads `inputs`, and leaves `outputs` and `grads` in memory of its own."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any
    grads: list[Tensor | None]


class GraphedStep:
    """step(*args, **kwargs) = function(model, *args, **kwargs), replayed from a CUDA graph.

    `function` is a forward and a backward; it returns tensors. By default it is the loss of
    model(*args, **kwargs) and its backward. Gradients are added to p.grad, as backward does, so
    accumulation, clipping, any optimizer and any schedule work as before, outside of the graph.

    With an `optimizer` its step is part of the graph, and gradients are gone after it. It has to be
    made for that: `capturable=True`, and a tensor as learning rate, which a schedule changes in
    place. ValueError says so if it is not.

    There are at most `limit` graphs; further signatures run as they are. On a CPU all do.

    Python runs at the capture and not at a replay: what the step does besides tensors (counting,
    logging, a branch on a number) stays as it was then. Random numbers are drawn anew.
    """

    def __init__(
        self, model: nn.Module, function: Callable[..., Any] = loss_and_backward, *,
        optimizer: torch.optim.Optimizer | None = None, limit: int = 8,
    ) -> None:  # fmt: skip
        for group in optimizer.param_groups if optimizer is not None else ():
            if not group.get("capturable"):
                raise ValueError(
                    "the optimizer is not made for CUDA graphs: pass capturable=True to it, or "
                    "leave it out of GraphedStep and call optimizer.step() after each step"
                )
            if not isinstance(group["lr"], Tensor):
                raise ValueError(
                    f"learning rate {group['lr']} is a number, which a graph would keep for ever: "
                    "pass lr=torch.tensor(...) on the model's device, or leave the optimizer out "
                    "of GraphedStep"
                )
        self.model, self.function, self.optimizer, self.limit = model, function, optimizer, limit
        self.reasons: dict[str, int] = {}  # why steps ran as they are -> how many did
        self._graphs: dict[Any, _Graph] = {}
        self._calls: dict[Any, int] = {}
        self._refused: dict[Any, str] = {}
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; a replay returns copies, which the next one leaves alone."""
        tensors: list[Tensor] = []
        shape = _taken_apart((args, kwargs), tensors)
        key = (shape, tuple(_signature(each) for each in tensors), self._state())
        graph = self._graphs.get(key)
        if graph is None:
            reason = self._why_not(key, tensors)
            if reason is None:
                graph = self._capture(key, shape, tensors)
                reason = self._refused.get(key)
            if graph is None:
                self.reasons[str(reason)] = self.reasons.get(str(reason), 0) + 1
                return self._run(*args, **kwargs)
        for buffer, given in zip(graph.inputs, tensors, strict=True):
            buffer.copy_(given, non_blocking=True)
        graph.replay()
        self._add(graph.grads)
        return _copied(graph.outputs)

    def __str__(self) -> str:
        plain = [f"{count} steps ran as they are: {why}" for why, count in self.reasons.items()]
        return "\n".join([f"{len(self._graphs)} CUDA graphs", *plain])

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(self.model, *args, **kwargs)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return result

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
        """Why this step runs as it is; None if it is to be captured."""
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

    def _capture(self, key: Any, shape: Any, tensors: list[Tensor]) -> _Graph | None:
        """The graph of a signature; None where the step cannot be captured, which is remembered."""
        device = self._device()
        inputs = [torch.empty_like(t, device=device).copy_(t) for t in tensors]
        args, kwargs = _put_together(shape, iter(inputs))
        parameters = list(self.model.parameters())
        before = [p.grad for p in parameters]
        outputs: list[Any] = []

        def run() -> None:
            outputs[:] = [self._run(*args, **kwargs)]

        for p in parameters:
            p.grad = None  # so that backward makes new ones, in the memory of the graph
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            replay = captured(run, warm_up=0, pool=self._pool)
            grads = [p.grad for p in parameters]
            graph = _Graph(replay, inputs, outputs[0], grads)
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            self._refused[key] = f"the step cannot be captured: {text[0]}"
            self._pool = None
            return None
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        self._graphs[key] = graph
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


def _each(name: str, targets: list[Tensor], values: list[Tensor]) -> None:
    """target.copy_(value), or add_, of each pair: at once where torch has its private operator."""
    at_once = getattr(torch, f"_foreach_{name}", None)
    if at_once is not None:
        at_once(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        getattr(target, name)(value)


def graph_trainer(trainer: Any, limit: int = 8) -> GraphedStep:
    """Let a transformers Trainer replay its `training_step` from CUDA graphs; returns the step.

    Call it before `trainer.train()`. Clipping, the optimizer, the schedule and the loss scaler stay
    the Trainer's. Pad batches to few lengths (`pad_to_multiple_of=64`): each is a graph. Raises
    ValueError for a Trainer that trains on several devices or by an engine of its own.
    """
    arguments = trainer.args
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise ValueError("CUDA graphs are for one device: this Trainer trains on several")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("DeepSpeed and FSDP run the step themselves: no CUDA graph can hold it")
    if arguments.torch_empty_cache_steps is not None:
        raise ValueError("torch_empty_cache_steps empties the memory of a graph: leave it None")
    plain = trainer.training_step

    def function(model: nn.Module, inputs: Any, items: Any, accumulated: Any) -> Any:
        return plain(model, inputs, items)

    step = GraphedStep(trainer.model, function, limit=limit)

    def training_step(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step.model = model.train()
        items = num_items_in_batch
        if isinstance(items, int):  # a number would be another signature every step
            items = torch.tensor(items, device=step._device())
        return step(dict(inputs), items, trainer.current_gradient_accumulation_steps)

    trainer.training_step = training_step
    return step


class _Place:
    """Where a tensor was."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place)

    def __hash__(self) -> int:
        return 0


_PLACE = _Place()


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a place for each tensor, hashable; the tensors go to `tensors`, in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _PLACE
    if isinstance(value, Mapping):
        return dict, tuple((name, _taken_apart(each, tensors)) for name, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple, tuple(_taken_apart(each, tensors) for each in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    raise TypeError(f"a step takes tensors, numbers and text, not {type(value).__name__}")


def _put_together(shape: Any, tensors: Any) -> Any:
    """The inverse of `_taken_apart`."""
    if shape is _PLACE:
        return next(tensors)
    kind, content = shape
    if kind is dict:
        return {name: _put_together(each, tensors) for name, each in content}
    if kind is tuple:
        return tuple(_put_together(each, tensors) for each in content)
    return content


def _signature(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype


def _copied(value: Any) -> Any:
    """The value with a copy of every tensor."""
    tensors: list[Tensor] = []
    shape = _taken_apart(value, tensors)
    return _put_together(shape, iter([t.clone() for t in tensors]))
