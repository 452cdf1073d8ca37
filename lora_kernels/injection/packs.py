"""Several adapters on one frozen model, each trained on its own rows of the batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import arguments
from ..algebra.columns import Ranges
from ..layers.chosen import chosen
from ..layers.config import LoRAConfig
from ..layers.linear import FusedLoRALinear
from ..layers.packed import Adapters, PackedLoRALinear, PerAdapter
from ..layers.quantised import quantiser
from ..strategies.choose import Choice
from ..strategies.problem import Problem
from .bypassed import unwatch, watch
from .inject import (
    flags_kept,
    fused_layers,
    packed_layers,
    ranks_of,
    refuse_injected,
    swap,
    trained_paths,
    weight_owners,
    with_lora,
)
from .kept import drawn_at_random, notes_on, remember, running_statistics
from .report import TYPICAL_TOKENS, FusedRow, Report, SkippedRow, count_parameters
from .siblings import group_siblings, unhook
from .targets import find_targets, find_train, inside
from .wrappers import bare, refuse_sharded

ALL_SHARE = ("train", "strategy", "group")  # what the configs of one model must have in common


class Planned(NamedTuple):
    """What one adapter does to a model: its ranks and alphas by path, its columns, its heads."""

    config: LoRAConfig
    ranks: Mapping[str, tuple[int, float]]
    columns: Mapping[str, Ranges | None]
    skipped: tuple[SkippedRow, ...] = ()


def add_loras(
    model: nn.Module,
    configs: Mapping[str, LoRAConfig],
    *,
    seeds: Mapping[str, int] | None = None,
) -> Report:
    """Put several adapters on a model, in place, and freeze all the rest: name -> `LoRAConfig`.

    A batch then holds a block of examples for each adapter, one block after another along the first
    dimension: of equal size in the order of the names, or as `adapter_rows` says. One frozen
    product, and as many kernel launches as for one adapter, serve all of them. Adapters may differ
    in rank, alpha, dropout, start and targets; `train`, `strategy` and `group` are the same for
    all. What `train` names is copied for each adapter.

    The adapter `a` of `...query` is the parameters `...query.lora_A.a` and `...query.lora_B.a`, and
    a head of its own is `classifier.a`.

    `seeds` make an adapter what it would be alone: its start, and on a CPU its dropout masks, are
    those of `torch.manual_seed(seed)` and `add_lora`. The model's own dropout layers draw from
    torch's generator, for all rows together, so they differ. Without `seeds` torch's generator
    draws them.

    Raises:
        ValueError: no adapter, a name that cannot be part of a path, configs that differ in what
            they must share, a layer that adapters divide into different columns or that is
            quantised, an embedding, a start that needs the frozen weight, dora or lora_bias, a
            module of `train` that shares a parameter, batch norms, too little memory, or what
            `add_lora` refuses. The model is then unchanged.

    Example:
        >>> add_loras(model, {f"r{r}": LoRAConfig(rank=r, alpha=16) for r in (4, 8, 16)})
        >>> loss = model(**batch).logits.pow(2).mean()  # a third of the batch for each
    """
    configs = dict(arguments.mapping("configs", configs))
    check_configs(configs)
    if seeds is None:
        seeds = drawn_seeds(configs)
    seeds = {name: arguments.integer(f"seeds[{name!r}]", s, least=0) for name, s in seeds.items()}
    if seeds.keys() != configs.keys():
        raise ValueError(f"seeds are for {sorted(seeds)}, configs for {sorted(configs)}")
    arguments.module("model", model)
    refuse_sharded(model, "call add_loras before it is sharded")
    with bare(model) as model:
        refuse_injected(model)
        plans = {}
        for name, config in configs.items():
            train = find_train(model, config.train)
            columns, skipped = find_targets(model, config, train)
            plans[name] = Planned(config, ranks_of(config, columns), columns, tuple(skipped))
        report = inject_all(model, plans, {name: seeds[name] for name in configs})
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return report


def drawn_seeds(names: Iterable[str]) -> dict[str, int]:
    """A seed for each adapter, from torch's generator."""
    return {name: int(torch.randint(1 << 62, (1,))) for name in names}


def check_configs(configs: Mapping[str, Any]) -> None:
    """Raise for names and configs that cannot stand together."""
    if not configs:
        raise ValueError("configs is empty: name at least one adapter")
    taken = {*dir(nn.ParameterDict()), *dir(nn.ModuleDict())}
    for name, config in configs.items():
        if not isinstance(name, str) or not name or set(name) & set("./\\") or name in taken:
            raise ValueError(
                f"{name!r} cannot name an adapter: it is part of the parameters' paths and a "
                "folder's name, so it needs to be a string without dots and slashes that no "
                "attribute of a module has"
            )
        if not isinstance(config, LoRAConfig):
            cls = f"{type(config).__module__}.{type(config).__qualname__}"
            raise TypeError(f"configs[{name!r}] must be a LoRAConfig: got a {cls}")
        if config.dora or config.lora_bias:
            raise ValueError(f"adapter {name!r}: dora and lora_bias run alone, by add_lora")
        if config.init.startswith(("pissa", "olora")):
            raise ValueError(
                f"adapter {name!r}: init={config.init!r} takes a part out of the frozen weight, "
                "which all adapters share"
            )
    (first, one), *others = configs.items()
    for name, config in others:
        for field in ALL_SHARE:
            if getattr(config, field) != getattr(one, field):
                raise ValueError(
                    f"{field} must be the same for all adapters: {first!r} has "
                    f"{getattr(one, field)!r}, {name!r} has {getattr(config, field)!r}"
                )


