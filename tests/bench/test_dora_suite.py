"""`python -m bench dora`: every provider is judged before it is timed."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as command
from bench import dora, records, variants
from lora_kernels.layers import dora as layers

SOME = ("floor", "peft", "ours", "plain")  # without a compiler
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(dora, "SUITE", dora.SUITE._replace(providers=SOME))
    return ["dora", "--tiny", "--samples", "2", "--results", str(tmp_path)]


def rows_in(folder):
    (path,) = folder.iterdir()
    return {row["provider"]: row for row in records.read(path)}


def test_all_are_right_and_timed(arguments, tmp_path, capsys):
    assert command.main(arguments) == 0
    rows = rows_in(tmp_path)
    assert tuple(rows) == SOME
    assert {row["status"] for row in rows.values()} == {"timed"}
    assert all(row["median_us"] > 0 and row["floor_ratio"] > 0 for row in rows.values())
    assert all(0 < rows[name]["error"] < 0.01 for name in SOME[1:])
    assert "x the frozen layer" in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", ["scale", "gain"])
def test_a_wrong_layer_is_not_timed(arguments, tmp_path, monkeypatch, spoilt):
    if spoilt == "scale":
        monkeypatch.setattr(dora, "ALPHA_PER_RANK", 3)  # another layer is asked for
    else:
        monkeypatch.setattr(layers, "row_norms", lambda weights, scale: torch.tensor(1.0))
    assert command.main(arguments) == 1
    rows = rows_in(tmp_path)
    assert rows["ours"]["status"] == rows["plain"]["status"] == "wrong"
    assert (rows["peft"]["status"] == "wrong") == (spoilt == "scale")
    assert "median_us" not in rows["ours"] or rows["ours"]["median_us"] is None


def test_plain_leaves_the_kernels_out(monkeypatch):
    asked = []
    monkeypatch.setattr(layers, "launches_gain", lambda *_: asked.append(1))
    for name, count in (("ours", 1), ("plain", 0)):
        asked.clear()
        built = dora.build(name, variants.TOY, torch.device("cpu"), 0.0)
        built.call(torch.randn(4, 128, dtype=torch.bfloat16))
        assert len(asked) == count, name
