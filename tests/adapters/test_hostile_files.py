"""Files that are wrong on purpose: one line says what is wrong, and the model stays as it was."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels.injection.inject import fused_layers
from tests.adapters.test_load_save import CONFIG, WEIGHTS, edit, injected
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FIRST = "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.out_proj.weight"
EVIL = "(a+)+b"
SLOW = r"(([\w.]+)*)*query!"

FIELDS = [
    ("r", "8"), ("r", 0), ("r", True), ("r", None), ("r", 3.0), ("r", [3]),
    ("lora_alpha", "16"), ("lora_alpha", None), ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")), ("lora_alpha", 10**400), ("lora_alpha", {}),
    ("lora_dropout", "0.1"), ("lora_dropout", -1), ("lora_dropout", 1.0), ("lora_dropout", None),
    ("use_rslora", "no"), ("use_rslora", 1),
    ("target_modules", 7), ("target_modules", [["query"]]), ("target_modules", {"a": 1}),
    ("target_modules", "(query"), ("target_modules", "*"), ("target_modules", r"(q)\1"),
    ("target_modules", "(" * 2000 + ")" * 2000), ("target_modules", "(?i)query"),
    ("exclude_modules", "[a-"), ("exclude_modules", 3), ("exclude_modules", [None]),
    ("modules_to_save", "classifier"), ("modules_to_save", [1]),
    ("layers_to_transform", "1"), ("layers_to_transform", [True]), ("layers_to_transform", 1.5),
    ("layers_pattern", 5), ("layers_pattern", [None]),
    ("rank_pattern", ["query"]), ("rank_pattern", {"query": "4"}), ("rank_pattern", {"(": 4}),
    ("rank_pattern", {"query": 0}),
    ("alpha_pattern", "query"), ("alpha_pattern", {"query": None}), ("alpha_pattern", {"+": 1}),
    ("peft_type", ["LORA"]), ("peft_type", None), ("use_dora", "no"),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    save_adapter(injected(), directory)
    return directory


@pytest.fixture
def copied(adapter, tmp_path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    return tmp_path


def assert_refused(path: Path, *words: str) -> None:
    """By a plain and by an injected model, in one line with these words, and nothing changes."""
    plain, lora = zoo.build("roberta"), injected()
    for model in (plain, lora):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_adapter(model, path)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 2000
        assert all(word in message for word in words), message
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert flags == [p.requires_grad for p in model.parameters()]
    assert not fused_layers(plain)


@pytest.mark.parametrize("field, value", FIELDS, ids=lambda v: str(v)[:24])
def test_a_field_of_the_wrong_type_is_named(field, value, copied):
    edit(copied, **{field: value})
    assert_refused(copied, str(copied / CONFIG), field)


@pytest.mark.parametrize("pattern", [EVIL, SLOW, "a*" * 30 + "b", "(a|aa|[^b])*" * 5 + "b"])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save",
              "rank_pattern", "alpha_pattern"],
)  # fmt: skip
def test_an_expression_that_backtracks_for_ever_does_not_hang(field, pattern, copied):
    model = nn.ModuleDict({"a" * 60: nn.Linear(4, 4), "query" * 20: nn.Linear(4, 4)})
    (name, _) = [n for n, _ in model.named_modules() if n]
    values = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(3, 4),
        f"base_model.model.{name}.lora_B.weight": torch.ones(4, 3),
    }
    save_file(values, copied / WEIGHTS)
    changes = {
        "target_modules": ["a" * 60], "modules_to_save": None, "layers_to_transform": None,
        "lora_alpha": 5, field: pattern,
    }  # fmt: skip
    if field == "modules_to_save":
        changes[field] = [pattern]
    elif field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    elif field.endswith("pattern"):
        changes[field] = {pattern: 3}
    edit(copied, **changes)
    start = time.perf_counter()
    try:
        load_adapter(model, copied)
    except ValueError as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - start < 5


BAD_VALUES = {
    "nan": (lambda v: v * float("nan"), "not finite"),
    "infinite": (lambda v: v.clone().fill_(float("-inf")), "not finite"),
    "too large for fp32": (lambda v: v.double() + 1e300, "not finite"),
    "integers": (lambda v: v.long(), "torch.int64"),
    "booleans": (lambda v: v > 0, "torch.bool"),
    "another shape": (lambda v: v[:, :-1].contiguous(), "31"),
}


@pytest.mark.parametrize("key", [FIRST, HEAD])
@pytest.mark.parametrize("change, word", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_no_layer_can_take_are_named(key, change, word, copied):
    values = load_file(copied / WEIGHTS)
    values[key] = change(values[key])
    save_file(values, copied / WEIGHTS)
    part = key.removeprefix("base_model.model.").removesuffix(".weight")
    assert_refused(copied, str(copied), part.removesuffix(".lora_A"), word)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda v: v.to_sparse(), "sparse_coo"),
        (lambda v: v.to("meta"), "meta"),
        (lambda v: v.to(torch.complex64), "complex64"),
        (lambda v: v.to_sparse_csr(), "sparse_csr"),
    ],
    ids=["sparse", "meta", "complex", "csr"],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_without_plain_values_are_named(change, word, copied):
    values = load_file(copied / WEIGHTS)
    values[FIRST] = change(values[FIRST])
    (copied / WEIGHTS).unlink()
    torch.save(values, copied / "adapter_model.bin")
    assert_refused(copied, FIRST, word)


def test_names_that_lead_nowhere_are_named(copied):
    edit(copied, target_modules=None)
    values = load_file(copied / WEIGHTS)
    pair = torch.ones(3, 32), torch.ones(32, 3)
    for path in ("", "roberta", "roberta.encoder.layer.9.attention.self.query", "classifier.dense"):
        more = {
            f"base_model.model.{path}.lora_{n}.weight": v for n, v in zip("AB", pair, strict=True)
        }
        save_file(values | more, copied / WEIGHTS)
        assert_refused(copied, path)
    with pytest.raises(ValueError, match=r"dense has LoRA in the file, and classifier is trained"):
        load_adapter(zoo.build("roberta"), copied)
    save_file(
        values | {HEAD.removeprefix("base_model.model."): values[HEAD].clone()}, copied / WEIGHTS
    )
    assert_refused(copied, "holds classifier.out_proj.weight twice")
    extra = "base_model.model.roberta.encoder.layer.0.output.dense.bias"
    save_file(values | {extra: torch.zeros(32)}, copied / WEIGHTS)
    assert_refused(copied, extra.removeprefix("base_model.model."), "does not train it")


@pytest.mark.parametrize(
    "key, text",
    [
        ("columns", "{"),
        ("columns", "[1]"),
        ("columns", '{"a": 3}'),
        ("columns", '{"a": [["x", 1]]}'),
        ("train", "7"),
        ("train", "[1]"),
        ("kept", '["x", null]'),
        ("kept", "[" * 100_000),
    ],
    ids=lambda text: text[:12],
)
def test_metadata_that_cannot_be_read_are_named(key, text, copied):
    save_file(load_file(copied / WEIGHTS), copied / WEIGHTS, {f"lora_kernels.{key}": text})
    assert_refused(copied, f"lora_kernels.{key}")


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"\xff\xfe{", b"[" * 100_000, b"", b'{"peft_type": "LORA"'],
    ids=lambda text: repr(text)[:12],
)  # fmt: skip
def test_a_configuration_that_is_none_is_named(text, copied):
    (copied / CONFIG).write_bytes(text)
    assert_refused(copied, CONFIG)


def test_a_model_without_values_takes_none(adapter):
    model = zoo.build("roberta").to("meta")
    with pytest.raises(ValueError, match="on the meta device in the model"):
        load_adapter(model, adapter)
    assert not fused_layers(model)


@pytest.mark.parametrize("alpha", ["8", float("nan"), None, True])
def test_an_alpha_that_is_no_number_changes_nothing(alpha, tmp_path):
    state = {k: v for k, v in injected().state_dict().items() if "lora_" in k}
    save_file(state, tmp_path / "lora.safetensors")
    model = zoo.build("roberta")
    with pytest.raises(ValueError, match="alpha"):
        load_adapter(model, tmp_path / "lora.safetensors", alpha=alpha)
    assert not fused_layers(model)


def test_only_what_the_file_names_trains(tmp_path):
    """`norm` in the file is the outer one: a name for `train` would mean the inner one, too."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        return nn.ModuleDict({"block": inner, "norm": nn.LayerNorm(4)})

    model = build()
    add_lora(model, LoRAConfig(rank=2, targets="q", train=r"re:norm"))
    save_adapter(model, tmp_path)
    assert "lora_kernels.train" in (tmp_path / WEIGHTS).read_bytes()[:2000].decode("latin1")
    again = build()
    report = load_adapter(again, tmp_path)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        "block.q.lora_A", "block.q.lora_B", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert report.trainable == 2 * 8 + 8
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] is None
