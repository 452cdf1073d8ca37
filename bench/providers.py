"""The providers that are compared, a row each: the frozen layer, the peers, each strategy, `auto`.

A provider builds the layer of a case. `Built.projections` are its tensors, into which the check
copies the same numbers for every provider.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import STRATEGIES, FusedLoRALinear, LoRAConfig, add_lora
from lora_kernels.strategies.choose import choose
from lora_kernels.strategies.problem import interpreting

from .cases import Case

ALPHA_PER_RANK = 2  # scale = alpha / R, the usual choice


@dataclass(frozen=True)
class Projection:
    """The tensors of one linear layer: weight [N, K] (a view where it is stored [K, N])."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None


@dataclass(frozen=True)
class Built:
    """A layer ready to call: from x the y of each projection."""

    call: Callable[[Tensor], tuple[Tensor, ...]]
    projections: tuple[Projection, ...]

    @property
    def trained(self) -> list[Tensor]:
        """The LoRA parameters; none on the floor."""
        pairs = ((p.lora_A, p.lora_B) for p in self.projections)
        return [parameter for pair in pairs for parameter in pair if parameter is not None]


@dataclass(frozen=True)
class Provider:
    """How to build a case's layer; `refuses` gives the reason if that cannot run.

    `slack` multiplies the errors that the check allows: ours (1) keep the library's contract of
    accuracy, a peer (2) only has to compute the right thing.
    """

    name: str
    summary: str
    build: Callable[[Case, torch.device], Built]
    refuses: Callable[[Case, torch.device], str | None]
    slack: float = 2.0


class Block(nn.Module):
    """Linear layers that read the same x, under the names they have in their model."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One y a layer."""
        return tuple(child(x) for child in self.children())


def plain(case: Case, device: torch.device) -> Block:
    """The frozen layers of a case."""
    block = Block()
    for name, N in zip(case.layer.children, case.layer.N, strict=True):
        block.add_module(name, _linear(case, N).to(device, case.torch_dtype))
    return block.requires_grad_(False).train()


def _linear(case: Case, N: int) -> nn.Module:
    if not case.layer.conv1d:
        return nn.Linear(case.layer.K, N, bias=case.layer.bias)
    from transformers.pytorch_utils import Conv1D

    return Conv1D(N, case.layer.K)


def _weight(layer: Any, conv1d: bool) -> Tensor:
    return layer.weight.T if conv1d else layer.weight


def _floor(case: Case, device: torch.device) -> Built:
    block = plain(case, device)
    layers: list[Any] = list(block.children())
    projections = tuple(Projection(_weight(c, case.layer.conv1d), c.bias) for c in layers)
    return Built(block, projections)


