"""Adapter files against the real peft, both ways; refusals; interrupted writes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import FusedLoRALinear, LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels.injection.families import heads_of
from lora_kernels.injection.inject import fused_layers, trained_paths
from tests.support import zoo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def injected(name: str = "roberta", **changes) -> nn.Module:
    """A model with LoRA whose adapter and heads hold values that no fresh model has."""
    model = zoo.build(name)
    config = LoRAConfig(**{"rank": 3, "alpha": 5, "train": heads_of(model), **changes})
    add_lora(model, config)
    zoo.randomise(model, "lora_")
    for path in trained_paths(model):
        zoo.randomise(model.get_submodule(path), "")
    return model


def from_peft(directory: Path, name: str) -> nn.Module:
    return peft.PeftModel.from_pretrained(zoo.build(name), str(directory)).eval()


def assert_same_function(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """The same logits, compared in double; and other ones than the base model's."""
    expected = zoo.logits(theirs.double())
    torch.testing.assert_close(zoo.logits(ours.double()), expected)
    assert (expected - zoo.logits(zoo.build(name))).abs().max() > 1e-4


def edit(directory: Path, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "name", ["roberta", "mpnet", "deberta-v2", "distilbert", "gpt2", "gemma-lm"]
)
def test_peft_loads_what_we_save(name, tmp_path):
    model = injected(name, dropout=0.1)
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = from_peft(tmp_path / "adapter", name)
    assert not [w for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    lora = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    layers = fused_layers(model)
    assert {n.removeprefix("base_model.model.") for n in lora} == layers.keys()
    for path, layer in layers.items():
        other = lora[f"base_model.model.{path}"]
        assert torch.equal(other.lora_A["default"].weight, layer.lora_A)
        assert torch.equal(other.lora_B["default"].weight, layer.lora_B)
        assert other.lora_dropout["default"].p == 0.1
    assert_same_function(model, theirs, name)


PEFT_CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank-pattern": {"rank_pattern": {r"layer\.0\.attention.*": 5, "value": 2}},
    "alpha-pattern": {"alpha_pattern": {"1.attention.self.query": 7}, "rank_pattern": {"query": 6}},
    "regex": {"target_modules": r".*\.(query|output\.dense)"},
    "all-linear": {"target_modules": "all-linear"},
    "one-layer": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "excluded": {"exclude_modules": ["0.attention.self.query"]},
    "in-the-head": {"target_modules": ["query", "dense"]},
    "no-task": {"task_type": None, "modules_to_save": ["classifier", "pooler"]},
}


