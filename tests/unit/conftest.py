"""Runs to report, and their report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pages import report_page, write_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """See :func:`pages.write_runs`; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return write_runs()


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], heard: pytest.LogCaptureFixture):
    """See :func:`pages.report_page`."""
    return partial(report_page, capsys, heard)