def attach_peft(
    model: nn.Module, targets: Sequence[str], rank: int, dropout: float, *,
    conv1d: bool = False, train: Sequence[str] = (), own_dtype: bool = False, dora: bool = False,
) -> Any:  # fmt: skip
    """The PEFT model; `own_dtype` keeps the adapters in the base's dtype instead of float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA_PER_RANK * rank,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=list(train) or None,
        fan_in_fan_out=conv1d,
        use_dora=dora,
        task_type="SEQ_CLS" if train else None,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=not own_dtype)  # type: ignore[arg-type]


def attach_lora(
    model: nn.Module, targets: Sequence[str], rank: int, dropout: float, *,
    train: Sequence[str] = (), strategy: str = "auto", dora: bool = False,
) -> nn.Module:  # fmt: skip
    """The model with our layers, siblings grouped."""
    config = LoRAConfig(
        rank=rank,
        alpha=ALPHA_PER_RANK * rank,
        dropout=dropout,
        targets=tuple(targets),
        train=tuple(train),
        strategy=strategy,
        dora=dora,
    )
    with warnings.catch_warnings():
        # In pure half precision every method trains its head so.
        warnings.filterwarnings("ignore", message=".* trained in torch")
        add_lora(model, config)
    return model


def _peft(case: Case, device: torch.device, own_dtype: bool, compiled: bool) -> Built:
    block = plain(case, device)
    attach_peft(
        block, case.layer.children, case.R, case.dropout,
        conv1d=case.layer.conv1d, own_dtype=own_dtype,
    )  # fmt: skip
    layers: list[Any] = list(block.children())
    projections = tuple(
        Projection(
            _weight(layer.base_layer, case.layer.conv1d),
            layer.base_layer.bias,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
        for layer in layers
    )
    return Built(_compiled(block) if compiled else block, projections)


def _compiled(block: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    torch._dynamo.reset()  # forgets earlier cases, whose shapes would make this one dynamic
    return torch.compile(block, dynamic=False)


def _loralib(case: Case, device: torch.device) -> Built:
    import loralib

    block = plain(case, device)
    for name, N in zip(case.layer.children, case.layer.N, strict=True):
        layer = loralib.Linear(
            case.layer.K, N, r=case.R, lora_alpha=ALPHA_PER_RANK * case.R,
            lora_dropout=case.dropout, fan_in_fan_out=case.layer.conv1d, merge_weights=False,
            bias=case.layer.bias, device=device, dtype=case.torch_dtype,
        )  # fmt: skip
        frozen: Any = getattr(block, name)
        layer.weight, layer.bias = frozen.weight, frozen.bias
        setattr(block, name, layer)
    layers: list[Any] = list(block.train().children())
    projections = tuple(
        Projection(_weight(layer, case.layer.conv1d), layer.bias, layer.lora_A, layer.lora_B)
        for layer in layers
    )
    return Built(block, projections)


def _ours(case: Case, device: torch.device, strategy: str) -> Built:
    block = plain(case, device)
    attach_lora(block, case.layer.children, case.R, case.dropout, strategy=strategy)
    layers: list[Any] = list(block.children())
    assert all(isinstance(layer, FusedLoRALinear) for layer in layers)
    projections = tuple(
        Projection(_weight(layer, layer.conv1d), layer.bias, layer.lora_A, layer.lora_B)
        for layer in layers
    )
    return Built(block, projections)


def _strategy_refuses(case: Case, device: torch.device, strategy: str) -> str | None:
    problem = case.problem(device)
    reason = STRATEGIES[strategy].supports(problem)
    if reason is not None:
        return reason
    if device.type == "cpu" and choose(problem, strategy).tiles is not None and interpreting():
        return "Triton's interpreter is never timed"
    return None


def _needs(package: str, half_only: bool = False) -> Callable[[Case, torch.device], str | None]:
    def refuses(case: Case, device: torch.device) -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed"
        if half_only and case.torch_dtype is torch.float32:
            return "in float32 the adapters are float32 anyway"
        return None

    return refuses


def _never(case: Case, device: torch.device) -> str | None:
    return None


_BUILTIN = (
    Provider("floor", "the frozen layer alone: y and dx", _floor, _never),
    Provider(
        "peft", "PEFT eager, its defaults: float32 adapters",
        partial(_peft, own_dtype=False, compiled=False), _needs("peft"),
    ),
    Provider(
        "peft-bf16-adapter", "PEFT eager, adapters in the base's half precision",
        partial(_peft, own_dtype=True, compiled=False), _needs("peft", half_only=True),
    ),
    Provider(
        "peft-compile", "PEFT under torch.compile, its defaults",
        partial(_peft, own_dtype=False, compiled=True), _needs("peft"),
    ),
    Provider(
        "peft-bf16-adapter-compile", "the same, adapters in the base's half precision",
        partial(_peft, own_dtype=True, compiled=True), _needs("peft", half_only=True),
    ),
    Provider("loralib", "loralib, adapters in the base's dtype", _loralib, _needs("loralib")),
)  # fmt: skip


def providers() -> dict[str, Provider]:
    """Every row by name: the peers, each of our strategies, `auto`."""
    ours = [
        Provider(
            name, row.summary, partial(_ours, strategy=name),
            partial(_strategy_refuses, strategy=name), slack=1.0,
        )
        for name, row in STRATEGIES.items()
    ]  # fmt: skip
    auto = Provider(
        "auto", "the strategy that `choose` picks", partial(_ours, strategy="auto"), _never, 1.0
    )
    return {row.name: row for row in (*_BUILTIN, *ours, auto)}
