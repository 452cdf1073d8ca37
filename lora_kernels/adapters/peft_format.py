"""PEFT's adapter directory, read and written by PEFT's own rules.

`adapter_config.json` is the `LoraConfig`. `adapter_model.safetensors` holds the tensors
`base_model.model.<path>.lora_A.weight` and `lora_B` (of embeddings `lora_embedding_A` and
`lora_embedding_B`), and modules trained in full under their own path.

A layer with LoRA on G ranges of its columns is stacked in our model, lora_A [G R, K] and lora_B
[sum of N_g, R]. PEFT has no such layer, so the file holds it unfolded: as one LoRA of the whole
layer, of rank G R, whose lora_B [N, G R] is block-diagonal. Metadata of the safetensors file, which
PEFT does not read, say which columns to fold it to, and what other values it holds.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..algebra.columns import Ranges, check_columns, fold, unfold, widths
from ..injection.kept import embeddings, running_statistics
from ..injection.peft_names import (
    by_pattern,
    exactly,
    names_for_peft,
    peft_matches,
    trained_by_peft,
)
from ..injection.targets import inside, is_layer
from ..layers.base import features_of
from ..layers.embedding import FusedLoRAEmbedding
from ..layers.linear import FusedLoRALinear
from .files import (
    Adapter,
    LayerValues,
    read_tensors,
    split_lora,
    take_vectors,
    under_all_names,
)
from .gather import State
from .peft_config import read_config

COLUMNS_KEY, TRAIN_KEY, KEPT_KEY = (f"lora_kernels.{name}" for name in ("columns", "train", "kept"))
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"
# How the keys of lora_A and lora_B begin and end: of a linear layer, and of an embedding.
OF_LINEAR, OF_EMBEDDING = (".lora_", ".weight"), (".lora_embedding_", "")


def read_peft(directory: Path, model: nn.Module) -> Adapter:
    """The adapter of a PEFT directory; raises as `load_adapter` does."""
    config = read_config(directory / CONFIG_NAME)
    weights = _weights_file(directory)
    own = model.state_dict()
    known = {name: module for name, module in model.named_modules() if name and _has_place(module)}
    tensors: dict[str, Tensor] = {}
    for key, value in read_tensors(weights, model).items():
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        if name not in own:  # PEFT writes so an embedding that has LoRA and was resized
            name = _as_of_linear(name.replace(".base_layer.", "."), known)
        if name in tensors:
            raise ValueError(f"{weights} holds {name} twice")
        tensors[name] = value
    vectors = take_vectors(tensors, MAGNITUDE, BIAS)
    pairs, others = split_lora(tensors, ".weight", directory)
    _check_vectors(directory, config, pairs.keys(), vectors)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rslora = config.get("use_rslora", False)
    metadata = _read_metadata(weights)
    columns = metadata[COLUMNS_KEY]
    layers: dict[str, LayerValues] = {}
    for path, (lora_A, lora_B) in pairs.items():
        wanted = by_pattern(config.get("rank_pattern"), path, rank)
        if len(lora_A) != wanted:
            raise ValueError(
                f"{directory}: {path}.lora_A is {list(lora_A.shape)}, but "
                f"{CONFIG_NAME} gives rank {wanted}"
            )
        own_alpha = by_pattern(config.get("alpha_pattern"), path, alpha)
        values = LayerValues(lora_A, lora_B, own_alpha, None, **vectors.get(path, {}))
        try:
            layers[path] = _folded(values, known.get(path), columns.get(path), rslora)
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}") from None
    _check_targets(directory, config, layers.keys(), known.keys())
    named = trained_by_peft(model, config.get("modules_to_save") or ())
    train = [path for path in named if any(True for _ in model.get_submodule(path).parameters())]
    train += [path for path in metadata[TRAIN_KEY] if path not in train]
    ours = (*metadata[TRAIN_KEY], *metadata[KEPT_KEY])  # PEFT parts what is tied, and we do not
    others |= under_all_names(model, {k: v for k, v in others.items() if inside(k, ours)})
    return Adapter(
        directory,
        layers,
        others,
        tuple(train),
        (*metadata[KEPT_KEY], *running_statistics(model), *embeddings(model)),
        config.get("lora_dropout", 0.0),
        rslora,
    )


def _has_place(module: nn.Module) -> bool:
    """Whether a module is a linear layer or an embedding, plain or with LoRA."""
    return is_layer(module) or isinstance(module, nn.Embedding)


def _as_of_linear(key: str, known: Mapping[str, nn.Module]) -> str:
    """The key of an embedding's LoRA, as it were of a linear layer; other keys stay."""
    path, found, leaf = key.rpartition(OF_EMBEDDING[0])
    embedding = isinstance(known.get(path), (nn.Embedding, FusedLoRAEmbedding))
    if not found or (path in known and not embedding):
        return key
    begin, end = OF_LINEAR
    return f"{path}{begin}{leaf}{end}"


