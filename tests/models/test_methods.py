"""The methods: how many parameters train, by formula, and that each one trains and is saved."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

pytest.importorskip("datasets", reason="the models read their data by it")
from lora_kernels import load_adapter
from models.arguments import Arguments
from models.data.tasks import load, task_of
from models.methods import METHODS
from models.model.attach import WAYS, attach, parameter_counts
from models.model.houlsby import load_adapters
from models.model.loading import load_model, load_tokenizer
from models.train import train
from tests.models.test_train import losses
from tests.support.tiny_run import label_of, text_of

# --- how many parameters train --------------------------------------------------------------------

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
# Name -> (configuration, blocks L, width d, parameters and biases outside blocks and head, head).
# A head of two classes: RoBERTa's dense + out_proj, DeBERTa's pooler + classifier, GPT-2's score.
SHAPES = {
    "roberta-base": (
        transformers.RobertaConfig(**ROBERTA), 12, 768, 50780 * 768 + 2 * 768, 768, 592_130,
    ),
    "roberta-large": (
        transformers.RobertaConfig(
            **ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096,
        ), 24, 1024, 50780 * 1024 + 2 * 1024, 1024, 1_051_650,
    ),
    "deberta-v2-xlarge": (  # outside: tokens, positions, three norms, a convolution of width 3
        transformers.DebertaV2Config(
            vocab_size=128100, hidden_size=1536, num_hidden_layers=24, num_attention_heads=24,
            intermediate_size=6144, relative_attention=True, position_buckets=256,
            norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
            conv_kernel_size=3, conv_act="gelu", type_vocab_size=0, position_biased_input=False,
        ), 24, 1536, (128100 + 512 + 7) * 1536 + 3 * 1536**2, 4 * 1536, 2_363_906,
    ),
    **{
        name: (
            transformers.GPT2Config(n_layer=L, n_embd=d, n_head=heads),
            L, d, (50257 + 1024 + 2) * d, d, 2 * d,
        )
        for name, L, d, heads in (
            ("gpt2", 12, 768, 12), ("gpt2-medium", 24, 1024, 16),
            ("gpt2-large", 36, 1280, 20), ("gpt2-xl", 48, 1600, 25),
        )
    },
}  # fmt: skip
QUERY_VALUE = {"roberta": ["query", "value"], "deberta-v2": ["query_proj", "value_proj"],
               "gpt2": ["c_attn.q", "c_attn.v"]}  # fmt: skip
LORA = ("lora", "peft", "lora_adaptive")


def trained(name: str, method: str, **changes) -> int:
    """The parameters that train when `method` is attached to a model without values."""
    config = SHAPES[name][0]
    config.num_labels, config.pad_token_id = 2, 0
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    attached = attach(Arguments(task="sst2", method=method, **changes), model)
    return parameter_counts(attached.model)["all"]["trainable"]


@pytest.mark.parametrize("name", SHAPES)
def test_what_trains_follows_its_formula(name):
    config, L, d, outside, biases, head = SHAPES[name]
    targets = QUERY_VALUE[config.model_type]
    norm = 2 * d if config.model_type == "gpt2" else 0
    width = d // 341
    formulas = {
        "lora": 2 * L * 2 * d * 8,
        "peft": 2 * L * 2 * d * 8,
        "lora_adaptive": 2 * L * 2 * d * 12,  # the start: 1.5 times the rank of 8
        "adapter": 2 * L * (2 * d * width + width + d),
        "bitfit": L * 11 * d + biases + head,
        "last_block": 12 * d**2 + 13 * d + norm + head,
        "last_layer": head,
        "full": L * (12 * d**2 + 13 * d) + outside + head,
    }
    changes = {
        **{method: {"targets": targets, "train_head": False} for method in LORA},
        "adapter": {"reduction": 341, "train_head": False},
    }
    # To PEFT the columns of GPT-2's query and value are no layers.
    methods = [m for m in METHODS if m != "peft" or config.model_type != "gpt2"]
    found = {method: trained(name, method, **changes.get(method, {})) for method in methods}
    assert found == {method: formulas[method] for method in methods}


def test_the_formulas_give_the_published_counts():
    assert trained("roberta-large", "adapter", reduction=341, train_head=False) == 344_208
    every = ["query", "key", "value", "attention.output.dense"]
    for targets, count in ((["query", "value"], 294_912), (every, 589_824)):
        assert trained("roberta-large", "lora", rank=3, targets=targets, train_head=False) == count
    # The LoRA paper's table 2 and 3: 0.3 M, 0.8 M; BitFit's 0.1 M is 0.08 % of RoBERTa-base.
    assert trained("roberta-base", "lora", targets=["query", "value"], train_head=False) == 294_912
    assert trained("roberta-large", "lora", targets=["query", "value"], train_head=False) == 786_432
    assert trained("roberta-base", "bitfit", train_head=False) - 770 == 102_144


def test_every_method_has_its_way():
    assert METHODS.keys() == WAYS.keys()


# --- what each one trains, and what it leaves -----------------------------------------------------


def moved(directory: Path, bert: str) -> set[str]:
    """The names of a saved model whose values are no longer those of the base."""
    before, after = load_file(Path(bert) / "model.safetensors"), load_file(directory)
    return {
        name
        for name, value in after.items()
        if not torch.equal(value, before.get(name.removeprefix("bert."), torch.zeros(())))
    }


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("bitfit", lambda name: name.endswith("bias") or name.startswith("classifier")),
        ("last_block", lambda name: "layer.1." in name or name.startswith("classifier")),
        ("last_layer", lambda name: name.startswith("classifier")),
    ],
)
def test_what_trains_moves_and_nothing_else(arguments, bert, method, trains):
    made = arguments(method=method, epochs=5)
    result = train(made)
    found = moved(made.directory() / "model/model.safetensors", bert)
    names = load_file(made.directory() / "model/model.safetensors").keys()
    # The pooler's bias and the keys' (to which attention is blind) may move or not.
    unsure = {name for name in names if "key.bias" in name}
    assert found - unsure == {name for name in names if trains(name)} - unsure
    curve = losses(made)
    assert sum(curve[-6:]) < sum(curve[:6])
    assert result["parameters"]["all"]["trainable"] > 0


def test_adapters_train_alone_and_load_again(arguments, bert, tokenizer):
    made = arguments(method="adapter", reduction=4, epochs=10, learning_rate=2e-2)
    result = train(made)
    curve = losses(made)
    assert sum(curve[-6:]) < 0.7 * sum(curve[:6])
    assert result["parameters"]["adapter"]["trainable"] == 2 * 2 * (2 * 32 * 8 + 8 + 32)
    assert result["parameters"]["backbone"]["trainable"] == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    load_adapters(model, made.directory() / "adapter")
    batch = tokenizer([text_of(row) for row in range(44)], padding=True, return_tensors="pt")
    labels = torch.tensor([label_of(row) for row in range(44)])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(result["metrics"]["train"]["loss"], abs=1e-4)


def test_adapters_that_do_not_fit_are_refused(arguments, bert, tmp_path):
    made = arguments(method="adapter", reduction=4, epochs=1)
    train(made)
    small = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertForSequenceClassification(small)
    with pytest.raises(ValueError, match=r"layer\.1\..* which the model lacks"):
        load_adapters(model, made.directory() / "adapter")


@pytest.mark.parametrize("method", ["lora", "adapter", "last_layer"])
def test_modules_named_by_train_are_trained_and_saved(arguments, bert, method):
    made = arguments(method=method, train=["pooler"], epochs=1)
    if method == "last_layer":
        folder = "model/model.safetensors"
    else:
        folder = "adapter/adapter_model.safetensors"
        made = replace(made, train_head=False)
    result = train(made)
    before = load_file(Path(bert) / "model.safetensors")["pooler.dense.weight"]
    saved = load_file(made.directory() / folder)
    (after,) = (value for name, value in saved.items() if "pooler.dense.weight" in name)
    assert not torch.equal(before, after)
    assert result["parameters"]["head"]["trainable"] == (66 if method == "last_layer" else 0)


def test_a_new_module_trains_without_the_head_if_train_names_it(arguments):
    for name, train_names in (("named", ["classifier"]), ("frozen", None)):
        made = arguments(name, train_head=False, train=train_names, epochs=1)
        head = train(made)["parameters"]["head"]["trainable"]
        assert head == (66 if train_names else 0)


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit"])
def test_a_module_that_does_not_exist_is_refused_with_near_misses(arguments, method):
    made = arguments(method=method, train=["poolr"])
    with pytest.raises(ValueError, match=r"poolr.*pooler"):
        train(made)
    assert not made.directory().exists()


@pytest.mark.parametrize("method", ["lora", "lora_adaptive"])
@pytest.mark.parametrize("base", ["without a head", "of other classes"])
def test_a_head_that_is_a_target_gets_lora_and_its_weight_is_saved(
    arguments, bert, base, method, tmp_path
):
    if base == "of other classes":
        torch.manual_seed(5)
        names = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
        cls = transformers.BertForSequenceClassification
        cls.from_pretrained(bert, **names).save_pretrained(tmp_path / "base")
        for path in Path(bert).glob("*token*"):
            shutil.copy(path, tmp_path / "base")
        bert = str(tmp_path / "base")
    made = arguments(model=bert, method=method, targets=["query", "classifier"])
    result = train(made)
    assert result["parameters"]["head"]["trainable"] == 0
    assert "classifier" in [row["name"] for row in result["fused"]]
    assert any("LoRA on classifier, whose weight was drawn" in note for note in result["notes"])
    torch.manual_seed(99)
    tokenizer = load_tokenizer(bert)
    again = load_model(bert, task_of("sst2"), tokenizer.pad_token_id, 48).model
    load_adapter(again, made.directory() / "adapter")
    again.eval()
    right = 0
    rows = load(task_of("sst2"), made.data_dir).splits["test"]
    for row in rows:
        logits = again(**tokenizer(row["text"], return_tensors="pt")).logits
        right += int(logits.argmax()) == row["labels"]
    assert right / len(rows) == pytest.approx(result["metrics"]["test"]["accuracy"])


def test_peft_s_adapter_lacks_the_random_weight_below_lora_and_the_run_says_so(arguments):
    result = train(arguments(method="peft", targets=["query", "classifier"], max_steps=2))
    assert result["parameters"]["head"]["trainable"] == 0
    assert any("PEFT's adapter lacks that weight" in note for note in result["notes"])
