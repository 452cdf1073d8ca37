"""Conversions among PEFT's directories, loralib's files and merged models, with a check of outputs.

Whatever is converted is loaded into its base model, written in the other form, and read again into
a second base model. Both must give the same outputs, or the target stays as it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..durable import replacing
from ..injection.inject import add_lora, fused_layers, merge, trained_paths
from ..injection.targets import is_layer
from ..layers.base import features_of, is_conv1d
from ..layers.config import LoRAConfig
from .checkpoint_format import checkpoint_files
from .files import read_tensors
from .load_save import load_adapter, save_adapter
from .peft_format import CONFIG_NAME

FORMS = ("peft", "loralib", "merged")
SUFFIXES = (".pt", ".bin", ".safetensors")  # of loralib's files
# The largest difference of outputs that is rounding, in units of the largest output.
ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Source:
    """What is converted, and what its files do not say.

    `base` is the directory or the name of the base model, `model_class` the class of transformers
    that it is loaded as, `num_labels` the outputs of its task head.
    """

    path: Path
    base: str | None = None
    model_class: str | None = None
    num_labels: int | None = None
    alpha: float | None = None
    enable_lora: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Converted:
    """What was written: its form, the layers with LoRA, loralib's alpha, the check of outputs.

    `difference` is the largest between the outputs before and after, in units of the largest one.
    """

    form: str
    layers: int
    alpha: float | None
    difference: float


def convert(source: Source, target: Path, form: str | None = None) -> Converted:
    """Write `source` to `target` in a form of `FORMS`, and check that it computes the same.

    The form of a target with one of `SUFFIXES` is "loralib", else "peft", unless it is named. A
    merged model as source becomes the adapter of smallest rank that gives it, up to rounding.
    Raises ValueError for a target that exists, for what the other form cannot hold, and where
    outputs differ.
    """
    if target.exists():
        raise ValueError(f"{target} exists already")
    form = form or ("loralib" if target.suffix in SUFFIXES else "peft")
    if form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}: got {form!r}")
    model = _loaded(source)
    expected, layers = _outputs(model), len(fused_layers(model))
    dtype = next(model.parameters()).dtype
    alpha, enabled = None, None
    with replacing(target) as aside:
        if form == "peft":
            save_adapter(model, aside)
        elif form == "loralib":
            alpha, enabled = _write_loralib(model, aside), _enabled(model)
        else:
            merge(model)
            model.save_pretrained(aside)  # type: ignore[operator]
        del model
        again = _base(source)
        if form == "merged":
            again = type(again).from_pretrained(aside)  # type: ignore[attr-defined]
        else:  # a loralib file says neither alpha nor which columns have LoRA
            load_adapter(again, aside, alpha=alpha, enable_lora=enabled)
        difference = _difference(_outputs(again.eval()), expected)
        if not difference <= ALLOWED[dtype]:
            raise ValueError(
                f"after the conversion the outputs differ by {difference:.1e} of their size: "
                "nothing was written"
            )
    return Converted(form, layers, alpha, difference)


def _loaded(source: Source) -> nn.Module:
    """The base model with the LoRA of the source."""
    model = _base(source)
    files = checkpoint_files(source.path) if source.path.is_dir() else []
    if files and not (source.path / CONFIG_NAME).exists():
        keys = {key for file in files for key in read_tensors(file, model)}
        if not any(".lora_" in key for key in keys):
            # Names in a file may be others than in the model: transformers knows them.
            kind: Any = type(model)
            _extract(model, kind.from_pretrained(source.path).state_dict(), source.path)
            return model.eval()
    load_adapter(model, source.path, alpha=source.alpha, enable_lora=source.enable_lora)
    return model.eval()


def _base(source: Source) -> nn.Module:
    """The base model, as `from_pretrained` loads it."""
    import transformers

    config: dict[str, Any] = {}
    if (source.path / CONFIG_NAME).is_file():
        config = json.loads((source.path / CONFIG_NAME).read_text(encoding="utf-8"))
    base = source.base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{source.path} does not name its base model: pass --base")
    named = (config.get("auto_mapping") or {}).get("base_model_class")
    architectures = transformers.AutoConfig.from_pretrained(base).architectures or [None]
    name = source.model_class or named or architectures[0]
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ValueError(f"transformers has no model class {name!r}: pass --model-class")
    # The same head whenever it is drawn at random.
    labels = {} if source.num_labels is None else {"num_labels": source.num_labels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind.from_pretrained(base, **labels)
    return model.eval()


def _write_loralib(model: nn.Module, path: Path) -> float:
    """Write the state dict that loralib saves; returns its alpha, which the file does not hold."""
    layers = fused_layers(model)
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if len(layer.adapter_names) > 2:
            raise ValueError(f"{name} has {layer.adapter_names[2]}, which loralib has not")
        tensors[f"{name}.lora_A"] = state[f"{name}.lora_A"]
        tensors[f"{name}.lora_B"] = state[f"{name}.lora_B"] * (alphas[name] / alpha)
    for trained in trained_paths(model):
        tensors |= {key: state[key] for key in state if key.startswith(trained + ".")}
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return alpha


def _enabled(model: nn.Module) -> tuple[bool, ...] | None:
    """loralib's `enable_lora` of the layers with LoRA on columns; None if there are none."""
    for layer in fused_layers(model).values():
        if layer.columns:
            (start, stop), *_ = layer.columns
            count, starts = layer.out_features // (stop - start), [a for a, _ in layer.columns]
            return tuple(i * (stop - start) in starts for i in range(count))
    return None


