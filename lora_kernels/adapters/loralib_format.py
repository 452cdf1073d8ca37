"""loralib checkpoints, read: a state dict with `<path>.lora_A` and `<path>.lora_B`.

A `MergedLinear` (query, key and value in one weight, say) holds its LoRAs stacked, as a
`FusedLoRALinear` with columns does. The file says neither which columns they are on nor `alpha`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..algebra.columns import Ranges, equal_columns
from ..injection.targets import is_layer
from ..layers.base import features_of
from .checkpoint_format import is_checkpoint, read_checkpoint
from .files import Adapter, LayerValues, read_tensors, split_lora


def read_loralib(
    path: Path, model: nn.Module, alpha: float | None, enable_lora: tuple[bool, ...] | None
) -> Adapter:
    """The adapter of a loralib checkpoint; raises as `load_adapter` does."""
    tensors = read_tensors(path, model)
    if is_checkpoint(tensors):
        if alpha is not None or enable_lora is not None:
            raise ValueError(f"{path} holds a whole model: alpha and enable_lora are not its")
        return read_checkpoint(path, tensors, model)
    pairs, others = split_lora(tensors, "", path)
    linear = {name: module for name, module in model.named_modules() if is_layer(module)}
    layers: dict[str, LayerValues] = {}
    for name, (lora_A, lora_B) in pairs.items():
        columns = None
        layer = linear.get(name)  # `check_fit` reports a path that the model lacks
        if layer is not None and lora_B.shape != (N := features_of(layer)[1], len(lora_A)):
            columns = getattr(layer, "columns", None)
            if enable_lora is not None or columns is None:
                columns = _columns(f"{path}: {name}", lora_A, lora_B, N, enable_lora)
        layers[name] = LayerValues(lora_A, lora_B, alpha, columns)
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

    The layer's N outputs are equal segments, and `enable_lora` says which of them have LoRA; None
    means all. Raises ValueError where the tensors do not have the shapes of that.
    """
    R = lora_B.shape[1]
    shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}, {N} outputs"
    if enable_lora is None:
        if len(lora_B) != N or len(lora_A) % R:
            raise ValueError(
                f"{name} ({shapes}) does not fit; "
                "if it is a MergedLinear pass enable_lora=, such as (True, False, True)"
            )
        enable_lora = (True,) * (len(lora_A) // R)
    enabled = [i for i, on in enumerate(enable_lora) if on]
    width = N // max(len(enable_lora), 1)
    fits = len(lora_A) == len(enabled) * R and len(lora_B) == len(enabled) * width
    if not fits or width * len(enable_lora) != N:
        raise ValueError(f"{name} ({shapes}) does not fit enable_lora={tuple(enable_lora)}")
    return tuple(equal_columns(N, len(enable_lora))[i] for i in enabled)
