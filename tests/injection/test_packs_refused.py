"""What several adapters on one model refuse, by name and before anything changes."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    adapter_rows,
    add_lora,
    add_loras,
    load_adapters,
    save_adapters,
)
from lora_kernels.injection.inject import packed_layers
from tests.injection.test_packs import (
    RANKS,
    ROWS,
    batch,
    configs,
    optimizer_of,
    packed,
    plain,
    train_together,
)
from tests.support import zoo


def test_what_cannot_be_is_refused_and_the_model_stays():
    def refused(given, words, name="roberta", error=ValueError, **options):
        model = plain(name)
        before = {n: (p.requires_grad, p) for n, p in model.named_parameters()}
        with pytest.raises(error, match=words):
            add_loras(model, given, **options)
        assert before == {n: (p.requires_grad, p) for n, p in model.named_parameters()}

    one = LoRAConfig(targets=("query",))
    refused({}, "configs is empty")
    refused({"a.b": one}, "cannot name an adapter")
    refused({"keys": one}, "cannot name an adapter")
    refused({"org/a": one}, "cannot name an adapter")
    refused({"weight_": 3}, "must be a LoRAConfig", error=TypeError)
    refused({"a": LoRAConfig(targets=("query",), dora=True)}, "dora and lora_bias run alone")
    refused({"a": LoRAConfig(targets=("query",), init="pissa")}, "which all adapters share")
    train = LoRAConfig(targets=("query",), train=("classifier",))
    refused({"a": one, "b": train}, "train must be the same for all adapters")
    refused({"a": one}, "seeds are for", seeds={"b": 1})
    refused({"a": LoRAConfig(targets=("nothing",))}, "matches no layer")
    q, k = (LoRAConfig(targets=(f"c_attn.{part}",)) for part in "qk")
    refused({"a": q, "b": k}, "different columns of 'transformer.h.0.attn.c_attn'", "gpt2")
    model = packed("roberta")
    with pytest.raises(ValueError, match="LoRA layers already"):
        add_loras(model, {"d": one})
    with pytest.raises(ValueError, match="LoRA layers already"):
        add_lora(model, one)
    with pytest.raises(ValueError, match="no adapters of add_loras"):
        save_adapters(plain("roberta"), "nowhere")
    for function in (lora_kernels.merge, partial(lora_kernels.save_adapter, path="nowhere")):
        with pytest.raises(ValueError, match="save_adapters"):
            function(model)


def test_relative_positions_that_examples_share_are_refused():
    model = zoo.build("deberta-v3")
    given = {each: LoRAConfig(rank=2, targets=("query_proj", "key_proj")) for each in "ab"}
    add_loras(model, given)
    ids = torch.randint(3, model.config.vocab_size, (4, 7))
    with pytest.raises(ValueError, match="cannot tell whose rows"):
        model(input_ids=ids)


class TokensFirst(nn.Module):
    """Takes x [examples, tokens, 8], and gives its second layer the tokens first."""

    def __init__(self, asks_for_numbers: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.asks_for_numbers = asks_for_numbers

    def forward(self, x, places=None):
        hidden = self.first(x)
        if places is not None:
            hidden = hidden + places[:, None]
        if self.asks_for_numbers:
            hidden.sum().item()
        return self.third(self.second(hidden.transpose(0, 1)).transpose(0, 1))


def of_two(model, *targets):
    add_loras(model, {each: LoRAConfig(rank=2, targets=targets) for each in "ab"})
    return model


@pytest.mark.filterwarnings("error")
def test_as_many_examples_as_tokens_do_not_hide_a_layer_that_takes_the_tokens_first():
    model = of_two(TokensFirst(), "second", "third")  # nothing is said of a third without effect
    with pytest.raises(ValueError, match="with 5 examples its x has 6 first"):
        model(torch.randn(6, 6, 8))
    with pytest.raises(ValueError, match="with 5 examples its x has 6 first"):  # and again
        model(torch.randn(6, 6, 8), places=torch.randn(6))  # a number for each token
    with adapter_rows(model, {"a": 6}):
        model(torch.randn(6, 6, 8))  # all rows are of one adapter
    model = of_two(TokensFirst(), "first")
    assert model(torch.randn(6, 6, 8), places=torch.randn(6)).shape == (6, 6, 8)
    assert model.first.examples_first


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["roberta", "gpt2", "bert"])
def test_as_many_examples_as_tokens_are_no_trouble_otherwise(name):
    model = packed(name)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda *call: seen.append(call))
    ids = torch.randint(3, model.config.vocab_size, (6, 6))
    state = torch.get_rng_state()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(6, dtype=int))
    assert torch.equal(state, torch.get_rng_state())
    assert all(layer.examples_first for layer in packed_layers(model).values())
    own = {id(module) for module in model.modules()}
    assert seen and all(id(module) in own for module, *_ in seen)  # no hook ran in the copy


def test_where_it_cannot_be_told_a_warning_says_so_once():
    model = of_two(TokensFirst(asks_for_numbers=True), "first")
    with pytest.warns(UserWarning, match="begin with a batch of another length"):
        model(torch.randn(6, 6, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(6, 6, 8))
    model = of_two(TokensFirst(asks_for_numbers=True), "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(6, 5, 8))  # shows it
        model(torch.randn(6, 6, 8))
    model = of_two(TokensFirst(), "first")
    model.second.weight.ds_id = 0  # as DeepSpeed marks what ZeRO-3 holds: its parts would gather
    with pytest.warns(UserWarning, match="begin with a batch of another length"):
        model(torch.randn(6, 6, 8))


def test_a_layer_that_cannot_know_whose_rows_it_has_refuses_them():
    model = packed("roberta").eval()
    hidden = torch.randn(6, 7, 32)
    layer = model.roberta.encoder.layer[0].attention.self.query
    assert layer(hidden).shape == (6, 7, 32)  # equal blocks of a part that is called by itself
    with pytest.raises(ValueError, match="called by itself outside of adapter_rows"):
        layer(hidden.flatten(0, 1))  # or rows of tokens in any order
    with adapter_rows(model, {"a": 20, "c": 22}):
        assert layer(hidden.flatten(0, 1)).shape == (42, 32)
    with pytest.raises(RuntimeError, match="DataParallel"):
        layer._replicate_for_data_parallel()(hidden)


def test_a_torch_that_tells_of_no_backward_is_not_trusted(monkeypatch):
    model = packed("roberta").eval()
    ids = torch.cat([batch(model, each, 0, 2)[0] for each in RANKS])
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    model(input_ids=ids)
    with adapter_rows(model, ROWS | {"c": 1}):
        model(input_ids=ids)
    with pytest.raises(RuntimeError, match="call backward inside"):
        model(input_ids=ids)  # which may be a recomputation


def test_what_adapters_would_share_or_mix_is_refused():
    tied = zoo.build("gpt2-lm")
    with pytest.raises(ValueError, match=r"'lm_head' shares a parameter with 'transformer\.wte'"):
        add_loras(tied, {"a": LoRAConfig(targets=("c_fc",), train=("lm_head",))})
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    flags = [p.requires_grad for p in normed.parameters()]
    with pytest.raises(ValueError, match="'1' normalizes over the batch"):
        add_loras(normed, {"a": LoRAConfig(targets=("0",))})
    assert flags == [p.requires_grad for p in normed.parameters()]


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, made = plain("roberta"), []
    start = FusedLoRALinear.from_linear

    def second_fails(*args, **kwargs):
        made.append(start(*args, **kwargs))
        if len(made) == 2:
            raise MemoryError
        return made[-1]

    monkeypatch.setattr(FusedLoRALinear, "from_linear", second_fails)
    with pytest.raises(MemoryError):
        add_loras(model, configs("roberta"))
    assert all(p.requires_grad for p in model.parameters())
    assert not packed_layers(model)


def test_files_are_all_checked_before_the_first_is_taken_over(tmp_path):
    model = packed("roberta")
    train_together(model, 1, optimizer_of(model))
    save_adapters(model, tmp_path)
    other = plain("roberta")
    add_lora(other, configs("roberta")["a"])
    lora_kernels.save_adapter(other, tmp_path / "c")  # of another rank
    into = packed("roberta")
    before = [p.clone() for p in into.parameters()]
    with pytest.raises(ValueError, match="does not fit"):
        load_adapters(into, tmp_path)
    assert all(map(torch.equal, before, into.parameters()))


def test_too_many_for_the_card_are_refused_before_the_start(monkeypatch):
    from lora_kernels.injection import packs

    model = plain("roberta")
    plans = {
        "a": packs.Planned(LoRAConfig(), {"classifier.dense": (4, 8)}, {}),
    }
    packs._refuse_too_many(model, plans)  # a CPU is not asked
    fake = type("Fake", (), {"shape": (32, 32), "device": torch.device("cuda", 0)})()
    monkeypatch.setattr(model, "get_submodule", lambda path: type("L", (), {"weight": fake})())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4095, 10**6))
    with pytest.raises(ValueError, match="fewer adapters, or smaller ranks"):
        packs._refuse_too_many(model, plans)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4096, 10**6))
    packs._refuse_too_many(model, plans)


def test_adapters_that_lie_there_besides_are_named(tmp_path):
    model = packed("roberta")
    save_adapters(model, tmp_path)
    lora_kernels.drop_adapter(model, "a")
    with pytest.warns(UserWarning, match="also holds a, which load_adapters would read too"):
        save_adapters(model, tmp_path)
    assert (tmp_path / "a").is_dir()
