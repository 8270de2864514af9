"""Tools that check the files of deploy/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prometheus import of_prometheus

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="session")
def promtool(request: pytest.FixtureRequest) -> str:
    """The program promtool."""
    return of_prometheus(request, "promtool")