def _check_vectors(
    directory: Path, config: Mapping[str, Any], paths: Set[str], vectors: Mapping[str, Any]
) -> None:
    """Raise ValueError unless exactly the layers have magnitudes and biases that should."""
    for field, flag in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        have = {path for path, found in vectors.items() if field in found}
        should = set(paths) if config.get(flag) else set()
        if different := sorted(have ^ should):
            words = "has" if different[0] in have else "lacks"
            raise ValueError(
                f"{directory}: {different[0]} {words} the {field} of its LoRA, but {CONFIG_NAME} "
                f"says {flag}={bool(config.get(flag))}"
            )


def _folded(
    values: LayerValues, layer: nn.Module | None, columns: Ranges | None, rslora: bool
) -> LayerValues:
    """The values stacked, at the same scale, if the model's `layer` has LoRA on columns.

    Where `layer` has no LoRA yet, the file's `columns` decide; ValueError if the values contradict
    them. What does not fit `layer` stays as it is in the file, and `check_fit` reports it.
    """
    columns = layer.columns if isinstance(layer, FusedLoRALinear) else columns
    if values.magnitude is not None or values.bias is not None:
        return values  # of whole layers alone
    if layer is None or columns is None or features_of(layer)[1] != len(values.lora_B):
        return values
    try:
        check_columns(columns, len(values.lora_B))
        lora_B = fold(values.lora_B, columns)
    except ValueError:
        if isinstance(layer, FusedLoRALinear):
            return values
        raise
    blocks = math.sqrt(len(columns)) if rslora else len(columns)
    return LayerValues(values.lora_A, lora_B, values.alpha and values.alpha / blocks, columns)


def _check_targets(
    directory: Path, config: Mapping[str, Any], layers: Set[str], known: Set[str]
) -> None:
    """Raise ValueError unless the file's layers are those that its target_modules name."""
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    expected = {name for name in known if peft_matches(config, name)}
    for found, text in (
        (expected - layers, "has no values for target layers of the model"),
        (layers & known - expected, "has values for layers that target_modules does not name"),
    ):
        if found:
            names = ", ".join(sorted(found)[:4])
            raise ValueError(f"{directory} {text}: {names} ({len(found)} in all)")


def _weights_file(directory: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (directory / name).exists():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}")


def _read_metadata(path: Path) -> dict[str, Any]:
    """What we write into the metadata of the file; empty for a pickle, or another's file.

    Columns by path of a layer, the modules trained in full that PEFT cannot name, and the keys of
    frozen values that the file holds.
    """
    found: dict[str, Any] = {COLUMNS_KEY: {}, TRAIN_KEY: [], KEPT_KEY: []}
    if path.suffix != ".safetensors":
        return found
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for key in found.keys() & metadata.keys():
        try:
            value = json.loads(metadata[key])
            if key == COLUMNS_KEY:
                found[key] = {
                    name: tuple((int(start), int(stop)) for start, stop in columns)
                    for name, columns in value.items()
                }
            else:
                found[key] = ["".join((name,)) for name in value]
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the metadata {key} cannot be read: {error}") from None
    return found


