"""What works with which library: a row for each, run here, and the table of docs/interop.md."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from lora_kernels import (
    FusedLoRACallback,
    LoRAConfig,
    add_lora,
    explain,
    fuse_peft,
    load_adapter,
    save_adapter,
    unfuse_peft,
)
from tests.adapters.test_trainer import losses, trainer
from tests.injection import test_peft_mixed, test_sharded, test_sharded_packs, test_zero
from tests.support import processes, zoo

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENT = Path(__file__).resolve().parent.parent / "docs/interop.md"
FIRST_LINE = "| feature or client | how | what is compared |"
ATTENTION = ["query", "key", "value"]
OURS = LoRAConfig(rank=3, alpha=5, targets=("query", "value"), train="classifier")

# Adam would divide gradients that are rounding errors by their own size.
STEADY = {"optim": "sgd", "learning_rate": 0.3}


class Row(NamedTuple):
    """A feature or client, what a user writes, what is compared, and the comparison."""

    name: str
    how: str
    compared: str
    run: Callable[[Path], None]


def ours() -> nn.Module:
    model = zoo.build("roberta")
    add_lora(model, OURS)
    zoo.randomise(model, "lora_B")
    return model


def pefts(**changes: Any) -> nn.Module:
    return zoo.peft_model(target_modules=ATTENTION, **changes)


def several() -> nn.Module:
    model = pefts(task_type=None)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ATTENTION))
    zoo.randomise(model, "lora_B")
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def experts() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    base = tf.MixtralForCausalLM(tf.MixtralConfig(**{**zoo.LLAMA, **sizes})).eval()
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(base, config)
    zoo.randomise(model, "lora_B")
    return model


def fused(build: Callable[[], nn.Module], layers: int) -> Callable[[Path], None]:
    """Every layer fused, as near to float64 as PEFT's own."""

    def run(_: Path) -> None:
        model = build()
        eager = copy.deepcopy(model)
        assert len(fuse_peft(model).fused) == len(explain(model).rows) == layers
        zoo.judge_models(model, eager, batches=16)
        assert not explain(model).unfused

    return run


def unfused(
    build: Callable[[], nn.Module], change: Callable[[Any], None] | None = None, **call: Any
) -> Callable[[Path], None]:
    """PEFT's own forward, to the bit, and `explain` says so."""

    def run(_: Path) -> None:
        model, eager = build(), build()
        report = fuse_peft(model)
        results = []
        for each in (model, eager):
            if change is not None:
                change(each)
            with torch.no_grad():
                results.append(each(**zoo.batch(), **call).logits)
        assert torch.equal(*results)
        assert explain(model).unfused if report.fused else report.skipped

    return run


def same_steps(changed: Callable[[nn.Module], nn.Module]) -> Callable[[Path], None]:
    """Three steps of a plain loop, with what `changed` does to the model and without."""

    def run(_: Path) -> None:
        plain, other = ours(), changed(ours())
        found = [processes.train(model, batches()) for model in (other, plain)]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        assert len(set(found[1])) == 3

    return run


def batches() -> list[dict[str, torch.Tensor]]:
    return processes.batches(slice(None))


def formula(model: nn.Module) -> nn.Module:
    return zoo.plain_copy(model)


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model.train()


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def mixed_inference(_: Path) -> None:
    model = test_peft_mixed.three()
    eager = copy.deepcopy(model)
    call = {**zoo.batch(), "adapter_names": ["b", "__base__", "a"]}
    with torch.no_grad():
        found = test_peft_mixed.fused(model)(**call).logits
        torch.testing.assert_close(found, eager(**call).logits)
    assert not explain(model).unfused


