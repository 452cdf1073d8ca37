"""README's tables of the H200 are what its result files hold."""

from __future__ import annotations

import re
from pathlib import Path

from bench.records import RESULTS, read

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def table(first_cell: str, text: str = README) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    raise AssertionError("the table has no end")


def test_layers():
    index = {
        (row["case"], row["M"], row["R"], row["provider"]): row
        for row in read(RESULTS / "nvidia-h200-kernels.json")
        if row["mode"] == "graph"
    }
    rows = table("layer, tokens, rank")
    assert len(rows) == 8
    for first, *cells in rows:
        name, M, R = re.fullmatch(r"`(\S+)`, ([\d,]+), (\d+)", first).groups()
        key = name, int(M.replace(",", "")), int(R)
        ours = index[(*key, "auto")]
        others = [index[(*key, peer)]["median_us"] for peer in ("peft", "peft-compile")]
        found = [f"{ours['median_us']:.0f} us", f"{ours['floor_ratio']:.2f}"]
        found += [f"{other / ours['median_us']:.2f}" for other in others]
        assert cells == found, f"README should say: | {first} | {' | '.join(found)} |"


def test_steps():
    times = {
        (row["model"], row["method"]): f"{row['step_ms']:.1f}"
        for row in read(RESULTS / "nvidia-h200-end-to-end.json")
    }
    lines = README.splitlines()
    header = next(line for line in lines if line.startswith("| step, ms"))
    methods = [cell.strip(" `") for cell in header.strip("|").split("|")[1:]]
    for name, *cells in table("step, ms"):
        found = [times.get((name.strip("`"), method), "not measured") for method in methods]
        assert cells == found, f"README should say: | {name} | {' | '.join(found)} |"
