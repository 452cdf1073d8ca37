"""What an adapter holds, whatever its format, and the reading and writing of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..algebra.columns import Ranges
from ..durable import locked, replacing_all
from ..injection.wrappers import without_wrappers


@dataclass(frozen=True)
class LayerValues:
    """lora_A [R, K] and lora_B [N, R] of one layer; `alpha` is None where the file does not say.

    With `columns`, LoRA on G ranges of columns alone, stacked as `FusedLoRALinear` holds it (see
    `algebra.columns`): lora_A [G R, K], lora_B [sum of N_g, R]. `alpha` belongs to R. DoRA has a
    magnitude [N], and LoRA may have a bias [N].
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float | None
    columns: Ranges | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that there are, by the names of the layer's parameters."""
        found = {
            "lora_A": self.lora_A, "lora_B": self.lora_B,
            "lora_magnitude": self.magnitude, "lora_bias": self.bias,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    @property
    def blocks(self) -> int:
        """G, the LoRAs that are stacked."""
        return 1 if self.columns is None else len(self.columns)

    @property
    def rank(self) -> int:
        """R, of each of them."""
        return self.lora_B.shape[1]


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter, by the module paths of the base model.

    `train` names the modules that were trained in full. `others` holds their values, by key of the
    model's state dict, and those of `kept`: keys of what was not trained, yet is not the base's.
    """

    source: Path
    layers: Mapping[str, LayerValues]
    others: Mapping[str, Tensor]
    train: tuple[str, ...]
    kept: tuple[str, ...] = ()
    dropout: float = 0.0
    rslora: bool = False


def read_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of a file for `model`: safetensors, or a pickle, read with weights_only=True.

    Names lose what wrappers put into them. Raises ValueError for anything else, for a pickle under
    the name of a safetensors file, and for tensors without plain values (sparse, meta, complex).
    """
    content = _read(path)
    wrapped = all(key.startswith("module.") for key in content) and not hasattr(model, "module")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        name = without_wrappers(key.removeprefix("module.") if wrapped else key)
        if name in tensors:
            raise ValueError(f"{path} holds {name} twice")
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise ValueError(f"{path}: {key} is a {kind} tensor of {value.dtype}: no plain values")
        if value.is_complex():
            raise ValueError(f"{path}: {key} is {value.dtype}: no plain values")
        tensors[name] = value
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            with path.open("rb") as file:
                is_pickle = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
            what = "a pickle under the name of a safetensors" if is_pickle else "no safetensors"
            raise ValueError(f"{path} is {what} file: not read ({error})") from None
        except (AttributeError, KeyError, TypeError) as error:  # a dtype that torch lacks
            raise ValueError(f"{path} holds tensors that torch cannot read: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises many kinds on bytes that are no pickle
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no file of plain tensors: {why}") from None
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} holds no state dict: names and tensors")
    return content


def split_lora(
    tensors: Mapping[str, Tensor], end: str, source: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Path -> (lora_A, lora_B) of the keys that end in `end`, and all other tensors by key.

    Raises ValueError where there is no LoRA, a partner is missing, a LoRA value has another name,
    or one is no matrix.
    """
    others = dict(tensors)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        if key.endswith(f".lora_A{end}"):
            path = key.removesuffix(f".lora_A{end}")
            partner = others.pop(f"{path}.lora_B{end}", None)
            if partner is None:
                raise ValueError(f"{source} holds {key} but no {path}.lora_B{end}")
            pairs[path] = others.pop(key), partner
    if not pairs:
        raise ValueError(f"{source} holds no LoRA values (no key ends in '.lora_A{end}')")
    for key in others:
        if ".lora_" in key:
            raise ValueError(f"{source} holds {key}: plain LoRA layers cannot represent it")
    for path, (lora_A, lora_B) in pairs.items():
        matrices = lora_A.dim() == lora_B.dim() == 2
        if not matrices or 0 in (lora_A.shape[0], lora_B.shape[1]):
            shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
            raise ValueError(f"{source}: {path} has {shapes}, which are no low-rank matrices")
        if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
            raise ValueError(f"{source}: {path} has lora_A {lora_A.dtype}, lora_B {lora_B.dtype}")
    return pairs, others


def take_vectors(
    tensors: dict[str, Tensor], magnitude: str, bias: str
) -> dict[str, dict[str, Tensor]]:
    """Path -> the `magnitude` and `bias` of its LoRA; they leave `tensors`.

    The two names are those that end their keys.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for field, end in (("magnitude", magnitude), ("bias", bias)):
        for key in [key for key in tensors if key.endswith(f".{end}")]:
            found.setdefault(key.removesuffix(f".{end}"), {})[field] = tensors.pop(key)
    return found


def under_all_names(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of parameters that have several names, by those names that `values` lacks."""
    every = dict(model.named_parameters(remove_duplicate=False))
    given = {id(every[key]): value for key, value in values.items() if key in every}
    return {key: given[id(p)] for key, p in every.items() if id(p) in given and key not in values}


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Replace `files` (name -> content) in `directory`, all or none.

    Files that hold their content already are left alone: where only the weights differ, one rename
    replaces the adapter. A process killed between two renames leaves the first file missing.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; an adapter is a directory")
    with locked(directory / next(iter(files))):  # processes of one run may save at once
        changed = {
            directory / name: content
            for name, content in files.items()
            if not _holds(directory / name, content)
        }
        with replacing_all(changed) as asides:
            for aside, content in zip(asides, changed.values(), strict=True):
                aside.write_bytes(content)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
