"""The kernel suite on toys: it measures, refuses to time what is wrong, resumes, and is a CLI."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import __main__ as command
from bench import cases, check, kernels, records, table
from bench.providers import Built, Provider, providers

CPU = torch.device("cpu")
ALONE, CONV1D, GROUP = cases.tiny()
EAGER_ROWS = ("floor", "peft", "library", "auto")


@pytest.fixture
def results(tmp_path):
    return records.Results("kernels", CPU, tmp_path)


def rows_of(names, case=ALONE):
    known = providers()
    return kernels.measure(case, [known[name] for name in names], CPU, samples=2)


def broken(how: str) -> Provider:
    """The library's own layer, spoilt in one way."""
    real = providers()["library"]

    def build(case, device):
        built = real.build(case, device)

        def call(x):
            ys = built.call(x)
            if how == "y":
                return tuple(y * 1.01 for y in ys)
            if how == "dx":  # the value of y is right, its gradient is not
                return tuple(y + 0.1 * (x.sum() - x.sum().detach()) for y in ys)
            return tuple(2 * y - z for y, z in zip(ys, built.call(x), strict=True))

        return Built(call, built.projections)

    return dataclasses.replace(real, name=f"broken-{how}", build=build)


@pytest.mark.parametrize("case", cases.tiny(), ids=str)
def test_every_provider_is_right_or_says_why_not(case):
    names = [name for name in providers() if "compile" not in name]
    for row in rows_of(names, case):
        if row["status"] == "unavailable":
            assert row["reason"]
        else:
            assert row["status"] == "timed", row["reason"]
            assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
            assert row["floor_ratio"] > 0


@pytest.mark.parametrize(
    ("how", "case"),
    [("y", CONV1D), ("dx", CONV1D), ("y", ALONE), ("mask", ALONE)],
    ids=["y", "dx", "y-dropout", "two-masks"],
)
def test_a_wrong_provider_is_reported_and_not_timed(results, capsys, how, case):
    status = kernels.suite([(case, [providers()["floor"], broken(how)])], CPU, results, samples=2)
    assert status == 1
    rows = [row for row in results.rows() if row["provider"] == f"broken-{how}"]
    assert rows and all(row["status"] == "wrong" and row["median_us"] is None for row in rows)
    assert all(row["reason"] for row in rows)
    assert "wrong: " in capsys.readouterr().out


def test_a_provider_without_lora_is_wrong():
    floor = providers()["floor"]
    library = providers()["library"].build(CONV1D, CPU)

    def call(x):
        zero = sum(p.sum() for p in library.trained) * 0
        return tuple(y + zero for y in floor_call(x))

    plain = floor.build(CONV1D, CPU)
    floor_call = plain.call
    projections = tuple(
        dataclasses.replace(p, lora_A=q.lora_A, lora_B=q.lora_B)
        for p, q in zip(plain.projections, library.projections, strict=True)
    )
    assert check.check(Built(call, projections), CONV1D, CPU, 2.0).wrong


def test_a_provider_that_raises_is_failed_with_its_reason():
    def build(case, device):
        raise RuntimeError("no such kernel\nsecond line")

    row = kernels.measure(
        ALONE, [dataclasses.replace(providers()["library"], build=build)], CPU, samples=2
    )[0]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no such kernel")


def test_strategies_and_auto_have_rows():
    from lora_kernels import STRATEGIES

    assert {"floor", "peft", "peft-bf16-adapter", "peft-compile", "auto", *STRATEGIES} <= set(
        providers()
    )


def test_triton_is_never_timed_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in (providers()["split"].refuses(ALONE, CPU) or "")


def test_records_have_the_columns_and_say_cpu(results):
    results.add(rows_of(("floor", "auto")))
    text = json.loads(results.path.read_text())
    assert results.path.name.startswith("cpu-")
    for row in text:
        assert set(records.FIELDS["kernels"]) <= set(row)
        assert (row["device"], row["suite"], row["driver"]) == ("cpu", "kernels", None)
        assert row["gpu"].startswith("CPU ")
        assert row["N"] == 16 and row["K"] == 24 and row["dtype"] == "float32"
    assert {row["strategy"] for row in text if row["provider"] == "auto"} == {"library"}


