"""Tables of times on a CPU are what the result files hold: README's rivals, and the packs."""

from __future__ import annotations

from bench.packs import BATCHES, CASES, RATIOS
from bench.records import RESULTS, read

from .test_h200_tables import README, table

KERNELS = (RESULTS.parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
FILE = "cpu-amd-epyc-family-26-avx512-host.json"
COLUMNS = ("floor", "full", "peft", "peft-compile", "library-compile")


def expected() -> list[list[str]]:
    """The cells of each row: the setting, our median, and the others over ours."""
    rows = [row for row in read(RESULTS / FILE) if row.get("over_ours") is not None]
    ratios, ours = {}, {}
    for row in rows:
        setting = f"{row['case']}, {row['precision']}, {row['dropout']:g}"
        ratios.setdefault(setting, {})[row["provider"]] = f"{row['over_ours']:.2f}"
        if row["provider"] == "library":
            us = row["median_us"]
            ours[setting] = f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} us"
    return [[s, ours[s], *(found[name] for name in COLUMNS)] for s, found in ratios.items()]


def test_rivals():
    found = expected()
    assert len(found) == 20
    lines = "\n".join(f"| {' | '.join(row)} |" for row in found)
    assert table("case, precision, dropout") == found, f"README should say:\n{lines}"


def test_the_file_is_named():
    assert f"bench/results/{FILE}" in README
    dates = {row["code"] for row in read(RESULTS / FILE) if row.get("over_ours") is not None}
    assert len(dates) == 1, "rows of one table are of one code"


def test_packs():
    rows: dict[tuple[str, int], list[str]] = {}
    for row in read(RESULTS / FILE.replace("-host", "-packs")):
        assert row["samples"] > 5, "too few to tell"
        cells = rows.setdefault((row["case"], row["batch"]), [row["case"], str(row["batch"])])
        if row["provider"] == "packed":
            ratios = [f"{row[ratio]:.2f}" for ratio in RATIOS.values()]
        cells.append(f"{row['median_us'] / 1e3:,.0f}")
        if row["provider"] == tuple(RATIOS)[-1]:
            cells += ratios
    assert len(rows) == len(CASES) * len(BATCHES)
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows.values())
    assert table("model", KERNELS) == list(rows.values()), f"docs/kernels.md should say:\n{lines}"
