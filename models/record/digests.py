"""Digests of what a run reads: with other rows or another model it would be another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")  # config, tokenizer, weights
_BLOCK = 2**20


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digests(splits: Mapping[str, datasets.Dataset], source: str) -> dict[str, Any]:
    """`data_sha256` of the rows of `splits`, in order, and `model_sha256` of the model's files.

    A model of the hub is named by its commit, which fixes the files.
    """
    rows = hashlib.sha256()
    for name, split in splits.items():
        for row in split:
            rows.update(json.dumps([name, row], sort_keys=True).encode())
    return {"data_sha256": rows.hexdigest(), "model_sha256": _model_digest(source)}


def _model_digest(source: str) -> str | None:
    directory = Path(source)
    if not directory.is_dir():
        return AutoConfig.from_pretrained(source)._commit_hash
    files = sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern)})
    names = "".join(f"{path.name} {file_digest(path)}\n" for path in files if path.is_file())
    return hashlib.sha256(names.encode()).hexdigest()