def inject_all(model: nn.Module, plans: Mapping[str, Planned], seeds: Mapping[str, int]) -> Report:
    """Swap the layers that the plans name, copy the heads, freeze the rest, and report."""
    wanted = {path for plan in plans.values() for path in plan.ranks}
    paths = [path for path, _ in model.named_modules() if path in wanted]
    for path in paths:
        if whose := quantiser(model.get_submodule(path)):
            raise ValueError(f"{path!r} is {whose}: several adapters need a plain weight")
        if isinstance(model.get_submodule(path), nn.Embedding):
            raise ValueError(f"{path!r} is an embedding: several adapters need linear layers")
        columns = {name: p.columns.get(path) for name, p in plans.items() if path in p.ranks}
        if len(set(columns.values())) > 1:
            raise ValueError(f"adapters ask for different columns of {path!r}: {columns}")
    _refuse_too_many(model, plans)
    config = next(iter(plans.values())).config
    heads = find_train(model, config.train)
    _refuse_mixed(model, heads)
    adapters = Adapters(seeds)
    layers: dict[str, dict[str, FusedLoRALinear]] = {path: {} for path in paths}
    with flags_kept(model):
        for name, (own, ranks, ranges, _) in plans.items():
            generator = adapters.streams.generators[name]
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(generator.get_state())
                for path, sizes in ranks.items():
                    layer = model.get_submodule(path)
                    layers[path][name] = with_lora(layer, own, *sizes, ranges.get(path))
                generator.set_state(torch.get_rng_state())
    model.lora_kept = tuple(drawn_at_random(model))  # type: ignore[assignment]
    notes = notes_on(model, wanted, [*heads])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    new: dict[int, nn.Module] = {
        id(model.get_submodule(path)): PackedLoRALinear(adapters, each)
        for path, each in layers.items()
    }
    for path in heads:
        head = model.get_submodule(path)
        copies = {name: copy.deepcopy(head).requires_grad_(True) for name in plans}
        new[id(head)] = PerAdapter(adapters, copies).train(head.training)
    swap(model, new)
    if config.group:
        group_siblings(model, packed_layer)
    watch(model)
    model.register_forward_pre_hook(adapters.call_begins, with_kwargs=True)
    model.register_forward_hook(adapters.call_ends, always_call=True)
    model.lora_configs = {name: plan.config for name, plan in plans.items()}  # type: ignore[assignment]
    return replace(_described(model, plans), notes=notes)


def _refuse_mixed(model: nn.Module, heads: Iterable[str]) -> None:
    """Raise ValueError for what adapters would share though it trains, or see of each other."""
    owners = weight_owners(model)
    for path in heads:
        for parameter in model.get_submodule(path).parameters():
            if others := [each for each in owners[id(parameter)] if not inside(each, [path])]:
                raise ValueError(
                    f"{path!r} shares a parameter with {sorted(others)[0]!r}: each adapter would "
                    "train a copy of its own, and the other module would not follow"
                )
    if mixing := [key for key in running_statistics(model) if not inside(key, heads)]:
        raise ValueError(
            f"{mixing[0].rpartition('.')[0]!r} normalizes over the batch, so the adapters would "
            "see each other's rows: add_lora trains one at a time"
        )


def _refuse_too_many(model: nn.Module, plans: Mapping[str, Planned]) -> None:
    """Raise ValueError where the adapters, their gradients and AdamW's two moments do not fit."""
    elements, device = 0, torch.device("cpu")
    for plan in plans.values():
        for path, (rank, _) in plan.ranks.items():
            weight: Any = model.get_submodule(path).weight
            elements, device = elements + rank * sum(weight.shape), weight.device
    if device.type != "cuda":
        return
    needed, (free, _) = 4 * 4 * elements, torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"{len(plans)} adapters take {needed / 1e9:.1f} GB with gradients and AdamW's moments, "
            f"and {device} has {free / 1e9:.1f} GB free: fewer adapters, or smaller ranks"
        )


def _described(model: nn.Module, plans: Mapping[str, Planned]) -> Report:
    groups = {}
    for name in plans:
        of_lora = [
            parameters[name]
            for layer in packed_layers(model).values()
            for parameters in (layer.lora_A, layer.lora_B)
            if name in parameters
        ]
        of_heads = [p for head in heads_of(model).values() for p in head[name].parameters()]
        groups[name] = [*of_lora, *of_heads]
    rows = []
    for path, layer in packed_layers(model).items():
        _, choice = chosen_of_pack(layer, TYPICAL_TOKENS)
        rows.append(FusedRow(path, choice.strategy, choice.reason))
    skipped = dict.fromkeys(row for plan in plans.values() for row in plan.skipped)
    return Report(tuple(rows), tuple(skipped), count_parameters(model, groups))