def mixed_training(_: Path) -> None:
    model = test_peft_mixed.training(test_peft_mixed.three())
    expected = test_peft_mixed.alone(copy.deepcopy(model), ("b", "__base__", "a", "b"))
    found = test_peft_mixed.step(test_peft_mixed.fused(model), ("b", "__base__", "a", "b"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max())


def trainer_with_peft(folder: Path) -> None:
    found = []
    for name, callbacks in (("fused", [FusedLoRACallback()]), ("plain", [])):
        run = trainer(without_dropout(pefts()), folder / name, callbacks, **STEADY)
        run.train()
        found.append(losses(run))
        assert bool(callbacks) == bool(callbacks and callbacks[0].report.fused)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def trainer_with_ours(folder: Path) -> None:
    model = without_dropout(ours())
    run = trainer(model, folder / "run", **STEADY)
    run.train()
    other = without_dropout(formula(ours()))
    plain = trainer(other, folder / "plain", save_strategy="no", **STEADY)
    plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def attached_by_transformers(_: Path) -> None:
    model = zoo.build("roberta")
    model.add_adapter(peft.LoraConfig(r=3, target_modules=ATTENTION, init_lora_weights=False))
    model.eval()
    eager = copy.deepcopy(model)
    assert len(fuse_peft(model).fused) == 6
    torch.testing.assert_close(zoo.logits(model), zoo.logits(eager))


def files(folder: Path) -> None:
    model = ours()
    save_adapter(model, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(zoo.build("roberta"), folder / "ours").eval()
    torch.testing.assert_close(zoo.logits(theirs), zoo.logits(model))
    theirs.save_pretrained(folder / "theirs")
    again = zoo.build("roberta")
    load_adapter(again, folder / "theirs")
    torch.testing.assert_close(zoo.logits(again), zoo.logits(model))


def sentences(folder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**{**zoo.BERT, "vocab_size": len(words)})).save_pretrained(folder)
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.add_adapter(peft.LoraConfig(r=3, target_modules=ATTENTION, init_lora_weights=False))
    text = ["one two", "three"]
    expected = model.encode(text)
    assert len(fuse_peft(model).fused) == 6
    assert model.encode(text) == pytest.approx(expected, abs=1e-6)


def sft(folder: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(57))]
    split = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    texts = [{"text": " ".join(f"w{(7 * i + j) % 57}" for j in range(8))} for i in range(24)]
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, **STEADY,
    }  # fmt: skip
    sizes = {name: size for name, size in zoo.LLAMA.items() if name != "num_labels"}
    found = []
    for callbacks in ([FusedLoRACallback()], []):
        torch.manual_seed(0)
        run = trl.SFTTrainer(
            tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)),
            args=trl.SFTConfig(output_dir=folder, **options),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj"]),
            callbacks=callbacks,
        )
        run.train()
        found.append(losses(run))
        assert all(len(each.report.fused) == 6 for each in callbacks)
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(set(found[0])) > 1


def sharded(*names: str) -> Callable[[Path], None]:
    """Run by tests/injection/test_sharded.py, which has a row of each name."""

    def run(_: Path) -> None:
        assert set(names) <= set(test_sharded.ROWS)

    return run


def adapters_on(*names: str) -> Callable[[Path], None]:
    """Run by tests/injection/test_sharded_packs.py, which has a row of each name."""

    def run(_: Path) -> None:
        assert set(names) <= set(test_sharded_packs.ROWS)

    return run


def zero(*names: str) -> Callable[[Path], None]:
    """Run by tests/injection/test_zero.py, which has a row of each name."""

    def run(_: Path) -> None:
        if find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        assert set(names) <= set(test_zero.ROWS)

    return run


def embeddings(folder: Path) -> None:
    """A step of plain gradients by ours and by PEFT's, from one file, and back in a file."""
    ours = zoo.build("gpt2-lm")
    add_lora(ours, LoRAConfig(rank=3, alpha=5, targets=("c_attn", "wte")))
    zoo.randomise(ours, "lora_")
    save_adapter(ours, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(
        zoo.build("gpt2-lm"), folder / "ours", is_trainable=True
    ).eval()
    for model in (ours, theirs):
        model(**zoo.batch()).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.1 * parameter.grad)
    torch.testing.assert_close(zoo.logits(ours), zoo.logits(theirs))
    theirs.save_pretrained(folder / "theirs")
    again = zoo.build("gpt2-lm")
    load_adapter(again, folder / "theirs")
    torch.testing.assert_close(zoo.logits(again), zoo.logits(theirs))


def unfuse(_: Path) -> None:
    model = pefts()
    expected = zoo.logits(model)
    fuse_peft(model)
    assert torch.equal(zoo.logits(unfuse_peft(model)), expected)


