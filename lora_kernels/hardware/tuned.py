"""The tuned tables: what `lora-kernels tune` measured on this machine, one JSON file for each GPU.

A file is named after the card, the Triton release and a digest of the kernels' sources, so that a
table is never applied to kernels other than those it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ..durable import locked, replacing
from .tiles import KERNELS, Tile, tiles_for

FORMAT = 1
KERNEL_SOURCES = Path(__file__).parent.parent / "kernels"

# What taking JSON of another form for a table or a row raises.
_WRONG_CONTENT = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


class Tuned(NamedTuple):
    """A measured row: the fastest strategy of a problem, the tiles of its kernels, and its time.

    `median_us` is the time of forward + backward, in microseconds.
    """

    strategy: str
    tiles: Mapping[str, Tile]
    median_us: float


def kernel_hash(sources: Path = KERNEL_SOURCES) -> str:
    """A digest of the kernels' sources: 12 hexadecimal digits.

    Raises RuntimeError where no kernel file is found: a digest of nothing would fit every kernel.
    """
    files = sorted(sources.glob("*.py"))
    if not files:
        raise RuntimeError(f"no kernel sources in {sources}: tuned tables cannot be told apart")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table_path(gpu: str) -> Path:
    """The file of a GPU's table: in $LORA_KERNELS_CACHE, else in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("LORA_KERNELS_CACHE") or Path(cache, "lora_kernels")
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()
    return Path(folder, f"{name}-triton{triton}-{kernel_hash()}.json")


@lru_cache(maxsize=8)
def load_table(path: Path) -> Mapping[str, Tuned]:
    """Problem key -> measured row, read once a process; empty where there is no table.

    What cannot have been measured, a row or the whole table, is ignored with one warning.
    """
    rows, ignored = _read(path)
    if ignored:
        warnings.warn("; ".join(ignored), stacklevel=2)
    return rows


def store_rows(path: Path, gpu: str, rows: Mapping[str, Tuned]) -> None:
    """Add rows to a table, each in place of the old one of its key.

    Processes that store at the same time take turns, so no row is lost. What `load_table` ignores
    is dropped.
    """
    with locked(path):
        merged = {**_read(path)[0], **rows}
        content: dict[str, Any] = {"format": FORMAT, "gpu": gpu, "kernels": kernel_hash()}
        content["rows"] = {
            key: {"strategy": r.strategy, "tiles": dict(r.tiles), "median_us": r.median_us}
            for key, r in sorted(merged.items())
        }
        with replacing(path) as aside:
            aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    load_table.cache_clear()


def _read(path: Path) -> tuple[dict[str, Tuned], list[str]]:
    """The rows of a table, and what of it is ignored, with the reason."""
    rows: dict[str, Tuned] = {}
    ignored: list[str] = []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        for key, row in content["rows"].items():
            try:
                rows[key] = _row(row)
            except _WRONG_CONTENT as error:
                ignored.append(f"row {key} of the tuning table {path} is ignored: {error!r}")
    except FileNotFoundError:
        pass
    except (OSError, *_WRONG_CONTENT) as error:
        ignored.append(f"the tuning table {path} is ignored: {error!r}")
    return rows, ignored


def _row(row: Mapping[str, Any]) -> Tuned:
    if unknown := set(row["tiles"]) - set(KERNELS):
        raise ValueError(f"unknown kernels {sorted(unknown)}")
    tiles = {kernel: Tile(*sizes) for kernel, sizes in row["tiles"].items()}
    shipped = tiles_for("any", 2, 16, tf32=False)
    for kernel, tile in tiles.items():
        if not _is_possible(tile, getattr(shipped, kernel)):
            raise ValueError(f"{kernel} has {tile}")
    median_us = float(row["median_us"])
    if not 0 < median_us < math.inf:
        raise ValueError(f"a time of {median_us} us")
    return Tuned(str(row["strategy"]), tiles, median_us)


def _is_possible(tile: Tile, shipped: Tile) -> bool:
    """Whether sizes and warps are powers of two; a size that the kernel does not use may be 0."""
    used = [value for value, default in zip(tile[:4], shipped[:4], strict=True) if value or default]
    integers = all(type(value) is int for value in tile)
    return integers and tile.stages > 0 and all(v > 0 and v & (v - 1) == 0 for v in used)
