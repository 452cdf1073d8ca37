"""Put LoRA layers into a model, and take them out again.

`add_lora` decides everything first (`targets` says which layers and which heads), raises before the
model is touched, and then swaps layers and freezes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from torch import nn

from .. import arguments
from ..algebra.columns import Ranges
from ..layers.chosen import chosen
from ..layers.config import LoRAConfig
from ..layers.linear import FusedLoRALinear
from ..layers.packed import PackedLoRALinear
from ..layers.quantised import QuantisedLoRALinear
from ..layers.start import takes_weight
from .bypassed import unwatch, watch
from .kept import drawn_at_random, forget, notes_on, remember
from .peft_names import by_pattern
from .report import TYPICAL_TOKENS, FusedRow, Report, SkippedRow, count_parameters
from .siblings import group_siblings, unhook
from .targets import find_targets, find_train, kind_for, near_misses
from .wrappers import bare, refuse_sharded, unwrapped


def add_lora(model: nn.Module, config: LoRAConfig) -> Report:
    """Replace the target layers by `FusedLoRALinear`, in place, and freeze all the rest.

    A layer that bitsandbytes or torchao has quantised stays inside of its replacement
    (`layers.quantised`). An `nn.Embedding` that is named as a target gets LoRA as in PEFT
    (`layers.embedding`).

    Afterwards exactly the LoRA parameters and the modules named in `config.train` have
    `requires_grad`. Names in `targets` and `train` are module names or path suffixes of whole
    components (`"q"` is `...attn.q`, never `...seq`), or `re:` and a regular expression for the
    whole path; part of a layer is named as if it were inside it (`"c_attn.q"` of GPT-2).
    `targets="all-linear"` takes every linear layer but the task head and the output
    embedding; `targets=None` takes the row of the model's family.

    What should be known before training is in the report's `notes`, and a warning each.

    Raises:
        ValueError: the model has LoRA layers already or is sharded, a name matches nothing, nothing
            can be fused, or `train` and `targets` ask for the same layer. The model is then
            unchanged.
        TypeError: the config is no LoRAConfig, or the model no module.

    Example:
        >>> print(add_lora(model, LoRAConfig(rank=8, alpha=16, train=("classifier",))))
    """
    if not isinstance(config, LoRAConfig):
        cls = type(config)
        raise TypeError(f"config must be a LoRAConfig: got a {cls.__module__}.{cls.__qualname__}")
    arguments.module("model", model)
    refuse_sharded(model, "call add_lora before it is sharded")
    with bare(model) as model:
        refuse_injected(model)
        train = find_train(model, config.train)
        columns, skipped = find_targets(model, config, train)
        ranks = ranks_of(config, columns)
        _refuse_tied(model, config, ranks)
        report = inject(model, config, ranks, skipped, columns)
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return report


def ranks_of(config: LoRAConfig, paths: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Path -> rank and alpha, by the patterns; ValueError for a pattern that matches no layer."""
    paths = list(paths)
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for pattern in patterns:
            if all(by_pattern({pattern: True}, path, None) is None for path in paths):
                raise ValueError(
                    f"pattern {pattern!r} matches no target{near_misses(pattern, paths)}"
                )
    return {
        path: (
            by_pattern(config.rank_pattern, path, config.rank),
            by_pattern(config.alpha_pattern, path, config.alpha),
        )
        for path in paths
    }


def _refuse_tied(model: nn.Module, config: LoRAConfig, paths: Iterable[str]) -> None:
    """Raise ValueError where a start would take a part out of a weight that others read too."""
    if takes_weight(config.init):
        owners = weight_owners(model)
        for path in paths:
            if others := owners[id(model.get_submodule(path).weight)] - {path}:
                raise ValueError(
                    f"init={config.init!r} would change the weight of {path!r}, which is tied to "
                    f"{sorted(others)[0]!r}"
                )


def weight_owners(model: nn.Module) -> dict[int, set[str]]:
    """id of each parameter -> the paths of the modules that hold it."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(path)
    return owners


def merge(model: nn.Module) -> nn.Module:
    """Fold every LoRA update into its weight and put plain layers back, in place; returns `model`.

    weight += scale * lora_B lora_A. Parameters keep their names and `requires_grad`.

    Raises:
        ValueError: there is no LoRA layer, or a weight is quantised, or tied to another layer's (an
            output embedding); the model is then unchanged.
    """
    layers = fused_layers(arguments.module("model", model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer to merge{hint(model)}")
    for path, layer in layers.items():
        if isinstance(layer, QuantisedLoRALinear):
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"cannot merge {path!r}: {error}") from None
    owners = weight_owners(model)
    for path, layer in layers.items():
        if others := owners[id(layer.weight)] - {path}:
            raise ValueError(
                f"cannot merge {path!r}: its weight is tied to {sorted(others)[0]!r}, and a merged "
                "weight would differ; give one of them its own copy first"
            )
    for layer in layers.values():
        if not layer.merged:
            layer.merge()
    inner = unwrapped(model)
    unhook(inner)
    unwatch(inner)
    swap(inner, {id(layer): layer.to_linear() for layer in layers.values()})
    forget(inner)
    return model


def fused_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """Path -> LoRA layer, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)}


