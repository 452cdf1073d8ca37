"""Which modules of a model a name means: rows of model families, targets for LoRA, heads to train.

A name is a module's path or a suffix of whole components (`"q"` is `...attn.q`, never `...seq`), or
`re:` and a regular expression for the whole path. A projection that a layer computes beside others
(the query in GPT-2's `c_attn`) is named as if it were a module inside it: `c_attn.q`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..algebra.columns import Range, Ranges, equal_columns
from ..layers.base import features_of, is_conv1d
from ..layers.config import LoRAConfig
from ..layers.embedding import FusedLoRAEmbedding
from ..layers.linear import FusedLoRALinear
from ..layers.quantised import QuantisedLoRALinear, quantiser
from .bypassed import bypasses, probed
from .families import FAMILIES, family_of, heads_of
from .report import SkippedRow
from .wrappers import inner_name


def find_targets(
    model: nn.Module, config: LoRAConfig, train: Mapping[str, str]
) -> tuple[dict[str, Ranges | None], list[SkippedRow]]:
    """The layers to fuse, and the matched ones that are left alone, with the reason.

    The first is path -> the columns that get LoRA; None means all of them, as one. Raises
    ValueError if nothing can be fused, a target asks for what `train` trains in full, or `exclude`
    or `layers` has a part that means none of the targets.
    """
    targets = _default_targets(model) if config.targets is None else config.targets
    if targets == ("all-linear",):
        matched = {n: "all-linear" for n, m in model.named_modules() if n and is_layer(m)}
        excluded = _outputs(model)
    else:
        matched, excluded = _match(model, targets), {}
    matched = _narrowed(matched, config)
    matched, columns = _whole_layers(matched, _named_columns(model))
    trained = {id(p) for path in train for p in model.get_submodule(path).parameters()}
    fused: dict[str, Ranges | None] = {}
    skipped: list[SkippedRow] = []
    dead = probed(model, [path for path in matched if why_not(model, path) is None])
    for path in matched:
        reason = excluded.get(path.split(".")[0]) or excluded.get(path) or why_not(model, path)
        reason = reason or dead.get(path)
        if owner := inside(path, train):
            reason = f"inside train={train[owner]!r}, trained in full"
        elif reason is None and id(model.get_submodule(path).weight) in trained:
            reason = "its weight is tied to one that is trained in full"
        if reason is None:
            fused[path] = columns.get(path)
        else:
            skipped.append(SkippedRow(path, reason))
    if not fused:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in skipped[:3])
        raise ValueError(
            f"targets={targets!r}: nothing can be fused ({reasons or 'no linear layer'})"
        )
    for target in dict.fromkeys(matched.values()):
        rows = [path for path, asked in matched.items() if asked == target]
        if target != "all-linear" and all(inside(path, train) for path in rows):
            name = train[str(inside(rows[0], train))]
            raise ValueError(
                f"target {target!r} only matches inside train={name!r} ({rows[0]}): "
                "a layer has LoRA or is trained in full, not both"
            )
    return fused, skipped + _experts(model)


def _narrowed(matched: Mapping[str, str], config: LoRAConfig) -> dict[str, str]:
    """The matches that `exclude` and `layers` leave."""
    for name in config.exclude:
        if not any(name_matches(name, path) for path in matched):
            raise ValueError(f"exclude={name!r} means no target{near_misses(name, matched)}")
    left = {
        path: target
        for path, target in matched.items()
        if not any(name_matches(name, path) for name in config.exclude)
    }
    if config.layers is None:
        return left
    found = {path: layer_index(path) for path in left}
    if missing := set(config.layers) - set(found.values()):
        there = sorted({index for index in found.values() if index is not None})
        raise ValueError(f"layers={config.layers}: no target in {sorted(missing)}, only in {there}")
    return {path: target for path, target in left.items() if found[path] in config.layers}


def layer_index(path: str, name: str = r"[^.]*") -> int | None:
    """The first number in a path that follows a component `name` (an expression); None if none."""
    found = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path)
    return int(found[1]) if found else None


def _experts(model: nn.Module) -> list[SkippedRow]:
    """A row for each module that holds the weights of several experts as one 3-D parameter."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if "expert" in f"{path.rpartition('.')[2]} {type(module).__name__}".lower():
            sizes = [p.numel() for p in module.parameters(recurse=False) if p.dim() == 3]
            found |= {path: sum(sizes)} if sizes else {}
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    share = f"{sum(found.values()) / total:.0%} of the weights are experts without LoRA"
    return [SkippedRow(path, f"{share}: 3-D parameters, no linear layers") for path in found]


