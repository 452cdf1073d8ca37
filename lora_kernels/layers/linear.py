"""FusedLoRALinear, the module that replaces an `nn.Linear` or a transformers `Conv1D`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..algebra.columns import Range, Ranges, check_columns, unfold, widths
from ..algebra.operands import Parts, Settings, Weights
from ..autograd.autocast import without_autocast
from ..autograd.few import few_layer
from ..autograd.functional import lora_layer
from .base import features_of, is_conv1d, plain_layer, why_not_plain
from .config import check_settings
from .dora import Dora, dora_layer, row_norms
from .sharded import as_asked
from .start import START, check_start, drawn, kaiming, takes_weight


class FusedLoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, as one fused operation.

        y = x weight^T + bias + scale * D(x) lora_A^T lora_B^T

    scale is alpha / rank, or alpha / sqrt(rank) with `rslora`. D is dropout with probability
    `dropout`, in training alone. x [..., K] -> y [..., N], where K is `in_features` and N
    `out_features`. Raises as `lora_linear` does.

    Parameters: weight [N, K] and bias [N] (frozen, under the names of the layer replaced; weight is
    [K, N] if that was a Conv1D), lora_A [R, K] (Kaiming-uniform, as in PEFT) and lora_B [N, R]
    (zero, so that training starts at the base model). A layer built here has them all on `device`
    in `dtype`; `from_linear` makes lora_A and lora_B float32 beside a half-precision weight.

    With `columns` only those ranges of y's columns have LoRA, each as a layer of its own (query and
    value of GPT-2's c_attn): lora_A [ranges * R, K] and lora_B [sum of widths, R] hold one below
    the other, as loralib's MergedLinear does.

    With `dora` there is lora_magnitude [N] besides (see `layers.dora`), with `lora_bias` a
    parameter of that name [N]: y + scale * lora_bias.

    >>> layer = FusedLoRALinear.from_linear(model.classifier, rank=8, alpha=16, dropout=0.1)
    """

    __module__ = "lora_kernels"  # where pickles find it, wherever the file lies
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter
    lora_bias: nn.Parameter
    disabled = False  # whether the layer computes the base layer's y
    has_magnitude = has_lora_bias = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        bias: bool = True,
        rslora: bool = False,
        strategy: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments.integer("in_features", in_features, least=0)
        arguments.integer("out_features", out_features, least=0)
        arguments.flag("bias", bias)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adopt(base, rank, alpha, dropout, rslora, strategy, base.weight.dtype, None, START)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        strategy: str = "auto",
        columns: Iterable[Range] | None = None,
        init: str = START,
        dora: bool = False,
        lora_bias: bool = False,
    ) -> FusedLoRALinear:
        """Wrap an `nn.Linear` or a transformers `Conv1D`; weight and bias are the layer's own, now
        frozen.

        lora_A and lora_B are fp32 at least, whatever the base (small updates vanish in half
        precision). `columns` are the (start, stop) of y's columns that get LoRA; None means all, as
        one. `init` names how lora_A and lora_B start (see `LoRAConfig`); with "pissa" and "olora"
        weight is a new one, without their part. Raises TypeError, with the reason, for a layer that
        `supports` refuses; ValueError for columns that are not ascending ranges of y's.

        >>> FusedLoRALinear.from_linear(attn.c_attn, rank=4, columns=[(0, 768), (1536, 2304)])
        """
        refusal = cls.supports(arguments.module("layer", layer))
        if refusal is not None:
            raise TypeError(f"cannot replace {type(layer).__name__}: {refusal}")
        self = cls.__new__(cls)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ranges = None if columns is None else arguments.ranges("columns", columns)
        arguments.flag("dora", dora)
        arguments.flag("lora_bias", lora_bias)
        if ranges is not None and (dora or lora_bias):
            raise ValueError("dora and lora_bias are for whole layers: this one has columns")
        self._adopt(layer, rank, alpha, dropout, rslora, strategy, dtype, ranges, init)
        if lora_bias:
            self.lora_bias = nn.Parameter(self.lora_B.new_zeros(self.out_features))
            self.has_lora_bias = True
        if dora:
            self.lora_magnitude = nn.Parameter(row_norms(self._weights(None), self.scale))
            self.has_magnitude = True
        return self

    @classmethod
    def supports(cls, layer: nn.Module) -> str | None:
        """Why a layer cannot be replaced; None if it can."""
        if type(layer) is not nn.Linear and not is_conv1d(layer):
            other = type(layer)
            return f"{other.__module__}.{other.__qualname__} is not a plain Linear or Conv1D"
        return cls._why_not_alone(layer)

    @staticmethod
    def _why_not_alone(layer: nn.Module) -> str | None:
        """Why a layer of a class that is known cannot be replaced; None if it can."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if refusal := why_not_plain(weight):
            return f"its weight is {refusal}"
        hooks = layer._forward_hooks, layer._forward_pre_hooks
        if any((*hooks, layer._backward_hooks, layer._backward_pre_hooks)):
            return "it has hooks, which would be lost"
        if "forward" in vars(layer):
            return "its forward is patched, which would be lost"
        if hasattr(layer, "parametrizations"):
            return "it is parametrized"
        return None

    def _adopt(
        self, layer: nn.Module, rank: int, alpha: float, dropout: float, rslora: bool,
        strategy: str, dtype: torch.dtype, columns: Ranges | None, init: str,
    ) -> None:  # fmt: skip
        check_settings(rank, alpha, dropout, rslora, strategy)
        if check_start(init, rank) != START and columns is not None:
            raise ValueError(f"init={init!r} is for whole layers: this one has columns")
        if columns is not None:
            check_columns(columns, features_of(layer)[1])
        nn.Module.__init__(self)
        self.conv1d = is_conv1d(layer)
        self.base_class = type(layer)
        weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        bias: nn.Parameter | None = getattr(layer, "bias", None)
        self.in_features, self.out_features = features_of(layer)
        self.rank, self.alpha, self.dropout = rank, alpha, float(dropout)
        self.rslora, self.strategy = rslora, strategy
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
        self.weight = weight
        self.register_parameter("bias", bias)
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.columns = columns
        ranges = ((0, self.out_features),) if columns is None else columns
        self.lora_A = nn.Parameter(torch.empty(len(ranges) * rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(sum(widths(ranges)), rank, **options))
        self.train(layer.training)
        self.group: Any = None  # the siblings that read the same x (a `group.Group`)
        self._unmerged: nn.Parameter | None = None
        self.reset_lora_parameters() if init == START else self._start(init)

    def reset_lora_parameters(self) -> None:
        """lora_A as PEFT draws it, lora_B zero."""
        kaiming(self.lora_A, self.lora_B)

    @torch.no_grad()
    def _start(self, init: str) -> None:
        """Start as `init` says; what it takes out of weight is kept for `taken`."""
        weight = self.weight.T if self.conv1d else self.weight
        lora_A, lora_B = drawn(init, weight, self.rank, self.scale)
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if takes_weight(init):
            rest = (weight.to(lora_A) - self.scale * lora_B @ lora_A).to(weight.dtype)
            rest = rest.T.contiguous() if self.conv1d else rest
            self.weight = nn.Parameter(rest, requires_grad=False)
            self.register_buffer("start_A", self.lora_A.detach().clone())
            self.register_buffer("start_B", self.lora_B.detach().clone())

    @property
    def taken(self) -> tuple[Tensor, Tensor] | None:
        """lora_A and lora_B that weight lacks since the start (PiSSA, OLoRA); None if none."""
        start_A, start_B = self._buffers.get("start_A"), self._buffers.get("start_B")
        return None if start_A is None or start_B is None else (start_A, start_B)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        if (y := few_layer(x, self)) is not None:
            return y
        parts = self.parts()
        if parts is None:
            return self._plain(x)
        if self.has_magnitude:
            dropout = self.dropout if self.training else 0.0
            return dora_layer(x, parts, Dora(self.lora_magnitude, self.bias, dropout), self._lora)
        return self._lora(x, parts)

    def _lora(self, x: Tensor, parts: Parts) -> Tensor:
        if self.group is not None and (y := self.group.output(self, x, parts)) is not None:
            return y
        return lora_layer(x, parts)

    def _plain(self, x: Tensor) -> Tensor:
        """y of a merged layer, or of a disabled one without its update."""
        own = self._unmerged if self.disabled and self._unmerged is not None else self.weight
        weight = own.T if self.conv1d else own
        bias = self.bias if self.disabled else self._bias()
        bias = bias if bias is None else bias.to(weight.dtype)
        x = x.to(weight.dtype)
        y = nn.functional.linear(x, weight, bias)
        if self.disabled and (taken := self.taken):
            start_A, start_B = (part.to(y.dtype) for part in taken)
            y = y + self.scale * (x @ start_A.T @ start_B.T)
        return y

    def parts(self) -> Parts | None:
        """The tensors and settings of a call now; None if merged or disabled: a plain layer."""
        if self.merged or self.disabled:
            return None
        return self._parts(self.dropout if self.training else 0.0)

    def own(self) -> Parts:
        """The tensors, merged or not, and the settings as in training."""
        return self._parts(self.dropout)

    def _parts(self, dropout: float) -> Parts:
        if self.has_magnitude:
            return Parts(self._weights(None), Settings(self.scale, 0.0, self.strategy))
        weights = self._weights(self._bias())
        return Parts(weights, Settings(self.scale, dropout, self.strategy, self.columns))

    def _weights(self, bias: Tensor | None) -> Weights:
        weight = as_asked(self.weight)
        weight = weight.t() if self.conv1d else weight  # a part of it, under FSDP1, is flat
        return Weights(weight, bias, self.lora_A, self.lora_B)

    def _bias(self) -> Tensor | None:
        """The bias of y: the frozen one, and that of LoRA."""
        bias: Tensor | None = as_asked(self.bias)
        if not self.has_lora_bias:
            return bias
        own = self.scale * self.lora_bias
        return own if bias is None else bias + own

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the parameters that LoRA adds."""
        magnitude = ("lora_magnitude",) if self.has_magnitude else ()
        return ("lora_A", "lora_B", *magnitude, *(("lora_bias",) if self.has_lora_bias else ()))

    @property
    def is_plain(self) -> bool:
        """Whether the layer now computes the equation above, with none of what else it can."""
        return not (
            self.disabled
            or self.has_magnitude
            or self.has_lora_bias
            or self.columns is not None
            or self._unmerged is not None
        )

    @property
    def merged(self) -> bool:
        """Whether weight holds the update (see `merge`)."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to weight, for inference: weight + scale * lora_B lora_A, rounded once.

        DoRA's gain multiplies the rows of the sum. The frozen weight is kept aside, so `unmerge`
        gives back its very bits. Does nothing if merged.
        """
        if self.merged:
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        lora_A, lora_B = self.unfolded()
        with without_autocast(self.weight.device):
            update = self.scale * (lora_B.to(wide) @ lora_A.to(wide))
        merged = self.weight.to(wide) + (update.T if self.conv1d else update)
        if self.has_magnitude:
            gain = self.lora_magnitude / row_norms(self._weights(None), self.scale)
            merged *= gain if self.conv1d else gain[:, None]
        self._unmerged = self.weight
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Undo `merge`, to the bit. Does nothing if not merged."""
        if self._unmerged is not None:
            self.weight, self._unmerged = self._unmerged, None

    def unfolded(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B as one LoRA of the whole layer (see `columns`), of rank len(lora_A)."""
        if self.columns is None:
            return self.lora_A, self.lora_B
        return self.lora_A, unfold(self.lora_B, self.columns, self.out_features)

    def to_linear(self) -> nn.Module:
        """A plain layer of the class that was replaced, sharing weight (merged or not) and bias."""
        bias = self.bias
        if self.merged and (total := self._bias()) is not None and total is not bias:
            trains = bias is not None and bias.requires_grad
            bias = nn.Parameter(total.detach().to(self.weight.dtype), requires_grad=trains)
        return plain_layer(self.base_class, self.weight, bias).train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, alpha={self.alpha}, "
            f"dropout={self.dropout}, strategy={self.strategy!r}"
            + (f", columns={self.columns}" if self.columns else "")
            + (", rslora=True" if self.rslora else "")
            + (", dora=True" if self.has_magnitude else "")
            + (", lora_bias=True" if self.has_lora_bias else "")
            + (", merged" if self.merged else "")
        )