def packed_layers(model: nn.Module) -> dict[str, PackedLoRALinear]:
    """Path -> layer with several adapters, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLoRALinear)}


def hint(model: nn.Module) -> str:
    """What an error about LoRA layers adds for a model with several adapters."""
    several = "; it has several adapters: save_adapters, and load_adapter the one that is wanted"
    return several if packed_layers(model) else ""


def refuse_injected(model: nn.Module) -> None:
    """Raise ValueError where `model` has LoRA layers already, ours or PEFT's."""
    if layers := {**fused_layers(model), **packed_layers(model)}:
        raise ValueError(
            f"{type(model).__name__} has {len(layers)} LoRA layers already (first: "
            f"{next(iter(layers))!r}); add_lora works on a plain model: merge(model) first"
        )
    if hasattr(model, "peft_config"):
        raise ValueError(f"{type(model).__name__} is a PEFT model: call fuse_peft(model) instead")
    for path, module in model.named_modules():
        if any(cls.__module__.startswith("peft.tuners.") for cls in type(module).__mro__):
            raise ValueError(
                f"{path!r} is a layer of PEFT's: call fuse_peft on the PEFT model instead, or "
                "merge_and_unload() it first"
            )


def inject(
    model: nn.Module,
    config: LoRAConfig,
    ranks: Mapping[str, tuple[int, float]],
    skipped: Iterable[SkippedRow] = (),
    columns: Mapping[str, Ranges | None] = MappingProxyType({}),
) -> Report:
    """Swap the layers at `ranks` (path -> rank, alpha), freeze the rest, and report.

    `columns` says which of them get LoRA on ranges of their columns alone. The caller has chosen
    layers that can be replaced; if one cannot, the error leaves the model as it was.
    """
    train = find_train(model, config.train)
    fresh = drawn_at_random(model)
    with flags_kept(model):
        new: dict[int, nn.Module] = {
            id(model.get_submodule(path)): with_lora(
                model.get_submodule(path), config, *sizes, columns.get(path)
            )
            for path, sizes in ranks.items()
        }
    swap(model, new)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in fused_layers(model).values():
        for name in layer.adapter_names:
            getattr(layer, name).requires_grad_(True)
    for path in train:
        model.get_submodule(path).requires_grad_(True)
    if config.group:
        group_siblings(model)
    watch(model)
    model.lora_config = config  # type: ignore[assignment]
    model.lora_kept = tuple(fresh)  # type: ignore[assignment]
    remember(model, fused_layers(model), trained_paths(model))
    return describe(model, skipped)


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """An error inside leaves every parameter's `requires_grad` as it was."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except Exception:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise


def with_lora(
    layer: nn.Module, config: LoRAConfig, rank: int, alpha: float, columns: Ranges | None
) -> FusedLoRALinear:
    """A LoRA layer in the place of a plain one, whose weight it takes over and freezes."""
    return kind_for(layer).from_linear(
        layer,
        rank=rank,
        alpha=alpha,
        dropout=config.dropout,
        rslora=config.rslora,
        strategy=config.strategy,
        columns=columns,
        init=config.init,
        dora=config.dora,
        lora_bias=config.lora_bias,
    )


def describe(model: nn.Module, skipped: Iterable[SkippedRow] = ()) -> Report:
    """The report of a model that has LoRA layers."""
    layers = fused_layers(model)
    config = getattr(model, "lora_config", LoRAConfig())
    groups = {"lora": [getattr(layer, n) for layer in layers.values() for n in layer.adapter_names]}
    for path, name in find_train(model, config.train).items():
        groups.setdefault(name, []).extend(model.get_submodule(path).parameters())
    rows = tuple(fused_row(name, layer) for name, layer in layers.items())
    notes = notes_on(model, set(layers), trained_paths(model))
    return Report(rows, tuple(skipped), count_parameters(model, groups), notes)


def trained_paths(model: nn.Module) -> list[str]:
    """Paths of the modules trained in full, and of those that share a parameter with them."""
    config = getattr(model, "lora_config", None)
    paths = list(find_train(model, config.train)) if config else []
    parameters = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    within = {id(m) for path in paths for m in model.get_submodule(path).modules()}
    for path, module in model.named_modules():
        if id(module) not in within and parameters & {
            id(p) for p in module.parameters(recurse=False)
        }:
            paths.append(path)
    return paths


def fused_row(name: str, layer: FusedLoRALinear) -> FusedRow:
    """The strategy of a layer for a batch of `TYPICAL_TOKENS`."""
    _, choice = chosen(layer, TYPICAL_TOKENS)
    where = f"columns {layer.columns}: " if layer.columns else ""
    return FusedRow(name, choice.strategy, where + choice.reason)


def swap(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put `new[id(module)]` wherever the module hangs, also where it hangs twice."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])
