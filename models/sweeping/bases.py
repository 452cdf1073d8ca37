"""What a sweep needs and no hub gives: tiny random models, and SMS spam split without repeats.

A tiny model shows that a command works. Its accuracy says nothing. Both are made once, the same on
every machine, below the runs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 64}  # fmt: skip
# Name -> transformers' model type and its numbers.
TINY: dict[str, tuple[str, Mapping[str, Any]]] = {
    "tiny-roberta": ("roberta", {**_BLOCKS, "max_position_embeddings": 130}),
    "tiny-deberta-v2": ("deberta-v2", {**_BLOCKS, "max_position_embeddings": 128,
                                       "type_vocab_size": 0}),
    "tiny-gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "tiny-gpt2-deep": ("gpt2", {"n_embd": 48, "n_layer": 4, "n_head": 2, "n_positions": 128}),
    "tiny-vit": ("vit", {**_BLOCKS, "image_size": 16, "patch_size": 4, "num_channels": 1}),
}  # fmt: skip
# The bases of the recipes, so that their size is known without a network.
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
          "intermediate_size": 4096}  # fmt: skip
KNOWN: dict[str, tuple[str, Mapping[str, Any]]] = {
    "roberta-base": ("roberta", _ROBERTA),
    "roberta-large": ("roberta", {**_ROBERTA, **_LARGE}),
    "microsoft/deberta-v2-xlarge": ("deberta-v2", {
        "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24,
        "num_attention_heads": 24, "intermediate_size": 6144, "relative_attention": True,
        "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "conv_act": "gelu",
        "type_vocab_size": 0, "position_biased_input": False,
    }),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "google/vit-base-patch16-224-in21k": ("vit", {}),
}  # fmt: skip

CLEAN = "sms_spam_clean"
HELD_OUT = 0.2  # of the clean split for test; an eighth of the rest is for validation: 70/10/20


def config_of(model: str | None) -> Any:
    """The configuration of a base: known here, in a directory, or on the hub.

    Raises ValueError and FileNotFoundError as loading that base does.
    """
    from transformers import AutoConfig

    from ..model.loading import model_source

    if model in KNOWN or model in TINY:
        kind, numbers = (KNOWN | TINY)[model]
        return AutoConfig.for_model(kind, **numbers)
    try:
        return AutoConfig.from_pretrained(model_source(model))
    except OSError as error:
        raise ValueError(f"--model {model} cannot be loaded: {error}") from error


def tiny_model(name: str, folder: Path) -> Path:
    """The directory `folder / name` with the tiny model, which is made where it is missing."""
    import torch
    import transformers

    from lora_kernels.durable import locked, replacing

    from ..model.loading import model_source

    directory = folder / name
    with locked(directory):
        if directory.is_dir():
            return directory
        kind, numbers = TINY[name]
        generator = torch.get_rng_state()
        torch.manual_seed(0)
        if kind == "vit":
            model = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(kind, **numbers)
            )
        else:
            # The words of MiniLM, which are at hand wherever the small forms run.
            words = transformers.AutoTokenizer.from_pretrained(model_source(None))
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=words.backend_tokenizer,
                eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
            )  # fmt: skip
            ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
                   "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
            model = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(kind, **numbers, **ids)
            )
        torch.set_rng_state(generator)
        transformers.logging.disable_progress_bar()
        with replacing(directory) as aside:
            model.save_pretrained(aside)
            if kind != "vit":
                tokenizer.save_pretrained(aside)
    return directory


def clean_sms(folder: Path, data_dir: Path | None) -> Path:
    """The directory with the clean split of SMS spam, which is made where it is missing.

    Every spam and as many ham messages, by a hash of their texts, are split 70/10/20 by
    `stratified_split`, which keeps repeats together. The messages are those of `data_dir`, or of
    the hub.
    """
    from lora_kernels.durable import locked, replacing

    from ..data.splits import normalise, stratified_split
    from ..data.tasks import load, task_of
    from ..record.run_directory import write_csv

    directory = folder / CLEAN
    with locked(directory):
        if directory.is_dir():
            return directory
        whole = load(task_of("sms_spam"), data_dir).splits
        by_class: dict[int, list[str]] = defaultdict(list)
        for split in whole.values():
            for text, label in zip(split["text"], split["labels"], strict=True):
                by_class[label].append(text)
        size = min(map(len, by_class.values()))

        def chosen(texts: list[str]) -> list[str]:
            return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:size]

        rows = [
            {"text": text, "label": label}
            for label, texts in sorted(by_class.items())
            for text in chosen(texts)
        ]

        def split(rows: list[dict[str, Any]], share: float) -> list[str]:
            keys = [normalise(row["text"]) for row in rows]
            return stratified_split(keys, [row["label"] for row in rows], keys, share)

        first = split(rows, HELD_OUT)
        test = [row for row, name in zip(rows, first, strict=True) if name == "test"]
        rest = [row for row, name in zip(rows, first, strict=True) if name != "test"]
        second = split(rest, 0.125)
        held = [row for row, name in zip(rest, second, strict=True) if name == "validation"]
        train = [row for row, name in zip(rest, second, strict=True) if name != "validation"]
        with replacing(directory) as aside:
            aside.mkdir()
            for name, part in (("train", train), ("validation", held), ("test", test)):
                write_csv(aside / f"{name}.csv", part)
    return directory
