"""loralib checkpoints: a state dict with `<path>.lora_A` and `<path>.lora_B`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from .adapter_files import Adapter, LayerValues, read_tensors, split_lora
from .targets import features_of, is_layer


def read_loralib(
    path: Path, model: nn.Module, alpha: float | None, enable_lora: tuple[bool, ...] | None
) -> Adapter:
    """The adapter of a loralib checkpoint; raises as `load_adapter` does."""
    pairs, others = split_lora(read_tensors(path), "", path)
    features = {
        name: features_of(module) for name, module in model.named_modules() if is_layer(module)
    }
    layers: dict[str, LayerValues] = {}
    for name, (lora_A, lora_B) in pairs.items():
        blocks = lora_A.shape[0] // lora_B.shape[1]
        if name in features and lora_B.shape != (features[name][1], lora_A.shape[0]):
            lora_B = _unfold(f"{path}: {name}", lora_A, lora_B, features[name][1], enable_lora)
        # loralib scales by alpha / r, and the rank of the whole is blocks * r.
        layers[name] = LayerValues(
            lora_A, lora_B, None if alpha is None else alpha * max(blocks, 1)
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


def _unfold(
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    out_features: int,
    enable_lora: tuple[bool, ...] | None,
) -> Tensor:
    """lora_B [N, blocks * r] of a `MergedLinear`: each block meets its own r rows of lora_A.

    The layer's N outputs are segments, `enable_lora` says which of them have LoRA, and the file
    holds lora_B [enabled * segment, r] without the others: those get zeros.
    """
    blocks, rest = divmod(lora_A.shape[0], lora_B.shape[1])
    r = lora_B.shape[1]
    shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}, {out_features} outputs"
    if enable_lora is None:
        if lora_B.shape[0] != out_features or rest:
            raise ValueError(
                f"{name} ({shapes}) does not fit; "
                "if it is a MergedLinear pass enable_lora=, such as (True, False, True)"
            )
        enable_lora = (True,) * blocks
    segment = out_features // max(len(enable_lora), 1)
    enabled = [i for i, on in enumerate(enable_lora) if on]
    fits = lora_A.shape[0] == len(enabled) * r and lora_B.shape[0] == len(enabled) * segment
    if not fits or segment * len(enable_lora) != out_features:
        raise ValueError(f"{name} ({shapes}) does not fit enable_lora={tuple(enable_lora)}")
    full = lora_B.new_zeros(out_features, lora_A.shape[0])
    for block, i in enumerate(enabled):
        rows = slice(i * segment, (i + 1) * segment)
        full[rows, block * r : (block + 1) * r] = lora_B[block * segment : (block + 1) * segment]
    return full
