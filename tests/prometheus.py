"""Programs of Prometheus, where they are installed."""

from __future__ import annotations

import shutil

import pytest

from tests.programs import is_missing


def of_prometheus(request: pytest.FixtureRequest, name: str) -> str:
    """A program of Debian's package `prometheus`; the test is skipped without it, or fails with --require-promtool."""
    found = shutil.which(name)
    if found is None:
        is_missing(request, name, "prometheus", "--require-promtool")
    return found
