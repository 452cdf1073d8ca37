"""Pictures of measured rows: PNG files, one set for each device, readable without colour.

Providers differ by hatch and by marker, and bars carry their number. Each picture names its device
and the command that measured it. One without rows is not made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .records import RESULTS, Row, every_row, slug

Rows = Sequence[Row]
# (fill, hatch, marker) by place in the list of providers.
STYLES = (
    ("#ffffff", "", "o"),
    ("#bdbdbd", "", "s"),
    ("#ffffff", "///", "^"),
    ("#737373", "", "D"),
    ("#ffffff", "...", "v"),
    ("#d9d9d9", "xx", "P"),
    ("#252525", "", "X"),
    ("#ffffff", "\\\\\\", "<"),
    ("#969696", "++", ">"),
    ("#ffffff", "oo", "*"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench plots`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: --results)")


def run(arguments: argparse.Namespace) -> int:
    """Draw every picture that has rows; 1 if none has. ValueError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install matplotlib")
    output = arguments.output or arguments.results
    output.mkdir(parents=True, exist_ok=True)
    made = []
    for suite, draw in PICTURES:
        rows = [r for r in every_row(suite, arguments.results) if r["status"] == "timed"]
        for gpu in dict.fromkeys(row["gpu"] for row in rows):
            path = draw([row for row in rows if row["gpu"] == gpu], gpu, output)
            made += [path] if path else []
    print("\n".join(map(str, made)) if made else "nothing was measured: no picture")
    return 0 if made else 1


def _figure(width: float, panels: int = 1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width, 4.2), squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#e0e0e0", linewidth=0.6)
    return figure, axes[0]