def chosen_of_pack(
    layer: PackedLoRALinear, tokens: int, dtype: torch.dtype | None = None
) -> tuple[Problem, Choice]:
    """As `chosen`, for the tokens of all adapters together; the reason says how the pack runs."""
    problem, choice = chosen(layer, tokens, dtype)
    count = len(layer.own_settings)
    how = "all in each launch"
    if choice.strategy == "library":
        how = "one frozen product for all, then small products of each"
    return problem, replace(choice, reason=f"{count} adapters, {how}; {choice.reason}")


def packed_layer(module: nn.Module | None) -> Any:
    """The module itself if it is a PackedLoRALinear, else None."""
    return module if isinstance(module, PackedLoRALinear) else None


def heads_of(model: nn.Module) -> dict[str, PerAdapter]:
    """Path -> modules that train in full, once for each adapter."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PerAdapter)}


def adapters_of(model: nn.Module) -> Adapters:
    """What the layers of a model with several adapters share; ValueError for another model."""
    layer = next(iter(packed_layers(arguments.module("model", model)).values()), None)
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no adapters of add_loras")
    return layer.adapters


@contextmanager
def adapter_rows(model: nn.Module, rows: Mapping[str, int]) -> Iterator[None]:
    """Inside, a batch holds `rows[name]` examples of each adapter, block after block in this order.

    Adapters that are not named have none, and their gradients are zero. An optimizer with momentum
    or weight decay still moves a parameter whose gradient is zero. Where a checkpoint recomputes
    layers, backward belongs inside as well.

    Raises ValueError for a name that the model lacks, and at the model's call for rows that do not
    add up to the batch.

    >>> with adapter_rows(model, {"a": 8, "b": 3}):
    ...     logits = model(**batch).logits  # of 11 examples
    """
    adapters = adapters_of(model)
    given = {
        name: arguments.integer(f"rows[{name!r}]", count, least=0)
        for name, count in arguments.mapping("rows", rows).items()
    }
    if unknown := given.keys() - set(adapters.names):
        raise ValueError(f"no adapter {sorted(unknown)[0]!r}: there are {adapters.names}")
    with adapters.rows(given):
        yield


def drop_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter out of a model of `add_loras`, in place; the others go on unchanged.

    Their parameters keep their names, values, gradients and places in an optimizer, and lie side by
    side again. The optimizer of the adapter that goes is the caller's to clear. Raises ValueError
    for a name that the model lacks, and for the last adapter.
    """
    adapters = adapters_of(model)
    if name not in adapters.names:
        raise ValueError(f"no adapter {name!r}: there are {adapters.names}")
    if len(adapters.names) == 1:
        raise ValueError(f"{name!r} is the last adapter: save_adapters, then load the base model")
    for layer in packed_layers(model).values():
        layer.drop(name)
    for head in heads_of(model).values():
        del head[name]
    adapters.drop(name)
    del model.lora_configs[name]  # type: ignore[union-attr, operator]


def alone(model: nn.Module, name: str, *, to_run: bool = True) -> nn.Module:
    """A model with one of the adapters alone, as `add_lora` makes it, of the same parameters.

    Training one of the two trains the other. What is not `to_run` is only looked at: it is made of
    sharded modules as well, which cannot be copied. Raises ValueError for a name that the model
    lacks.
    """
    adapters = adapters_of(model)
    if name not in adapters.names:
        raise ValueError(f"no adapter {name!r}: there are {adapters.names}")
    config: LoRAConfig = model.lora_configs[name]  # type: ignore[index, assignment, operator]
    own: dict[int, nn.Module] = {id(m): m.alone(name) for m in packed_layers(model).values()}
    own |= {id(head): head[name] for head in heads_of(model).values()}
    if not to_run:
        one = _outline(model, own)
        one.lora_config = config  # type: ignore[assignment]
        return one
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo[id(adapters)] = adapters
    for key, module in own.items():
        is_layer = isinstance(module, FusedLoRALinear)
        memo[key] = module if is_layer else copy.deepcopy(module, memo)
    one = copy.deepcopy(model, memo)
    unhook(one)
    unwatch(one)
    for hooks in (one._forward_pre_hooks, one._forward_hooks):
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is adapters]:
            del hooks[key]
    del one.lora_configs
    one.lora_config = config  # type: ignore[assignment]
    if config.group:
        group_siblings(one)
    remember(one, fused_layers(one), trained_paths(one))
    return one


def _outline(module: nn.Module, instead: Mapping[int, nn.Module]) -> nn.Module:
    """The module tree without copies of what the modules hold, some of them replaced."""
    if id(module) in instead:
        return instead[id(module)]
    outline = object.__new__(type(module))  # `copy` would call FSDP2's class, which builds anew
    vars(outline).update(vars(module))
    outline._modules = {
        name: None if child is None else _outline(child, instead)
        for name, child in module._modules.items()
    }
    return outline