def test_a_run_goes_on_where_it_stopped(results, monkeypatch):
    chosen = [providers()[name] for name in ("floor", "auto")]
    kernels.suite([(ALONE, chosen)], CPU, results, samples=2)
    before = results.rows()
    kernels.suite([(ALONE, chosen), (CONV1D, chosen)], CPU, results, samples=2)
    assert results.rows()[: len(before)] == before
    assert len(results.rows()) == 2 * len(before)
    monkeypatch.setattr(records, "code_digest", lambda: "other")
    records.machine.cache_clear()
    results = records.Results("kernels", CPU, results.path.parent)
    kernels.suite([(ALONE, chosen)], CPU, results, samples=2)
    assert [row["code"] for row in results.rows()].count("other") == len(before)
    records.machine.cache_clear()


def test_a_failed_measurement_is_tried_again(results):
    rows = rows_of(("floor",))
    rows[0] |= {"status": "failed", "reason": "the device was busy"}
    results.add(rows)
    again = records.Results("kernels", CPU, results.path.parent)
    assert [again.has(row) for row in rows] == [False] + [True] * (len(rows) - 1)


def test_a_file_is_written_whole_or_not_at_all(results, monkeypatch):
    results.add(rows_of(("floor",)))
    before = results.path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.add(rows_of(("auto",)))
    assert results.path.read_text() == before
    results.path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        results.rows()


def test_ties_are_printed_as_ties():
    def row(median, noise=0.05):
        return {"median_us": median, "noise": noise}

    assert table.speed_up(row(100), row(104)) == "tie"
    assert table.speed_up(row(100), row(120)) == "1.20"
    assert table.speed_up(row(100), None) == "-"


def test_goals_table_takes_the_worst_case():
    goal = cases.GOALS[2]
    measured = [
        {"case": goal.layers[0], "M": M, "provider": name, "median_us": us, "dtype": "bfloat16"}
        | {"dropout": 0.1, "R": 16, "direction": "forward_backward", "mode": "graph"}
        | {"device": "cuda", "floor_ratio": us / times[0]}
        for M, times in ((2048, (10, 15, 40, 20)), (4096, (20, 25, 90, 50)))
        for name, us in zip(("floor", "auto", "peft", "peft-compile"), times, strict=True)
    ]
    line = table.goals_table(measured).splitlines()[-1]
    assert "1.50 / 1.6" in line and "2.67 / 2.5" in line and "1.33 / 1.3" in line
    assert "- / 1.12" in table.goals_table(measured)


def test_a_device_that_fails_ends_the_run_and_is_told(tmp_path, monkeypatch, capsys):
    def fails(device, dtype, tf32=False):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels.timing, "matrix_rate", fails)
    results = records.Results("kernels", CPU, tmp_path)
    job = (ALONE, [providers()[name] for name in ("floor", "auto")])
    assert kernels.suite([job, job], CPU, results, samples=2) == 1
    rows = results.rows()
    assert {row["status"] for row in rows} == {"failed"} and len(rows) == 4
    assert all("illegal memory access" in row["reason"] for row in rows)
    assert "1 cases left" in capsys.readouterr().out


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there the cases are thousands
    monkeypatch.setattr(cases, "small", lambda: (ALONE,))
    arguments = ["kernels", "--results", str(tmp_path), "--samples", "2", "--providers"]
    assert command.main([*arguments, "auto"]) == 0
    assert "auto" in capsys.readouterr().out
    assert command.main([*arguments, "nobody"]) == 2
    assert "unknown providers ['nobody']" in capsys.readouterr().err
    assert command.main(["kernels", "--list", "--only", "tiny"]) == 0
    assert str(ALONE) in capsys.readouterr().out
