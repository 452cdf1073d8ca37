"""Runs that train as one: a forward and a backward of one frozen base for the batches of all.

Every run has its own model, as alone. But all models share the frozen parameters of one base, and
what trains in them are the very parameters of one packed model. So a run's optimizer, clipping,
checkpoints and scoring need not know of the others. In a step

    run c    hands in its batch x_c and gets the logits z_c of its rows
             computes its own loss l_c of z_c, and the slope dl_c/dz_c
    pack     z = packed(x_1, ..., x_C), once;  one backward of z with all slopes: d(sum l_c)/d(all)

The rows of the batches stand one below the other, padded to one length.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import lora_kernels
from lora_kernels.injection.inject import fused_layers
from lora_kernels.injection.targets import find_train

from .meter import peak
from .strand import Strand

if TYPE_CHECKING:
    from .trainer import ExactTrainer

Inputs = Mapping[str, Tensor]
Step = Callable[..., tuple[Tensor, Tensor | None]]


class Batch(NamedTuple):
    """What a run asks first in a step: the logits of these inputs."""

    inputs: Inputs


class Slope(NamedTuple):
    """What it asks then: the gradients of its parameters, from that of its logits."""

    gradient: Tensor
    loss: Tensor


class Ready(NamedTuple):
    """What it asks before the first step: a place in the pack."""


class EpochEnds(NamedTuple):
    """What it asks between two epochs, where losers are stopped: whether it may go on."""

    epochs: int


class StoppedError(Exception):
    """Raised in a run that others have beaten."""


class Seat(TrainerCallback):
    """The place of a run in a pack; `trainer` is the run's once it is ready to train."""

    def __init__(self, name: str, pack: Pack, halving: bool = False) -> None:
        self.name, self.pack, self.halving = name, pack, halving
        self.strand: Strand
        self.trainer: ExactTrainer
        self.why_alone: str | None = None
        self.diverged = False

    @property
    def alone(self) -> bool:
        """Whether the run makes its steps without the others."""
        return self.why_alone is not None

    def join(self, trainer: ExactTrainer) -> None:
        """Take part. Afterwards the parameters of the trainer's model are those of the pack."""
        self.trainer = trainer
        if self.halving and trainer.eval_dataset is None:
            raise ValueError("--stop-losers compares scores of validation: there is no such split")
        self.why_alone = self.strand.ask(Ready())

    def step(
        self, run: Step, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `run(model, inputs, ...)`, with the pack's forward and backward in place of its own.

        The time in which others run is not counted; the pack counts a share of its own.
        """
        if not self.alone:
            inputs = self.trainer._prepare_inputs(inputs)  # type: ignore[arg-type]
            logits = self._ask(Batch({k: v for k, v in inputs.items() if k != "labels"}))
            if isinstance(logits, str):
                self.why_alone = logits
        if self.alone:
            return run(model, inputs, *args, **kwargs)
        loss, kept = run(_Said(model, logits), inputs, *args, **kwargs)
        assert logits.grad is not None
        self.diverged = self._ask(Slope(logits.grad, loss))
        return loss, kept

    def _ask(self, what: Batch | Slope) -> Any:
        began = time.perf_counter()
        answer = self.strand.ask(what)
        self.trainer.meter.seconds["training"] -= time.perf_counter() - began
        return answer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a run that has diverged for good: its loss and its parameters are no numbers."""
        trained = (p for p in self.trainer.model.parameters() if p.requires_grad)
        if self.diverged and not all(bool(p.isfinite().all()) for p in trained):
            control.should_training_stop = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two epochs, ask whether the run may go on."""
        epochs = len(self.scores())
        if self.halving and epochs and not self.alone:
            self.strand.ask(EpochEnds(epochs))

    def scores(self) -> list[Mapping[str, float]]:
        """What Trainer logged of the validation split after each epoch so far."""
        return [log for log in self.trainer.state.log_history if "eval_loss" in log]

    def notes(self, steps: int) -> list[str]:
        """What the run's result should tell of the pack."""
        if self.alone:
            return []
        found = [
            f"trained with up to {self.pack.most} runs in one pass over the base: its seconds are "
            "its share of theirs, its memory is that of all"
        ]
        if self.pack.has_dropout:
            found.append("the base's own dropout draws other masks than in a run alone")
        if self.diverged:
            found.append(f"it left the others at step {steps}: its loss is no number")
        return found


class _Said(nn.Module):
    """Stands for a run's model in Trainer's step: the logits are there, and the loss is its own."""

    def __init__(self, model: nn.Module, logits: Tensor) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """What the model's forward returns, without computing the logits."""
        outputs = {"logits": self.logits}
        if labels is not None:
            outputs["loss"] = loss_of(self.model, self.logits, labels, kwargs)
        return outputs

    def _get_name(self) -> str:  # by which Trainer tells how labels are smoothed
        return self.model._get_name()  # type: ignore[no-any-return, operator]


def loss_of(model: Any, logits: Tensor, labels: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The loss that the model's forward computes of its logits. `given` are its other arguments."""
    if "ForCausalLM" in model.loss_type or "LMHead" in type(model).__name__:
        counts = {k: v for k, v in given.items() if k == "num_items_in_batch"}
        size = model.config.vocab_size
        return model.loss_function(logits=logits, labels=labels, vocab_size=size, **counts)
    return model.loss_function(labels=labels, pooled_logits=logits, config=model.config)


class Pack:
    """One base with the adapters of several runs."""

    def __init__(self) -> None:
        self.base: nn.Module | None = None
        self.members: dict[str, ExactTrainer] = {}
        self.most = 0
        self.peak = 0
        self._logits: Tensor
        self._blocks: dict[str, tuple[slice, ...]] = {}

    @property
    def has_dropout(self) -> bool:
        """Whether the base drops out, by torch's generator."""
        assert self.base is not None
        config = self.base.config
        return any(
            "drop" in name and isinstance(value, float) and value > 0
            for name, value in config.to_dict().items()
        )

    def keep(self, model: nn.Module) -> None:
        """Remember the pretrained model of a run before LoRA is added; the first is the base."""
        if self.base is None:
            # The modules are copied, the parameters are the very ones.
            self.base = copy.deepcopy(model, {id(p): p for p in model.parameters()})

    def open(self, trainers: Mapping[str, ExactTrainer]) -> dict[str, str]:
        """Give a place to every run whose frozen parameters are the base's.

        Returns why the others train alone.
        """
        assert self.base is not None
        alone = {name: why for name, t in trainers.items() if (why := self._unlike(t.model))}
        found = {name: trainer for name, trainer in trainers.items() if name not in alone}
        if len(found) < 2:
            return alone | dict.fromkeys(found, "no other run has its base")
        flags = {p: p.requires_grad for t in found.values() for p in t.model.parameters()}
        try:
            self._add(found)
        except ValueError as error:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            return alone | dict.fromkeys(found, str(error))
        self.members, self.most = found, len(found)
        return alone

    def _unlike(self, model: Any) -> str | None:
        """Why a run cannot share the base; None if it can."""
        assert self.base is not None
        theirs = dict(self.base.named_parameters(remove_duplicate=False))
        ours = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in ours.items():
            if parameter.requires_grad or _within(name, find_train(model, model.lora_config.train)):
                continue
            if name not in theirs or not torch.equal(parameter, theirs[name].to(parameter.device)):
                return f"its {name} is not that of the first run"
        if any(module._buffers.get("running_mean") is not None for module in model.modules()):
            return "the base has running statistics, which would be those of all runs"
        return None

    def _add(self, trainers: Mapping[str, ExactTrainer]) -> None:
        """Make the packed model, and put its parameters into the models of the runs."""
        assert self.base is not None
        models: dict[str, Any] = {name: trainer.model for name, trainer in trainers.items()}
        device = next(iter(trainers.values())).args.device
        configs = {name: model.lora_config for name, model in models.items()}
        lora_kernels.add_loras(self.base.to(device), configs)
        frozen = dict(self.base.named_parameters(remove_duplicate=False))
        for name, model in models.items():
            for path, own in list(model.named_parameters(remove_duplicate=False)):
                shared = packed_parameter(self.base, model, path, name)
                if shared is None:
                    shared = frozen[path]
                else:
                    with torch.no_grad():
                        shared.copy_(own)
                    shared.requires_grad_(own.requires_grad)
                parent, _, leaf = path.rpartition(".")
                model.get_submodule(parent)._parameters[leaf] = shared

    def leave(self, name: str) -> None:
        """Take a run out that has ended; what it trained is its own no longer."""
        if self.members.pop(name, None) is not None and self.members:
            lora_kernels.drop_adapter(self.base, name)

    def forward(self, batches: Mapping[str, Inputs]) -> dict[str, Tensor]:
        """The logits of each run's rows, as leaves: their gradients are for `backward`."""
        assert self.base is not None
        rows = {name: len(next(iter(inputs.values()))) for name, inputs in batches.items()}
        joint = stack(list(batches.values()), getattr(self.base.config, "pad_token_id", None))
        self.base.train()
        accelerator = next(iter(self.members.values())).accelerator
        with accelerator.autocast(), lora_kernels.adapter_rows(self.base, rows):
            self._logits = self.base(**joint).logits
        first, leaves = 0, {}
        for name, inputs in batches.items():
            block: tuple[slice, ...] = (slice(first, first + rows[name]),)
            if self._logits.ndim == 3:  # a token each: without those of padding
                block += (slice(inputs["input_ids"].shape[1]),)
            self._blocks[name] = block
            leaves[name] = self._logits[block].detach().float().requires_grad_()
            first += rows[name]
        self.peak = max(self.peak, peak())
        return leaves

    def backward(self, slopes: Mapping[str, Tensor]) -> None:
        """Add the gradients of every run to its parameters, from those of its logits."""
        gradient = torch.zeros_like(self._logits)
        for name, slope in slopes.items():
            gradient[self._blocks[name]] = slope.to(gradient.dtype)
        self._logits.backward(gradient)  # type: ignore[no-untyped-call]
        self._blocks.clear()
        del self._logits
        self.peak = max(self.peak, peak())

    def speed(self, batches: int = 2) -> float:
        """Seconds of steps one by one over those of the pack, measured on batches of an epoch.

        Only forward and backward are timed. No parameter changes, and no gradient is left.
        """
        plans = {name: list(_some(trainer, batches)) for name, trainer in self.members.items()}
        first = {name: plan[0] for name, plan in plans.items()}
        self._packed(first), self._solo(dict(list(first.items())[:1]))  # warm
        packed = solo = 0.0
        for number in range(batches):
            given = {name: plan[number] for name, plan in plans.items()}
            packed += _timed(self._packed, given)
            solo += _timed(self._solo, given)
        return solo / packed

    def _packed(self, batches: Mapping[str, Inputs]) -> None:
        leaves = self.forward(batches)
        self.backward({name: torch.ones_like(leaf) for name, leaf in leaves.items()})
        self._forget()

    def _solo(self, batches: Mapping[str, Inputs]) -> None:
        for name, inputs in batches.items():
            trainer = self.members[name]
            trainer.model.train()
            with trainer.accelerator.autocast():
                logits = trainer.model(**inputs).logits
            logits.sum().backward()
        self._forget()

    def _forget(self) -> None:
        for trainer in self.members.values():
            trainer.model.zero_grad()


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
            parts = [
                nn.functional.pad(p, (0, longest[0] - p.shape[1]), value=fill[key])  # type: ignore
                for p in parts
            ]
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


def _timed(function: Callable[[Any], None], given: Any) -> float:
    began = time.perf_counter()
    function(given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