def peft_tensors(
    state: State,
    layers: Mapping[str, FusedLoRALinear],
    train: Iterable[str],
    kept: Iterable[str],
    nameless: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the safetensors file: LoRA, unfolded; `train`; the values `kept`.

    `nameless` is whether the configuration cannot name `train`. Raises ValueError for LoRA values
    that are not whole.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        lora_A, lora_B = state[f"{path}.lora_A"], state[f"{path}.lora_B"]
        N = layer.out_features if layer.columns is None else sum(widths(layer.columns))
        for name, value, shape in (
            ("lora_A", lora_A, (_rows(layer), layer.in_features)),
            ("lora_B", lora_B, (N, layer.rank)),
        ):
            if value.shape != shape:
                raise ValueError(
                    f"{path}.{name} is {list(value.shape)}, a part of {list(shape)}: pass a "
                    "gathered state_dict="
                )
        if layer.columns is not None:
            lora_B = unfold(lora_B, layer.columns, layer.out_features)
        if layer.taken is not None:  # W - s B' A' + s B A is W + s [B, -B'] [A; A']
            lora_A = torch.cat([lora_A, state[f"{path}.start_A"]])
            lora_B = torch.cat([lora_B, -state[f"{path}.start_B"]], dim=1)
        begin, end = OF_EMBEDDING if isinstance(layer, FusedLoRAEmbedding) else OF_LINEAR
        tensors |= {f"{path}{begin}A{end}": lora_A, f"{path}{begin}B{end}": lora_B}
        if layer.has_magnitude:
            tensors[f"{path}.{MAGNITUDE}"] = state[f"{path}.lora_magnitude"]
        if layer.has_lora_bias:
            tensors[f"{path}.{BIAS}"] = state[f"{path}.lora_bias"]
    train = list(train)
    tensors |= {key: state[key] for path in train for key in state.keys(path)}
    kept = list(kept)
    for key in kept:  # PEFT keeps the weight below a LoRA layer one level deeper
        path, _, leaf = key.rpartition(".")
        tensors[f"{path}.base_layer.{leaf}" if path in layers else key] = state[key]
    columns = {path: layer.columns for path, layer in layers.items() if layer.columns}
    notes = {COLUMNS_KEY: columns, TRAIN_KEY: train if nameless else [], KEPT_KEY: kept}
    metadata = {"format": "pt"} | {key: json.dumps(note) for key, note in notes.items() if note}
    return {PREFIX + key: value for key, value in tensors.items()}, metadata


def _rows(layer: FusedLoRALinear) -> int:
    """The rows of lora_A, whether or not all of them are here."""
    return layer.rank * (1 if layer.columns is None else len(layer.columns))


def rank_of(layer: FusedLoRALinear) -> int:
    """The rank of a layer's LoRA as one of the whole layer, on the unchanged weight."""
    return _rows(layer) * (1 if layer.taken is None else 2)


def peft_config(
    model: nn.Module, layers: Mapping[str, FusedLoRALinear], train: Iterable[str]
) -> dict[str, Any]:
    """The `LoraConfig` under which PEFT builds the same layers, as a dictionary."""
    rslora = all(layer.rslora for layer in layers.values())
    # PEFT has one `use_rslora` for all layers. A layer that differs keeps its scale by an alpha of
    # its own, and so does one whose rank in the file is another than its own.
    ranks = {path: rank_of(layer) for path, layer in layers.items()}
    alphas = {
        path: _number(
            layer.alpha
            if ranks[path] == layer.rank and rslora == layer.rslora
            else layer.scale * (math.sqrt(ranks[path]) if rslora else ranks[path])
        )
        for path, layer in layers.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropouts = {layer.dropout for layer in layers.values()}
    if len(dropouts) > 1:
        warnings.warn(
            f"PEFT has one dropout for all layers: {max(dropouts)} of {sorted(dropouts)}",
            stacklevel=3,
        )
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": name_or_path or None,
        "bias": "none",
        "fan_in_fan_out": any(
            layer.conv1d and layer.base_class is not nn.Embedding for layer in layers.values()
        ),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "r": rank,
        "rank_pattern": {exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(path): a for path, a in alphas.items() if a != alpha},
        "lora_bias": any(layer.has_lora_bias for layer in layers.values()),
        "use_dora": any(layer.has_magnitude for layer in layers.values()),
        "use_rslora": rslora,
        **names_for_peft(model, set(layers), train),
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