def _save(figure: Any, name: str, gpu: str, command: str, output: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.text(0.005, 0.005, f"{gpu}   python -m bench {command}", fontsize=7, color="#404040")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path = output / f"{slug(gpu)}-{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _bars(axis: Any, groups: list[str], series: dict[str, list[float | None]], digits: int) -> None:
    """Bars side by side; a missing value leaves its place empty."""
    width = 0.84 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        fill, hatch, _ = STYLES[i % len(STYLES)]
        places = [g - 0.42 + (i + 0.5) * width for g in range(len(groups))]
        shown = [(place, v) for place, v in zip(places, values, strict=True) if v is not None]
        bars = axis.bar(
            [place for place, _ in shown], [v for _, v in shown], width,
            label=name, color=fill, hatch=hatch, edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        axis.bar_label(bars, fmt=f"%.{digits}f", fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right", fontsize=8)
    axis.margins(y=0.18)


def _usual(rows: Rows) -> Rows:
    """Rows of forward + backward in the setting of the goals; a value not measured is left open."""
    rows = [row for row in rows if row["direction"] == "forward_backward"]
    for wanted in ({"mode": "graph"}, {"dtype": "bfloat16"}, {"dropout": 0.1}, {"R": 16}):
        ((name, value),) = wanted.items()
        rows = [row for row in rows if row[name] == value] or rows
    return rows


def _setting(row: Row) -> str:
    return f"{row['dtype']}, R = {row['R']}, dropout {row['dropout']}, {row['mode']}"


def overhead(rows: Rows, gpu: str, output: Path) -> Path | None:
    """Time over the floor's, by layer and provider, at the most common M."""
    rows = [row for row in _usual(rows) if row.get("floor_ratio")]
    if not rows:
        return None
    tokens = [row["M"] for row in rows]
    M = max(sorted(set(tokens)), key=tokens.count)
    rows = [row for row in rows if row["M"] == M]
    layers = list(dict.fromkeys(row["case"] for row in rows))
    names = [n for n in dict.fromkeys(row["provider"] for row in rows) if n != "floor"]
    # Where settings differ, the first row's is shown, as the title says.
    ratios = {(r["provider"], r["case"]): r["floor_ratio"] for r in reversed(rows)}
    series = {name: [ratios.get((name, layer)) for layer in layers] for name in names}
    figure, (axis,) = _figure(max(7.0, 1.6 + 0.16 * len(names) * len(layers)))
    _bars(axis, layers, series, 2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_ylabel("time / frozen layer's time")
    axis.set_title(f"Forward + backward over the floor, M = {M}, {_setting(rows[0])}", fontsize=9)
    axis.legend(fontsize=7, ncols=4, frameon=False)
    return _save(figure, "overhead", gpu, "kernels", output)


def speed_up(rows: Rows, gpu: str, output: Path) -> Path | None:
    """Eager PEFT's time over each provider's, by M; one panel a layer that has several M."""
    rows = _usual(rows)
    times = {(r["case"], r["provider"], r["M"]): r["median_us"] for r in rows}
    layers = [
        layer
        for layer in dict.fromkeys(r["case"] for r in rows)
        if len({M for case, name, M in times if (case, name) == (layer, "peft")}) > 1
    ][:4]
    if not layers:
        return None
    figure, axes = _figure(max(6.0, 3.4 * len(layers)), len(layers))
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n not in ("peft", "floor")]
    for axis, layer in zip(axes, layers, strict=True):
        for i, name in enumerate(names):
            tokens = sorted(M for case, n, M in times if (case, n) == (layer, name))
            tokens = [M for M in tokens if (layer, "peft", M) in times]
            ratios = [times[layer, "peft", M] / times[layer, name, M] for M in tokens]
            marker = STYLES[i % len(STYLES)][2]
            axis.plot(tokens, ratios, marker=marker, color="black", linewidth=0.8, label=name)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("M")
        axis.set_title(layer, fontsize=9)
    axes[0].set_ylabel(f"PEFT's time / time\n{_setting(rows[0])}", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
    return _save(figure, "speed-up", gpu, "kernels", output)


def end_to_end(rows: Rows, gpu: str, output: Path) -> Path | None:
    """Samples/s and peak memory by model and method, in the precision with the most rows."""
    precisions = [row["precision"] for row in rows]
    precision = max(dict.fromkeys(precisions), key=precisions.count)
    rows = [row for row in rows if row["precision"] == precision]
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = [("samples_per_second", "samples / s", 1.0)]
    if any(row["peak_memory_bytes"] for row in rows):
        panels.append(("peak_memory_bytes", "peak memory, GiB", 2.0**30))
    figure, axes = _figure(6.5 * len(panels), len(panels))
    for axis, (column, label, unit) in zip(axes, panels, strict=True):
        cells = {(r["model"], r["method"]): r[column] / unit for r in rows if r[column]}
        series = {method: [cells.get((m, method)) for m in models] for method in methods}
        _bars(axis, models, series, 1)
        axis.set_ylabel(label)
    axes[0].set_title(f"Fine-tuning steps, {precision}", fontsize=9)
    axes[0].legend(fontsize=7, ncols=3, frameon=False)
    return _save(figure, "end-to-end", gpu, "end_to_end", output)


def host(rows: Rows, gpu: str, output: Path) -> Path | None:
    """Time of forward + backward on the CPU, by setting and provider."""
    rows = [row for row in rows if row["case"] in ("linears", "encoder")]
    if not rows:
        return None
    settings = [(row["case"], row["precision"], row["dropout"]) for row in rows]
    keys = list(dict.fromkeys(settings))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cells = {(k, row["provider"]): row["median_us"] for k, row in zip(settings, rows, strict=True)}
    series = {n: [cells[k, n] / 1e3 if (k, n) in cells else None for k in keys] for n in names}
    figure, (axis,) = _figure(9.0)
    _bars(axis, [f"{case}\n{how}, p = {p}" for case, how, p in keys], series, 0)
    axis.set_ylabel("ms, forward + backward")
    axis.set_title(f"RoBERTa-base layers on a CPU, {rows[0].get('threads')} thread(s)", fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    return _save(figure, "host", gpu, "host", output)


Picture = Callable[[Rows, str, Path], Path | None]
PICTURES: tuple[tuple[str, Picture], ...] = (
    ("kernels", overhead),
    ("kernels", speed_up),
    ("end_to_end", end_to_end),
    ("host", host),
)
