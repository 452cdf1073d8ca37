"""Tables of times are what the result files hold: rivals on a CPU, packs, layers in NF4."""

from __future__ import annotations

import itertools

from bench.host import SUBJECTS
from bench.packs import BATCHES, CASES, GRAPH, RATIOS
from bench.records import RESULTS, read

from .test_h200_tables import README, table

KERNELS = (RESULTS.parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
FILE = "cpu-intel-r-xeon-r-processor-family-6-avx512-host.json"
PACKS = "cpu-amd-epyc-family-26-avx512-packs.json"
COLUMNS = ("floor", "full", "peft", "peft-compile", "library-compile")


def expected() -> list[list[str]]:
    """The cells of each row: the setting, our median, and the others over ours."""
    rows = [row for row in read(RESULTS / FILE) if row.get("over_ours") is not None]
    ratios, ours = {}, {}
    for row in rows:
        setting = f"{row['case']}: {row['precision']}, {row['dropout']:g}"
        ratios.setdefault(setting, {})[row["provider"]] = f"{row['over_ours']:.2f}"
        if row["provider"] == "library":
            us = row["median_us"]
            ours[setting] = f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} us"
    cases = list(SUBJECTS)
    settings = sorted(ratios, key=lambda setting: cases.index(setting.split(": ")[0]))
    return [[s, ours[s], *(ratios[s][name] for name in COLUMNS)] for s in settings]


def test_rivals():
    found = expected()
    assert len(found) == 28
    lines = "\n".join(f"| {' | '.join(row)} |" for row in found)
    assert table("case: precision, dropout") == found, f"README should say:\n{lines}"


def test_the_file_is_named():
    assert f"bench/results/{FILE}" in README
    dates = {row["code"] for row in read(RESULTS / FILE) if row.get("over_ours") is not None}
    assert len(dates) == 1, "rows of one table are of one code"


def test_packs():
    rows = {(row["case"], row["batch"], row["provider"]): row for row in read(RESULTS / PACKS)}
    wanted = []
    for case, batch in itertools.product((case.name for case in CASES["cpu"]), BATCHES):
        found = [rows.get((case, batch, name)) for name in ("packed", *RATIOS)]
        ratios = [found[0].get(ratio) for ratio in RATIOS.values()]
        times = [f"{row['median_us'] / 1e3:,.0f}" if row else "not measured" for row in found]
        cells = [f"{ratio:.2f}" if ratio else "not measured" for ratio in ratios]
        wanted.append([case, str(batch), str(found[0]["samples"]), *times, *cells])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert table("model", KERNELS) == wanted, f"docs/kernels.md should say:\n{lines}"


def test_packs_on_an_h200():
    rows = {(r["batch"], r["provider"]): r for r in read(RESULTS / "nvidia-h200-packs.json")}
    wanted = []
    for batch, graph in ((1, ""), (4, ""), (16, ""), (4, GRAPH)):
        ways = [rows[batch, name + graph] for name in ("packed", "one by one", "peft one by one")]
        times = [f"{row['median_us'] / 1e3:.0f}" for row in ways]
        ratios = [f"{ways[0][ratio]:.2f}" for ratio in ("solo_ratio", "peft_ratio")]
        wanted.append([str(batch), "CUDA graph" if graph else "eager", *times, *ratios])
    assert table("examples of each adapter", KERNELS) == wanted


def test_layers_in_nf4():
    rows: dict[str, dict] = {}
    for row in read(RESULTS / "nvidia-h200-quantised.json"):
        rows.setdefault(f"`{row['case']}`, {row['M']:,}", {})[row["provider"]] = row
    wanted = {}
    for name, found in rows.items():
        times = [f"{found[p]['median_us']:,.0f}" for p in ("floor", "peft", "library", "split")]
        memory = [f"{found[p]['peak_bytes'] / 1e6:.0f}" for p in ("library", "split")]
        wanted[name] = [name, *times, ", ".join(memory)]
    assert {row[0]: row for row in table("layer, tokens", KERNELS)} == wanted
