"""FusedLoRAEmbedding, the module that replaces an `nn.Embedding`.

An embedding is a linear layer of one-hot x [M, K]: K is the number of entries, and row k of the
weight [K, N] is y for entry k. So what holds for a linear layer with LoRA holds here, and a lookup
takes the place of each product with x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments
from ..algebra.operands import Parts
from .linear import FusedLoRALinear
from .sharded import as_asked
from .start import START


class FusedLoRAEmbedding(FusedLoRALinear):
    """A frozen embedding with a trainable low-rank update: two lookups and one small product.

        y = weight[ids] + scale * lora_A[:, ids]^T lora_B^T

    weight [K, N] holds K entries of N numbers (frozen, shared with the layer replaced); lora_A
    [R, K] starts at zero and lora_B [N, R] normal, as in PEFT. ids [...] -> y [..., N], in the
    dtype of weight. The product is added to the rows in place, in the wider dtype of weight and
    lora_A, and rounded once.

    `dropout` has no effect, as in PEFT. `padding_idx` and `scale_grad_by_freq` of the layer
    replaced hold for the gradient of lora_A. Where the weight is tied to an output layer's, that
    layer keeps the frozen weight: LoRA changes the lookup alone. Raises as `F.embedding` does.

    `FusedLoRAEmbedding(K, N, ...)` draws a weight as `nn.Embedding` does; `from_linear` takes over
    that of a layer.

    >>> layer = FusedLoRAEmbedding.from_linear(model.transformer.wte, rank=8, alpha=16)
    """

    padding_idx: int | None
    scale_grad_by_freq: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int = 8,
        alpha: float = 16,
        rslora: bool = False,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments.integer("num_embeddings", num_embeddings, least=1)
        arguments.integer("embedding_dim", embedding_dim, least=1)
        base = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq=scale_grad_by_freq,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._adopt(base, rank, alpha, 0.0, rslora, "auto", base.weight.dtype, None, START)

    @classmethod
    def from_linear(cls, layer: nn.Module, **settings: Any) -> FusedLoRAEmbedding:
        """Wrap an `nn.Embedding`; the settings are those of `FusedLoRALinear.from_linear`.

        Raises TypeError, with the reason, for a layer that `supports` refuses; ValueError for
        settings of linear layers alone: other starts than "kaiming", dora, lora_bias, columns.
        """
        for name, plain in (("init", START), ("dora", False), ("lora_bias", False)):
            if settings.get(name, plain) != plain:
                raise ValueError(f"{name}={settings[name]!r} is for linear layers, not embeddings")
        if settings.get("columns") is not None:
            raise ValueError("LoRA on columns is for linear layers, not embeddings")
        return super().from_linear(layer, **settings)  # type: ignore[return-value]

    def _adopt(self, layer: Any, *settings: Any) -> None:
        super()._adopt(layer, *settings)
        self.conv1d = True  # weight is [K, N], as Conv1D's
        self.padding_idx, self.scale_grad_by_freq = layer.padding_idx, layer.scale_grad_by_freq

    @classmethod
    def supports(cls, layer: nn.Module) -> str | None:
        """Why a layer cannot be replaced; None if it can."""
        if type(layer) is not nn.Embedding:
            return f"{type(layer).__module__}.{type(layer).__qualname__} is not a plain Embedding"
        if layer.max_norm is not None:
            return f"it rescales its weight in every call (max_norm={layer.max_norm})"
        if layer.sparse:
            return "its gradients are sparse (sparse=True)"
        return cls._why_not_alone(layer)

    def reset_lora_parameters(self) -> None:
        """lora_A zero, lora_B normal: PEFT's start of an embedding."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """y [..., N] of ids [...]."""
        disabled = self.disabled and self._unmerged is not None
        weight: Tensor = as_asked(self._unmerged if disabled else self.weight)
        if self.merged or self.disabled:
            return F.embedding(ids, weight, self.padding_idx)
        flat = ids.reshape(-1)
        wide = torch.promote_types(weight.dtype, self.lora_A.dtype)
        y = F.embedding(flat, weight, self.padding_idx).to(wide)  # memory of its own
        lora_A, by_count = self.lora_A.t(), self.scale_grad_by_freq
        h = F.embedding(flat, lora_A, self.padding_idx, scale_grad_by_freq=by_count)
        y.addmm_(h.to(wide), self.lora_B.t().to(wide), alpha=self.scale)  # autocast leaves it alone
        return y.to(weight.dtype).view(*ids.shape, self.out_features)

    def own(self) -> Parts | None:  # type: ignore[override]
        """None: there is no x that siblings could share."""
        return None

    parts = own

    def to_linear(self) -> nn.Embedding:
        """A plain embedding that shares weight, merged or not."""
        layer = nn.Embedding(
            self.in_features, self.out_features, self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq, device="meta",
        )  # fmt: skip
        layer.weight = self.weight
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}"
            + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "")
            + (", rslora=True" if self.rslora else "")
            + (", merged" if self.merged else "")
        )