@pytest.mark.parametrize("changes", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_we_load_what_peft_saves_and_give_it_back(changes, tmp_path):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(zoo.build("roberta"), peft.LoraConfig(**config | changes)).eval()
    zoo.randomise(theirs, "lora_", "modules_to_save")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.build("roberta")
    report = load_adapter(ours, tmp_path / "theirs")
    count = sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    assert len(report.fused) == count
    assert all(p.requires_grad for p in ours.classifier.parameters())
    save_adapter(ours, tmp_path / "ours")
    assert_same_function(ours, theirs, "roberta")
    assert_same_function(ours, from_peft(tmp_path / "ours", "roberta"), "roberta")


def test_conv1d_goes_both_ways(tmp_path):
    theirs = peft.get_peft_model(
        zoo.build("gpt2"),
        peft.LoraConfig(
            r=3, target_modules=["c_attn", "c_proj"], task_type="SEQ_CLS", fan_in_fan_out=True
        ),
    ).eval()
    zoo.randomise(theirs, "lora_", "modules_to_save")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.build("gpt2")
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["fan_in_fan_out"] is True
    assert_same_function(ours, theirs, "gpt2")
    assert_same_function(ours, from_peft(tmp_path / "ours", "gpt2"), "gpt2")


@pytest.mark.parametrize("train", [("pre_classifier",), ("classifier",), ()], ids=str)
def test_peft_loads_a_head_trained_in_part(train, tmp_path):
    """PEFT's model for the task would train `classifier`, and all that ends so, and want them."""
    model = injected("distilbert", train=train)
    save_adapter(model, tmp_path)
    theirs = from_peft(tmp_path, "distilbert")
    again = zoo.build("distilbert")
    load_adapter(again, tmp_path)
    assert_same_function(again, model, "distilbert")
    assert_same_function(theirs, model, "distilbert")


def test_a_trained_tied_weight_reaches_peft_under_both_names(tmp_path):
    model = injected("gpt2-lm", train=("lm_head",))
    zoo.randomise(model, "wte")
    save_adapter(model, tmp_path)
    assert_same_function(model, from_peft(tmp_path, "gpt2-lm"), "gpt2-lm")
    again = zoo.build("gpt2-lm")
    load_adapter(again, tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert_same_function(again, model, "gpt2-lm")


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_a_wrapped_model_saves_and_loads_as_the_model_in_it(wrap, tmp_path):
    model = injected()
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        plain, wrapped = (tmp_path / each / name for each in ("plain", "wrapped"))
        assert plain.read_bytes() == wrapped.read_bytes()
    fresh = zoo.build("roberta")
    assert len(load_adapter(wrap(fresh), tmp_path / "wrapped").fused) == len(fused_layers(model))
    torch.testing.assert_close(zoo.logits(fresh.cpu()), zoo.logits(model.cpu()))
    inner = zoo.build("roberta")
    add_lora(wrap(inner), LoRAConfig(rank=3, train=heads_of(inner)))
    assert inner.lora_config.rank == 3 and fused_layers(inner)


def test_trained_parameters_that_are_left_out_are_named(tmp_path):
    model = injected(train=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "whole")
    model.classifier.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"4 trained parameters are not in.*classifier\.dense\.weight"
    ):
        save_adapter(model, tmp_path / "part")


def test_values_load_into_a_model_that_has_lora(tmp_path):
    source, target = injected(), zoo.build("roberta")
    add_lora(target, LoRAConfig(rank=3, alpha=5, train="classifier", dropout=0.3))
    save_adapter(source, tmp_path)
    report = load_adapter(target, tmp_path)
    assert len(report.fused) == 4
    assert torch.equal(zoo.logits(target), zoo.logits(source))
    assert next(iter(fused_layers(target).values())).dropout == 0.3


def test_dtypes_names_and_merged_layers_are_saved_as_they_are(tmp_path):
    model = injected().to(torch.bfloat16)
    model.config._name_or_path = "some/base"
    for layer in fused_layers(model).values():
        layer.lora_A.data = layer.lora_A.data.float()
    save_adapter(torch.compile(model), tmp_path / "a")
    for layer in fused_layers(model).values():
        layer.merge()
    save_adapter(model, tmp_path / "b")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    prefix = "base_model.model.roberta.encoder.layer.0.attention.self.query"
    assert first[f"{prefix}.lora_A.weight"].dtype == torch.float32
    assert first[f"{prefix}.lora_B.weight"].dtype == torch.bfloat16
    assert first["base_model.model.classifier.out_proj.bias"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "SEQ_CLS"
    assert config["target_modules"] == ["query", "value"]


REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2]],
    "target_parameters": ["weight"],
    "peft_type": "IA3",
    "a_field_of_tomorrow": {"on": True},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_lora_layers_cannot_represent_is_refused_by_name(field, tmp_path):
    save_adapter(injected(), tmp_path)
    edit(tmp_path, **{field: REFUSED[field]})
    model = zoo.build("roberta")
    with pytest.raises(ValueError) as caught:
        load_adapter(model, tmp_path)
    assert f"{field}={REFUSED[field]!r}" in str(caught.value)
    assert not fused_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 4}, r"query.lora_A is \[3, 32\] in the file and \[4, 32\] in the model"),
        ({"alpha": 6}, "alpha=5, rslora=False in the file and alpha=6, rslora=False in the model"),
        ({"rslora": True}, "rslora=False in the file and .*rslora=True in the model"),
        ({"targets": "query"}, "value is no LoRA layer of this model"),
        ({"targets": ("query", "key", "value")}, "key has no values in the file"),
        (
            {"train": ()},
            r"classifier.* is in the file, but the model does not train it \(train=\[\]\)",
        ),
        ({"train": ("classifier", "LayerNorm")}, "LayerNorm.weight has no value in the file"),
    ],
    ids=["rank", "alpha", "rslora", "unexpected", "missing", "head-unexpected", "head-missing"],
)
def test_a_file_that_does_not_fit_changes_no_value(changes, message, tmp_path):
    save_adapter(injected(), tmp_path)
    model = injected(**changes)
    if "targets" in changes and "key" in changes["targets"]:
        edit(tmp_path, target_modules=None)
    if changes.get("targets") == "query":
        edit(tmp_path, target_modules=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_mismatches_are_named(tmp_path):
    save_adapter(injected(), tmp_path)
    with pytest.raises(ValueError, match=r"bert does not fit|has no values for target layers"):
        load_adapter(zoo.build("bert"), tmp_path)
    merged = injected()
    next(iter(fused_layers(merged).values())).merge()
    with pytest.raises(ValueError, match="query is merged: unmerge it first"):
        load_adapter(merged, tmp_path)
    edit(tmp_path, r=9)
    with pytest.raises(ValueError, match=r"lora_A is \[3, 32\], but .* gives rank 9"):
        load_adapter(zoo.build("roberta"), tmp_path)
    edit(tmp_path, r=3, target_modules=["query", "key", "value"])
    with pytest.raises(ValueError, match=r"has no values for target layers .*self.key"):
        load_adapter(zoo.build("roberta"), tmp_path)
    with pytest.raises(ValueError, match="no LoRA layer to save"):
        save_adapter(zoo.build("roberta"), tmp_path)


def on_columns(N: int = 36, **options) -> nn.Module:
    """One layer of N outputs with LoRA on the first and the last twelve of 36."""
    layer = FusedLoRALinear.from_linear(
        nn.Linear(8, N), rank=3, columns=((0, 12), (24, 36)), **options
    )
    nn.init.normal_(layer.lora_B)
    return nn.ModuleDict({"first": layer, "second": copy.deepcopy(layer)})


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    save_adapter(on_columns(alpha=5), tmp_path)
    values = load_file(tmp_path / WEIGHTS)
    for name in ("first", "second"):
        values[f"base_model.model.{name}.lora_B.weight"][20, 0] = 1.0  # no block has this row
    save_file(values, tmp_path / WEIGHTS)
    with pytest.raises(ValueError) as caught:
        load_adapter(on_columns(alpha=6), tmp_path)
    problems = str(caught.value).partition(" does not fit ModuleDict: ")[2].split("; ")
    assert [problem[:40] for problem in problems] == [
        "first: lora_B is not zero outside the bl",
        "first has alpha=10, rslora=False in the ",
        "second: lora_B is not zero outside the b",
        "second has alpha=10, rslora=False in the",
    ]


def test_columns_in_the_metadata_are_held_against_the_values(tmp_path):
    save_adapter(on_columns(), tmp_path)
    plain = nn.ModuleDict({"first": nn.Linear(8, 36), "second": nn.Linear(8, 40)})
    with pytest.raises(ValueError, match=r"second.lora_B is \[36, 6\] in the file and \[40, 6\]"):
        load_adapter(plain, tmp_path)
    for columns, what in (([(0, 12), (24, 37)], "ascending"), ([(0, 12), (25, 36)], "not zero")):
        metadata = {"format": "pt", "lora_kernels.columns": json.dumps({"first": columns})}
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata)
        plain = nn.ModuleDict({"first": nn.Linear(8, 36), "second": nn.Linear(8, 36)})
        with pytest.raises(ValueError, match=f"first: .*{what}"):
            load_adapter(plain, tmp_path)
        assert not fused_layers(plain)


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_run_no_code_and_are_not_taken_for_safetensors(tmp_path):
    directory, proof = tmp_path / "adapter", tmp_path / "proof"
    save_adapter(injected(), directory)
    state = {key: value.clone() for key, value in load_file(directory / WEIGHTS).items()}
    torch.save(state, directory / WEIGHTS)
    with pytest.raises(ValueError, match="a pickle under the name of a safetensors file"):
        load_adapter(zoo.build("roberta"), directory)
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    load_adapter(zoo.build("roberta"), directory)
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"x": Malice(str(proof))}, directory / "adapter_model.bin")
        with pytest.raises(ValueError, match="no file of plain tensors"):
            load_adapter(zoo.build("roberta"), directory)
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello there\n", bytes(range(256))], ids=["empty", "text", "bytes"]
)
def test_what_is_no_file_of_tensors_gets_one_message(content, tmp_path):
    path = tmp_path / "adapter.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter\.pt is no file of plain tensors: \w"):
        load_adapter(zoo.build("roberta"), path, alpha=8)


def test_broken_directories_get_one_message(tmp_path):
    model = zoo.build("roberta")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapter(model, tmp_path)
    save_adapter(injected(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no safetensors file"):
        load_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither adapter_model\.safetensors nor"):
        load_adapter(model, tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="an adapter is a directory"):
        save_adapter(injected(), tmp_path / "file")
    assert not fused_layers(model)


@pytest.mark.parametrize("failing", range(4))
def test_an_interrupted_save_leaves_the_old_adapter(failing, tmp_path, monkeypatch):
    old = injected(rank=2)
    save_adapter(old, tmp_path)
    (tmp_path / "result.json").write_text("mine")
    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", fail_once)
        save_adapter(injected(rank=4), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "result.json"]
    model = zoo.build("roberta")
    load_adapter(model, tmp_path)
    assert torch.equal(zoo.logits(model), zoo.logits(old))
