"""The files of a model with several adapters: a directory each, which PEFT loads as well."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path

from torch import nn

from .. import arguments
from ..injection.inject import packed_layers, refuse_injected, trained_paths
from ..injection.kept import kept_keys
from ..injection.packs import (
    Planned,
    adapters_of,
    alone,
    check_configs,
    drawn_seeds,
    heads_of,
    inject_all,
)
from ..injection.report import Report
from ..injection.wrappers import bare, is_sharded, refuse_sharded
from .files import Adapter
from .fit import check_fit
from .gather import State
from .load_save import config_of, load_adapter, ranks_of, read_adapter, save_adapter
from .peft_format import CONFIG_NAME


def save_adapters(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write every adapter of a model of `add_loras` to a directory of its own, `path`/name.

    Each is what `save_adapter` writes of a model with that adapter alone, its own head included,
    so PEFT and `load_adapter` load it. A sharded model (FSDP) is gathered: all its processes call
    this, and the first one writes. Adapters of other names that lie in `path` stay, and a warning
    names them, since `load_adapters` would read them too. Raises ValueError for a model without
    adapters.

    >>> save_adapters(model, "runs/grid")
    >>> peft.PeftModel.from_pretrained(base_model, "runs/grid/r8")
    """
    root = arguments.path("path", path)
    with bare(arguments.module("model", model)) as inner:
        ones = {name: alone(inner, name, to_run=False) for name in adapters_of(inner).names}
        keys = {name: _keys(inner, name, one) for name, one in ones.items()}
    if others := sorted({each.parent.name for each in root.glob(f"*/{CONFIG_NAME}")} - ones.keys()):
        warnings.warn(
            f"{root} also holds {', '.join(others)}, which load_adapters would read too: remove "
            "what is not wanted",
            stacklevel=2,
        )
    if not is_sharded(model):
        for name, one in ones.items():
            save_adapter(one, root / name)
        return
    wanted = {key for own in keys.values() for key in own}
    state = State(model, None, wanted.__contains__)

    def write() -> None:
        for name, one in ones.items():
            save_adapter(one, root / name, state_dict=state.renamed(keys[name]))

    state.on_first(write)


def _keys(model: nn.Module, name: str, one: nn.Module) -> dict[str, str]:
    """Keys of what an adapter's files hold in a packed model -> in `one`, with it alone."""
    found = {key: key for key in kept_keys(one, trained_paths(one))}
    for path, layer in packed_layers(model).items():
        if name in layer.own_settings:
            found |= {f"{path}.{part}.{name}": f"{path}.{part}" for part in ("lora_A", "lora_B")}
    for path, head in heads_of(model).items():
        found |= {f"{path}.{name}.{key}": f"{path}.{key}" for key in head[name].state_dict()}
    return found


def load_adapters(model: nn.Module, path: str | PathLike[str]) -> Report | None:
    """Load every adapter below `path`, in place, under the name of its directory.

    A plain model gets them as by `add_loras`, and a report is returned. A model of `add_loras` gets
    values for the adapters that it has; then there must be a directory for each, and None is
    returned. Raises FileNotFoundError where there is no adapter, ValueError for files that do not
    fit the model or each other.

    >>> load_adapters(model, "runs/grid")
    """
    root = arguments.path("path", path)
    refuse_sharded(arguments.module("model", model), "load the adapters before it is sharded")
    with bare(model) as inner:
        if packed_layers(inner):
            names = adapters_of(inner).names
            if missing := [name for name in names if not (root / name).is_dir()]:
                raise FileNotFoundError(f"{root} has no adapter {missing[0]!r}")
            ones = {name: alone(inner, name) for name in names}
            for name, one in ones.items():  # all must fit before the first is taken over
                check_fit(one, read_adapter(root / name, one, None, None), trained_paths(one))
            for name, one in ones.items():
                load_adapter(one, root / name)
            return None
        refuse_injected(inner)
        found = _found(root, inner)
        plans = {}
        for name, adapter in found.items():
            check_fit(inner, adapter, adapter.train)
            columns = {path: values.columns for path, values in adapter.layers.items()}
            plans[name] = Planned(config_of(inner, adapter), ranks_of(adapter), columns)
        check_configs({name: plan.config for name, plan in plans.items()})
        report = inject_all(inner, plans, drawn_seeds(plans))
        for name in plans:
            load_adapter(alone(inner, name), root / name)
        return report


def _found(root: Path, model: nn.Module) -> dict[str, Adapter]:
    """The adapters below a directory, by name."""
    names = sorted(each.name for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
    if not names:
        raise FileNotFoundError(f"{root} has no directories of adapters")
    return {name: read_adapter(root / name, model, None, None) for name in names}