def find_train(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Path of each module to train in full -> the name that asked for it; outermost ones only."""
    found: dict[str, str] = {}
    with_parameters = [
        n for n, m in model.named_modules() if n and any(True for _ in m.parameters())
    ]
    for name in names:
        paths = [path for path in with_parameters if name_matches(name, path)]
        if not paths:
            raise ValueError(
                f"train={name!r} matches no module{near_misses(name, with_parameters)}"
            )
        for path in paths:
            found.setdefault(path, name)
            for key, parameter in model.get_submodule(path).named_parameters():
                if not parameter.is_floating_point():
                    raise ValueError(f"train={name!r}: {path}.{key} is {parameter.dtype}")
            for key, module in model.get_submodule(path).named_modules(prefix=path):
                if whose := quantiser(module):
                    raise ValueError(f"train={name!r}: {key} is {whose}, which cannot train")
    return {path: name for path, name in found.items() if inside(path, found) in (None, path)}


def name_matches(pattern: str, path: str) -> bool:
    """Whether a target or train name means this module path."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], path) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return path == pattern or path.endswith("." + pattern)


def inside(path: str, outer: Iterable[str]) -> str | None:
    """The shortest of `outer` that is `path` or holds it."""
    found = [o for o in outer if path == o or path.startswith(o + ".")]
    return min(found, key=len, default=None)


def near_misses(name: str, paths: Iterable[str]) -> str:
    """`; near misses: ...` for an error message: suffixes with as many components as `name`."""
    depth = name.count(".") + 1
    suffixes = sorted({".".join(path.split(".")[-depth:]) for path in paths})
    close = difflib.get_close_matches(name, suffixes, n=3, cutoff=0.5)
    if close:
        return "; near misses: " + ", ".join(map(repr, close))
    names = [n for n in suffixes if not n.isdigit()]
    return "; there are: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def why_not(model: nn.Module, path: str) -> str | None:
    """The reason why the module at `path` cannot be replaced, or None."""
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "TransformerEncoderLayer reads this weight without calling the layer, in eval mode"
    if reason := bypasses(model, path):
        return reason
    if name := inner_name(parent) or inner_name(module):
        return f"it is wrapped alone ({name}): wrap it after add_lora"
    if "forward" in vars(module):
        return "its forward is patched, which replacing it would undo"
    return None if quantiser(module) else kind_for(module).supports(module)


def kind_for(layer: nn.Module) -> type[FusedLoRALinear]:
    """The class that replaces such a layer, if it `supports` it."""
    if quantiser(layer) is not None:
        return QuantisedLoRALinear
    return FusedLoRAEmbedding if isinstance(layer, nn.Embedding) else FusedLoRALinear


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer, plain or with LoRA."""
    return isinstance(module, (nn.Linear, FusedLoRALinear)) or is_conv1d(module)


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    if family := family_of(model):
        return family.targets
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = sorted({n.split(".")[-1] for n, m in model.named_modules() if is_layer(m)})
    known = ", ".join(t for row in FAMILIES for t in row.model_types)
    raise ValueError(
        f"no default targets for model_type {model_type!r} ({type(model).__name__}): "
        f"pass targets=; its linear layers end in: {', '.join(names)}; "
        f"families with defaults: {known}"
    )


def _match(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Path -> the target that names it, for modules and named columns; each target must match."""
    named = list(_named_columns(model))
    paths = [name for name, _ in model.named_modules() if name] + named
    linear = [name for name, module in model.named_modules() if is_layer(module)] + named
    matched: dict[str, str] = {}
    for target in targets:
        found = [path for path in paths if name_matches(target, path)]
        if not found:
            raise ValueError(f"target {target!r} matches no layer{near_misses(target, linear)}")
        matched |= {path: target for path in found if path not in matched}
    return {path: matched[path] for path in paths if path in matched}


def _named_columns(model: nn.Module) -> dict[str, tuple[str, Range]]:
    """Path of a projection inside a layer (`h.0.attn.c_attn.q`) -> (the layer's path, its columns).

    `Family.columns` has the names. A cross-attention is left out: its query is a layer of its own,
    and this weight holds key and value alone.
    """
    family = family_of(model)
    found: dict[str, tuple[str, Range]] = {}
    if family is None or not family.columns:
        return found
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        names = family.columns.get(name, ())
        crossed = vars(model.get_submodule(owner)).get("is_cross_attention")
        if names and is_layer(module) and not crossed:
            ranges = equal_columns(features_of(module)[1], len(names))
            found |= {f"{path}.{each}": (path, r) for each, r in zip(names, ranges, strict=True)}
    return found


def _whole_layers(
    matched: Mapping[str, str], named: Mapping[str, tuple[str, Range]]
) -> tuple[dict[str, str], dict[str, Ranges]]:
    """The matches with layers in the place of named columns, and the columns of those layers."""
    layers: dict[str, str] = {}
    columns: dict[str, Ranges] = {}
    for path, target in matched.items():
        owner, found = named.get(path, (path, None))
        if found is None:
            layers[path] = target
        elif owner not in matched:
            layers.setdefault(owner, target)
            columns[owner] = (*columns.get(owner, ()), found)
        elif matched[owner] != target:
            raise ValueError(
                f"targets {matched[owner]!r} and {target!r} ask for {owner} as a whole and for a "
                "part of it"
            )
    return layers, {path: tuple(sorted(ranges)) for path, ranges in columns.items()}


def _outputs(model: nn.Module) -> dict[str, str]:
    """What "all-linear" leaves alone: top-level task heads and the output embedding."""
    excluded = dict.fromkeys(heads_of(model), "task head")
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if getter is not None else None
    if output is not None:
        excluded |= {n: "output embedding" for n, m in model.named_modules() if m is output}
    return excluded
