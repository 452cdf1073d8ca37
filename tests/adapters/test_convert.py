"""`lora-kernels convert` and `merge`: every form into every other, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_kernels import LoRAConfig, add_lora, cli, load_adapter, save_adapter
from lora_kernels.adapters import convert as conversion
from lora_kernels.injection.inject import fused_layers
from tests.adapters.test_load_save import CONFIG
from tests.support import zoo

pytestmark = pytest.mark.filterwarnings("ignore")
# Name in the zoo -> the targets, and flags that loralib's file needs to be read.
MODELS = {
    "roberta": (("query", "value"), []),
    "gpt2": (("c_attn.q", "c_attn.v"), ["--enable-lora", "1", "0", "1"]),
    "llama": (("q_proj", "up_proj"), []),
    "vit": (r"re:.*\.(query|value|q_proj|v_proj)", []),
}


def base(folder: Path, name: str) -> nn.Module:
    if not folder.exists():
        zoo.build(name).save_pretrained(folder)
    return type(zoo.build(name)).from_pretrained(folder).eval()


def adapted(folder: Path, name: str = "roberta", **changes) -> nn.Module:
    model = base(folder, name)
    config = {"rank": 3, "alpha": 5, "targets": MODELS[name][0], "rslora": True, **changes}
    add_lora(model, LoRAConfig(**config))
    zoo.randomise(model, "lora_")
    return model


def run(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_round_of_conversions_ends_where_it_began(name, tmp_path, capsys):
    folder, flags = tmp_path / "base", MODELS[name][1]
    model = adapted(folder, name)
    expected = zoo.logits(model)
    assert (expected - zoo.logits(base(folder, name))).abs().max() > 1e-3
    save_adapter(model, tmp_path / "peft")
    run("convert", tmp_path / "peft", tmp_path / "lib.pt", "--json")
    alpha = json.loads(capsys.readouterr().out)["alpha"]
    assert alpha == pytest.approx(5 * 3**0.5)
    run(
        "convert",
        tmp_path / "lib.pt",
        tmp_path / "back",
        "--base",
        folder,
        "--alpha",
        alpha,
        *flags,
    )
    again = base(folder, name)
    load_adapter(again, tmp_path / "back")
    torch.testing.assert_close(zoo.logits(again), expected)
    theirs = peft.PeftModel.from_pretrained(base(folder, name), tmp_path / "back").eval()
    torch.testing.assert_close(zoo.logits(theirs), expected)
    run("merge", tmp_path / "peft", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(zoo.logits(merged), expected)
    run("convert", tmp_path / "merged", tmp_path / "extracted", "--base", folder)
    found = base(folder, name)
    load_adapter(found, tmp_path / "extracted")
    torch.testing.assert_close(zoo.logits(found), expected)
    ranks = {layer.rank for layer in fused_layers(found).values()}
    assert ranks == {6 if name == "gpt2" else 3}  # the columns of c_attn as one update
    assert "differ by" in capsys.readouterr().out


def test_heads_and_whole_checkpoints_are_converted(tmp_path):
    model = adapted(tmp_path / "base", train="classifier")
    zoo.randomise(model, "classifier")
    type(model).save_pretrained(model, tmp_path / "whole")
    run("convert", tmp_path / "whole", tmp_path / "peft", "--base", tmp_path / "base")
    run("merge", tmp_path / "peft", tmp_path / "merged")
    run("convert", tmp_path / "merged", tmp_path / "out", "--base", tmp_path / "base")
    run("convert", tmp_path / "out", tmp_path / "lib.safetensors")
    for path in (tmp_path / "peft", tmp_path / "out"):
        again = base(tmp_path / "base", "roberta")
        load_adapter(again, path)
        torch.testing.assert_close(zoo.logits(again), zoo.logits(model))


REFUSED = {
    "no-base": (["convert", "lib.pt", "out", "--alpha", "5"], "does not name its base model"),
    "no-alpha": (["convert", "lib.pt", "out", "--base", "base"], "does not say alpha"),
    "exists": (["convert", "peft", "base"], "base exists already"),
    "class": (["merge", "peft", "out", "--model-class", "NoSuch"], "no model class 'NoSuch'"),
    "absent": (["convert", "nowhere", "out", "--base", "base"], "no adapter at"),
    "same": (["convert", "base", "out", "--base", "base"], "differs from its base model by no"),
    "dora": (["convert", "dora", "out.pt"], "has lora_magnitude, which loralib has not"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_refusals(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted(Path("base")), "peft")
    save_adapter(adapted(Path("base"), dora=True), "dora")
    run("convert", "peft", "lib.pt")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch, capsys):
    save_adapter(adapted(tmp_path / "base"), tmp_path / "peft")
    save = conversion.save_adapter

    def broken(model, path):
        next(iter(fused_layers(model).values())).lora_A.data.mul_(1.5)
        save(model, path)

    monkeypatch.setattr(conversion, "save_adapter", broken)
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "out")]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "peft" / CONFIG).exists() and transformers.__version__
