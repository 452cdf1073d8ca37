"""Fixtures of the tests of captured steps."""

from __future__ import annotations

import pytest

from tests.support.graphs import Recorder, recording


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return recording(monkeypatch)
