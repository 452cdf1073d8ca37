"""The steps of `make gpu`: shares of the time, commands, and a failure that stops nothing."""

from __future__ import annotations

import pytest

from bench import on_gpu
from bench.on_gpu import STEPS, Step, command_of


def test_the_shares_are_the_whole_time():
    assert sum(step.share for step in STEPS) == 100


def test_a_step_is_interrupted_at_the_end_of_its_share():
    command = command_of(STEPS[2], minutes=50, workers=3)
    assert command[:6] == ["timeout", "-s", "INT", "-k", "30", "360"]
    assert command[-2:] == ["--seconds", "300"], "the suite ends by itself before that"
    assert "3" in command_of(STEPS[0], minutes=50, workers=3)


def test_what_fails_or_is_missing_stops_nothing(monkeypatch, capsys):
    steps = (
        Step("fails", 50, ("-c", "raise SystemExit(3)")),
        Step("hangs", 1, ("-c", "import time; time.sleep(60)")),
        Step("is missing", 1, ("-c", ""), under=("no-such-program",)),
        Step("works", 50, ("-c", "")),
    )
    monkeypatch.setattr(on_gpu, "STEPS", steps)
    on_gpu.main(["--minutes", "2"])
    told = dict(
        line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines() if line[0] != "+"
    )
    told = {name.strip(): end.strip() for name, end in told.items()}
    assert told == {
        "fails": "failed (3)", "hangs": "out of time", "is missing": "no no-such-program here",
        "works": "done",
    }  # fmt: skip


@pytest.mark.parametrize("step", [step for step in STEPS if "pytest" in step.command])
def test_the_tests_named_exist(step, pytestconfig):
    for word in step.command:
        assert not word.startswith("tests/") or (pytestconfig.rootpath / word).is_file(), word
