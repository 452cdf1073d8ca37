"""Mixed batches of PEFT's (`adapter_names`), in inference and in training, on fused layers."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lora_kernels import explain, fuse_peft, unfuse_peft
from lora_kernels.autograd.packs import packed_linears
from lora_kernels.injection.peft import fused_peft_layers
from tests.support import zoo
from tests.support.small_layers import nodes_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TARGETS = {
    "roberta": ["query", "key", "value"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj"],
}
NAMES = {
    "in-blocks": ("a", "a", "__base__", "b", "b", "c"),
    "mixed-up": ("b", "a", "c", "__base__", "b", "a"),
}
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def three(name: str = "bert", *, dropout: float = 0.0, heads: bool = True) -> nn.Module:
    """A PEFT model in eval mode of a, b and c: of other ranks and alphas, and c in fewer layers."""
    targets, task = TARGETS[name], "SEQ_CLS" if heads else None
    model = None
    for adapter, rank, alpha, layers in (
        ("a", 3, 5, targets), ("b", 6, 4, targets), ("c", 1, 2, targets[:1]),
    ):  # fmt: skip
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=dropout, task_type=task
        )
        if model is None:
            model = peft.get_peft_model(zoo.build(name), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    zoo.randomise(model, "lora_B", "modules_to_save")
    return model.eval()


def training(model: nn.Module, *trained: str) -> nn.Module:
    """The model in train mode, where LoRA's dropout alone drops, and these adapters train."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in path:
            module.p = 0.0
    model.set_requires_grad(list(trained or "abc"))
    return model.train()


def fused(model: nn.Module, strategy: str = "auto") -> nn.Module:
    fuse_peft(model, strategy)
    return model


def loss(logits: Tensor, places: list[int] | range | None = None) -> Tensor:
    """A weighting of the logits, which differs from example to example."""
    weights = torch.randn(6, *logits.shape[1:], generator=torch.Generator().manual_seed(3))
    return (logits * weights[list(places or range(len(logits)))].to(logits.dtype)).sum()


def step(model: nn.Module, names: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(**zoo.batch(rows=len(names)), adapter_names=list(names)).logits
    loss(logits).backward()
    return {"logits": logits.detach(), **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same by PEFT itself, one adapter after another, each on its own examples."""
    batch, found, parts = zoo.batch(rows=len(names)), {}, {}
    for name in dict.fromkeys(names):
        places = [i for i, each in enumerate(names) if each == name]
        own = {key: value[places] for key, value in batch.items()}
        model.zero_grad(set_to_none=True)
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                logits = model(**own).logits
        else:
            model.set_adapter(name)
            logits = model(**own).logits
            loss(logits, places).backward()
            found |= gradients(model)
        parts |= dict(zip(places, logits.detach(), strict=True))
    return {"logits": torch.stack([parts[i] for i in range(len(names))]), **found}


@pytest.fixture
def packed_calls(monkeypatch) -> list[int]:
    """Grows by the number of layers that run in each pack."""
    calls: list[int] = []

    def counted(x, layers, settings):
        calls.append(len(layers))
        return packed_linears(x, layers, settings)

    monkeypatch.setattr("lora_kernels.injection.peft_mixed.packed_linears", counted)
    monkeypatch.setattr("lora_kernels.layers.group.packed_linears", counted)
    return calls


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("name", TARGETS)
def test_inference_is_pefts_mixed_batch(name, names, packed_calls):
    model = three(name, heads=name != "roberta")  # PEFT takes no mixed batch in RoBERTa's head
    eager = copy.deepcopy(model)
    fused(model)
    with torch.no_grad():
        found, expected = (
            each(**zoo.batch(rows=6), adapter_names=list(names)).logits for each in (model, eager)
        )
    torch.testing.assert_close(found, expected)
    assert sum(packed_calls) == len(fused_peft_layers(model, 8)) and not explain(model).unfused
    assert torch.equal(zoo.logits(model), zoo.logits(fused(eager))), "and the next call is ordinary"


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("name", TARGETS)
def test_gradients_are_those_of_each_adapter_alone(name, names, packed_calls):
    model = training(three(name))
    eager = copy.deepcopy(model)
    found, expected = step(fused(model), names), alone(eager, names)
    assert found.keys() == expected.keys() and len(found) > 20
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max())
    assert sum(packed_calls) == len(fused_peft_layers(model, 8))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_gradients_under_autocast_are_as_near_to_float64(name):
    model = training(three(name))
    eager, exact = copy.deepcopy(model), alone(copy.deepcopy(model).double(), NAMES["mixed-up"])
    with BF16:
        found = step(fused(model), NAMES["mixed-up"])
        yardstick = alone(eager, NAMES["mixed-up"])
    errors, eager_errors = (
        torch.stack([(each[k].double() - v).norm() / v.norm() for k, v in exact.items()])
        for each in (found, yardstick)
    )
    assert errors.mean() <= 1.2 * eager_errors.mean() and errors.max() <= 2 * eager_errors.max()


def test_an_adapter_without_rows_has_no_gradient_and_stays():
    model = fused(training(three()))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    assert not [key for key in step(model, ("a", "__base__", "a", "a", "a", "a")) if ".b." in key]
    optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved and all(".a." in key for key in moved)


def test_siblings_run_as_one_pack_where_their_adapters_allow():
    """c is in query alone, so only batches without it have query, key and value in one launch."""
    model = fused(training(three("roberta")), "library")
    for names, expected in (("ab", [3, 3]), ("abc", [1] * 6)):
        y = model(**zoo.batch(rows=len(names)), adapter_names=list(names)).logits
        assert nodes_of(y) == expected


def test_dropout_is_that_of_an_ordinary_call_for_one_adapter_and_differs_between_two():
    model = fused(training(three(dropout=0.3), "a"))
    model.set_adapter("a")
    torch.manual_seed(5)
    ordinary = model(**zoo.batch(rows=6)).logits
    torch.manual_seed(5)
    mixed = model(**zoo.batch(rows=6), adapter_names=["a"] * 6).logits
    torch.testing.assert_close(mixed, ordinary)
    layer = model.base_model.model.bert.encoder.layer[0].attention.output.dense
    with torch.no_grad():
        for own in (layer.lora_A, layer.lora_B):
            own["b"] = copy.deepcopy(own["a"])
        layer.scaling["b"] = layer.scaling["a"]
        y = layer(torch.ones(2, 50, 32), adapter_names=["a", "b"])
    assert len(y.unique(dim=1)[0]) > 2 and not torch.equal(y[0], y[1])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_recomputes_with_the_names_of_its_own_call(reentrant):
    """Three calls wait for their backwards: two mixed ones, and one without names."""
    model = fused(training(three(dropout=0.2)))
    names = [list(NAMES["mixed-up"]), None, list(reversed(NAMES["mixed-up"]))]

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        outputs = [
            model(**zoo.batch(seed, rows=6), **({"adapter_names": each} if each else {})).logits
            for seed, each in enumerate(names)
        ]
        for logits in outputs:
            loss(logits).backward()
        return gradients(model)

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    again = run()
    assert plain.keys() == again.keys() and all(torch.equal(again[k], plain[k]) for k in plain)
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == functions


def test_a_torch_that_does_not_tell_of_saved_tensors_trains_as_well(monkeypatch):
    model = fused(training(three()))
    expected = step(model, NAMES["mixed-up"])
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    found = step(model, NAMES["mixed-up"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tensors_that_wait_elsewhere_are_no_checkpoint():
    model = fused(training(three()))
    expected = step(model, NAMES["mixed-up"])
    with torch.autograd.graph.save_on_cpu():
        found = step(model, NAMES["mixed-up"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_head_that_an_adapter_lacks_is_the_original():
    """Also where the active adapter is the one that lacks it, which PEFT's own forward stops at."""
    model = three("roberta")
    targets = {"r": 2, "target_modules": TARGETS["roberta"]}
    model.add_adapter("plain", peft.LoraConfig(**targets, init_lora_weights=False))
    training(model, *"abc", "plain")
    (head,) = (m for m in model.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper))
    head.modules_to_save["plain"].load_state_dict(head.original_module.state_dict())
    eager, names = copy.deepcopy(model), ("plain", "a", "b", "plain", "b", "a")
    expected = alone(eager, names)
    fused(model).set_adapter("plain")
    del head.modules_to_save["plain"]  # PEFT itself gives it one
    expected = {key: value for key, value in expected.items() if "modules_to_save.plain" not in key}
    model.set_requires_grad(["a", "b", "plain"])
    found = step(model, names)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max())