TO_PEFT, OWN = "logits and gradients, with PEFT's", "runs PEFT's own forward: logits, to the bit"
ONE = "losses of two processes, with those of one"
ROWS = (
    Row("plain training loop", "`add_lora`", "losses, with the plain formula", same_steps(formula)),
    Row(
        "gradient checkpointing", "`model.gradient_checkpointing_enable()`", "losses, without it",
        same_steps(lambda model: checkpointed(without_dropout(model))),
    ),
    Row(
        "torch.compile", "`torch.compile(model)`", "losses, without it",
        same_steps(lambda model: torch.compile(model, backend="eager")),
    ),
    Row("PEFT", "`fuse_peft(model)`", TO_PEFT, fused(pefts, 6)),
    Row(
        "PEFT: rsLoRA, `rank_pattern`", "`fuse_peft(model)`", TO_PEFT,
        fused(lambda: pefts(use_rslora=True, rank_pattern={"key": 5}), 6),
    ),
    Row("PEFT: DoRA", "`fuse_peft(model)`", TO_PEFT, fused(lambda: pefts(use_dora=True), 6)),
    Row("PEFT: `lora_bias`", "`fuse_peft(model)`", TO_PEFT,
        fused(lambda: pefts(lora_bias=True), 6)),
    Row("PEFT: several active adapters, plain LoRA without dropout", "`fuse_peft(model)`", TO_PEFT,
        fused(several, 6)),
    Row("PEFT: mixed batch, inference", "`model(**batch, adapter_names=[...])`",
        "logits, with PEFT's", mixed_inference),
    Row("PEFT: mixed batch, training", "`model.set_requires_grad([...])`, then the same",
        "logits and gradients, with PEFT's of one adapter after another", mixed_training),
    Row("PEFT: disabled", "`model.base_model.disable_adapter_layers()`", OWN,
        unfused(pefts, lambda model: model.base_model.disable_adapter_layers())),
    Row("PEFT: merged", "`model.merge_adapter()`", OWN,
        unfused(pefts, lambda model: model.merge_adapter())),
    Row("PEFT: `target_parameters`", "`fuse_peft(model)`", OWN, unfused(experts)),
    Row("PEFT: embeddings", "`fuse_peft(model)`", OWN,
        unfused(lambda: zoo.peft_model(target_modules=["word_embeddings"]))),
    Row("PEFT: back again", "`unfuse_peft(model)`", "logits, to the bit", unfuse),
    Row("PEFT's files", "`save_adapter`, `load_adapter`", "logits, both ways", files),
    Row("LoRA on embeddings", "`add_lora`, `targets=(\"wte\", ...)`",
        "logits and a step, with PEFT's; files both ways", embeddings),
    Row("transformers' Trainer", "`add_lora`", "losses, with the plain formula", trainer_with_ours),
    Row("transformers' Trainer and PEFT", "`callbacks=[FusedLoRACallback()]`",
        "losses, with PEFT's", trainer_with_peft),
    Row("TRL's SFTTrainer", "`callbacks=[FusedLoRACallback()]`", "losses, with PEFT's", sft),
    Row("`add_adapter` of transformers", "`fuse_peft(model)`", "logits, with PEFT's",
        attached_by_transformers),
    Row("`add_adapter` of sentence-transformers", "`fuse_peft(model)`", "embeddings, with PEFT's",
        sentences),
    Row("DistributedDataParallel", "`add_lora` or `fuse_peft`, then wrap", ONE,
        sharded("ddp", "ddp-peft")),
    Row("FSDP1, a block a unit", "`add_lora` or `fuse_peft`, then wrap; `use_orig_params=True`",
        ONE, sharded("fsdp1", "fsdp1-peft")),
    Row("FSDP2, a block a unit", "`add_lora` or `fuse_peft`, then `fully_shard`", ONE,
        sharded("fsdp2", "fsdp2-peft")),
    Row("FSDP, then `fuse_peft`", "wrap, then `fuse_peft` or the callback", ONE,
        sharded("fsdp1-peft-late", "fsdp2-peft-late")),
    Row("FSDP, a layer a unit", "layers run one by one, with a warning", ONE,
        sharded("fsdp1-each", "fsdp2-each")),
    Row("several adapters under DDP, FSDP1, FSDP2",
        "`add_loras`, or `fuse_peft` and `adapter_names`; then wrap", ONE, adapters_on(
            "ddp", "ddp-peft", "fsdp1", "fsdp1-peft", "fsdp1-peft-late",
            "fsdp2", "fsdp2-peft", "fsdp2-peft-late")),
    Row("DeepSpeed's ZeRO-1 and ZeRO-2",
        "`add_lora`, then `deepspeed.initialize`; `fuse_peft` before or after it", ONE,
        zero("zero1", "zero2", "zero2-peft", "zero2-peft-late")),
    Row("DeepSpeed's ZeRO-3", "layers of `add_lora` run one by one, with a warning", ONE,
        zero("zero3")),
    Row("DeepSpeed's ZeRO-3 and PEFT", "layers run PEFT's own forward, with the reason", ONE,
        zero("zero3-peft", "zero3-peft-late")),
    Row("checkpoints of torch.distributed", "`get_state_dict`, `checkpoint.save`",
        "losses after loading, with those of the run itself", sharded(*test_sharded.RESUMED)),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_row_holds(row, tmp_path):
    row.run(tmp_path)


def test_the_table_of_the_document_is_these_rows():
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = lines.index(FIRST_LINE)
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(line)
    right = [f"| {row.name} | {row.how} | {row.compared} |" for row in ROWS]
    assert found == right, "docs/interop.md should say:\n" + "\n".join(right)
