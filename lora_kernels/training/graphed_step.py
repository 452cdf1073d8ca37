"""A training step as a CUDA graph: the GPU no longer waits for the host.

On a small model the host is slower than the GPU: a step is some thousand launches, each of which
takes Python longer than the kernel takes the GPU. A CUDA graph holds all launches of a step, and
one call replays them.

    step = GraphedStep(model)                 # forward, and backward from the loss
    for batch in loader:
        loss = step(**batch)
        optimizer.step()
        optimizer.zero_grad()

`captures` says when a step is captured. What cannot be captured runs as it is, and `reasons` says
why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .captures import Captures, Graph, captured, copied


def loss_and_backward(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of model(*args, **kwargs), detached, after its backward."""
    loss: Tensor = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach()


class GraphedStep(Captures):
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
        super().__init__(model, function, limit)
        self.optimizer = optimizer

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._run(*args, **kwargs)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return result

    def _capture(self, run: Callable[[], Any], inputs: list[Tensor]) -> Graph:
        outputs: list[Any] = []

        def whole() -> None:
            outputs[:] = [run()]

        replay = captured(whole, self._pool)
        return Graph(replay, inputs, outputs[0], [p.grad for p in self.model.parameters()])

    def _replayed(self, graph: Graph) -> Any:
        graph.replay()
        self._add(graph.grads)
        return copied(graph.outputs)


def graph_trainer(trainer: Any, limit: int = 8) -> GraphedStep:
    """Let a transformers Trainer replay its `training_step` from CUDA graphs; returns the step.

    Call it before `trainer.train()`. Clipping, the optimizer, the schedule and the loss scaler stay
    the Trainer's. Pad batches to few lengths (`pad_to_multiple_of=64`): each is a graph. Raises
    ValueError for a Trainer that trains on several devices or by an engine of its own, TypeError
    for what is no Trainer.
    """
    flags = getattr(trainer, "args", None)
    if flags is None or not hasattr(trainer, "training_step"):
        raise TypeError(f"trainer must be a transformers Trainer: got {trainer!r:.80}")
    if flags.n_gpu > 1 or flags.world_size > 1:
        raise ValueError("CUDA graphs are for one device: this Trainer trains on several")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("DeepSpeed and FSDP run the step themselves: no CUDA graph can hold it")
    if flags.torch_empty_cache_steps is not None:
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
