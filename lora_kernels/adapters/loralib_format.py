"""loralib checkpoints: a state dict with `<path>.lora_A` and `<path>.lora_B`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..algebra.columns import Ranges, equal_columns, unfold
from ..injection.targets import is_layer
from ..layers.base import features_of
from .files import Adapter, LayerValues, read_tensors, split_lora


def read_loralib(
    path: Path, model: nn.Module, alpha: float | None, enable_lora: tuple[bool, ...] | None
) -> Adapter:
    """The adapter of a loralib checkpoint; raises as `load_adapter` does."""
    pairs, others = split_lora(read_tensors(path), "", path)
    linear = {name: module for name, module in model.named_modules() if is_layer(module)}
    layers: dict[str, LayerValues] = {}
    for name, (lora_A, lora_B) in pairs.items():
        columns, blocks = None, 1
        layer = linear.get(name)  # a path that the model lacks is reported with all else
        N = features_of(layer)[1] if layer is not None else len(lora_B)
        if layer is not None and lora_B.shape != (N, len(lora_A)):
            columns = getattr(layer, "columns", None)
            if enable_lora is not None or columns is None:
                columns = _columns(f"{path}: {name}", lora_A, lora_B, N, enable_lora)
            blocks, lora_B = len(columns), unfold(lora_B, columns, N)
        # loralib scales by alpha / r, and the rank of the whole is blocks * r.
        layers[name] = LayerValues(
            lora_A, lora_B, None if alpha is None else alpha * blocks, columns
        )
    modules = {key.rpartition(".")[0] for key in others}
    state = model.state_dict().keys()
    for name in modules:
        rest = [key for key in state if key.startswith(name + ".") and key not in others]
        if rest:
            mine = next(key for key in others if key.startswith(name + "."))
            raise ValueError(
                f"{path} holds {mine} but not {rest[0]}: only whole modules can be taken over"
            )
    return Adapter(path, layers, others, tuple(sorted(modules)))


def _columns(
    name: str, lora_A: Tensor, lora_B: Tensor, N: int, enable_lora: tuple[bool, ...] | None
) -> Ranges:
    """The columns that a `MergedLinear` adapts.

    The layer's N outputs are equal segments, and `enable_lora` says which of them have LoRA.
    """
    blocks, rest = divmod(lora_A.shape[0], lora_B.shape[1])
    r = lora_B.shape[1]
    shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}, {N} outputs"
    if enable_lora is None:
        if lora_B.shape[0] != N or rest:
            raise ValueError(
                f"{name} ({shapes}) does not fit; "
                "if it is a MergedLinear pass enable_lora=, such as (True, False, True)"
            )
        enable_lora = (True,) * blocks
    segment = N // max(len(enable_lora), 1)
    enabled = [i for i, on in enumerate(enable_lora) if on]
    fits = lora_A.shape[0] == len(enabled) * r and lora_B.shape[0] == len(enabled) * segment
    if not fits or segment * len(enable_lora) != N:
        raise ValueError(f"{name} ({shapes}) does not fit enable_lora={tuple(enable_lora)}")
    return tuple(equal_columns(N, len(enable_lora))[i] for i in enabled)
