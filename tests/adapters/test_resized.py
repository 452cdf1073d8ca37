"""A vocabulary that was resized: the adapter holds the embeddings, as PEFT's does."""

from __future__ import annotations

import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from tests.support import zoo

IDS = torch.tensor([[5, 40, 6, 41, 7, 43]])  # 40 and above are new
SIZES = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASES = {
    "tied": (
        transformers.LlamaForCausalLM,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "tie_word_embeddings": True},
        ("q_proj",),
    ),
    "untied": (
        transformers.LlamaForCausalLM,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "tie_word_embeddings": False},
        ("q_proj",),
    ),
    "classifier": (
        transformers.RobertaForSequenceClassification,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4},
        ("query",),
    ),
    "embedding with LoRA": (
        transformers.GPT2LMHeadModel,
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32},
        ("c_attn", "wte"),
    ),
}  # fmt: skip


@pytest.fixture(params=BASES)
def checkpoint(request, tmp_path):
    """What loads the base, grown to 44 entries unless told otherwise, and its targets."""
    cls, sizes, targets = BASES[request.param]
    torch.manual_seed(0)
    cls(cls.config_class(**SIZES, **sizes)).save_pretrained(tmp_path / "base")

    def load(grown: bool = True) -> torch.nn.Module:
        model = cls.from_pretrained(tmp_path / "base").eval()
        return grow(model) if grown else model

    return load, targets


def grow(model):
    model.resize_token_embeddings(44, mean_resizing=False)
    return model


def give_rows(model):
    """Rows of the new entries that no other process would draw."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[40:] = 3 * weight[20:24]
    zoo.randomise(model, "lora_")


@pytest.mark.parametrize("by", ["save_adapter", "save_pretrained"])
def test_the_adapter_holds_the_rows_for_us_and_for_peft(checkpoint, by, tmp_path):
    load, targets = checkpoint
    model = load()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        add_lora(model, LoRAConfig(rank=2, targets=targets))
    assert any("a vocabulary that is not the checkpoint's" in str(w.message) for w in told)
    give_rows(model)
    expected = model(IDS).logits
    if by == "save_adapter":
        save_adapter(model, tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")
    again = load()
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected)
    assert not again.get_input_embeddings().weight.requires_grad
    theirs = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected)


def test_rows_that_are_added_later_count_too(checkpoint, tmp_path):
    load, targets = checkpoint
    if "wte" in targets:
        pytest.skip("transformers resizes plain embeddings alone")
    model = load(grown=False)
    assert not add_lora(model, LoRAConfig(rank=2, targets=targets)).notes
    give_rows(grow(model))
    save_adapter(model, tmp_path / "adapter")
    again = load()
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("grown", [True, False])
def test_the_file_holds_what_was_resized_once_and_no_more(checkpoint, grown, tmp_path):
    load, targets = checkpoint
    model = load(grown)
    add_lora(model, LoRAConfig(rank=2, targets=targets))
    save_adapter(model, tmp_path / "adapter")
    values = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    besides = [value for key, value in values.items() if "lora_" not in key]
    every = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(each.weight): each.weight for each in every if each is not None}
    sizes = sorted(weight.numel() for weight in weights.values())  # one, if they are tied
    assert sorted(value.numel() for value in besides) == (sizes if grown else [])


def test_a_checkpoint_that_is_gone_is_said(checkpoint, tmp_path):
    load, targets = checkpoint
    model = load(grown=False)
    add_lora(model, LoRAConfig(rank=2, targets=targets))
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match="whether the vocabulary was resized is not known"):
        save_adapter(model, tmp_path / "adapter")
