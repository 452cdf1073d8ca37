"""Tiny random models of every family, and the plain formula of a LoRA layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.layers.linear import FusedLoRALinear
from tests.support.small_layers import nodes_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
BERT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3}
LLAMA = {**SMALL, "vocab_size": 60, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 40}
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 60,
    "num_labels": 3,
    "feed_forward_proj": "gated-gelu",
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DISTIL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 60,
    "num_labels": 3,
}

VIT = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BERT)),
    "xlm-roberta": lambda: tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**BERT)),
    "camembert": lambda: tf.CamembertForSequenceClassification(tf.CamembertConfig(**BERT)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "electra": lambda: tf.ElectraForSequenceClassification(
        tf.ElectraConfig(**BERT, embedding_size=24)
    ),
    "mpnet": lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**BERT)),
    "deberta-v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
        )
    ),
    "deberta-v3": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        )
    ),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**BERT, pad_token_id=0, **SPECIAL)
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTIL)),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(**GPT2, num_labels=3, pad_token_id=0)
    ),
    "gpt2-lm": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "gpt-neox": lambda: tf.GPTNeoXForSequenceClassification(
        tf.GPTNeoXConfig(**BERT, pad_token_id=0)
    ),
    "bloom-lm": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60)
    ),
    "opt": lambda: tf.OPTForSequenceClassification(tf.OPTConfig(**OPT)),
    "t5": lambda: tf.T5ForTokenClassification(tf.T5Config(**T5)),
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**LLAMA)),
    "gemma-lm": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, head_dim=8)),
}


def build(name: str) -> nn.Module:
    """A model of the zoo, the same at every call, in eval mode (no dropout outside LoRA)."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch(seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Token ids without padding; the same at every call."""
    ids = torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batch_for(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """What `model` reads: token ids, or images of 8 x 8."""
    if getattr(model, "main_input_name", "input_ids") != "pixel_values":
        return batch(seed)
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator).to(model.dtype)}


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(**batch_for(model, seed)).logits


def randomise(model: nn.Module, *names: str) -> None:
    """Move the parameters whose name holds one of `names` away from what they start as.

    lora_B starts at zero, where the LoRA term and the gradient of lora_A vanish.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def nodes(model: nn.Module) -> list[int]:
    """How many layers each of our autograd nodes computes, in a forward of the model."""
    return nodes_of(model(**batch()).logits)


def peft_model(name: str = "roberta", **changes: Any) -> nn.Module:
    """A PEFT model in eval mode, its adapter away from zero."""
    import peft

    targets = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj"]}
    config = {"r": 3, "lora_alpha": 5, "task_type": "SEQ_CLS"}
    config["target_modules"] = targets.get(name, ["query", "value"])
    model = peft.get_peft_model(build(name), peft.LoraConfig(**config | changes)).eval()
    randomise(model, "lora_B")
    return model


class PlainLoRA(nn.Module):
    """The formula in PyTorch's own products, with parameters under the names of FusedLoRALinear."""

    def __init__(self, layer: FusedLoRALinear) -> None:
        super().__init__()
        self.conv1d, self.scale = layer.conv1d, layer.alpha / layer.rank
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.conv1d else self.weight
        return F.linear(x, weight, self.bias) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


def plain_copy(model: nn.Module) -> nn.Module:
    """The same model with its LoRA layers written as the plain formula."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedLoRALinear):
                setattr(parent, name, PlainLoRA(child))
    return model


def run(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Logits, and the gradients of a random weighting of them, for every parameter that trains."""
    model.zero_grad(set_to_none=True)
    output = model(**batch_for(model, seed)).logits
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * weights.to(output.dtype)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in trained.items() if grad is None]
    assert not missing, f"no gradient for {missing}"
    return {"logits": output.detach(), **trained}


def judge_models(model: nn.Module, eager: nn.Module, batches: int = 4) -> None:
    """AssertionError if logits or a gradient is further from float64 than the contract allows.

    RMS error within 10 % of eager's, largest twice eager's plus one ulp, as in `oracle.judge`;
    errors within one batch are correlated, so the sample that its allowance counts is the batches.
    """
    exact_model = copy.deepcopy(eager).double()
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(batches):
        found, yardstick, exact = (run(m, seed) for m in (model, eager, exact_model))
        assert found.keys() == yardstick.keys() == exact.keys()
        for name, truth in exact.items():
            assert truth.abs().max() > 0, f"{name} is zero, which tests nothing"
            results.setdefault(name, []).append((found[name], yardstick[name], truth))
    allowance = 1.1 * (1 + 3 / math.sqrt(batches))
    for name, triples in results.items():
        actual, yardstick, exact = (torch.stack(tensors) for tensors in zip(*triples, strict=True))
        error, eager_error = (actual.double() - exact).abs(), (yardstick.double() - exact).abs()
        rms, eager_rms = (e.square().mean().sqrt().item() for e in (error, eager_error))
        assert rms <= allowance * eager_rms, f"{name}: RMS error {rms:.3e}, eager {eager_rms:.3e}"
        if exact.abs().max() <= eager_error.max():  # zero but for rounding, such as of a key's bias
            continue  # the RMS has told a wrong one; which of the two has the largest is chance
        ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
        worst, limit = error.max().item(), 2 * eager_error.max().item() + ulp
        assert worst <= limit, f"{name}: largest error {worst:.3e}, allowed {limit:.3e}"