def t5() -> nn.Module:
    torch.manual_seed(0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**zoo.T5, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("build", "targets", "task"),
    [
        (lambda: zoo.build("gpt2-lm"), ["c_attn"], "CAUSAL_LM"),
        (t5, ["q", "v"], "SEQ_2_SEQ_LM"),
    ],
    ids=["decoder", "encoder-decoder"],
)
def test_generation_and_its_beams_are_pefts(build, targets, task, beams, packed_calls):
    a, b = (peft.LoraConfig(r=r, target_modules=targets, task_type=task) for r in (3, 2))
    model = peft.get_peft_model(build(), a, adapter_name="a")
    model.add_adapter("b", b)
    zoo.randomise(model, "lora_B")
    eager = copy.deepcopy(model.eval())
    call = {
        **zoo.batch(), "adapter_names": ["b", "__base__", "a"], "num_beams": beams,
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    assert torch.equal(fused(model).generate(**call), eager.generate(**call))
    assert packed_calls and not explain(model).unfused


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiled_the_numbers_are_the_same(train):
    model = training(three()).train(train)
    eager = fused(copy.deepcopy(model))
    compiled = torch.compile(fused(model), backend="eager")
    torch._dynamo.reset()
    for names in NAMES.values():
        expected, found = step(eager, names), step(compiled, names)
        assert found.keys() == {k if k == "logits" else f"_orig_mod.{k}" for k in expected}
        for key, value in expected.items():
            own = found["logits" if key == "logits" else f"_orig_mod.{key}"]
            torch.testing.assert_close(own, value)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_disabled_adapters_leave_the_base_model(train):
    model = fused(three("roberta", heads=False)).train(train)
    batch = zoo.batch(rows=6)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with model.disable_adapter(), torch.no_grad():
        found = model(**batch, adapter_names=list(NAMES["mixed-up"])).logits
        assert torch.equal(found, model(**batch).logits)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_train_and_the_way_back_is_pefts(duplicate, packed_calls):
    model = training(three())
    printed, classes = repr(model), [type(module) for module in model.modules()]
    expected = step(fused(model), NAMES["mixed-up"])
    twin = duplicate(model)
    found = step(twin, NAMES["mixed-up"])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert type(twin.base_model).__name__ == "LoraModel" and model.get_model_status().enabled
    calls = len(packed_calls)
    unfuse_peft(twin)
    assert repr(twin) == printed and [type(module) for module in twin.modules()] == classes
    with pytest.raises(ValueError, match="when the model is in training mode"):
        step(twin, NAMES["mixed-up"])
    assert len(packed_calls) == calls
