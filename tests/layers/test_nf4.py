"""Layers of bitsandbytes' NF4 that run `split`: when they are asked to, and why some cannot."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from torch import nn

from lora_kernels import explain, fuse_peft
from lora_kernels.layers.quantised import QuantisedLoRALinear, why_not_nf4
from tests.support.oracle import DEVICE

pytest.importorskip("triton")
bnb = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BRAIN = torch.bfloat16


def linear4bit(N: int = 40, K: int = 128, kind: str = "nf4", computes=BRAIN, blocksize: int = 64):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(K, N, quant_type=kind, compute_dtype=computes)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(N, K) * K**-0.5, requires_grad=False, quant_type=kind, module=layer,
        blocksize=blocksize,
    )  # fmt: skip
    return layer.to(DEVICE)


def with_lora(base: nn.Module, strategy: str, dropout: float = 0.0) -> QuantisedLoRALinear:
    torch.manual_seed(1)
    layer = QuantisedLoRALinear.from_linear(base, rank=4, dropout=dropout, strategy=strategy)
    nn.init.normal_(layer.lora_B)
    return layer


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    y = layer(x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
    return dict(zip(("y", "dx", *trained), (y, *found), strict=True))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Both round to bfloat16, in different places."""
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, value in expected.items():
        assert found[name].dtype is value.dtype
        error = (found[name] - value).float().norm() / value.float().norm()
        assert error < 0.01, f"{name}: {error:.1e}"


def inputs(dtype: torch.dtype = BRAIN, N: int = 40, K: int = 128):
    torch.manual_seed(3)
    return tuple(torch.randn(2, 20, size).to(DEVICE, dtype) for size in (K, N))


def test_our_layer_runs_split_when_it_is_asked_for():
    base, (x, dy) = linear4bit(), inputs()
    ours, theirs = with_lora(base, "split"), with_lora(base, "auto")
    assert_close(step(ours, x, dy), step(theirs, x, dy))
    assert type(ours(x).grad_fn).__name__ == "_LayerBackward"
    assert type(theirs(x).grad_fn).__name__ == "_AdditionBackward"
    assert "NF4 weight\n    split: named by the caller" in str(explain(ours))
    assert "library: bitsandbytes' product of NF4, LoRA is added to it" in str(explain(theirs))


def test_dropout_masks_the_low_rank_part_alone():
    layer = with_lora(linear4bit(), "split", dropout=0.5)
    x, dy = inputs()
    first, again = step(layer, x, dy), step(layer, x, dy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    layer.eval()
    assert (step(layer, x, dy)["y"] - first["y"]).abs().max() > 0.1
    nn.init.zeros_(layer.lora_B)
    layer.train()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=2e-2, atol=2e-2)


def test_autocast_casts_x_and_gives_y_back_in_its_dtype():
    base, (x, dy) = linear4bit(), inputs(torch.float32)
    ours, theirs = with_lora(base, "split"), with_lora(base, "auto")
    with torch.autocast(DEVICE.type, BRAIN):
        found, expected = step(ours, x, dy), step(theirs, x, dy)
        assert type(ours(x).grad_fn).__name__ == "ToCopyBackward0"
    assert found["y"].dtype is torch.float32
    assert_close(found, expected)
    assert type(ours(x).grad_fn).__name__ == "_AdditionBackward"  # x and LoRA in float32


@pytest.mark.parametrize("use_bias", ["none", "all"])
def test_pefts_layer_runs_split_when_it_is_asked_for(use_bias):
    model = nn.Sequential(linear4bit())
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], bias=use_bias)
    model = peft.get_peft_model(model, config)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x, dy = inputs()
    expected = step(model, x, dy)
    report = fuse_peft(model, strategy="split")
    assert [row.strategy for row in report.fused] == ["split"]
    assert "split: named by the caller" in str(explain(model))
    assert_close(step(model, x, dy), expected)
    assert type(model(x).grad_fn).__name__ == "_LayerBackward"
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model[0].base_layer(x))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


REFUSED = {
    "ragged rows": (
        lambda: linear4bit(48, 96),
        "a block of 64 weights .* past the end .*: K is 96",
    ),
    "fp4": (lambda: linear4bit(kind="fp4"), "no quantised weight but bitsandbytes' NF4"),
    "float32": (lambda: linear4bit(computes=torch.float32), "in float16 or bfloat16, not in .*32"),
    "blocks": (lambda: linear4bit(blocksize=128), "an absmax stands for 128 weights, not for 64"),
    "hooks": (lambda: hooked(linear4bit()), "has hooks or a patched forward, which would not run"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_split_cannot_read_is_bitsandbytes_own_product(make, reason):
    base = make()
    dtype = base.compute_dtype
    x, dy = inputs(dtype, base.out_features, base.in_features)
    ours = with_lora(base, "split")
    assert type(ours(x).grad_fn).__name__ == "_AdditionBackward"
    (row,) = explain(ours).rows
    assert row[2].strategy == "library"
    assert re.search(f"split was asked for, but: .*{reason}", row[2].reason), row[2].reason
    assert_close(step(ours, x, dy), step(with_lora(base, "auto"), x, dy))


def test_the_reasons_that_only_some_calls_have():
    base = linear4bit()
    assert why_not_nf4(base, BRAIN) is None
    assert "x is torch.float16, and the layer computes in torch.bfloat16" in str(
        why_not_nf4(base, torch.float16)
    )
    base.weight.quant_state.packing_format_for_cpu = True
    assert "does not lie in memory as bitsandbytes packs it" in str(why_not_nf4(base, BRAIN))


def test_a_compiled_graph_and_a_cpu_keep_bitsandbytes_product(monkeypatch):
    layer = with_lora(linear4bit(), "split")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, _ = inputs()
    assert type(layer(x).grad_fn).__name__ == "AddBackward0"
    monkeypatch.undo()
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert "split was asked for, but: Triton kernels need a GPU" in str(explain(layer))
