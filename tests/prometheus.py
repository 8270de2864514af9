"""Programs of Prometheus, where they are installed."""

from __future__ import annotations

import shutil

import pytest


def of_prometheus(request: pytest.FixtureRequest, name: str) -> str:
    """A program of Debian's package `prometheus`; the test is skipped without it, or fails with --require-promtool."""
    found = shutil.which(name)
    if found is None:
        missing = f"{name} is not installed here (apt-get install prometheus)"
        if request.config.getoption("--require-promtool"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found