def _extract(model: nn.Module, merged: Mapping[str, Tensor], source: Path) -> None:
    """Give `model` the LoRA that makes it the `merged` one.

    A linear layer whose weight differs gets the singular vectors of the difference, down to the
    size of rounding. A module where anything else differs trains in full.
    """
    state = model.state_dict()
    if strange := sorted(key for key in merged if key not in state):
        raise ValueError(f"{source} holds {strange[0]}, which its base model lacks")
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, None] = {}
    for path, module in model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        changed = [k for k in own if k in merged and not torch.equal(merged[k], state[k])]
        if not changed:
            continue
        low = None
        if is_layer(module) and changed == [f"{path}.weight"]:
            low = _low_rank(module, merged[changed[0]])
        if low is None:
            whole[path] = None
        else:
            updates[path] = low
    if not updates:
        raise ValueError(f"{source} differs from its base model by no LoRA of a linear layer")
    ranks = {path: len(lora_A) for path, (lora_A, _) in updates.items()}
    exact = {f"^{re.escape(path)}$": rank for path, rank in ranks.items()}
    config = LoRAConfig(
        rank=max(ranks.values()),
        targets=tuple(f"re:{re.escape(path)}" for path in updates),
        train=tuple(f"re:{re.escape(path)}" for path in whole),
        rank_pattern=exact,
        alpha_pattern=exact,
    )
    add_lora(model, config)
    with torch.no_grad():
        for path, layer in fused_layers(model).items():
            layer.lora_A.copy_(updates[path][0])
            layer.lora_B.copy_(updates[path][1])
        for path in whole:
            for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
                parameter.copy_(merged.get(f"{path}.{name}", parameter))


def _low_rank(layer: nn.Module, merged: Tensor) -> tuple[Tensor, Tensor] | None:
    """lora_A [R, K] and lora_B [N, R] that make the `merged` weight; None if there are none."""
    K, N = features_of(layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    update = merged.float() - weight.float()
    update = update.T if is_conv1d(layer) else update
    V, S, U = torch.linalg.svd(update, full_matrices=False)
    noise = torch.finfo(weight.dtype).eps * merged.abs().max().float() * max(N, K) ** 0.5
    rank = int((noise < S).sum())
    if rank == 0 or rank > min(N, K) // 2:
        return None
    root = S[:rank].sqrt()
    return root[:, None] * U[:rank], V[:, :rank] * root


@torch.no_grad()
def _outputs(model: Any) -> list[Tensor]:
    """The floating tensors that a model gives for made-up inputs of its kind."""
    if model.main_input_name == "pixel_values":
        size = model.config.num_channels, model.config.image_size, model.config.image_size
        pixels = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixels.to(model.dtype)}
    else:
        inputs = model.dummy_inputs
    found = model(**inputs)
    return [v.double() for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in units of the largest output."""
    size = max(value.abs().max().item() for value in expected) or 1.0
    pairs = zip(found, expected, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs) / size
