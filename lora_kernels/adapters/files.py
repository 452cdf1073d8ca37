"""Reading and writing the files of an adapter, whatever they mean for a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..algebra.columns import Ranges


@dataclass(frozen=True)
class LayerValues:
    """lora_A [R, K] and lora_B [N, R] of one layer; alpha is None where the file does not say.

    With `columns`, LoRA on those alone, unfolded: R is the rank summed over them (see `columns`).
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float | None
    columns: Ranges | None = None


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter file, by the paths of the base model.

    `train` are the paths of modules saved in full, `others` their values by key of the model's
    state dict.
    """

    source: Path
    layers: Mapping[str, LayerValues]
    others: Mapping[str, Tensor]
    train: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor; pickles with weights_only=True, and never where safetensors are expected."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            with path.open("rb") as file:
                is_pickle = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
            what = (
                "a pickle under the name of a safetensors file"
                if is_pickle
                else "no safetensors file"
            )
            raise ValueError(f"{path} is {what}: not read ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what the unpickler raises on other bytes is of many kinds
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no file of plain tensors: {why}") from None
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(f"{path} holds no state dict: names and tensors")
    return content


def split_lora(
    tensors: Mapping[str, Tensor], end: str, source: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """(path -> (lora_A, lora_B), everything else)."""
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
        if lora_A.dim() != 2 or lora_B.dim() != 2 or not lora_A.shape[0]:
            shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
            raise ValueError(f"{source}: {path} has {shapes}, which are no low-rank matrices")
    return pairs, others


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Replace `files` (name -> content) in `directory`, all or none.

    Everything is on disk under other names first. Where one file differs, one rename replaces it.
    Otherwise, if a replacement fails, the old files come back; a process killed between two renames
    leaves the first file missing, which a reader reports: never an old file beside a new one.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; an adapter is a directory")
    directory.mkdir(parents=True, exist_ok=True)
    files = {n: content for n, content in files.items() if not _holds(directory / n, content)}
    if not files:
        return
    new = {name: directory / f".{name}.{os.getpid()}.new" for name in files}
    old = {name: directory / f".{name}.{os.getpid()}.old" for name in files}
    try:
        for name, content in files.items():
            with new[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        first, *others = files
        for name in files if others else ():
            with suppress(FileNotFoundError):
                os.replace(directory / name, old[name])
        for name in (*others, first):
            os.replace(new[name], directory / name)
    except BaseException:
        for name in files:
            with suppress(FileNotFoundError):
                os.replace(old[name], directory / name)
        raise
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
