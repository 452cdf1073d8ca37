"""LoRA on layers that bitsandbytes or torchao has quantised, ours and PEFT's, before and after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    explain,
    fuse_peft,
    load_adapter,
    merge,
    save_adapter,
    unfuse_peft,
)
from lora_kernels.injection.inject import fused_layers
from lora_kernels.layers.quantised import QuantisedLoRALinear
from tests.support import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def bits(kind: str) -> Callable[[nn.Linear], nn.Module]:
    """bitsandbytes' layer in place of a linear layer."""

    def quantise(layer: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        K, N, bias = layer.in_features, layer.out_features, layer.bias is not None
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(
                layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False
            )
        else:
            new = bnb.nn.Linear4bit(
                K, N, bias=bias, quant_type=kind, compute_dtype=layer.weight.dtype
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.clone(), requires_grad=False, quant_type=kind, module=new
            )
        new.bias = layer.bias
        return new.to("cpu")

    return quantise


def torchao(name: str, bits: int | None = None) -> Callable[[nn.Linear], nn.Module]:
    """A linear layer in one of torchao's forms; `bits` wide, with a scale for 32 weights."""

    def quantise(layer: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        given = {}
        if bits is not None:
            group = quantization.granularity.PerGroup(32)
            given = {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": group}
        holder = nn.Sequential(layer)
        quantization.quantize_(holder, getattr(quantization, name)(**given))
        return holder[0]

    return quantise


KINDS = {
    "bnb-nf4": bits("nf4"),
    "bnb-fp4": bits("fp4"),
    "bnb-int8": bits("int8"),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int4": torchao("IntxWeightOnlyConfig", bits=4),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
# On a CPU bitsandbytes has gradients in training alone: so models train, without dropout.
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def model_of(name: str = "roberta") -> nn.Module:
    torch.manual_seed(0)
    import transformers as tf

    config = tf.RobertaConfig(**{**zoo.BERT, **SIZES})
    return tf.RobertaForSequenceClassification(config)


def quantise(model: nn.Module, kind: str, inner: bool = False) -> nn.Module:
    """Query and value quantised, in place; `inner` is the base layer of PEFT's layers."""
    for path, module in list(model.named_modules()):
        if path.endswith(("query", "value")):
            owner, name = (
                (module, "base_layer")
                if inner
                else (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
            )
            setattr(owner, name, KINDS[kind](getattr(owner, name)))
    for flag, start in (("is_loaded_in_4bit", "bnb-nf"), ("is_loaded_in_8bit", "bnb-int")):
        setattr(model, flag, kind.startswith((start, start.replace("nf", "fp"))))
    return model


def with_peft(kind: str, order: str, **changes: Any) -> nn.Module:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **changes}
    if order == "before":
        model = peft.get_peft_model(quantise(model_of(), kind), peft.LoraConfig(**config))
    else:
        model = peft.get_peft_model(model_of(), peft.LoraConfig(**config))
        quantise(model.base_model.model, kind, inner=True)
    zoo.randomise(model, "lora_B")
    return model


def ran(model: nn.Module, seed: int = 0, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**zoo.batch(seed)).logits
    logits.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach().float(), **grads}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float):
    assert len(found) == len(expected) >= 9
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < rtol, f"{name}: {error:.2e}"


@each_kind
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_fused_peft_layers_compute_what_pefts_do(kind, order, autocast):
    model = with_peft(kind, order)
    exact, expected = ran(model), ran(model, autocast=autocast)
    report = fuse_peft(model)
    assert len(report.fused) == 4 and not report.skipped
    assert "LoRA is added to it" in report.fused[0].reason
    assert "LoRA is added to it" in str(explain(model))
    found = ran(model, autocast=autocast)
    if autocast:  # both round to bfloat16: ours must not be further away than PEFT's
        for name, value in exact.items():
            ours, theirs = ((each[name] - value).norm() for each in (found, expected))
            assert ours <= 1.5 * theirs + 1e-3 * value.norm(), f"{name}: {ours:.2e}, {theirs:.2e}"
    else:
        assert_same(found, expected, 1e-4)
    with model.disable_adapter():
        base = ran_without_grad(model)
    unfuse_peft(model)
    with model.disable_adapter():
        assert torch.equal(ran_without_grad(model), base)
    assert_same(ran(model, autocast=autocast), expected, 1e-6)


def ran_without_grad(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**zoo.batch()).logits


@each_kind
def test_our_layers_compute_what_pefts_do_and_files_go_both_ways(kind, tmp_path):
    theirs = with_peft(kind, "before")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = quantise(model_of(), kind)
    add_lora(ours, LoRAConfig(rank=4, alpha=6, targets=("query", "value")))
    assert all(isinstance(layer, QuantisedLoRALinear) for layer in fused_layers(ours).values())
    load_adapter(ours, tmp_path / "theirs")
    expected = {
        name.replace("base_model.model.", "").replace(".default.weight", ""): value
        for name, value in ran(theirs).items()
    }
    assert_same(ran(ours), expected, 1e-4)
    save_adapter(ours, tmp_path / "ours")
    for path in ("ours", "theirs"):
        again = quantise(model_of(), kind)
        assert len(load_adapter(again, tmp_path / path).fused) == 4
        torch.testing.assert_close(ran_without_grad(again), ran_without_grad(ours))
    with ours.disable_adapter():
        plain = ran_without_grad(quantise(model_of(), kind))
        torch.testing.assert_close(ran_without_grad(ours), plain)


@each_kind
def test_a_quantised_layer_is_never_merged_and_stays_whole(kind):
    model = quantise(model_of(), kind)
    config = LoRAConfig(rank=4, targets=("query", "key", "value"))
    report = add_lora(model, config)
    assert "LoRA is added to it" in str(report) and "LoRA is added to it" in str(explain(model))
    assert len(report.fused) == 6
    with pytest.raises(ValueError, match=r"cannot merge '.*query': its weight is .*quantised anew"):
        merge(model)
    assert not any(layer.merged for layer in fused_layers(model).values())
    twin = copy.deepcopy(model)
    zoo.randomise(model, "lora_")
    assert not torch.equal(ran_without_grad(twin), ran_without_grad(model))


@each_kind
@pytest.mark.parametrize("setting", [{"dora": True}, {"lora_bias": True}, {"init": "pissa"}])
def test_what_needs_the_weight_is_refused(kind, setting):
    model = quantise(model_of(), kind)
    with pytest.raises(ValueError, match="needs a plain weight, and this one is"):
        add_lora(model, LoRAConfig(rank=4, targets=("query", "value"), **setting))
    assert not fused_layers(model)


@pytest.mark.parametrize("kind", ["bnb-nf4", "torchao-int8"])
def test_dora_on_a_quantised_weight_runs_pefts_forward(kind):
    model = with_peft(kind, "before", use_dora=True)
    expected = ran(model)
    report = fuse_peft(model)
    assert not report.fused and "the adapter no plain LoRA" in report.skipped[0].reason
    assert_same(ran(model), expected, 1e-6)


@each_kind
def test_nothing_dequantised_is_kept_for_backward(kind):
    """Of our part: x, h, the packed mask, lora_A and lora_B."""
    layer = KINDS[kind](nn.Linear(128, 64))
    ours = QuantisedLoRALinear.from_linear(layer, rank=4, dropout=0.5)
    x = torch.randn(256, 128, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(x)
    node = y.grad_fn
    assert type(node).__name__ == "_AdditionBackward"
    sizes = [t.numel() * t.element_size() for t in node.saved_tensors if t is not None]
    assert sorted(sizes) == sorted([256 * 128 * 4, 256 * 4 * 4, 256 * 16, 4 * 128 * 4, 64 * 4 * 4])
    assert node.saved_tensors[0].data_ptr() == x.data_ptr()


def test_dropout_masks_the_low_rank_part_alone_and_backward_has_the_same_mask():
    layer = KINDS["torchao-int8"](nn.Linear(64, 64))
    ours = QuantisedLoRALinear.from_linear(layer, rank=64, alpha=64, dropout=0.25)
    with torch.no_grad():
        ours.lora_A.copy_(torch.eye(64))
        ours.lora_B.copy_(torch.eye(64))
    x = (torch.rand(100, 64) + 0.5).requires_grad_()
    torch.manual_seed(0)
    added = ours(x) - layer(x)
    kept = (added / (x / 0.75)).detach()
    torch.testing.assert_close(kept, kept.round().clamp(0, 1), atol=1e-4, rtol=0)
    assert abs(kept.round().mean() - 0.75) < 0.03
    (dx,) = torch.autograd.grad(added.sum(), x)
    torch.testing.assert_close(dx, kept.round() / 0.75, atol=1e-4, rtol=0)
    ours.eval()
    torch.testing.assert_close(ours(x) - layer(x), x, atol=1e-5, rtol=0)


X_TOO = torchao("Int8DynamicActivationInt8WeightConfig")  # quantises x as well


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_frozen_product_without_a_gradient_is_said(compiled):
    """What lies before such a layer would get the low-rank part's gradient alone."""
    frozen = X_TOO(nn.Linear(64, 64))
    ours = QuantisedLoRALinear.from_linear(frozen, rank=4, alpha=4)
    zoo.randomise(ours, "lora_B")
    run = torch.compile(ours) if compiled else ours
    x = torch.randn(5, 64)
    added = x @ ours.lora_A.T @ ours.lora_B.T
    with torch.no_grad():
        torch.testing.assert_close(run(x.requires_grad_()), frozen(x) + added)
    run(x.detach()).sum().backward()  # nothing lies before: lora_A and lora_B have theirs
    torch.testing.assert_close(ours.lora_B.grad, (x @ ours.lora_A.T).sum(0).expand(64, 4))
    with pytest.raises(RuntimeError, match=r"gives no gradient of its input.*Quantise the weight"):
        run(x.requires_grad_()).sum().backward()


def test_a_weight_packed_for_inference_is_not_trained_through(monkeypatch):
    """As bitsandbytes says of a weight that it has packed, which it does on some CPUs alone."""
    ours = QuantisedLoRALinear.from_linear(KINDS["bnb-nf4"](nn.Linear(64, 64)), rank=4)
    x = torch.randn(5, 64)
    expected = ours(x.requires_grad_())
    monkeypatch.setattr(ours.weight.quant_state, "packing_format_for_cpu", True, raising=False)
    with pytest.raises(RuntimeError, match=r"packed this layer's weight.*load the model again"):
        ours(x)
    monkeypatch.setattr(type(ours.base_layer), "forward", lambda _, x: expected.detach())
    assert torch.equal(ours(x.detach()), expected)  # nothing lies before
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("kind", ["bnb-nf4", "torchao-int8"])
def test_copies_and_pickles_of_fused_peft_models(kind):
    model = with_peft(kind, "before")
    fuse_peft(model)
    expected = ran_without_grad(model)
    assert torch.equal(ran_without_grad(copy.deepcopy(model)), expected)
    layer = next(m for m in model.modules() if type(m).__qualname__.startswith("Fused"))
    assert pickle.loads(pickle.dumps(type(layer))) is type(layer)


def test_a_pickle_finds_the_class():
    assert pickle.loads(pickle.dumps(QuantisedLoRALinear)) is QuantisedLoRALinear


def test_a_trainer_trains_a_quantised_model_of_add_lora(tmp_path):
    """transformers asks for PEFT's adapters before it trains a quantised model."""
    quantization = pytest.importorskip("torchao.quantization")
    import transformers as tf

    from tests.adapters.test_trainer import trainer

    model_of().save_pretrained(tmp_path / "base")
    config = tf.TorchAoConfig(
        quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"]
    )
    model = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", quantization_config=config, num_labels=3
    )
    with pytest.raises(ValueError, match=r"train='query': .*query is torchao's .*cannot train"):
        add_lora(model, LoRAConfig(targets="value", train="query"))
    add_lora(model, LoRAConfig(rank=4, targets=("query", "value"), train="classifier"))
    run = trainer(model, tmp_path / "run", load_best_model_at_end=True, num_train_epochs=1)
    before = model.classifier.dense.weight.detach().clone()
    run.train()
    assert not torch.equal(model.classifier.dense.weight, before)
    files = {file.name for file in (tmp_path / "run/checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files and "config.json" not in files
