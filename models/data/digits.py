"""Images without a network: scikit-learn's 1,797 handwritten digits of 8 x 8, as a task."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import datasets
import torch
from torch.nn import functional as F

from . import docstrings
from .splits import SPLITS, stratified_split
from .tokens import chosen

SIDE, BRIGHTEST = 8, 16


def build() -> docstrings.Docstrings:
    """The task: split -> rows of (pixels from 0 to 16, class); a repeated image is in one split."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    rows = list(zip(images.astype(int).tolist(), classes.tolist(), strict=True))
    keys = [json.dumps(pixels) for pixels, _ in rows]
    names = stratified_split(keys, [label for _, label in rows], keys)
    splits: dict[str, list[Any]] = {name: [] for name in SPLITS}
    for row, name in zip(rows, names, strict=True):
        splits[name].append(row)
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    labels = tuple(str(digit) for digit in range(10))
    return docstrings.Docstrings(splits, labels, platform.python_version(), digest)


def encode(
    splits: dict[str, datasets.Dataset], size: int, channels: int
) -> tuple[datasets.Dataset, dict[str, datasets.Dataset], dict[str, list[int]]]:
    """As `tokens.encode`: pixel_values [channels, size, size] from -1 to 1 in place of texts."""

    def values_of(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = torch.tensor(batch["pixels"]).view(-1, 1, SIDE, SIDE) / (BRIGHTEST / 2) - 1
        resized = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        values = resized.expand(-1, channels, -1, -1)
        return {"pixel_values": values.numpy().tolist(), "length": [1] * len(images)}

    encoded = {
        name: split.map(values_of, batched=True, remove_columns=["pixels"])
        for name, split in splits.items()
    }
    return chosen(encoded)
