"""Tools that check the files of deploy/."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="session")
def promtool(request: pytest.FixtureRequest) -> str:
    """The program promtool, from Debian's package `prometheus`."""
    found = shutil.which("promtool")
    if found is None:
        missing = "promtool is not installed here (apt-get install prometheus)"
        if request.config.getoption("--require-promtool"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found
