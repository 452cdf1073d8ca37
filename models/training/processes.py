"""One run by several processes, which `torchrun` or `accelerate launch` has started.

A step has the rows that it has with one process. Each process takes its share of them, and its loss
counts by what it is a mean of (rows, or tokens of a text). So losses and gradients are those of one
process, to rounding; only dropout draws other masks. The first process alone writes and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

Value = TypeVar("Value")


def begin() -> None:
    """Meet the other processes, if a launcher has started several."""
    if count() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def end() -> None:
    """Part from them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def identity() -> dict[str, int]:
    """What several processes add to a run's identity: dropout draws its masks by the process."""
    return {"processes": count()} if count() > 1 else {}


def seed_apart(seed: int) -> None:
    """Let each process but the first, which keeps its state, draw random numbers of its own."""
    if not is_first():
        torch.manual_seed(seed + 1_000_003 * rank())


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def from_first(call: Callable[[], Value]) -> Value:
    """What `call` returns in the first process, which alone calls it; it raises in all."""
    if count() == 1:
        return call()
    told: list[Any] = [None, None]
    try:
        if is_first():
            told[0] = call()
    except Exception as error:
        told[1] = error
        raise
    finally:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    value: Value = told[0]
    return value


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in their order."""
    found: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(found, value)
    return found


def mean(value: Tensor) -> Tensor:
    """The mean of a number over the processes."""
    if count() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / count()


def weight_of(items: Tensor) -> Tensor:
    """The factor by which a mean over `items` counts, so that the mean over processes is exact."""
    items = items.float()
    return items / mean(items)


def mean_over(labels: Tensor) -> Tensor:
    """How many labels a loss is a mean of: rows, or the tokens of a text behind its first."""
    counted = labels[:, 1:] if labels.dim() == 2 else labels
    return (counted != -100).sum()


class Shares(DataLoader[Any]):
    """A loader whose batches are this process's share of the batches of a sampler of rows.

    Of a batch that has fewer rows than there are processes each takes all, which leaves the mean.
    """

    def __init__(self, rows: Any, sampler: Any, size: int, collator: Any) -> None:
        self._sampler = sampler
        super().__init__(rows, batch_sampler=_Parts(sampler, size), collate_fn=collator)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self._sampler.set_epoch(epoch)


class _Parts(BatchSampler):
    def __init__(self, sampler: Any, size: int) -> None:
        super().__init__(sampler, size, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield list(batch) if len(batch) < count() else batch[rank() :: count()]
