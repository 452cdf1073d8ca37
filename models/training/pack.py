"""Runs that train as one: a forward and a backward of one frozen base for the batches of all.

Every run has its own model, as alone. But all models share the frozen parameters of one base, and
what trains in them are the very parameters of one packed model. So a run's optimizer, clipping,
checkpoints and scoring need not know of the others. In a step

    run c    hands in its batch x_c and gets the logits z_c of its rows
             computes its own loss l_c of z_c, and the slope dl_c/dz_c
    pack     z = packed(x_1, ..., x_C), once;  one backward of z with all slopes: d(sum l_c)/d(all)

The rows of the batches stand one below the other, padded to one length. With `--graphs` the pack's
forward and backward are CUDA graphs, and what a run does between them is not.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import GraphedForward, adapter_rows, add_loras, drop_adapter
from lora_kernels.injection.inject import fused_layers
from lora_kernels.injection.packs import adapters_of
from lora_kernels.injection.targets import find_train

from .seat import Inputs, Seat


class Pack:
    """One base with the adapters of several runs; `most` is how many there were at once."""

    def __init__(self) -> None:
        self.base: Any = None
        self.members: dict[str, Seat] = {}
        self.most = 0
        self.graphs: GraphedForward | None = None
        self._logits: Tensor
        self._rows: dict[str, int] = {}

    @property
    def has_dropout(self) -> bool:
        """Whether the base drops out, by torch's generator."""
        return any(
            "drop" in name and isinstance(value, float) and value > 0
            for name, value in self.base.config.to_dict().items()
        )

    def keep(self, model: nn.Module) -> None:
        """Remember the pretrained model of a run before LoRA is added; the first is the base."""
        if self.base is None:
            # The modules are copied, the parameters are the very ones.
            self.base = copy.deepcopy(model, {id(p): p for p in model.parameters()})

    def open(self, seats: Sequence[Seat]) -> list[str | None]:
        """Give a place to every run whose frozen parameters are the base's.

        Returns for each why it trains alone, or None.
        """
        why = {seat: self._unlike(seat.trainer.model) for seat in seats}
        found = [seat for seat in seats if why[seat] is None]
        if len(found) < 2:
            why |= dict.fromkeys(found, "no other run shares its base")
            return list(why.values())
        flags = {p: p.requires_grad for seat in found for p in seat.trainer.model.parameters()}
        torch.manual_seed(found[0].trainer.args.seed)  # of the base's own dropout
        try:
            self._add(found, flags)
        except (ValueError, TypeError) as error:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            why |= dict.fromkeys(found, str(error))
        else:
            self.members, self.most = {seat.name: seat for seat in found}, len(found)
            if any(seat.trainer.graphs is not None for seat in found):
                self.graphs = GraphedForward(self.base, self._computed)
        return list(why.values())

    def _unlike(self, model: Any) -> str | None:
        """Why a run cannot share the base; None if it can."""
        theirs = dict(self.base.named_parameters(remove_duplicate=False))
        whole = find_train(model, model.lora_config.train)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad or _within(name, whole):
                continue
            if name not in theirs or not torch.equal(parameter, theirs[name].to(parameter.device)):
                return f"its frozen {name} is not that of the first run"
        if any(module._buffers.get("running_mean") is not None for module in model.modules()):
            return "the base has running statistics, which would be those of all runs"
        return None

    def _add(self, seats: Sequence[Seat], trains: Mapping[nn.Parameter, bool]) -> None:
        """Make the packed model, and put its parameters into the models of the runs."""
        models: dict[str, Any] = {seat.name: seat.trainer.model for seat in seats}
        add_loras(
            self.base.to(seats[0].trainer.args.device),
            {name: model.lora_config for name, model in models.items()},
            seeds={seat.name: seat.trainer.args.seed for seat in seats},
        )
        frozen = dict(self.base.named_parameters(remove_duplicate=False))
        for name, model in models.items():
            for path, own in list(model.named_parameters(remove_duplicate=False)):
                shared = packed_parameter(self.base, model, path, name)
                if shared is None:
                    shared = frozen[path]
                else:
                    with torch.no_grad():
                        shared.copy_(own)
                    shared.requires_grad_(trains[own])
                parent, _, leaf = path.rpartition(".")
                model.get_submodule(parent)._parameters[leaf] = shared

    def leave(self, name: str) -> None:
        """Take a run out that has ended."""
        if self.members.pop(name, None) is not None and self.members:
            drop_adapter(self.base, name)
            if self.graphs is not None:  # whose memory is that of other parameters
                self.graphs.forget()

    def forward(self, batches: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """The logits of each run's rows, as leaves: their gradients are for `backward`.

        On a CPU each run's dropout on LoRA is drawn from its own random state, as alone.
        """
        generators = adapters_of(self.base).streams.generators
        for name in batches:
            generators[name].set_state(self.members[name].strand.surroundings.torch)
        leaves = self._forward(batches)
        for name in batches:
            strand = self.members[name].strand
            strand.surroundings = strand.surroundings._replace(torch=generators[name].get_state())
        return leaves

    def _forward(self, batches: Mapping[str, Inputs]) -> dict[str, Tensor]:
        self._rows = {name: len(next(iter(inputs.values()))) for name, inputs in batches.items()}
        joint = stack(list(batches.values()), getattr(self.base.config, "pad_token_id", None))
        self.base.train()
        with self._whose():
            computed = self.graphs or partial(self._computed, self.base)
            self._logits = computed(**joint)
        leaves = {}
        for (name, inputs), part in zip(batches.items(), self._parts(self._logits), strict=True):
            if part.ndim == 3:  # of every token: without those of padding
                part = part[:, : inputs["input_ids"].shape[1]]
            leaves[name] = part.detach().float().requires_grad_()
        return leaves

    def _computed(self, base: nn.Module, **joint: Tensor) -> Tensor:
        with next(iter(self.members.values())).trainer.accelerator.autocast():
            logits: Tensor = base(**joint).logits
        return logits

    def _whose(self) -> AbstractContextManager[None]:
        """Inside, the base knows whose rows a batch has; a graph can hold equal blocks of all."""
        equal = len({*self._rows.values()}) == 1 and [*self._rows] == adapters_of(self.base).names
        return nullcontext() if equal else adapter_rows(self.base, self._rows)

    def _parts(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.split(list(self._rows.values()))

    def backward(self, slopes: Mapping[str, Tensor]) -> None:
        """Add the gradients of every run to its parameters, from those of its logits."""
        gradient = torch.zeros_like(self._logits)
        for name, part in zip(self._rows, self._parts(gradient), strict=True):
            if name in slopes:  # a run that failed meanwhile has none
                slope = slopes[name]
                part[tuple(map(slice, slope.shape))] = slope.to(part.dtype)
        with self._whose():
            self._logits.backward(gradient)  # type: ignore[no-untyped-call]
        del self._logits

    def speed(self, batches: int = 3) -> float:
        """Seconds of a step one by one over the pack's: the median over batches of an epoch.

        Only forward and backward are timed, both without graphs. No parameter changes, and no
        gradient is left.
        """
        graphs, self.graphs = self.graphs, None
        plans = {n: list(_some(seat.trainer, batches)) for n, seat in self.members.items()}
        given = [{name: plan[i] for name, plan in plans.items()} for i in range(batches)]
        ways = (self._solo, self._packed)  # in turns, so that a pause of the machine hits both
        pairs = [[_seconds(partial(way, each)) for way in ways] for each in given]
        self.graphs = graphs
        return statistics.median(solo / packed for solo, packed in pairs)

    def _packed(self, batches: Mapping[str, Inputs]) -> None:
        leaves = self._forward(batches)
        self.backward({name: torch.ones_like(leaf) for name, leaf in leaves.items()})
        self._forget()

    def _solo(self, batches: Mapping[str, Inputs]) -> None:
        for name, inputs in batches.items():
            trainer = self.members[name].trainer
            trainer.model.train()
            with trainer.accelerator.autocast():
                logits = trainer.model(**inputs).logits
            logits.sum().backward()
        self._forget()

    def _forget(self) -> None:
        for seat in self.members.values():
            seat.trainer.model.zero_grad()


def packed_parameter(base: nn.Module, model: Any, path: str, name: str) -> nn.Parameter | None:
    """The packed model's parameter for that of a run's model at `path`; None for a frozen one."""
    parent, _, leaf = path.rpartition(".")
    if leaf in ("lora_A", "lora_B") and parent in fused_layers(model):
        return getattr(base.get_submodule(parent), leaf)[name]  # type: ignore[no-any-return]
    whole = _within(path, find_train(model, model.lora_config.train))
    if whole is None:
        return None
    own: nn.Module = base.get_submodule(whole)[name]  # type: ignore[index]
    return own.get_parameter(path.removeprefix(f"{whole}."))


def _within(path: str, modules: Mapping[str, str]) -> str | None:
    return next((module for module in modules if path.startswith(f"{module}.")), None)


def stack(batches: Sequence[Inputs], pad: int | None) -> dict[str, Tensor]:
    """The batches one below the other, padded on the right to the longest.

    Raises ValueError for batches of other tensors, and for lengths that nothing is known to fill.
    """
    fill = {"attention_mask": 0, "token_type_ids": 0, "input_ids": pad}
    found = {}
    for key in batches[0]:
        parts = [inputs.get(key) for inputs in batches]
        if any(part is None for part in parts):
            raise ValueError(f"a batch of the pack lacks {key}")
        longest = max(part.shape[1:2] for part in parts)  # type: ignore[union-attr]
        if any(part.shape[1:2] != longest for part in parts):  # type: ignore[union-attr]
            if fill.get(key) is None:
                raise ValueError(f"the batches of the pack have {key} of several lengths")
            fit = partial(nn.functional.pad, value=fill[key])
            parts = [fit(p, (0, longest[0] - p.shape[1])) for p in parts]  # type: ignore[arg-type, union-attr]
        found[key] = torch.cat(parts)  # type: ignore[arg-type]
    return found


def _some(trainer: Any, count: int) -> Any:
    """Batches from all over the first epoch, as the run will have them."""
    size, order = trainer.args.train_batch_size, list(trainer._get_train_sampler())
    whole = max(1, len(order) // size)
    for number in range(count):
        at = whole * (2 * number + 1) // (2 * count) * size
        rows = [trainer.train_dataset[row] for row in order[at : at + size]]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        yield {key: value for key, value in inputs.items() if key != "labels"}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
