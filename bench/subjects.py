"""What the end-to-end suite trains: models from their configs, methods and precisions, as rows.

The weights are random, which does not change the speed; the sizes are the published configs'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_kernels.tools import shapes

from .providers import attach_lora, attach_peft


@dataclass(frozen=True)
class Model:
    """A sequence classifier; the config values of `tiny` make it small enough for a test."""

    name: str
    family: str  # transformers' class prefix
    config: Mapping[str, Any]
    targets: tuple[str, ...]  # every linear layer of the backbone
    train: tuple[str, ...]
    tiny: Mapping[str, Any]
    batch: int = 16
    length: int = 128
    no_graph: str | None = None  # why a CUDA graph cannot hold a step of it
    unmasked: bool = True  # whether its attention can do without a mask

    def build(self, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> nn.Module:
        """A fresh model, its numbers drawn on the device."""
        import transformers

        values = {**self.config, **(self.tiny if tiny else {})}
        config = getattr(transformers, f"{self.family}Config")(num_labels=2, **values)
        with device:
            model = getattr(transformers, f"{self.family}ForSequenceClassification")(config)
        if self.unmasked:  # transformers makes masks for the attentions it knows, not for this one
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            transformers.AttentionInterface.register("sdpa_unmasked", sdpa_attention_forward)
            model.set_attn_implementation("sdpa_unmasked")
        return model.to(device, dtype).train()


_ENCODER = ("query", "key", "value", "intermediate.dense", "output.dense")
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL |= {"intermediate_size": 64, "vocab_size": 120}
_GPT2 = ("c_attn", "c_proj", "c_fc")
_SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 120, "pad_token_id": 119}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}


def _encoder(name: str, layers: int, heads: int) -> dict[str, Any]:
    widths = shapes.MODELS[name]
    return {
        "hidden_size": widths.hidden,
        "intermediate_size": widths.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _roberta(name: str, layers: int, heads: int) -> Model:
    config = _encoder(name, layers, heads) | _ROBERTA
    return Model(name, "Roberta", config, _ENCODER, ("classifier",), _SMALL)


def _gpt2(name: str, layers: int, heads: int) -> Model:
    config = {"n_embd": shapes.MODELS[name].hidden, "n_layer": layers, "n_head": heads}
    config |= {"pad_token_id": 50256, "use_cache": False}  # of keys and values, for generation
    return Model(name, "GPT2", config, _GPT2, ("score",), _SMALL_GPT2)


_DEBERTA = _encoder("deberta-v2-xlarge", layers=24, heads=24) | {
    "vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 64, "layer_norm_eps": 1e-7,
}  # fmt: skip
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _roberta("roberta-base", layers=12, heads=12),
        _roberta("roberta-large", layers=24, heads=16),
        # Two blocks of RoBERTa-base on 8 sequences: a step that a CPU makes in a second.
        replace(
            _roberta("roberta-base", layers=12, heads=12),
            name="roberta-base-2-blocks", batch=8,
            config=_encoder("roberta-base", layers=2, heads=12) | _ROBERTA,
        ),
        _gpt2("gpt2", layers=12, heads=12),
        _gpt2("gpt2-medium", layers=24, heads=16),
        Model(
            "deberta-v2-xlarge", "DebertaV2", _DEBERTA,
            ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"),
            ("pooler", "classifier"), {**_SMALL, "attention_head_size": 16}, batch=8,
            no_graph="its relative positions are copied from the host in every step",
            unmasked=False,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """The dtype of the base's weights, autocast's (None: off), and whether the loss is scaled."""

    name: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scaled: bool = False


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("fp32"),
        Precision("fp16", autocast=torch.float16, scaled=True),
        Precision("bf16", weights=torch.bfloat16),
        Precision("bf16-autocast", autocast=torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Recipe:
    """The rank and the dropout of the LoRA, PEFT's or ours."""

    rank: int = 8
    dropout: float = 0.1


def _frozen(model: nn.Module, row: Model, recipe: Recipe) -> nn.Module:
    """Only the head trains, but the gradient goes through every layer, as it does with LoRA."""
    model.enable_input_require_grads()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in row.train for part in name.split(".")))
    return model


def _full(model: nn.Module, row: Model, recipe: Recipe) -> nn.Module:
    return model.requires_grad_(True)


def _peft(model: nn.Module, row: Model, recipe: Recipe) -> nn.Module:
    return attach_peft(
        model, row.targets, recipe.rank, recipe.dropout,
        conv1d=row.family == "GPT2", train=row.train,
    )  # fmt: skip


def _lora(model: nn.Module, row: Model, recipe: Recipe) -> nn.Module:
    return attach_lora(model, row.targets, recipe.rank, recipe.dropout, train=row.train)


@dataclass(frozen=True)
class Method:
    """A way to train: what is attached to the model; whether its step is compiled or captured."""

    name: str
    provider: str
    attach: Callable[[nn.Module, Model, Recipe], nn.Module]
    compiled: bool = False
    graph: bool = False
    summary: str = field(default="", compare=False)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("frozen", "torch", _frozen, summary="no LoRA: y and dx of each layer"),
        Method("frozen-graph", "torch", _frozen, graph=True, summary="the same, one CUDA graph"),
        Method("full", "torch", _full, summary="full fine-tuning"),
        Method("peft", "peft", _peft, summary="PEFT, eager"),
        Method("peft-compile", "peft", _peft, compiled=True, summary="PEFT + torch.compile"),
        Method("lora", "lora_kernels", _lora, summary="ours, eager"),
        Method(
            "lora-compile", "lora_kernels", _lora, compiled=True, summary="ours + torch.compile"
        ),
        Method("lora-graph", "lora_kernels", _lora, graph=True, summary="ours, one CUDA graph"),
    )
}
