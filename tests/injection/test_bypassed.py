"""Layers whose block multiplies by their weight without calling them: skipped, or warned of."""

from __future__ import annotations

import pickle
import warnings

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers as tf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora, fuse_peft, merge, unfuse_peft
from lora_kernels.injection.bypassed import _uses
from lora_kernels.injection.inject import fused_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.arange(1, 13).view(2, 6)
SMALL = {"hidden_size": 16, "vocab_size": 30}


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(
        tf.MambaConfig(**SMALL, num_hidden_layers=1, state_size=4, use_cache=False)
    )


def bloom(**changes) -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(**SMALL, n_layer=1, n_head=2, **changes))


def mobilebert() -> nn.Module:
    sizes = {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.MobileBertForMaskedLM(tf.MobileBertConfig(**SMALL, **sizes, **heads))


MODELS = {
    "mamba": (mamba, {"dt_proj"}),
    "mobilebert": (mobilebert, {"dense"}),
    "bloom": (bloom, set()),
    "bloom-exact": (
        lambda: bloom(slow_but_exact=True, pretraining_tp=2),
        {"dense", "dense_4h_to_h"},
    ),
}


@pytest.mark.parametrize("build, expected", MODELS.values(), ids=MODELS)
def test_what_is_fused_gets_gradients_and_merges_to_the_same_output(build, expected):
    model = build().double().eval()
    report = add_lora(model, LoRAConfig(rank=2, targets="all-linear"))
    dead = [row for row in report.skipped if "reads this weight without calling" in row.reason]
    assert {row.name.split(".")[-1] for row in dead} == expected
    for layer in fused_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(input_ids=IDS).logits
    output.square().sum().backward()
    assert all(layer.lora_B.grad is not None for layer in fused_layers(model).values())
    merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, output)


def test_a_peft_layer_that_is_bypassed_is_not_reported_as_fused():
    for build, name in ((mamba, "dt_proj"), (MODELS["bloom-exact"][0], "dense")):
        model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=[name]))
        report = fuse_peft(model)
        assert not report.fused and "without calling the layer" in report.skipped[0].reason


class Block(nn.Module):
    """Multiplies by `used`'s weight, calls `called`, and has a layer for another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.called, self.idle = (nn.Linear(8, 8) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x, mode="plain"):
        if mode == "other":
            return self.idle(x)
        if self.called.weight.dtype != x.dtype:
            x = x.to(self.called.weight.dtype)
        return self.experts[0](self.called(self.product(x)))

    def product(self, x):
        return F.linear(x, self.used.weight, self.used.bias)


class Hidden(Block):
    """The same through a loop, which the code of the block does not show."""

    def product(self, x):
        for layer in [getattr(self, "used")]:  # noqa: B009
            x = F.linear(x, layer.weight.T.T)
        return x


class Either(Block):
    """Calls the layer in one mode, and multiplies by its weight in another."""

    def product(self, x):
        return F.linear(x, self.used.weight) if self.training else self.used(x)


class Dtype(Block):
    """Asks for the dtype of a weight, and calls the layer by another way."""

    def product(self, x):
        return getattr(self, "used")(x.to(self.used.weight.dtype))  # noqa: B009


class Keeps(Block):
    """Its code leaves a doubt; and it keeps what it computed, as rotary tables are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.kept = None, None

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2, 8)}

    def forward(self, x):
        self.kept = self.called(x)
        self.used.weight.data.add_(0)
        return F.linear(self.kept, self.used.weight) + self.used(x)


def test_a_probe_leaves_nothing_in_the_model():
    for model in (Keeps(), Keeps()):
        assert "weight" in _uses(model, "used")[1], "there is a doubt, so a probe"
        report = add_lora(model, LoRAConfig(rank=2, targets=("used", "called")))
        assert len(report.fused) == 2 and model.kept is None
        assert not any(isinstance(p, FakeTensor) for p in model.parameters())
        model.used.weight.data.add_(1)
        assert torch.isfinite(model(torch.ones(2, 8))).all()


def told(model, *args, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*args, **kwargs)
    return [str(each.message) for each in caught]


def block(cls: type = Block, **changes) -> nn.Module:
    model = nn.Sequential(cls())
    add_lora(model, LoRAConfig(rank=2, targets="all-linear", **changes))
    return model


def test_a_block_of_anyone_s_is_read():
    reasons = {row.name: row.reason for row in add_lora(
        nn.Sequential(Block()), LoRAConfig(targets="all-linear")
    ).skipped}  # fmt: skip
    assert reasons == {"0.used": "Block reads this weight without calling the layer"}
    assert told(block(), torch.randn(2, 8)) == []


@pytest.mark.parametrize("cls", [Hidden, Either])
def test_the_first_forward_with_gradients_tells_what_the_code_does_not(cls):
    model, x = block(cls), torch.randn(2, 8)
    with torch.no_grad():
        assert told(model, x) == [] or cls is Hidden
    for each in (model, pickle.loads(pickle.dumps(model))):
        (message,) = told(each, x)
        assert "no effect on 1 layers (0.used)" in message and "the targets" in message
        assert told(each, x) == [] and not each._forward_pre_hooks and not each._forward_hooks
        assert not any(module._forward_pre_hooks for module in each.modules())


def test_no_wolf_is_cried():
    x = torch.randn(2, 8)
    model = block(Either).eval()
    assert told(model, x) == [], "called in this mode"
    assert type(block(Dtype)[0].used) is FusedLoRALinear and told(block(Dtype), x) == []
    model = block()
    assert told(model[0], x, "other") == [] == told(model, x), "idle layers, experts without tokens"
    model = block(Hidden)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    model = mamba()
    add_lora(model, LoRAConfig(rank=2, targets="all-linear"))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": 1})
    assert told(model, input_ids=IDS) == []


def test_a_weight_that_is_tied_is_read_by_its_other_owner():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner, self.head = nn.Embedding(8, 8), Block(), nn.Linear(8, 8)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.inner(self.embedding(ids))

    model = Tied()
    add_lora(model, LoRAConfig(rank=2, targets=("head", "called")))
    assert told(model, torch.arange(4)) == []


def test_merge_and_unfuse_take_the_hook_off():
    model = block()
    assert len(model._forward_pre_hooks) == 1
    merge(model)
    assert not model._forward_pre_hooks
    wrapped = peft.get_peft_model(bloom(), peft.LoraConfig(r=2, target_modules=["dense"]))
    fuse_peft(wrapped)
    fuse_peft(wrapped)
    assert len(wrapped._forward_pre_hooks) == 1
    assert not unfuse_peft(wrapped)._forward_pre_hooks


def test_a_compiled_part_is_not_compiled_twice():
    model, x = block(Hidden), torch.randn(2, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model[0] = torch.compile(model[0], fullgraph=True, backend=counter)
    model(x), model(x)
    assert counter.frame_count == 1


def test_experts_held_as_3d_parameters_have_a_row():
    config = tf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    experts = model.model.layers[0].mlp.experts
    assert {p.dim() for p in experts.parameters()} == {3}
    held = sum(p.numel() for p in experts.parameters())
    share = held / sum(p.numel() for p in model.parameters())
    report = add_lora(model, LoRAConfig(rank=2, targets=("q_proj",), train=()))
    rows = [row for row in report.skipped if row.name == "model.layers.0.mlp.experts"]
    assert len(rows) == 1 and f"{share:.0%} of the weights are experts" in rows[0].reason
