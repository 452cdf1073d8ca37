"""The tuned table: what `lora-kernels tune` measured on this machine's card, one JSON file a GPU.

The file is named after the card, the Triton release and a digest of the kernels' sources, so that a
table is never applied to other kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from .tiles import KERNELS, Tile

FORMAT = 1
KERNEL_SOURCES = Path(__file__).parent.parent / "kernels"


class Tuned(NamedTuple):
    """A measured row: the fastest strategy of a problem, its tiles, and its time."""

    strategy: str
    tiles: Mapping[str, Tile]
    median_us: float


def kernel_hash(sources: Path = KERNEL_SOURCES) -> str:
    """A digest of the kernels' sources: a table that was measured on other kernels is not applied.

    RuntimeError where no kernel file is found: a digest of nothing would fit every kernel.
    """
    files = sorted(sources.glob("*.py"))
    if not files:
        raise RuntimeError(f"no kernel sources in {sources}: tuned tables cannot be told apart")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table_path(gpu: str) -> Path:
    """Where the table of a GPU lies: under $LORA_KERNELS_CACHE, else the user's cache folder."""
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
    """Problem key -> measured row; empty without a table. A corrupt one is ignored, warned once."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"the tuning table {path} is ignored: {error!r}", stacklevel=2)
        return {}


def _parse(text: str) -> dict[str, Tuned]:
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, not {FORMAT}")
    rows = {}
    for key, row in content["rows"].items():
        tiles = {kernel: Tile(*(int(v) for v in tile)) for kernel, tile in row["tiles"].items()}
        if unknown := set(tiles) - set(KERNELS):
            raise ValueError(f"unknown kernels {sorted(unknown)}")
        rows[key] = Tuned(str(row["strategy"]), tiles, float(row["median_us"]))
    return rows


def store_rows(path: Path, gpu: str, rows: Mapping[str, Tuned]) -> None:
    """Add rows to a table: written aside and renamed, one writer at a time, nobody's rows lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        try:
            merged = {**_parse(path.read_text(encoding="utf-8")), **rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            merged = dict(rows)
        content: dict[str, Any] = {"format": FORMAT, "gpu": gpu, "kernels": kernel_hash()}
        content["rows"] = {
            key: {"strategy": r.strategy, "tiles": dict(r.tiles), "median_us": r.median_us}
            for key, r in sorted(merged.items())
        }
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    load_table.cache_clear()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows, where Triton has no wheels either
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
